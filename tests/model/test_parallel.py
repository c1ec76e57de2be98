"""Tensor and expert parallel: the same bits for any number of ranks, from the slices that each of them reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact_values import convert, dsv4
from ranks import run_ranks, torchrun
from safetensors.torch import load_file
from tiny import flipped

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import UsageError
from dsv4.model import loading
from dsv4.model.config import Config
from dsv4.model.parallel import TensorParallelGroup, check_divisible
from dsv4.model.reading.matrices import read_matrix, read_vector
from dsv4.model.weight_store import is_matrix

# Four groups of heads, a quarter of hidden_size that ends inside a block of 128 rows, a hash layer, both compressors,
# an MTP block. Four ranks have ten heads each, no multiple of the four that a kernel computes at once.
FOUR = Geometry(hidden_size=320, compress_ratios=(4, 128, 0), o_groups=4, num_attention_heads=40, index_n_heads=4)
TOKENS = ",".join(str(7 * i % 64) for i in range(1, 141))  # one block of 128 and the beginning of another


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "hf"
    make_checkpoint(path, geometry=FOUR)
    return path


@pytest.fixture(scope="module")
def rank_files(folder: Path) -> Path:
    path = folder.parent / "mp"
    convert(folder, path, "--layout", "mp", "--model-parallel", "2")
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Path]:
    """Logits of a single process, with and without the simulated quantizations."""
    files = {}
    for option in ("", "--no-simulation"):
        files[option] = folder.parent / f"expected{option}.safetensors"
        options = ["--logits", files[option], "--prefill", "137", *filter(None, [option])]
        assert dsv4("run", folder, "--tokens", TOKENS, *options)[0] == 0
    return files


def same_bits(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    assert {"logits", "mtp_logits"} <= a.keys() == b.keys()
    return all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in ("logits", "mtp_logits"))


class TestSameBits:
    """Not within a tolerance: no sum is cut in two, so there is nothing that a tolerance could excuse."""

    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("option", ["", "--no-simulation"])
    @pytest.mark.slow
    def test_of_logits(self, count: int, option: str, folder: Path, expected: dict[str, Path], tmp_path: Path) -> None:
        options = ["--tokens", TOKENS, "--logits", "out.safetensors", "--prefill", "137", *filter(None, [option])]
        ended = run_ranks(count, tmp_path, "run", folder, *options)
        assert ended.codes == [0] * count, ended.err
        assert same_bits(tmp_path / "out.safetensors", expected[option])
        assert "wrote" in ended.err[0] and not any(ended.err[1:] + ended.out)

    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.slow
    def test_of_rank_files(self, count: int, rank_files: Path, expected: dict[str, Path], tmp_path: Path) -> None:
        """Files of two ranks, run by one, two and four: the bits do not depend on how the files are cut."""
        options = ["--tokens", TOKENS, "--logits", "out.safetensors", "--prefill", "137"]
        ended = run_ranks(count, tmp_path, "run", rank_files, *options)
        assert ended.codes == [0] * count, ended.err
        assert same_bits(tmp_path / "out.safetensors", expected[""])

    @pytest.mark.slow
    def test_of_what_little_memory_reads_again(self, folder: Path, expected: dict[str, Path], tmp_path: Path) -> None:
        options = ["--tokens", TOKENS, "--logits", "out.safetensors", "--prefill", "137"]
        ended = run_ranks(2, tmp_path, "run", folder, *options, weights_bytes=1_500_000)
        assert ended.codes == [0, 0], ended.err
        assert same_bits(tmp_path / "out.safetensors", expected[""])

    @pytest.mark.slow
    def test_of_the_trace(self, folder: Path, tmp_path: Path) -> None:
        options = ["--tokens", "1,2,3,4,5", "--temperature", "0", "--max-new-tokens", "3", "--trace"]
        code, out, _ = dsv4("run", folder, *options, tmp_path / "one.jsonl")
        ended = run_ranks(4, tmp_path, "run", folder, *options, "four.jsonl")
        assert code == 0 and ended.codes == [0] * 4 and ended.out == [out, "", "", ""]
        assert (tmp_path / "four.jsonl").read_text() == (tmp_path / "one.jsonl").read_text() != ""


class TestAnswers:
    @pytest.mark.slow
    def test_greedy_under_torchrun(self, folder: Path) -> None:
        options = ["--tokens", "1,2,3,4,5", "--temperature", "0", "--max-new-tokens", "12", "--mtp"]
        code, out, _ = dsv4("run", folder, *options)
        ended = torchrun(2, "run", folder, *options)
        assert code == 0 and ended.returncode == 0, ended.stderr
        assert ended.stdout == out and out.count(",") >= 3

    @pytest.mark.slow
    def test_sampled_with_one_seed_for_all(self, folder: Path, tmp_path: Path) -> None:
        """Ranks that drew different tokens would wait for each other's numbers, or compute nonsense."""
        (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
        options = ["--file", tmp_path / "prompts.txt", "--max-new-tokens", "6", "--json"]
        ended = run_ranks(2, tmp_path, "run", folder, *options)
        assert ended.codes == [0, 0] and not ended.out[1], ended.err
        found = json.loads(ended.out[0])
        code, out, _ = dsv4("run", folder, *options, "--seed", found["seed"])
        assert code == 0 and json.loads(out)["answers"] == found["answers"]

    @pytest.mark.slow
    def test_compare(self, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        make_checkpoint(other, geometry=FOUR, seed=1)
        for one, code in ((folder, 0), (other, 1)):
            options = ["--tokens", "1,2,3", "--compare", one, "--report", "page.html"]
            ended = run_ranks(2, tmp_path, "run", folder, *options)
            assert ended.codes == [code, code], ended.err
            assert ("BIT-EQUAL" in ended.out[0]) == (code == 0) and not ended.out[1]
            assert (tmp_path / "page.html").read_text()

    @pytest.mark.slow
    def test_compare_with_little_memory(self, folder: Path, tmp_path: Path) -> None:
        """2 MB are less than a rank's share of the weights."""
        other = flipped(folder, tmp_path / "other", "layers.1.ffn.experts.5.w2.weight")
        for one, code in ((folder, 0), (other, 1)):
            options = ["--tokens", TOKENS, "--prefill", "137", "--compare", one]
            expected = dsv4("run", folder, *options)
            ended = run_ranks(2, tmp_path, "run", folder, *options, weights_bytes=2_000_000)
            assert ended.codes == [code, code] == [expected[0]] * 2, ended.err
            assert ended.out == [expected[1], ""] and not ended.err[1]
            assert ended.err[0].count("differs at position") == code

    @pytest.mark.parametrize(
        ("options", "word"), [([], "chat"), (["--tokens", "1", "--device", "cuda:0"], "a device each: --device cuda")]
    )
    def test_wrong_usage(self, options: list[str], word: str, folder: Path, tmp_path: Path) -> None:
        ended = run_ranks(2, tmp_path, "run", folder, *options)
        assert 2 in ended.codes and set(ended.codes) <= {2, 143} and word in ended.err[ended.codes.index(2)]

    @pytest.mark.slow
    @pytest.mark.parametrize("dies", [0, 1])
    def test_a_killed_rank_is_an_error(self, dies: int, folder: Path, tmp_path: Path) -> None:
        kill = {dies: ("dsv4.model.evaluate.logits", "write_logits" if dies == 0 else "teacher_forced", 1)}
        ended = run_ranks(2, tmp_path, "run", folder, "--tokens", "1,2", "--logits", "out.safetensors", kill=kill)
        assert ended.codes[dies] == -9 and ended.codes[1 - dies] in (4, 143), ended.err
        assert not (tmp_path / "out.safetensors").exists() and "bug" not in ended.err[1 - dies]


class TestSlices:
    @pytest.mark.parametrize("count", [2, 4])
    @pytest.mark.fast_cases(1)
    def test_put_together_they_are_the_whole(self, count: int, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        _, config, _, weights = loading.check_loadable(checkpoint)
        groups, split = [TensorParallelGroup(i, count) for i in range(count)], 0
        for name, weight in weights.items():
            shape = weight.logical_shape
            holders = [group for group in groups if group.holds(name, config)]
            assert len(holders) == (1 if ".experts." in name else count)
            rows = [group.rows(name, shape) for group in holders]
            if rows[0] is None:
                continue
            split += 1
            if is_matrix(shape, name):
                parts = [read_matrix(checkpoint, weight, r) for r in rows]
                whole = read_matrix(checkpoint, weight)
                found = torch.cat([part.decode() for part in parts]), whole.decode()
                assert sum(part.values.nbytes for part in parts) == whole.values.nbytes
            else:
                found = (
                    torch.cat([read_vector(checkpoint, config, weight, r) for r in rows]),
                    read_vector(checkpoint, config, weight),
                )
            assert torch.equal(*(value.view(torch.int32) for value in found)), name
        assert split > 20

    def test_a_rank_reads_its_own_only(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = Checkpoint.open(folder)
        read: dict[str, int] = {}
        right = Checkpoint.read_into

        def counted(self: Checkpoint, name: str, buffer: memoryview, start: int = 0) -> None:
            right(self, name, buffer, start)
            read[name] = read.get(name, 0) + len(buffer)

        monkeypatch.setattr(Checkpoint, "read_into", counted)
        loading.load(checkpoint, group=TensorParallelGroup(1, 4))
        config = Config.from_json(checkpoint.config)
        mine = TensorParallelGroup(1, 4).experts(config)
        for name, info in checkpoint.tensors.items():
            if ".experts." in name:
                assert (name in read) == (int(name.split(".experts.")[1].split(".")[0]) in mine), name
            elif name.endswith(".weight") and TensorParallelGroup(1, 4).rows(name, info.shape):
                assert read[name] * 4 == info.nbytes, name
            elif name.endswith(".weight"):
                assert read[name] == info.nbytes, name

    @pytest.mark.parametrize("count", [3, 5, 8])
    def test_what_cannot_be_shared_equally(self, count: int, folder: Path) -> None:
        config = Config.from_json(Checkpoint.open(folder).config)
        with pytest.raises(UsageError, match="equally") as error:
            check_divisible(config, TensorParallelGroup(0, count))
        assert "o_groups = 4" in str(error.value) and "1, 2, 4 ranks" in error.value.hint

    def test_index_heads_that_cannot_be_shared_equally(self, folder: Path) -> None:
        config = replace(Config.from_json(Checkpoint.open(folder).config), index_n_heads=3)
        with pytest.raises(UsageError, match="2 ranks cannot share index_n_heads = 3 equally") as error:
            check_divisible(config, TensorParallelGroup(0, 2))
        assert error.value.hint == "This checkpoint can be run by 1 ranks."

    @pytest.mark.slow
    def test_is_said_by_the_command(self, folder: Path, tmp_path: Path) -> None:
        ended = run_ranks(3, tmp_path, "run", folder, "--tokens", "1")
        assert 2 in ended.codes and "o_groups = 4" in ended.err[ended.codes.index(2)]
