"""What each tensor is taken for. Above all: bytes with another dtype tag are the same weight, for every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exact_values import convert, edit_tensors, tensors_of
from raw_safetensors import Raw, Tensors

from dsv4.convert.checkpoint.header import tensor_bytes
from dsv4.convert.checkpoint.reader import Checkpoint, Extent, TensorInfo
from dsv4.convert.checkpoint.weights import Alike, Format, Weight, find_alike, find_weights
from dsv4.convert.doctor.diagnosis import diagnose
from dsv4.convert.inspect.inspection import as_json, inspect_checkpoint
from dsv4.convert.inspect.tensor_view import as_json as view_json
from dsv4.convert.inspect.tensor_view import view_tensor
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0), n_routed_experts=4, index_n_heads=4, o_groups=4)
CONFIG: dict[str, Any] = {"quantization_config": {"weight_block_size": [128, 128]}}
EXPERT = "layers.0.ffn.experts.1.w2"


def declared(dtypes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, d, s, (Extent("x.safetensors", 0, tensor_bytes(d, s)),)) for n, (d, s) in dtypes.items()}


def weight(dtype: str, shape: tuple[int, ...], scale: str, scale_shape: tuple[int, ...], name: str = EXPERT) -> Weight:
    both = {f"{name}.weight": (dtype, shape), f"{name}.scale": (scale, scale_shape)}
    return find_weights(declared(both), CONFIG)[f"{name}.weight"]


@pytest.mark.parametrize(
    ("dtype", "shape", "scale"),
    [("I8", (8, 32), "F8_E8M0"), ("U8", (8, 32), "F8_E8M0"), ("F4", (8, 64), "F8_E8M0"), ("I8", (8, 32), "U8"),
     ("U8", (8, 32), "U8"), ("F4", (8, 64), "U8")],
)  # fmt: skip
def test_fp4_under_any_tag(dtype: str, shape: tuple[int, ...], scale: str) -> None:
    found = weight(dtype, shape, scale, (8, 2))
    assert found.fault is None and found.scale is not None
    assert (found.format, found.logical_shape, found.block) == (Format.FP4, (8, 64), (1, 32))
    assert (found.info.dtype, found.scale.dtype) == ("F4" if dtype == "F4" else "I8", "F8_E8M0")


@pytest.mark.parametrize("scale", ["F8_E8M0", "U8", "F32"])
def test_fp8_with_any_scale(scale: str) -> None:
    found = weight("F8_E4M3", (200, 300), scale, (2, 3))
    assert found.fault is None and found.scale is not None
    assert (found.format, found.scale.dtype) == (Format.FP8, "F32" if scale == "F32" else "F8_E8M0")


@pytest.mark.parametrize("shape", [(8, 1), (8, 4), (2, 8), (16,), ()])
def test_other_bytes_with_a_scale_are_no_weight(shape: tuple[int, ...]) -> None:
    """Such as INT8 with a scale per row, or NVFP4 with one per 16 elements: U8 alone does not say FP4."""
    found = weight("U8", (8, 32), "F8_E8M0", shape)
    assert (found.format, found.fault, found.info.dtype) == (Format.PLAIN, None, "U8")


def test_tensors_that_only_the_expert_tells_apart_are_found_together() -> None:
    fp4, scale = ("I8", (8, 32)), ("F8_E8M0", (8, 2))
    experts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in (0, 1):
        for number in range(4):
            name = f"layers.{layer}.ffn.experts.{number}.w1"
            experts |= {f"{name}.weight": fp4, f"{name}.scale": scale}
    del experts["layers.1.ffn.experts.0.w1.scale"]  # a fault
    experts["layers.1.ffn.experts.1.w1.weight"] = ("BF16", (8, 64))  # another dtype: its scale belongs to no format
    experts["layers.1.ffn.experts.2.w1.scale"] = ("U8", (8, 2))  # the same to the weight, another dtype itself
    tensors = declared(experts | {"norm.weight": ("BF16", (8,)), "layers.0.attn_norm.weight": ("BF16", (8,))})
    weights = find_weights(tensors, CONFIG)

    found = find_alike(tensors, weights)

    def where(some: Alike) -> tuple[str, list[str]]:
        return some.name.removeprefix("layers."), some.experts

    assert [where(some) for some in found] == [
        ("0.ffn.experts.0.w1.weight", ["0", "1", "2", "3"]),
        ("0.ffn.experts.0.w1.scale", ["0", "1", "2", "3"]),
        ("1.ffn.experts.0.w1.weight", ["0"]),
        ("1.ffn.experts.1.w1.weight", ["1"]),
        ("1.ffn.experts.1.w1.scale", ["1", "3"]),
        ("1.ffn.experts.2.w1.weight", ["2", "3"]),
        ("1.ffn.experts.2.w1.scale", ["2"]),
        ("norm.weight", [""]),
        ("0.attn_norm.weight", [""]),
    ]
    assert [some.weight for some in found] == [weights.get(some.name) for some in found]
    assert sum(some.count for some in found) == len(tensors)
    assert found[0].numbers == {0, 1, 2, 3} and found[-1].numbers == set()


@pytest.mark.parametrize(
    ("dtype", "shape", "scale", "scale_shape", "wrong"),
    [
        ("I8", (8, 32), "F8_E8M0", (8, 3), "scale"),
        ("I8", (8, 32), "F32", (8, 2), "scale"),
        ("F8_E4M3", (200, 300), "BF16", (2, 3), "scale"),
        ("F8_E4M3", (200, 300), "I8", (2, 3), "scale"),
        ("F8_E4M3", (200, 300), "U8", (3, 2), "scale"),
        ("F8_E4M3", (200,), "F32", (2,), "weight"),
        ("F8_E4M3", (2, 200, 300), "F32", (2, 2, 3), "weight"),
    ],
)
def test_faults(dtype: str, shape: tuple[int, ...], scale: str, scale_shape: tuple[int, ...], wrong: str) -> None:
    fault = weight(dtype, shape, scale, scale_shape).fault
    assert fault is not None and fault.tensor == f"{EXPERT}.{wrong}"


def retag(tensors: Tensors, old: str, new: str) -> Tensors:
    return {n: Raw(new, t.shape, t.data) for n, t in tensors.items() if t.dtype == old}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "source", geometry=SMALL)


@pytest.fixture(params=[("I8",), ("F8_E8M0",), ("I8", "F8_E8M0")], ids="+".join)
def as_u8(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The same checkpoint, with all tensors of some dtypes tagged U8."""
    folder = Path(shutil.copytree(source, tmp_path / "u8"))
    for dtype in request.param:
        edit_tensors(folder, retag(tensors_of(folder), dtype, "U8"))
    return folder


