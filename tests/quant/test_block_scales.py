"""Quantize and dequantize by blocks: every code with every scale, ragged edges, any rank, against fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import E2M1_MAGNITUDES, E4M3_MAGNITUDES, E8M0_VALUES, nearest_code, with_float32_neighbours

from dsv4.quant import e2m1, e4m3, e8m0
from dsv4.quant.block_scales import (
    FP4_BLOCK,
    Block,
    block_amax,
    decode_scale,
    dequantize_fp4,
    dequantize_fp8,
    expand_scale,
    power_of_two_above,
    quantize_fp4,
    quantize_fp8,
    scale_shape,
)

SMALL_BLOCK = Block(4, 3)
SHAPES = [(4, 3), (8, 6), (5, 7), (1, 1), (3, 9, 4), (2, 1, 6, 5), (128, 1)]
RELEASE_SHAPES = [((256, 256), Block(128, 128)), ((130, 257), Block(128, 128)), ((2, 33, 95), Block(32, 32))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_index(scale: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """The scale of every element, looked up one by one: an element's block is its position divided by the block."""
    expanded = torch.empty(shape, dtype=scale.dtype)
    for index in np.ndindex(*shape):
        *batch, row, column = index
        expanded[index] = scale[(*batch, row // block.rows, column // block.columns)]
    return expanded


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((4096, 2048), Block(128, 128), (32, 16)),
        ((129, 128), Block(128, 128), (2, 1)),
        ((1, 1), Block(128, 128), (1, 1)),
        ((64, 4096), FP4_BLOCK, (64, 128)),
        ((64, 33), FP4_BLOCK, (64, 2)),
        ((5, 0, 7), Block(2, 2), (5, 0, 4)),
    ],
)
def test_scale_shape(shape: tuple[int, ...], block: Block, expected: tuple[int, ...]) -> None:
    assert scale_shape(shape, block) == expected


@pytest.mark.parametrize("shape", [(), (7,)])
def test_scale_shape_needs_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two dimensions"):
        scale_shape(shape, FP4_BLOCK)


@pytest.mark.parametrize("shape", SHAPES)
def test_expand_scale(shape: tuple[int, ...]) -> None:
    scale = torch.rand(scale_shape(shape, SMALL_BLOCK), generator=generator())
    assert torch.equal(expand_scale(scale, shape, SMALL_BLOCK), by_index(scale, shape, SMALL_BLOCK))


@pytest.mark.parametrize("shape", [(1, 3), (2, 2, 1), (2, 2), (3, 1), (2,)])
def test_expand_scale_refuses_a_misfit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a weight \[8, 3\] needs \[2, 1\]"):
        expand_scale(torch.ones(shape), (8, 3), SMALL_BLOCK)


def test_decode_scale_takes_all_three_forms() -> None:
    bytes_ = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    values = decode_scale(bytes_)
    assert [Fraction(v) for v in values.tolist()] == list(E8M0_VALUES)
    assert torch.equal(decode_scale(bytes_.view(torch.float8_e8m0fnu)), values)
    assert decode_scale(values) is values


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_decode_scale_refuses_what_is_no_scale(bad: float) -> None:
    with pytest.raises(ValueError, match="not positive and finite"):
        decode_scale(torch.tensor([[1.0, bad]]))


def test_decode_scale_refuses_byte_255() -> None:
    with pytest.raises(ValueError, match="byte 255 is NaN"):
        decode_scale(torch.tensor([[127, 255]], dtype=torch.uint8))


def test_dequantize_fp4_every_code_with_every_scale() -> None:
    # Row s holds all 16 codes twice under scale byte s; from byte 252 on, 6 * 2**(s-127) is beyond float32 and refused.
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(252, 32)
    scale = torch.arange(252, dtype=torch.int32).to(torch.uint8)[:, None]
    values = dequantize_fp4(e2m1.pack(codes), scale)
    for row, scale_value in enumerate(E8M0_VALUES[:252]):
        expected = [magnitude * scale_value for magnitude in E2M1_MAGNITUDES]
        assert [Fraction(v) for v in values[row, :8].tolist()] == expected
        assert [Fraction(-v) for v in values[row, 8:16].tolist()] == expected
    assert torch.signbit(values[:, 8:16]).all() and not torch.signbit(values[:, :8]).any()


