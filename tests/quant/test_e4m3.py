"""float8_e4m3fn: all codes, all midpoints and their float32 neighbours, against ml_dtypes and against fractions."""

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import E4M3_MAGNITUDES, midpoints, nearest_code, with_float32_neighbours

from dsv4.quant import e4m3

ALL_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def test_decode_every_code() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = e4m3.decode(ALL_CODES).numpy()
    nan = [0x7F, 0xFF]
    assert np.flatnonzero(np.isnan(ours)).tolist() == nan == np.flatnonzero(np.isnan(theirs)).tolist()
    number = ~np.isnan(theirs)
    assert ours.view(np.int32)[number].tolist() == theirs.view(np.int32)[number].tolist()
    assert np.signbit(ours[nan]).tolist() == [False, True]
    assert ours[:127].tolist() == [float(v) for v in E4M3_MAGNITUDES]


def test_decode_takes_both_dtypes() -> None:
    codes = ALL_CODES.view(4, 64)
    as_floats = e4m3.decode(codes.view(torch.float8_e4m3fn))
    assert torch.equal(as_floats.view(torch.int32), e4m3.decode(codes).view(torch.int32))
    assert as_floats.shape == (4, 64)


def in_range() -> torch.Tensor:
    """Every value, every midpoint, the float32 next to each, both signs; up to 464, the midpoint above 448."""
    positive = [0.0, *with_float32_neighbours([*E4M3_MAGNITUDES[1:], *midpoints(E4M3_MAGNITUDES)]), 463.99997, 464.0]
    positive += [2.0**-149, 2.0**-126, 2.0**-11]
    return torch.tensor(positive + [-value for value in positive], dtype=torch.float32)


def expected_codes(values: torch.Tensor) -> list[int]:
    return [nearest_code(abs(v), E4M3_MAGNITUDES) + 128 * bool(np.signbit(np.float32(v))) for v in values.tolist()]


def test_encode_is_nearest_ties_to_even() -> None:
    values = in_range()
    codes = e4m3.encode(values).tolist()
    assert codes == values.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()
    assert codes == expected_codes(values)


def test_encode_saturates() -> None:
    # ml_dtypes makes NaN of what exceeds 464; saturating is our choice, so the oracle here is the fractions.
    values = torch.tensor([464.00003, 480.0, 1e9, 3.4028234663852886e38, -464.00003, -1e30])
    assert e4m3.encode(values).tolist() == expected_codes(values) == [0x7E] * 4 + [0xFE] * 2


def test_encode_inverts_decode() -> None:
    assert e4m3.encode(e4m3.decode(ALL_CODES)).tolist() == list(range(256))


def test_encode_keeps_the_sign_of_what_rounds_to_zero() -> None:
    assert e4m3.encode(torch.tensor([0.0, -0.0, 2.0**-11, -(2.0**-11), -(2.0**-149)])).tolist() == [0, 128, 0, 128, 128]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encode_half_precision(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = every[torch.isfinite(every)]
    saturated = values.float().clamp(-448, 448)
    assert e4m3.encode(values).tolist() == saturated.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_encode_refuses_infinity(bad: float) -> None:
    with pytest.raises(ValueError, match="no infinity"):
        e4m3.encode(torch.tensor([1.0, bad]))


def test_is_nan_on_every_code() -> None:
    assert e4m3.is_nan(ALL_CODES).nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert e4m3.is_nan(ALL_CODES.view(torch.float8_e4m3fn)).sum().item() == 2


def test_the_constants_are_the_format_s() -> None:
    magnitudes = e4m3.decode(ALL_CODES[:127])
    assert magnitudes[0b1111_110].item() == e4m3.MAX == max(E4M3_MAGNITUDES)
    assert magnitudes[0b0001_000].item() == 2.0**e4m3.MIN_NORMAL_EXPONENT
    assert magnitudes[0b0000_001].item() == 2.0**e4m3.MIN_SUBNORMAL_EXPONENT
