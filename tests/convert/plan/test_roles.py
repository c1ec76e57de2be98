"""What each tensor is taken for, from declared dtype, name, sibling scale and config; no file is read."""

from typing import Any

import pytest

from dsv4.convert.checkpoint.config import checked_expert_dtype
from dsv4.convert.checkpoint.header import tensor_bytes
from dsv4.convert.checkpoint.names import scales_of
from dsv4.convert.checkpoint.reader import Checkpoint, Extent, TensorInfo
from dsv4.convert.checkpoint.storage import Storage
from dsv4.convert.checkpoint.weights import Format
from dsv4.convert.plan.classify import classify, fp8_block
from dsv4.errors import InputError

CONFIG: dict[str, Any] = {"quantization_config": {"weight_block_size": [128, 128]}}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


class NoStorage:
    """Roles come from headers: any read of data fails."""

    label = "headers only"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def checkpoint(tensors: Tensors, config: dict[str, Any] | None = None) -> Checkpoint:
    storage: Storage = NoStorage()  # type: ignore[assignment]
    infos = {
        name: TensorInfo(name, dtype, shape, (Extent("model.safetensors", 0, tensor_bytes(dtype, shape)),))
        for name, (dtype, shape) in tensors.items()
    }
    return Checkpoint(storage, CONFIG if config is None else config, {}, {}, infos)


def fp4(stem: str, rows: int = 8, columns: int = 64) -> Tensors:
    return {f"{stem}.weight": ("I8", (rows, columns // 2)), f"{stem}.scale": ("F8_E8M0", (rows, columns // 32))}


def fp8(stem: str, dtype: str = "F8_E8M0", suffix: str = ".scale") -> Tensors:
    return {f"{stem}.weight": ("F8_E4M3", (200, 300)), f"{stem}{suffix}": (dtype, (2, 3))}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (fp4("layers.0.ffn.experts.3.w1"), Format.FP4),
        (fp4("layers.0.ffn.shared_experts.w1"), Format.FP4),
        (fp8("layers.0.attn.wq_a"), Format.FP8),
        (fp8("layers.0.attn.wq_a", "F32"), Format.FP8),
        (fp8("layers.0.attn.wq_a", suffix=".weight_scale_inv"), Format.FP8),
        ({"a.weight": ("F4", (8, 64)), "a.scale": ("F8_E8M0", (8, 2))}, Format.FP4),
        ({"a.weight": ("BF16", (8, 64)), "a.scale": ("F32", (1,))}, Format.PLAIN),
        ({"a.weight": ("I8", (8, 64))}, Format.PLAIN),
        ({"layers.0.hc_attn_scale": ("F32", (3,))}, Format.PLAIN),
        ({"a.scale": ("F8_E8M0", (3, 3))}, Format.PLAIN),
        ({"a.q_weight": ("F8_E4M3", (3, 3))}, Format.PLAIN),
    ],
)
def test_formats(tensors: Tensors, expected: Format) -> None:
    weights = classify(checkpoint(tensors))
    assert [weight.format for weight in weights] == [expected]
    assert (weights[0].scale is not None) == (len(tensors) == 2)


def test_geometry() -> None:
    found = {w.name: w for w in classify(checkpoint(fp4("e") | fp8("d") | {"n.weight": ("BF16", (7,))}))}
    assert (found["e.weight"].logical_shape, found["e.weight"].block) == ((8, 64), (1, 32))
    assert (found["d.weight"].logical_shape, found["d.weight"].block) == ((200, 300), (128, 128))
    assert (found["n.weight"].logical_shape, found["n.weight"].block) == ((7,), None)
    f4 = classify(checkpoint({"a.weight": ("F4", (8, 64)), "a.scale": ("F8_E8M0", (8, 2))}))[0]
    assert f4.logical_shape == (8, 64)


def test_the_table_of_v41_has_its_own_blocks() -> None:
    table = "layers.1.engram.embed"
    tensors: Tensors = {f"{table}.weight": ("F8_E4M3", (77, 64)), f"{table}.scale": ("F8_E8M0", (77, 2))}
    assert classify(checkpoint(tensors))[0].block == (1, 32)
    with pytest.raises(InputError, match=r"\[77, 2\] expected"):
        classify(checkpoint({**tensors, f"{table}.scale": ("F8_E8M0", (1, 1))}))


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("layers.0.ffn.experts.0.w1.weight", True),
        ("layers.60.ffn.experts.383.w3.weight", True),
        ("mtp.2.ffn.experts.7.w2.weight", True),
        ("model.layers.0.mlp.experts.0.w2.weight", True),
        ("layers.0.ffn.shared_experts.w1.weight", False),
        ("layers.0.ffn.experts.0.w4.weight", False),
        ("layers.0.ffn.experts.0.w1.scale", False),
        ("layers.0.ffn.gate.weight", False),
        ("vision.experts.0.w1.weight", False),
    ],
)
def test_routed_experts(name: str, routed: bool) -> None:
    assert classify(checkpoint({name: ("BF16", (4, 4))}))[0].is_routed_expert is routed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"expert_dtype": "fp4"}, "fp4"),
        ({"quantization_config": {"expert_dtype": "fp8"}}, "fp8"),
        ({"expert_dtype": None}, None),
    ],
)
def test_expert_dtype(config: dict[str, Any], expected: str | None) -> None:
    assert checked_expert_dtype(config) == expected


def test_block_size() -> None:
    assert fp8_block({"quantization_config": {"weight_block_size": [32, 64]}}) == (32, 64)


def test_scales_by_name() -> None:
    tensors = checkpoint(fp8("a") | fp8("b", suffix=".weight_scale_inv") | {"c": ("F32", (1,))}).tensors
    found = {name: next((scale.name for scale in scales_of(name, tensors)), None) for name in tensors}
    assert found == {
        "a.weight": "a.scale", "a.scale": None, "b.weight": "b.weight_scale_inv", "b.weight_scale_inv": None, "c": None,
    }  # fmt: skip


@pytest.mark.parametrize("declared", ["fp4", "fp8"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_config_is_believed_about_routed_experts_only(declared: str, inside: bool) -> None:
    quantization = CONFIG["quantization_config"]
    config = (
        {"quantization_config": {**quantization, "expert_dtype": declared}}
        if inside
        else {**CONFIG, "expert_dtype": declared}
    )
    experts = {"fp4": fp4("layers.0.ffn.experts.0.w1"), "fp8": fp8("layers.0.ffn.experts.0.w1")}
    dense = fp8("layers.0.attn.wq_a") | fp4("layers.0.ffn.shared_experts.w1")
    assert classify(checkpoint(experts[declared] | dense, config))
    other = experts["fp8" if declared == "fp4" else "fp4"]
    with pytest.raises(InputError, match=f"expert_dtype '{declared}'"):
        classify(checkpoint(other | dense, config))


def test_no_fp8_needs_no_block_size() -> None:
    assert classify(checkpoint(fp4("layers.0.ffn.experts.0.w1"), {}))
    with pytest.raises(InputError, match="weight_block_size"):
        classify(checkpoint(fp8("layers.0.attn.wq_a"), {}))
