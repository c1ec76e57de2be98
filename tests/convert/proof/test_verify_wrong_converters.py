"""Deliberately wrong converters: the mistakes that real ones have made, each found and named by `verify`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference_converter
from raw_safetensors import Raw, Tensors, merged, raw, read_folder, write_folder
from reference_converter import FP4_VALUES, scale_values, spread, unpacked

from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.run import verify

EXPERTS = [f"layers.0.ffn.experts.{expert}.w1" for expert in range(4)]


def fp4_experts(lowest: int, highest: int) -> Tensors:
    """Four experts of 256 x 256 whose scales lie between the two bytes."""
    random = np.random.default_rng(3)
    found: Tensors = {"norm.weight": raw("BF16", np.full(8, 0x3F80, np.uint16))}
    for name in EXPERTS:
        found[f"{name}.weight"] = raw("I8", random.integers(0, 256, (256, 128), dtype=np.uint8))
        found[f"{name}.scale"] = raw("F8_E8M0", random.integers(lowest, highest + 1, (256, 8), dtype=np.uint8))
    return found


def values_of(weight: Raw, scale: Raw) -> np.ndarray:
    """float64, sign of zero kept."""
    codes = unpacked(weight)
    signed = np.where(codes == 8, -0.0, FP4_VALUES[codes])
    return signed * np.exp2(spread(scale.array().astype(np.float64) - 127, 1, 32, codes.shape))


def quantize(values: np.ndarray, exponents: np.ndarray, block: int = 128) -> tuple[Raw, Raw]:
    """FP8 with the block exponents given; saturates."""
    scaled = values / np.exp2(spread(exponents.astype(np.float64), block, block, values.shape))
    codes = np.clip(scaled, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return raw("F8_E4M3", codes), raw("F8_E8M0", (exponents + 127).astype(np.uint8))


def block_exponents(scale: Raw, block: int = 128) -> np.ndarray:
    """The reference's: largest group exponent - 6."""
    exponents = scale.array().astype(np.int64) - 127
    rows, columns = exponents.shape
    return exponents.reshape(rows // block, block, columns // (block // 32), block // 32).max((1, 3)) - 6


def right(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name in EXPERTS:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        found[f"{name}.weight"], found[f"{name}.scale"] = quantize(values_of(weight, scale), block_exponents(scale))
    return found


def right_in_small_blocks(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name in EXPERTS:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        made = quantize(values_of(weight, scale), block_exponents(scale, 32), 32)
        found[f"{name}.weight"], found[f"{name}.scale"] = made
    return found


def high_nibble_first(tensors: Tensors) -> Tensors:
    turned = dict(tensors)
    for name in EXPERTS:
        data = tensors[f"{name}.weight"].array()
        turned[f"{name}.weight"] = tensors[f"{name}.weight"].like((data >> 4) | (data << 4 & 0xF0))
    return right(turned)


def scale_off_by_one(tensors: Tensors) -> Tensors:
    found = right(tensors)
    for name in EXPERTS:
        found[f"{name}.scale"] = found[f"{name}.scale"].like(found[f"{name}.scale"].array() + np.uint8(1))
    return found


def first_scale_for_all_groups(tensors: Tensors) -> Tensors:
    """Takes one scale per row instead of one per 32 columns."""
    wrong = dict(tensors)
    for name in EXPERTS:
        scales = tensors[f"{name}.scale"].array()
        wrong[f"{name}.scale"] = tensors[f"{name}.scale"].like(np.repeat(scales[:, :1], 8, axis=1))
    return right(wrong)


def positive_zeros(tensors: Tensors) -> Tensors:
    found = right(tensors)
    for name in EXPERTS:
        codes = found[f"{name}.weight"].array()
        found[f"{name}.weight"] = found[f"{name}.weight"].like(np.where(codes == 0x80, 0, codes).astype(np.uint8))
    return found


def one_expert_skipped(tensors: Tensors) -> Tensors:
    found = right(tensors)
    del found[f"{EXPERTS[2]}.weight"], found[f"{EXPERTS[2]}.scale"]
    return found


def one_expert_written_twice(tensors: Tensors) -> Tensors:
    found = right(tensors)
    for part in ("weight", "scale"):
        found[f"{EXPERTS[2]}.{part}"] = found[f"{EXPERTS[1]}.{part}"]
    return found


def scales_transposed(tensors: Tensors) -> Tensors:
    found = right(tensors)
    for name in EXPERTS:
        found[f"{name}.scale"] = found[f"{name}.scale"].like(found[f"{name}.scale"].array().T)
    return found


def weights_transposed(tensors: Tensors) -> Tensors:
    found = right(tensors)
    for name in EXPERTS:
        found[f"{name}.weight"] = found[f"{name}.weight"].like(found[f"{name}.weight"].array().T)
    return found


def scale_bytes_as_numbers(tensors: Tensors) -> Tensors:
    """E8M0 byte 120 stored as 120.0."""
    found = right(tensors)
    for name in EXPERTS:
        found[f"{name}.scale"] = raw("F32", found[f"{name}.scale"].array().astype(np.float32))
    return found


def inverse_scales(tensors: Tensors) -> Tensors:
    """Stores 1/scale, as some formats have it."""
    found = right(tensors)
    for name in EXPERTS:
        found[f"{name}.scale"] = raw("F32", 1 / scale_values(found[f"{name}.scale"]))
    return found


def negative_values_as_offsets(tensors: Tensors) -> Tensors:
    """Codes 8 to 15 read as two's complement: -8 to -1."""
    found = dict(tensors)
    for name in EXPERTS:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        codes = unpacked(weight).astype(np.int64)
        numbers = np.where(codes > 7, codes - 16, codes)
        wrong = numbers * np.exp2(spread(scale.array().astype(np.float64) - 127, 1, 32, codes.shape))
        found[f"{name}.weight"], found[f"{name}.scale"] = quantize(wrong, block_exponents(scale))
    return found


def smallest_scale_and_saturation(tensors: Tensors) -> Tensors:
    """The block scale from the smallest group: large values saturate."""
    found = dict(tensors)
    for name in EXPERTS:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        tiles = (scale.array().astype(np.int64) - 127).reshape(2, 128, 2, 4)
        made = quantize(values_of(weight, scale), tiles.min((1, 3)) - 2)
        found[f"{name}.weight"], found[f"{name}.scale"] = made
    return found


def check(tmp_path: Path, tensors: Tensors, made: Tensors, block: int = 128, strict: bool = False) -> Verification:
    quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [block, block]}
    for place, found in (("source", tensors), ("output", made)):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
        write_folder(tmp_path / place, {"model.safetensors": found}, index=False)
        config = {"quantization_config": quantization, "expert_dtype": "fp4" if found is tensors else "fp8"}
        (tmp_path / place / "config.json").write_text(json.dumps(config))
    return verify(tmp_path / "source", tmp_path / "output", strict=strict, max_workers=1)


def differing_weights(result: Verification) -> list[str]:
    return [r.name.removesuffix(".weight") for r in result.results if r.status == "*" and r.name.endswith("weight")]


@pytest.mark.parametrize(("converter", "block"), [(right, 128), (right_in_small_blocks, 32)])
def test_the_right_ones_pass(tmp_path: Path, converter: Callable[[Tensors], Tensors], block: int) -> None:
    tensors = fp4_experts(116, 124)
    result = check(tmp_path, tensors, converter(tensors), block, strict=True)
    assert (result.exit_code, result.counts["≈"]) == (0, 8), [result.verdict, *result.problems]
    assert (result.lost_signs, result.gained_signs) == (0, 0)


@pytest.mark.parametrize(
    "converter",
    [
        high_nibble_first,
        scale_off_by_one,
        first_scale_for_all_groups,
        scales_transposed,
        weights_transposed,
        scale_bytes_as_numbers,
        inverse_scales,
        negative_values_as_offsets,
        smallest_scale_and_saturation,
    ],
)
@pytest.mark.fast_cases(1)
def test_wrong_values_in_every_expert(tmp_path: Path, converter: Callable[[Tensors], Tensors]) -> None:
    tensors = fp4_experts(110, 124)
    # Scales that differ from block to block: otherwise transposing them would be right.
    for name in EXPERTS:
        scales = tensors[f"{name}.scale"].array().copy()
        scales[:128, 4:] = scales[:128, 4:] // 16 + 100
        tensors[f"{name}.scale"] = tensors[f"{name}.scale"].like(scales)
    assert check(tmp_path, tensors, right(tensors)).exit_code == 0
    result = check(tmp_path, tensors, converter(tensors))
    assert (result.exit_code, differing_weights(result)) == (1, EXPERTS)


def test_positive_zeros(tmp_path: Path) -> None:
    tensors = fp4_experts(116, 124)
    zeros = sum(int((unpacked(tensors[f"{name}.weight"]) == 8).sum()) for name in EXPERTS)
    result = check(tmp_path, tensors, positive_zeros(tensors))
    assert (result.exit_code, result.lost_signs, result.gained_signs) == (0, zeros, 0)
    strict = check(tmp_path, tensors, positive_zeros(tensors), strict=True)
    assert strict.exit_code == 1 and "zeros changed sign" in strict.verdict
    backwards = verify(tmp_path / "output", tmp_path / "source", strict=True)
    assert (backwards.exit_code, backwards.lost_signs, backwards.gained_signs) == (1, 0, zeros)


def test_one_expert_skipped(tmp_path: Path) -> None:
    tensors = fp4_experts(116, 124)
    result = check(tmp_path, tensors, one_expert_skipped(tensors))
    missing = {r.name for r in result.results if r.status == "-"}
    assert (result.exit_code, missing) == (1, {f"{EXPERTS[2]}.weight", f"{EXPERTS[2]}.scale"})


def test_one_expert_written_twice(tmp_path: Path) -> None:
    tensors = fp4_experts(116, 124)
    result = check(tmp_path, tensors, one_expert_written_twice(tensors))
    assert (result.exit_code, differing_weights(result)) == (1, [EXPERTS[2]])


def test_rounding_without_a_word(tmp_path: Path) -> None:
    """Scales too far apart: a converter that does not fail changes exactly the elements that rounding changes."""
    tensors = fp4_experts(116, 124)
    name = EXPERTS[1]
    scales = tensors[f"{name}.scale"].array().copy()
    scales[130:140, 5] = 90  # 2^34 below the largest of its block: (1, 1)
    tensors[f"{name}.scale"] = tensors[f"{name}.scale"].like(scales)
    made = right(tensors)
    result = check(tmp_path, tensors, made)
    assert (result.exit_code, differing_weights(result)) == (1, [name])
    found = next(r for r in result.results if r.name == f"{name}.weight").tally
    codes = unpacked(tensors[f"{name}.weight"])[130:140, 160:192]
    changed = int(np.count_nonzero(codes & 7))
    assert (found.different, dict(found.blocks)) == (changed, {(1, 1): changed})
    assert max(found.spans) == 34
    first = np.argwhere(codes & 7)[0]
    assert found.first[0]["at"] == [130 + int(first[0]), 160 + int(first[1])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_which_blocks_the_reference_gets_wrong(tmp_path: Path, ranks: int) -> None:
    """The reference converter rounds silently; an oracle in float64 says where, block by block."""
    tensors = fp4_experts(100, 130)
    for place in ("source", "output"):
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    (tmp_path / "output" / "model.safetensors").unlink()
    reference_converter.convert(tmp_path / "source", tmp_path / "output", ranks, "fp8")
    result = verify(tmp_path / "source", tmp_path / "output")
    written = merged(read_folder(tmp_path / "output"))
    for name in EXPERTS:
        wanted = values_of(tensors[f"{name}.weight"], tensors[f"{name}.scale"])
        stored = written[f"{name}.weight"].array().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scales = scale_values(written[f"{name}.scale"]).astype(np.float64)
        different = wanted != stored * spread(scales, 128, 128, stored.shape)
        blocks = different.reshape(2, 128, 2, 128).sum((1, 3))
        found = next(r for r in result.results if r.name == f"{name}.weight").tally
        assert found.blocks == {(r, c): int(n) for (r, c), n in np.ndenumerate(blocks) if n}
        assert found.blocks


@pytest.mark.parametrize("lowest", [0, 116])
def test_blocks_with_another_scale_than_the_reference(tmp_path: Path, lowest: int) -> None:
    """The reference's scale is the largest / 2^6, or 2^-127 where E8M0 ends; other exact ones are counted."""
    tensors = fp4_experts(lowest, lowest + 4)
    made = dict(tensors)
    for name in EXPERTS:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
        exponents = np.maximum(block_exponents(scale), -127)
        exponents[1, 0] += name != EXPERTS[0]
        made[f"{name}.weight"], made[f"{name}.scale"] = quantize(values_of(weight, scale), exponents)
    result = check(tmp_path, tensors, made)
    assert result.exit_code == 0
    assert all(r.tally.other_scale == (EXPERTS[0] not in r.name) for r in result.results if "w1.weight" in r.name)
    assert result.to_json()["statistics"]["fp8_blocks"]["other_scale_than_reference"] == 3