@pytest.mark.parametrize(("code", "byte"), [(7, 253), (7, 254), (4, 254), (15, 253)])
def test_dequantize_fp4_refuses_what_float32_cannot_hold(code: int, byte: int) -> None:
    packed = e2m1.pack(torch.full((1, 32), code, dtype=torch.uint8))
    with pytest.raises(ValueError, match="exceeds float32"):
        dequantize_fp4(packed, torch.tensor([[byte]], dtype=torch.uint8))


def test_dequantize_fp4_ragged_and_batched() -> None:
    shape = (2, 3, 70)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator())
    scale = torch.randint(100, 140, scale_shape(shape, FP4_BLOCK), dtype=torch.uint8, generator=generator(1))
    values = dequantize_fp4(e2m1.pack(codes), scale).numpy()
    theirs = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    theirs *= np.exp2(by_index(scale, shape, FP4_BLOCK).numpy().astype(np.float32) - 127)
    assert values.view(np.int32).tolist() == theirs.view(np.int32).tolist()


def test_dequantize_fp8_every_code_with_many_scales() -> None:
    scale_bytes = torch.tensor([0, 1, 2, 3, 60, 126, 127, 128, 200, 245, 246], dtype=torch.uint8)[:, None]
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    codes = torch.tensor(numbers, dtype=torch.uint8).expand(len(scale_bytes), 254)
    values = dequantize_fp8(codes, scale_bytes, Block(1, 254))
    for row, byte in enumerate(scale_bytes.flatten().tolist()):
        # Bits below 2**-149 do not occur: 2**-9 * 2**-127 = 2**-136.
        magnitudes = [magnitude * E8M0_VALUES[byte] for magnitude in E4M3_MAGNITUDES]
        assert [Fraction(v) for v in values[row].tolist()] == [*magnitudes, *(-m for m in magnitudes)]
    assert torch.signbit(values[:, 127]).all()


def test_dequantize_fp8_keeps_nan_and_refuses_overflow() -> None:
    codes = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8)
    values = dequantize_fp8(codes, torch.ones(1, 1), Block(128, 128))
    assert torch.isnan(values).tolist() == [[True, True, False]] and values[0, 2] == 1
    with pytest.raises(ValueError, match="exceeds float32"):
        dequantize_fp8(torch.tensor([[0x7E]], dtype=torch.uint8), torch.full((1, 1), 2.0**120), Block(128, 128))


def test_dequantize_fp8_with_a_float32_scale_rounds_once() -> None:
    codes = torch.tensor([[code for code in range(256) if code & 0x7F != 0x7F]], dtype=torch.uint8)
    scale = torch.tensor([[0.1234567]])
    values = dequantize_fp8(codes, scale, Block(1, 254))
    # A product of 4 and 24 significant bits is exact in float64; the one rounding is numpy's, to float32.
    wide = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale.numpy().astype(np.float64)
    assert values.numpy().view(np.int32).tolist() == wide.astype(np.float32).view(np.int32).tolist()