@pytest.mark.parametrize("options", [("--to", "fp8"), ("--to", "bf16"), ("--to", "same")], ids=" ".join)
@pytest.mark.fast_cases(1)
def test_convert_writes_the_bytes_of_the_release(
    options: tuple[str, ...], source: Path, as_u8: Path, tmp_path: Path
) -> None:
    for folder, name in ((source, "expected"), (as_u8, "found")):
        convert(folder, tmp_path / name, *options)
    for file in ("model.safetensors.index.json", "config.json"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert tensors_of(tmp_path / "found") == tensors_of(tmp_path / "expected")


def test_inspect_says_the_same(source: Path, as_u8: Path) -> None:
    expected, found = (as_json(inspect_checkpoint(Checkpoint.open(folder))) for folder in (source, as_u8))
    assert found["dtypes"] != expected["dtypes"]
    same = [key for key in expected if key not in ("checkpoint", "dtypes")]
    assert json.dumps({key: found[key] for key in same}) == json.dumps({key: expected[key] for key in same})


def test_values_are_the_same(source: Path, as_u8: Path) -> None:
    for name in (f"{EXPERT}.weight", "layers.0.attn.wq_a.weight"):
        expected, found = (view_json(view_tensor(Checkpoint.open(folder), name)) for folder in (source, as_u8))
        for key in ("format", "values", "codes", "scales", "code_counts", "scale_exponents", "value_exponents"):
            assert found[key] == expected[key], key


def test_doctor_says_the_same(source: Path, as_u8: Path) -> None:
    expected, found = (diagnose(folder, "sglang") for folder in (source, as_u8))
    assert [check.status for check in found.checks] == [check.status for check in expected.checks]
