"""Activation quantization: bits against ml_dtypes and exact arithmetic on fractions."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4.quant.activation import (
    group_scale,
    hadamard,
    quantize_fp4,
    quantize_fp4_e4m3,
    quantize_fp8,
    simulate_fp4,
    simulate_fp4_e4m3,
    simulate_fp8,
)


def smallest_power_of_two(amax: float, largest: float) -> float:
    """2**e with the smallest e such that amax * float32(1 / largest), rounded to float32, is at most 2**e."""
    quotient = float(np.float32(amax) * np.float32(1.0 / largest))
    mantissa, exponent = math.frexp(quotient)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def awkward_rows(width: int) -> torch.Tensor:
    """bfloat16 rows [n, width]: random, all zero, tiny, huge, one outlier, exact powers of two and their neighbours."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(width, generator=generator) * 10.0**e for e in range(-8, 9)]
    rows += [torch.zeros(width), torch.full((width,), -0.0), torch.full((width,), 1e-4), torch.full((width,), 1e-30)]
    outlier = torch.full((width,), 1e-3)
    outlier[3] = -3e4
    rows.append(outlier)
    for power in (-3, 0, 5):
        for factor in (448 * (1 - 2**-8), 448, 448 * (1 + 2**-8), 6, 6 * (1 + 2**-8)):
            rows.append(torch.linspace(-1, 1, width) * factor * 2.0**power)
    return torch.stack(rows).to(torch.bfloat16)


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_group_scale_is_the_smallest_power_that_fits(largest: float) -> None:
    values = [float(torch.tensor(v, dtype=torch.bfloat16)) for v in (1e-4, 0.75, 1, 5.97, 6, 6.03, 447, 448, 450, 3e4)]
    found = group_scale(torch.tensor(values), largest)
    assert found.tolist() == [smallest_power_of_two(v, largest) for v in values]


@pytest.mark.parametrize("group", [64, 128])
def test_fp8_codes_and_scales(group: int) -> None:
    x = awkward_rows(256)
    codes, scale = quantize_fp8(x, group)
    groups = x.to(torch.float32).numpy().reshape(len(x), -1, group)
    for row, col in np.ndindex(groups.shape[:2]):
        power = smallest_power_of_two(max(float(np.abs(groups[row, col]).max()), float(np.float32(1e-4))), 448.0)
        assert float(scale[row, col]) == power
        scaled = np.clip(groups[row, col] / np.float32(power), -448, 448)
        expected = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert (codes[row, col * group : (col + 1) * group].view(torch.uint8).numpy() == expected).all()


def test_fp4_codes_and_scales() -> None:
    x = awkward_rows(128)
    codes, scale = quantize_fp4(x)
    groups = x.to(torch.float32).numpy().reshape(len(x), -1, 32)
    for row, col in np.ndindex(groups.shape[:2]):
        power = smallest_power_of_two(max(float(np.abs(groups[row, col]).max()), 6 * 2.0**-126), 6.0)
        assert float(scale[row, col]) == power
        expected = (groups[row, col] / np.float32(power)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
        assert (codes[row, col * 32 : (col + 1) * 32].numpy() == expected).all()


def test_fp4_codes_with_e4m3_scales() -> None:
    x = awkward_rows(64)
    codes, scale = quantize_fp4_e4m3(x)
    groups = x.to(torch.float32).numpy().reshape(len(x), -1, 16)
    for row, col in np.ndindex(groups.shape[:2]):
        amax = max(np.abs(groups[row, col]).max(), np.float32(6 * 2.0**-9))
        expected_scale = np.minimum(amax / np.float32(6), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        assert float(scale[row, col]) == float(expected_scale)
        scaled = np.clip(groups[row, col] / np.float32(expected_scale), -6, 6)
        expected = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
        assert (codes[row, col * 16 : (col + 1) * 16].numpy() == expected).all()


@pytest.mark.parametrize("simulate", [simulate_fp8, simulate_fp4, simulate_fp4_e4m3])
def test_simulating_is_exact_in_bfloat16_and_stable(simulate: object) -> None:
    x = awkward_rows(128)
    once = simulate(x)  # type: ignore[operator]
    assert once.dtype == torch.bfloat16
    assert torch.equal(once.to(torch.float32), simulate(x.to(torch.float32)))  # type: ignore[operator]


def test_ragged_last_group_is_a_group_of_its_own() -> None:
    x = awkward_rows(160)
    whole = torch.cat((simulate_fp8(x[:, :128]), simulate_fp8(x[:, 128:], 32)), 1)
    assert torch.equal(simulate_fp8(x), whole)
    assert quantize_fp8(x)[1].shape == (len(x), 2)


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_hadamard_is_the_matrix(size: int) -> None:
    """Against the matrix of parities, on small integers, where float32 sums are exact."""
    matrix = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]).to(torch.float32)
    x = torch.randint(-8, 9, (5, size), generator=torch.Generator().manual_seed(1)).to(torch.float32)
    assert torch.equal(hadamard(x), x @ matrix * size**-0.5)
    assert hadamard(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, the last dimension is 12"):
        hadamard(torch.zeros(3, 12))


def test_values_are_nearest() -> None:
    """No E4M3 value of the group's scale is nearer to x than the chosen one (fractions, no rounding)."""
    x = awkward_rows(128)[:17]
    codes, scale = quantize_fp8(x)
    finite = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    grid = [Fraction(v) for v in finite[np.isfinite(finite)]]
    for row in range(0, 17, 4):
        power = Fraction(float(scale[row, 0]))
        for column in range(0, 128, 16):
            value = Fraction(float(x[row, column])) / power
            best = min(abs(value - g) for g in grid)
            assert abs(value - Fraction(float(codes[row, column].to(torch.float32)))) == best
