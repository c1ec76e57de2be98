"""One verification by several processes: the verdict of one, and none at all if one of them is gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from exact_values import convert, dsv4, edit_tensors, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks, torchrun
from raw_safetensors import Raw

from dsv4.convert.proof.files import LocalFiles
from dsv4.convert.proof.run import Settings, verify, verify_files
from dsv4.convert.proof.schedule import Share
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0), n_routed_experts=4, index_n_heads=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "source"
    make_checkpoint(folder, geometry=SMALL)
    return folder


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "output"
    convert(source, folder, "--max-shard-size", "300kB")
    return folder


@pytest.fixture(scope="module")
def damaged(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A different tensor at each end, so that two ranks have something to tell."""
    folder = shutil.copytree(output, tmp_path_factory.mktemp("verify") / "damaged")
    tensors = tensors_of(folder)
    for name in (min(tensors), max(tensors), "layers.0.ffn.experts.3.w2.weight"):
        data = bytearray(tensors[name].data)
        data[0] ^= 1
        edit_tensors(folder, {name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))})
    return folder


def without_time(text: str) -> dict[str, Any]:
    found = json.loads(text)
    assert found.pop("seconds") >= 0 and found["made_by"].pop("date")
    return dict(found)


class TestShare:
    @given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 9))
    def test_everything_is_done_once_and_in_order(self, sizes: list[int], count: int) -> None:
        items = list(range(len(sizes)))
        parts = [Share(i, count).of(items, sizes) for i in range(count)]
        assert [item for part in parts for item in part] == items

    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(1, 9))
    def test_parts_are_balanced_to_a_piece(self, sizes: list[int], count: int) -> None:
        for i in range(count):
            mine = sum(Share(i, count).of(sizes, sizes))
            assert abs(mine - sum(sizes) / count) <= max(sizes)


@pytest.mark.parametrize(
    ("count", "options"),
    [(3, ()), (2, ("--inverse", "--strict")), (2, ("--tensor", "layers.0.*")), (4, ("--sample=20%",))],
)
@pytest.mark.slow
def test_the_same_result(
    count: int, options: tuple[str, ...], source: Path, output: Path, damaged: Path, tmp_path: Path
) -> None:
    for other in (output, damaged):
        code, out, _ = dsv4("verify", source, other, *options, "--json")
        ended = run_ranks(count, tmp_path, "verify", source, other, *options, "--json")
        assert ended.codes == [code] * count, ended.err
        assert without_time(ended.out[0]) == without_time(out) and not any(ended.out[1:])


@pytest.mark.slow
def test_the_same_text_and_page(source: Path, damaged: Path, tmp_path: Path) -> None:
    code, out, _ = dsv4("verify", source, damaged)
    ended = run_ranks(2, tmp_path, "verify", source, damaged, "--report", "page.html")
    assert code == 1 and ended.codes == [1, 1] and ended.out == [out, ""] and not ended.err[1]
    assert "layers.0.ffn.experts.3.w2.weight" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_one_checkpoint(output: Path, damaged: Path, tmp_path: Path) -> None:
    """Also its hashes, which are shared too: damage in any shard is found by somebody."""
    for folder, expected in ((output, 0), (damaged, 1)):
        code, out, _ = dsv4("verify", folder, "--json")
        ended = run_ranks(2, tmp_path, "verify", folder, "--json")
        assert code == expected and ended.codes == [code] * 2, ended.err
        assert without_time(ended.out[0]) == without_time(out)


def test_a_tensor_may_be_shared(source: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of one tensor that several processes looked at add up."""
    monkeypatch.setattr("dsv4.convert.proof.compare_tensor.PIECE_BYTES", 4096)
    whole = verify(source, damaged)
    parts: list[Any] = []

    def collect(value: Any) -> list[Any]:
        parts.append(value)
        return [value]

    used = psutil.Process().memory_info().rss
    files, memory = (LocalFiles(source), LocalFiles(damaged)), (None, used + (40 << 20), used + (80 << 20))
    for i in range(3):  # machines with more and less memory
        verify_files(*files, Settings(max_memory=memory[i]), share=Share(i, 3, collect))
    merged = verify_files(*files, Settings(), share=Share(0, 3, lambda value: parts))
    assert {**merged.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}


@pytest.mark.slow
def test_under_torchrun(source: Path, damaged: Path) -> None:
    """The first rank's words arrive although the launcher stops everybody when a rank ends with code 1."""
    code, out, _ = dsv4("verify", source, damaged)
    ended = torchrun(2, "verify", source, damaged)
    assert code == 1 and ended.returncode == 1 and ended.stdout == out


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.slow
def test_a_killed_rank_is_an_error_and_no_verdict(dies: int, source: Path, output: Path, tmp_path: Path) -> None:
    module, function = (("work.conclude", "tensor_results"), ("run", "in_order"))[dies]  # after the exchange, before it
    kill = {dies: (f"dsv4.convert.proof.{module}", function, 1)}
    ended = run_ranks(2, tmp_path, "verify", source, output, kill=kill)
    assert ended.codes[dies] == -9 and ended.codes[1 - dies] in (4, 143), ended.err
    assert not ended.out[0] and not ended.out[1]
    assert "rank" in ended.err[1 - dies] and "bug" not in ended.err[1 - dies]


def test_a_wrong_path_is_said_by_each(source: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, tmp_path, "verify", source, tmp_path / "nowhere")
    assert set(ended.codes) <= {3, 4, 143} and 3 in ended.codes and "bug" not in ended.err[0] + ended.err[1]
