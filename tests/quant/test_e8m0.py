"""float8_e8m0fnu: all bytes, all midpoints and their float32 neighbours, against ml_dtypes and against fractions.

ml_dtypes is the oracle for normal float32 up to 1.5 * 2**127. Above, it makes NaN of what we saturate; below 2**-126,
where float32 is subnormal, ml_dtypes 0.6 rounds all that exceeds 2**-127 up to 2**-126, though the midpoint is
1.5 * 2**-127. There the fractions decide.
"""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import E8M0_VALUES, midpoints, with_float32_neighbours

from dsv4.quant import e8m0

ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def nearest_byte(value: float) -> int:
    """Nearest of the 255 powers, a tie going up: both neighbours of a tie have an empty mantissa, none is "even"."""
    return min(range(255), key=lambda byte: (abs(E8M0_VALUES[byte] - Fraction(value)), -byte))


def test_decode_every_byte() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    ours = e8m0.decode(ALL_BYTES).numpy()
    assert ours[:255].view(np.int32).tolist() == theirs[:255].view(np.int32).tolist()
    assert [Fraction(float(v)) for v in ours[:255]] == list(E8M0_VALUES)
    assert np.isnan(ours[255]) and np.isnan(theirs[255])


def test_decode_takes_both_dtypes_and_any_shape() -> None:
    bytes_ = ALL_BYTES.view(2, 8, 16)
    as_scales = e8m0.decode(bytes_.view(torch.float8_e8m0fnu))
    assert torch.equal(as_scales.view(torch.int32), e8m0.decode(bytes_).view(torch.int32))
    assert as_scales.shape == (2, 8, 16)


def test_encode_in_the_format_s_range() -> None:
    values = torch.tensor(with_float32_neighbours([*E8M0_VALUES[2:], *midpoints(E8M0_VALUES)[1:]]))
    assert values.min() > 2.0**-126 and len(values) == 3 * (253 + 253)
    codes = e8m0.encode(values).tolist()
    assert codes == values.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist()


def test_encode_against_fractions_at_both_ends() -> None:
    low = with_float32_neighbours([2.0**-127, 2.0**-126, 2.0**-128, Fraction(3, 2) * Fraction(2) ** -127])
    low += [2.0**-149, 2.0**-148, 2.0**-140]
    high = [*with_float32_neighbours([2.0**126, 1.5 * 2.0**126, 2.0**127, 1.5 * 2.0**127]), 3.4028234663852886e38]
    values = torch.tensor(low + high)
    codes = e8m0.encode(values).tolist()
    assert codes == [nearest_byte(v) for v in values.tolist()]
    assert codes[low.index(2.0**-149)] == 0 and codes[-1] == 254


def test_encode_inverts_decode() -> None:
    assert e8m0.encode(e8m0.decode(ALL_BYTES)).tolist() == list(range(256))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, -(2.0**-149), float("inf"), float("-inf")])
def test_encode_refuses_what_the_format_lacks(bad: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        e8m0.encode(torch.tensor([1.0, bad]))


def test_exact_on_every_power() -> None:
    assert e8m0.exact(e8m0.decode(ALL_BYTES[:255])).tolist() == list(range(255))


def not_powers() -> list[float]:
    beside = [v for v in with_float32_neighbours(E8M0_VALUES) if Fraction(v) not in set(E8M0_VALUES)]
    return [*beside, 0.0, -1.0, -(2.0**-127), 2.0**-128, 2.0**-149, float("inf"), float("nan")]


def test_exact_refuses_everything_else() -> None:
    for value in not_powers():
        with pytest.raises(ValueError, match="not a power of two"):
            e8m0.exact(torch.tensor([1.0, value]))
