"""FP4 and FP8 -> BF16: exact with power-of-two scales, rounded once with others, against fractions and ml_dtypes."""

import math
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import E2M1_MAGNITUDES, E4M3_MAGNITUDES, E8M0_VALUES, power

from dsv4.quant import e2m1, e8m0
from dsv4.quant.block_scales import Block
from dsv4.quant.to_bf16 import always_exact, from_fp4, from_fp8

NUMBERS = [code for code in range(256) if code & 0x7F != 0x7F]
ROW = Block(1, 254)


@cache
def nearest_bf16(value: Fraction) -> Fraction | None:
    """The bfloat16 nearest to a positive number, ties to even; None beyond the largest. 8 bits, 2**-133 at least."""
    if value == 0:
        return Fraction(0)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < power(exponent)
    step = power(max(exponent, -126) - 7)
    rounded = round(value / step) * step  # Python rounds a Fraction's ties to even
    return rounded if rounded < power(128) else None


def signed(codes: list[int], magnitudes: list[Fraction], sign: int) -> list[Fraction]:
    return [-m if code & sign else m for code, m in zip(codes, magnitudes, strict=True)]


@pytest.mark.parametrize("byte", [0, 1, 2, 3, 10, 127, 240, 245, 246, 247, 250, 252, 253, 254])
def test_fp4_every_code(byte: int) -> None:
    codes = list(range(16)) * 2
    packed = e2m1.pack(torch.tensor([codes], dtype=torch.uint8))
    form = from_fp4(packed, torch.tensor([[byte]], dtype=torch.uint8))
    magnitudes = [E2M1_MAGNITUDES[code & 7] * E8M0_VALUES[byte] for code in codes]
    check(form.values[0], signed(codes, magnitudes, 8), form.changed)
    assert torch.signbit(form.values[0, 8]) and not torch.signbit(form.values[0, 0])


def check(values: torch.Tensor, exact: list[Fraction], changed: int) -> None:
    differing = 0
    for got, value in zip(values.tolist(), exact, strict=True):
        expected = nearest_bf16(abs(value))
        differing += expected != abs(value)
        assert (abs(got) == float("inf")) if expected is None else Fraction(abs(got)) == expected
        assert value == 0 or math.copysign(1, got) == (-1 if value < 0 else 1)
    assert changed == differing


@pytest.mark.parametrize("byte", [0, 1, 2, 3, 10, 127, 240, 245, 246, 247, 250, 254])
@pytest.mark.parametrize("as_float32", [False, True])
def test_fp8_every_code(byte: int, as_float32: bool) -> None:
    scale = torch.tensor([[byte]], dtype=torch.uint8)
    form = from_fp8(torch.tensor([NUMBERS], dtype=torch.uint8), e8m0.decode(scale) if as_float32 else scale, ROW)
    magnitudes = [E4M3_MAGNITUDES[code & 0x7F] * E8M0_VALUES[byte] for code in NUMBERS]
    check(form.values[0], signed(NUMBERS, magnitudes, 0x80), form.changed)
    if 20 < byte < 240:
        assert form.changed == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_float32_scale_rounds_once(seed: int) -> None:
    scale = torch.rand((200, 1), generator=torch.Generator().manual_seed(seed)) + 0.01
    codes = torch.tensor([NUMBERS], dtype=torch.uint8).expand(200, -1)
    form = from_fp8(codes, scale, ROW)
    # 4 + 24 bits are exact in float64; ml_dtypes then rounds to bfloat16 once.
    wide = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale.numpy().astype(np.float64)
    assert torch.equal(form.values.view(torch.int16), _bf16_once(wide))
    assert form.changed == int((form.values.double().numpy() != wide).sum())


def _bf16_once(wide: np.ndarray) -> torch.Tensor:
    """float64 -> the bits of the nearest bfloat16, ties to even, for normal numbers; integer arithmetic on the bits."""
    bits = np.abs(wide).view(np.uint64)
    kept, rest, half = bits >> 45, bits & ((1 << 45) - 1), np.uint64(1 << 44)
    kept = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    rounded = (kept << 45).view(np.float64) * np.where(np.signbit(wide), -1.0, 1.0)
    return torch.from_numpy(rounded.astype(np.float32)).to(torch.bfloat16).view(torch.int16)


def test_a_product_just_beside_a_tie_is_not_rounded_twice() -> None:
    # 1.875 * scale lies just above or below the middle of two BF16 values, closer than float32 can tell.
    found = 0
    for candidate in range(1 << 23, (1 << 23) + 60000):
        scale = Fraction(candidate, 1 << 23)
        product = scale * Fraction(15, 8)
        single = Fraction(float(np.float32(float(product))))
        tie = (single / power(-8)).denominator == 1 and (single / power(-8)).numerator % 2 == 1
        if not tie or single == product:
            continue
        found += 1
        form = from_fp8(
            torch.tensor([[0b0_0111_111, 0b1_0111_111]], dtype=torch.uint8), torch.tensor([[float(scale)]]), ROW
        )
        expected = nearest_bf16(product)
        assert expected is not None
        assert [Fraction(v) for v in form.values[0].tolist()] == [expected, -expected]
        assert form.changed == 2
    assert found


def test_nan_stays_nan_and_is_not_counted() -> None:
    codes = torch.tensor([[0x7F, 0xFF, 0x38]], dtype=torch.uint8)
    for scale in (torch.full((1, 1), 127, dtype=torch.uint8), torch.full((1, 1), 1.0), torch.full((1, 1), 1.25)):
        form = from_fp8(codes, scale, ROW)
        assert torch.isnan(form.values).tolist() == [[True, True, False]] and form.changed == 0


def test_always_exact_never_promises_too_much() -> None:
    every = e8m0.decode(torch.arange(255, dtype=torch.int32).to(torch.uint8))
    for byte, scale in enumerate(every):
        if always_exact(scale[None]):
            assert from_fp8(torch.tensor([NUMBERS], dtype=torch.uint8), scale.view(1, 1), ROW).changed == 0
        else:
            assert not 20 < byte < 235
    assert not always_exact(torch.tensor([1.0, 1.5]))
