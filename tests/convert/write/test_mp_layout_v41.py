"""`--layout mp` of V4.1: n-gram tables that no number of ranks divides, experts counted by stack, blocks of 32."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_converter
import torch
from exact_values import (
    convert,
    dsv4,
    edit_config,
    edit_tensors,
    experts,
    read_json,
    tensors_of,
)
from ranks import run_ranks
from raw_safetensors import Raw, Tensors, raw, read_file, write_file

from dsv4.convert import verify
from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.checkpoint.rank_layout import Slice, mp_slice
from dsv4.convert.synthetic.checkpoint import V41Geometry, make_checkpoint
from dsv4.model import load

# Three primes from 211 on make the rows of a table, of an odd number. Draft stages have other experts.
SMALL = V41Geometry(
    hidden_size=64, compress_ratios=(0, 0, 2, 1, 0, 0, 0), kv_source_layer_ids=(2, 3), index_source_layer_ids=(2, 3),
    candidate_source_layer_id=3, candidate_topk_blocks=3, moe_intermediate_size=32, n_routed_experts=8, o_groups=4,
    o_lora_rank=32, q_lora_rank=32, dspark_target_layer_ids=(1, 2, 3), engram_layer_ids=(1, 2), engram_n_heads=1,
    engram_num_embeddings=(211 + 223 + 227, 229 + 233 + 239),
)  # fmt: skip
MP = ("--layout", "mp", "--model-parallel")
TABLE, SCALE = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"
LAST = "model3-mp4.safetensors"  # of rank 3 of 4, where what fills the tables up is


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mp_v41") / "release", geometry=SMALL)


@pytest.fixture(scope="module")
def made(release: Path) -> Callable[..., Path]:
    """The rank files of a conversion, made once."""

    def rank_files(ranks: int, to: str = "same") -> Path:
        folder = release.parent / f"{to}{ranks}"
        if not folder.exists():
            convert(release, folder, *MP, ranks, "--to", to)
        return folder

    return rank_files


@pytest.fixture
def copy(made: Callable[..., Path], tmp_path: Path) -> Path:
    """Rank files to damage, without the manifest, whose hashes would tell."""
    return Path(shutil.copytree(made(4), tmp_path / "copy", ignore=shutil.ignore_patterns("dsv4.json")))


def without_negative_zero(tensor: Raw) -> Raw:
    codes = tensor.array()
    return tensor.like(np.where(codes == 0x80, 0, codes).astype(np.uint8))


@pytest.mark.parametrize("to", ["same", "fp8"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_the_reference_converter(
    ranks: int, to: str, release: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    reference_converter.convert(release, tmp_path, ranks, "fp4" if to == "same" else "fp8", block=32)
    for theirs in tmp_path.glob("*.safetensors"):
        expected, found = read_file(theirs), read_file(made(ranks, to) / theirs.name)
        assert found.keys() == expected.keys()
        cast = experts(found) if to == "fp8" else []
        for name, tensor in found.items():
            assert (without_negative_zero(tensor) if name in cast else tensor) == expected[name], name


@pytest.mark.parametrize("to", ["same", "fp8"])
def test_the_engines_config(to: str, release: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """The released one, or made from config.json; not every release has it."""
    bare = shutil.copytree(release, tmp_path / "bare", ignore=shutil.ignore_patterns("inference"))
    convert(bare, tmp_path / "out", *MP, 2, "--to", to)
    expected = read_json(release / "inference" / "config.json")
    if to == "fp8":
        del expected["expert_dtype"]
    assert read_json(tmp_path / "out" / "config.json") == read_json(made(2, to) / "config.json") == expected


def test_parts_make_the_same_files(release: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    for part in ("1/3", "3/3", "2/3"):
        convert(release, tmp_path / "out", *MP, 4, "--to", "same", "--part", part)
    convert(release, tmp_path / "out", *MP, 4, "--to", "same", "--finish")
    for file in made(4).iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("to", ["same", "fp8"])
def test_verify(to: str, release: Path, made: Callable[..., Path]) -> None:
    """Every value equal to the release's, and each folder sound by itself."""
    for ranks in (2, 4):
        found = verify(release, made(ranks, to))
        assert found.exit_code == 0 and {result.status for result in found.results} <= {"=", "≈"}
        assert [result.status for result in found.results if result.name in (TABLE, SCALE)] == ["=", "="]
        assert verify(made(ranks, to)).exit_code == 0


