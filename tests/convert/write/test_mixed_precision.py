"""Draft stages that are stored in another way than the experts of the main layers, as some conversions leave them."""

from pathlib import Path

import numpy as np
import pytest
from checkpoint_variants import VARIANTS
from exact_values import convert, different_values, dsv4, edit_tensors, experts, tensors_of
from raw_safetensors import Tensors, raw


def in_bf16(folder: Path, names: list[str]) -> Path:
    """The folder with some FP4 experts as BF16, without scales; of finite values."""
    tensors, rng = tensors_of(folder), np.random.default_rng(3)
    new: Tensors = {}
    for name in names:
        rows, columns = tensors[name].shape
        new[name] = raw("BF16", rng.integers(0, 0x7F00, (rows, 2 * columns), dtype=np.uint16))
    edit_tensors(folder, new, tuple(name.replace(".weight", ".scale") for name in names))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = VARIANTS["release"](tmp_path / "source")
    return in_bf16(folder, [name for name in experts(tensors_of(folder)) if name.startswith("mtp.")])


@pytest.mark.parametrize(
    "options", [(), ("--on-inexact", "keep"), ("--layout", "mp", "--model-parallel", "2")], ids=str
)
def test_a_draft_stage_in_bf16_stays_as_it_is(options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    said = convert(source, tmp_path / "out", *options)
    old = tensors_of(source)
    drafts = [name for name in experts(old) if name.startswith("mtp.")]
    assert drafts and f"{len(drafts)} expert matrices of draft stages are neither FP4 nor FP8 and stay" in said
    if not options or "mp" not in options:
        new = tensors_of(tmp_path / "out")
        assert all(new[name] == old[name] for name in drafts)
        assert {new[name].dtype for name in experts(new) if name not in drafts} == {"F8_E4M3"}
        assert different_values(old, new) == []
    code, out, _ = dsv4("verify", source, tmp_path / "out")
    assert code == 0 and "IDENTICAL" in out


def test_nothing_is_said_where_nothing_is_cast(source: Path, tmp_path: Path) -> None:
    assert "stay as they are" not in convert(source, tmp_path / "out", "--to", "bf16")


def test_a_mixture_within_the_main_layers_is_an_error(tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "source")
    first = next(name for name in experts(tensors_of(folder)) if name.startswith("layers."))
    in_bf16(folder, [first])
    code, _, err = dsv4("convert", folder, tmp_path / "out")
    assert code == 3 and first in err and "new quantization" in err and not (tmp_path / "out").exists()


def test_a_mixture_within_a_draft_stage_is_a_problem_for_verify(source: Path, tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "mixed")
    in_bf16(folder, [next(name for name in experts(tensors_of(folder)) if name.startswith("mtp."))])
    convert(folder, tmp_path / "out")
    code, out, _ = dsv4("verify", folder, tmp_path / "out")
    assert code == 1 and "the routed experts are bf16 and fp" in out
