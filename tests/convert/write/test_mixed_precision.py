"""Draft stages that are stored in another way than the experts of the main layers, as some conversions leave them."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_variants import VARIANTS
from exact_values import convert, different_values, dsv4, edit_tensors, experts, tensors_of
from raw_safetensors import Tensors, raw

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times


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
@pytest.mark.fast_cases(1)
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


@pytest.mark.parametrize("converted", [False, True], ids=["FP4", "FP8"])
def test_inspect_and_doctor_take_it_as_convert_does(converted: bool, source: Path, tmp_path: Path) -> None:
    folder = source
    if converted:
        convert(source, folder := tmp_path / "out", "--target", "vllm")
    code, out, _ = dsv4("inspect", folder, "--json")
    (found,) = [f for f in json.loads(out)["findings"] if "stored as" in f["text"]]
    assert code == 0 and found["level"] == "note" and "draft stages are stored as bf16" in found["text"]
    for engine in ("vllm", "sglang", "transformers"):
        code, out, _ = dsv4("doctor", folder, "--for", engine, "--json")
        checks = [check for check in json.loads(out)["checks"] if check["rule"] == "experts"]
        assert code == 0 and [check["status"] for check in checks] == ["ok", "note"]
        assert checks[0]["text"] == ("fp8" if converted else "fp4") and "bf16" in checks[1]["text"]


def test_the_reference_engine_loads_drafts_with_the_rest(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "--to", "same", "--layout", "mp", "--model-parallel", "2")
    code, out, _ = dsv4("doctor", tmp_path / "out", "--for", "reference", "--json")
    assert code == 1
    assert [c["text"] for c in json.loads(out)["checks"] if c["status"] == "unknown"] == [
        "those of the draft blocks are bf16: drafting from them was not tried"
    ]


@pytest.mark.parametrize("stack", ["layers.", "mtp."])
def test_inspect_and_doctor_name_a_mixture_within_a_stack(stack: str, tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "source")
    in_bf16(folder, [next(name for name in experts(tensors_of(folder)) if name.startswith(stack))])
    findings = json.loads(dsv4("inspect", folder, "--json")[1])["findings"]
    assert [f["level"] for f in findings if "several ways: bf16, fp4" in f["text"]] == ["problem"]
    code, out, _ = dsv4("doctor", folder, "--for", "vllm", "--json")
    assert code == 1
    assert [c["rule"] for c in json.loads(out)["checks"] if c["status"] == "wrong"] == ["experts"]


def test_nothing_is_said_where_nothing_is_cast(source: Path, tmp_path: Path) -> None:
    assert "stay as they are" not in convert(source, tmp_path / "out", "--to", "bf16")


def test_a_mixture_within_the_main_layers_that_has_no_exact_form_is_an_error(tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "source")
    first = next(name for name in experts(tensors_of(folder)) if name.startswith("layers."))
    in_bf16(folder, [first])
    code, _, err = dsv4("convert", folder, tmp_path / "out")
    assert code == 3 and first in err and "no exact form" in err and not list((tmp_path / "out").glob("*.safetensors"))


def test_a_mixture_within_a_draft_stage_is_a_problem_for_verify(source: Path, tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "mixed")
    in_bf16(folder, [next(name for name in experts(tensors_of(folder)) if name.startswith("mtp."))])
    convert(folder, tmp_path / "out")
    code, out, _ = dsv4("verify", folder, tmp_path / "out")
    assert code == 1 and "the routed experts are bf16 and fp" in out
