"""The checks on bytes against ml_dtypes' and torch's floats: every code, every edge, anywhere in the data."""

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4.model.reading import checks

LOOK = checks.BYTES_PER_LOOK
BIG = 2 * LOOK + 3  # elements: begins a third look, of any dtype


def with_one(value: int, filler: int, kind: torch.dtype, at: int, count: int = BIG) -> torch.Tensor:
    """`count` times `filler`, but for one element: integers of the width of `kind`, as `kind`."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    data = torch.full((count,), filler, dtype=integers)
    data[at] = value
    return data.view(kind)


@pytest.mark.parametrize("at", [0, LOOK - 1, LOOK, BIG - 1])
def test_every_e4m3_code(at: int) -> None:
    nan = np.isnan(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert nan.sum() == 2
    for code in range(256):
        for filler in (0x7E, 0xFE):
            assert checks.has_nan(with_one(code, filler, torch.float8_e4m3fn, at)) == nan[code], (code, filler)


@pytest.mark.parametrize("at", [0, LOOK, BIG - 1])
def test_every_e8m0_byte(at: int) -> None:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    for byte in range(256):
        scale = with_one(byte, 127, torch.float8_e8m0fnu, at)
        assert checks.are_scales(scale) == bool(np.isfinite(values[byte])), byte
        moderate = 2.0**-60 <= values[byte] <= 2.0**60
        assert checks.are_moderate_powers_of_two(scale) == moderate, byte


FLOATS = [
    0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1.5, 3.0, 1e-45, 2.0**-126, 2.0**127, 3.4e38,
    2.0**-60, 2.0**-61, 2.0**60, 2.0**61, 2.0**60 * 1.5,
]  # fmt: skip


@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize("at", [0, LOOK // 4 - 1, LOOK // 4, BIG - 1])
def test_float32_scales(value: float, at: int) -> None:
    scale = torch.full((BIG,), 2.0**-7)
    scale[at] = value
    assert checks.are_scales(scale) == (value > 0 and np.isfinite(value))
    if value > 0 and np.isfinite(value):
        fraction, exponent = np.frexp(value)
        assert checks.are_moderate_powers_of_two(scale) == (fraction == 0.5 and abs(exponent - 1) <= 60)


@pytest.mark.parametrize("at", [0, LOOK // 2 - 1, LOOK // 2, BIG - 1])
def test_tiny_bfloat16(at: int) -> None:
    smallest = 2.0**-checks.MODERATE_EXPONENT
    patterns = [0, 1, 0x7F, 0x80, 0x3F80, 0x7F80, 0x7FC0, *range(0x2170, 0x2190)]
    patterns += [pattern - 0x8000 for pattern in patterns]
    tiny = 0
    for pattern in patterns:
        values = with_one(pattern, 0, torch.bfloat16, at)
        magnitude = abs(float(values[at]))
        expected = 0 < magnitude < smallest
        assert checks.has_tiny_values(values.view(1, -1)) == expected, pattern
        tiny += expected
    assert 0 < tiny < len(patterns)


def test_nothing_is_tiny_or_nan_in_nothing() -> None:
    assert not checks.has_nan(torch.empty(0, dtype=torch.float8_e4m3fn))
    assert not checks.has_tiny_values(torch.empty(0, 4, dtype=torch.bfloat16))