def test_other_ranks(release: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """From 4 rank files to 2: the same files as from the release."""
    convert(made(4), tmp_path / "mp2", *MP, 2, "--to", "same")
    for file in made(2).glob("*.safetensors"):
        assert (tmp_path / "mp2" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_release_comes_back(ranks: int, release: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    convert(made(ranks), tmp_path / "back", "--to", "fp4")
    before, after = tensors_of(release), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    config, released = read_json(tmp_path / "back" / "config.json"), read_json(release / "config.json")
    assert released.pop("transformers_version") and config == released


def test_tables_in_bf16(release: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """Quantized as the release has them, their slices are filled up likewise."""
    convert(release, tmp_path / "bf16", "--to", "bf16")
    convert(tmp_path / "bf16", tmp_path / "mp4", *MP, 4, "--to", "fp8")
    for file in made(4, "fp8").glob("*.safetensors"):
        found, expected = read_file(tmp_path / "mp4" / file.name), read_file(file)
        for name in (TABLE, SCALE):
            assert found[name].shape == expected[name].shape
        own = 661 - 3 * 166 if file.name == LAST else 166
        assert found[TABLE].array()[own:].max(initial=0) == 0 and set(found[SCALE].array()[own:].flat) <= {127}
    assert verify(release, tmp_path / "mp4").exit_code == 0


def logits(folder: Path) -> torch.Tensor:
    model = load(folder)
    found = model.forward(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), model.new_cache(1)).logits
    assert found is not None
    return found


def test_the_same_bits_run_from_rank_files(release: Path, made: Callable[..., Path]) -> None:
    assert torch.equal(logits(release), logits(made(4)))


class TestFewRows:
    """Fewer rows than make every rank own some: 5 rows on 4 ranks are 2, 2, 1 and none."""

    @pytest.fixture
    def few(self, release: Path, tmp_path: Path) -> Path:
        folder = tmp_path
        source = Path(shutil.copytree(release, folder / "source", ignore=shutil.ignore_patterns("inference")))
        tensors = tensors_of(source)
        edit_tensors(source, {name: raw(tensors[name].dtype, tensors[name].array()[:5]) for name in (TABLE, SCALE)})
        config = read_json(source / "config.json")
        config["text_config"]["engram_num_embeddings"][0] = 5
        (source / "config.json").write_text(json.dumps(config))
        convert(source, folder / "mp", *MP, 4, "--to", "same")
        return folder

    def test_a_rank_of_nothing_but_filling(self, few: Path) -> None:
        last = read_file(few / "mp" / LAST)
        assert last[TABLE].shape == (2, 64) and last[TABLE].data == bytes(128) and set(last[SCALE].data) == {127}
        assert verify(few / "source", few / "mp").exit_code == verify(few / "mp").exit_code == 0

    def test_the_rows_come_back(self, few: Path) -> None:
        one, other = open_checkpoint(few / "source"), open_checkpoint(few / "mp")
        for name in (TABLE, SCALE):
            assert one.tensors[name].shape == other.tensors[name].shape
            assert one.read_bytes(name) == other.read_bytes(name)

    def test_from_bf16(self, few: Path) -> None:
        convert(few / "source", few / "bf16", "--to", "bf16")
        convert(few / "bf16", few / "mp_of_bf16", *MP, 4, "--to", "fp8")
        assert read_file(few / "mp_of_bf16" / LAST)[TABLE] == read_file(few / "mp" / LAST)[TABLE]
        assert verify(few / "source", few / "mp_of_bf16").exit_code == 0

    @pytest.mark.parametrize(("rows", "ranks"), [(5, 4), (661, 4), (8, 4), (3, 7)])
    def test_slices_cover_every_row_once(self, rows: int, ranks: int) -> None:
        cuts = [mp_slice(TABLE, (rows, 64), rank, ranks) for rank in range(ranks)]
        assert all(isinstance(cut, Slice) and cut.apply_to((rows, 64)) == (-(-rows // ranks), 64) for cut in cuts)
        bounds = [cut.bounds(rows) for cut in cuts if cut is not None]
        assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
        assert sum(cut.filled for cut in cuts if cut is not None) == ranks * -(-rows // ranks) - rows


def change(folder: Path, file: str, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Edit a tensor of a rank file as an array of bytes."""
    tensors = read_file(folder / file)
    data = np.frombuffer(tensors[name].data, np.uint8).reshape(tensors[name].shape[0], -1).copy()
    edit(data)
    write_file(folder / file, tensors | {name: replace(tensors[name], data=data.tobytes())})


def flip(row: int, column: int) -> Callable[[np.ndarray], object]:
    def edit(data: np.ndarray) -> None:
        data[row, column] ^= 1

    return edit


# Of the 166 rows of rank 3, 163 are the table's.
DAMAGE: dict[str, tuple[str, str, int, str]] = {
    "a code of a table": (LAST, TABLE, 162, TABLE),
    "a scale of a table": (LAST, SCALE, 162, TABLE),
    "a copied matrix": (LAST, "layers.1.engram.wkv.weight", 0, "ranks hold different copies"),
    "a copied vector": (LAST, "layers.1.engram.q_weight", 0, "ranks hold different copies"),
    "a Markov table": (LAST, "mtp.2.markov_head.embed.weight", 0, "mtp.2.markov_head.embed.weight"),
    "wo_a": (LAST, "layers.2.attn.wo_a.weight", 0, "layers.2.attn.wo_a.weight"),
    "an expert of a draft stage": (LAST, "mtp.0.ffn.experts.3.w1.weight", 0, "mtp.0.ffn.experts.3.w1.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds(damage: str, release: Path, copy: Path) -> None:
    file, name, row, words = DAMAGE[damage]
    change(copy, file, name, flip(row, 1))
    code, out, _ = dsv4("verify", release, copy)
    assert code == 1 and words in out


@pytest.mark.parametrize(("name", "value"), [(TABLE, 0), (SCALE, 1)])
@pytest.mark.parametrize("row", [163, 165])
def test_verify_finds_what_fills_a_slice_up(name: str, value: int, row: int, release: Path, copy: Path) -> None:
    """It is no value of the model: the tensor is equal, and the layout is wrong. Also without the release."""
    change(copy, LAST, name, flip(row, 1))
    for found in (verify(release, copy), verify(copy)):
        assert found.exit_code == 1 and {result.status for result in found.results} <= {"=", "≈", "✓"}
        (problem,) = [problem for problem in found.problems if problem.severity == "difference"]
        text = f"{name}: 1 bytes of {LAST} after its last row are not those of {value}, which fills it up"
        assert (problem.area, problem.where, problem.text) == ("layout", "output", text)


def shortened(tensors: Tensors) -> Tensors:
    table = tensors[TABLE]
    return tensors | {TABLE: Raw(table.dtype, (165, table.shape[1]), table.data[: 165 * table.shape[1]])}


def without_rows(folder: Path) -> None:
    edit_config(folder, engram_num_embeddings=None)


def with_other_rows(folder: Path) -> None:
    edit_config(folder, engram_num_embeddings=[660, 701])


def with_one_table(folder: Path) -> None:
    edit_config(folder, engram_layer_ids=[2], engram_num_embeddings=[701])


def with_a_short_slice(folder: Path) -> None:
    write_file(folder / LAST, shortened(read_file(folder / LAST)))


@pytest.mark.parametrize(
    ("edit", "words", "judged", "found"),
    [
        (without_rows, "engram_num_embeddings is missing", "engram_num_embeddings is missing", 1),
        (with_other_rows, "config.json says 660 rows", "config.json says 660 rows", 3),
        (with_one_table, "has no number of rows for layer 1", "has no number of rows for layer 1", 1),
        (with_a_short_slice, "says 661 rows", "block scale of shape [166, 2]; [165, 2] expected", 3),
    ],
)
def test_slices_that_do_not_fit_the_config(
    edit: Callable[[Path], None], words: str, judged: str, found: int, release: Path, copy: Path, tmp_path: Path
) -> None:
    """`convert` and `run` stop, `doctor` says that the engine does, `verify` names the key or the table."""
    edit(copy)
    for command in (("convert", copy, tmp_path / "out"), ("run", copy, "--tokens", "1,2")):
        code, _, err = dsv4(*command)
        assert code == 3 and words in err
    code, out, _ = dsv4("doctor", copy, "--for", "reference")
    assert code == 1 and judged in " ".join(out.split())
    code, out, _ = dsv4("verify", release, copy)
    assert code == found and ("engram_num_embeddings = " if found == 1 else f"! {TABLE}") in out


def test_verify_without_a_config(release: Path, copy: Path) -> None:
    """The reference converter writes none: the release says how many rows there are, and nothing does without it."""
    (copy / "config.json").unlink()
    assert verify(release, copy).exit_code == 0
    alone = verify(copy)
    notes = [problem.text for problem in alone.problems if problem.text.startswith(TABLE)]
    assert alone.exit_code == 0 and len(notes) == 1 and "nothing says how many rows" in notes[0]
    change(copy, LAST, SCALE, flip(165, 0))
    assert verify(release, copy).exit_code == 1


def test_doctor_counts_the_experts_of_each_stack(made: Callable[..., Path], copy: Path) -> None:
    assert dsv4("doctor", made(4), "--for", "reference", "--tensor-parallel", "4")[0] == 0
    tensors = read_file(copy / LAST)
    write_file(copy / LAST, {n: t for n, t in tensors.items() if not n.startswith("mtp.0.ffn.experts.")})
    code, out, _ = dsv4("doctor", copy, "--for", "reference")
    assert code == 1 and "11 routed experts in 3 blocks; 4 in each expected" in " ".join(out.split())


@pytest.mark.slow
def test_ranks_run_from_files_of_another_number_of_ranks(
    release: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--tokens", "3,1,4,1,5,9,2,6", "--temperature", "0", "--max-new-tokens", "6", "--draft")
    code, out, _ = dsv4("run", release, *options)
    ended = run_ranks(2, tmp_path, "run", made(4), *options)
    assert code == 0 and ended.codes == [0, 0] and ended.out == [out, ""], ended.err