@pytest.mark.parametrize(("shape", "block"), RELEASE_SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.fast_cases(1)
def test_dequantize_fp8_ragged_and_batched(shape: tuple[int, ...], block: Block, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 127, shape, dtype=torch.uint8, generator=generator())
    scale = torch.randint(110, 140, scale_shape(shape, block), dtype=torch.uint8, generator=generator(1))
    stored = e8m0.decode(scale) if dtype == torch.float32 else scale
    values = dequantize_fp8(codes.view(torch.float8_e4m3fn), stored, block).numpy()
    theirs = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    theirs *= np.exp2(by_index(scale, shape, block).numpy().astype(np.float32) - 127)
    assert values.view(np.int32).tolist() == theirs.view(np.int32).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_block_amax(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=generator())
    amax = block_amax(values, SMALL_BLOCK)
    expected = torch.zeros(scale_shape(shape, SMALL_BLOCK))
    for index in np.ndindex(*shape):
        *batch, row, column = index
        at = (*batch, row // 4, column // 3)
        expected[at] = max(expected[at], abs(values[index]))
    assert torch.equal(amax, expected)


def smallest_power(amax: float, largest_code: float) -> int:
    """The byte of the smallest power of two s with amax / s <= largest_code, by trying all."""
    return next((byte for byte in range(255) if amax <= Fraction(largest_code) * E8M0_VALUES[byte]), 254)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [e2m1.MAX, e4m3.MAX])
def test_power_of_two_above(largest: float) -> None:
    normal = [largest * 2.0**e for e in range(-117, 119)]
    values = [v for v in with_float32_neighbours(normal) if v < float("inf")]
    # Further down the quotient is subnormal and rounds, so only the powers themselves are asked for.
    values += [largest * 2.0**e for e in range(-127, -117)]
    values += torch.rand(200, generator=generator()).mul(1000).tolist()
    found = power_of_two_above(torch.tensor(values), largest).tolist()
    assert found == [smallest_power(v, largest) for v in torch.tensor(values).tolist()]


def test_power_of_two_above_zero_is_one() -> None:
    assert power_of_two_above(torch.zeros(3), e4m3.MAX).tolist() == [127] * 3


def quantization_input(shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=generator()) * torch.exp2(torch.randint(-6, 6, shape, generator=generator(1)))
    values.flatten()[::7] = -0.0
    return values


@pytest.mark.parametrize(
    ("shape", "block"), [((5, 7), SMALL_BLOCK), ((3, 9, 4), SMALL_BLOCK), ((40, 33), Block(32, 32))]
)
@pytest.mark.fast_cases(1)
def test_quantize_fp8_is_nearest(shape: tuple[int, ...], block: Block) -> None:
    values = quantization_input(shape)
    codes, scale = quantize_fp8(values, block)
    assert (codes.shape, scale.shape) == (shape, scale_shape(shape, block))
    amax = block_amax(values, block)
    assert scale.flatten().tolist() == [smallest_power(v, 448) if v else 127 for v in amax.flatten().tolist()]
    scales = by_index(scale, shape, block).flatten().tolist()
    for value, code, byte in zip(values.flatten(), codes.flatten().tolist(), scales, strict=True):
        assert code & 0x7F == nearest_code(abs(Fraction(value.item())) / E8M0_VALUES[byte], E4M3_MAGNITUDES)
        assert bool(code & 0x80) == bool(torch.signbit(value))


@pytest.mark.parametrize("shape", [(4, 32), (3, 70), (2, 2, 64)])
def test_quantize_fp4_is_nearest(shape: tuple[int, ...]) -> None:
    values = quantization_input(shape)
    packed, scale = quantize_fp4(values)
    assert (packed.shape, scale.shape) == ((*shape[:-1], shape[-1] // 2), scale_shape(shape, FP4_BLOCK))
    amax = block_amax(values, FP4_BLOCK)
    assert scale.flatten().tolist() == [smallest_power(v, 6) if v else 127 for v in amax.flatten().tolist()]
    scales = by_index(scale, shape, FP4_BLOCK).flatten().tolist()
    for value, code, byte in zip(values.flatten(), e2m1.unpack(packed).flatten().tolist(), scales, strict=True):
        assert code & 7 == nearest_code(abs(Fraction(value.item())) / E8M0_VALUES[byte], E2M1_MAGNITUDES)
        assert bool(code & 8) == bool(torch.signbit(value))


def test_quantize_at_the_ends_of_float32() -> None:
    tiny, huge = 2.0**-149, 3.4028234663852886e38
    for values in (torch.full((1, 32), tiny), torch.full((1, 32), huge), torch.full((1, 32), 2.0**-127)):
        codes, scale = quantize_fp8(values, FP4_BLOCK)
        assert int(scale) <= 254
        expected = nearest_code(Fraction(values[0, 0].item()) / E8M0_VALUES[int(scale)], E4M3_MAGNITUDES)
        assert codes.unique().tolist() == [expected]
        packed, scale = quantize_fp4(values)
        expected = nearest_code(Fraction(values[0, 0].item()) / E8M0_VALUES[int(scale)], E2M1_MAGNITUDES)
        assert e2m1.unpack(packed).unique().tolist() == [expected]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_refuses_nan_and_infinity(bad: float) -> None:
    values = torch.full((1, 32), bad)
    with pytest.raises(ValueError, match="cannot be quantized"):
        quantize_fp8(values, Block(128, 128))
    with pytest.raises(ValueError, match="cannot be quantized"):
        quantize_fp4(values)


def test_quantize_inverts_dequantize() -> None:
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8, generator=generator())
    codes[:, ::32] = 0b0_11_1  # every group holds a 6, so its scale is the one that quantize_fp4 chooses
    scale = torch.randint(1, 250, (8, 2), dtype=torch.uint8, generator=generator(1))
    packed, found = quantize_fp4(dequantize_fp4(e2m1.pack(codes), scale))
    assert torch.equal(packed, e2m1.pack(codes)) and torch.equal(found, scale)
