"""Slow, obvious versions of what `quant/` computes, in exact fractions. For tests only.

Each format is built here from its bit fields, not from anybody's table, so that a mistake in one place cannot hide
in the other.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np

Number = Fraction | float


def power(exponent: int) -> Fraction:
    """2**exponent."""
    return Fraction(2) ** exponent


def minifloat(exponent_field: int, mantissa: int, mantissa_bits: int, bias: int) -> Fraction:
    """Magnitude of a small float from its bit fields, subnormals included."""
    fraction = Fraction(mantissa, 1 << mantissa_bits)
    if exponent_field == 0:
        return fraction * power(1 - bias)
    return (1 + fraction) * power(exponent_field - bias)


E2M1_MAGNITUDES = tuple(minifloat(code >> 1, code & 1, 1, 1) for code in range(8))
E4M3_MAGNITUDES = tuple(minifloat(code >> 3, code & 7, 3, 7) for code in range(127))  # code 127 is NaN
E8M0_VALUES = tuple(power(code - 127) for code in range(255))  # code 255 is NaN
E4M3_SET = frozenset(E4M3_MAGNITUDES)


@cache
def nearest_code(magnitude: Number, table: tuple[Fraction, ...]) -> int:
    """Index of the entry of ascending `table` that is nearest, ties to the even index, beyond the end the last."""
    value = Fraction(magnitude)
    return min(range(len(table)), key=lambda code: (abs(table[code] - value), code % 2))


def midpoints(table: Sequence[Fraction]) -> list[Fraction]:
    """Halfway points between neighbours of an ascending table."""
    return [(low + high) / 2 for low, high in pairwise(table)]


def with_float32_neighbours(values: Iterable[Number]) -> list[float]:
    """Each value, the float32 just below and the float32 just above it. Every value must be a float32."""
    found: list[float] = []
    for value in values:
        single = np.float32(float(value))
        assert Fraction(float(single)) == Fraction(value)
        found += [float(np.nextafter(single, np.float32(-np.inf))), float(single)]
        found.append(float(np.nextafter(single, np.float32(np.inf))))
    return found


@cache
def exact_in_e4m3(magnitude_code: int, k: int) -> bool:
    """Whether E2M1 magnitude `magnitude_code` times 2**k is an E4M3 value."""
    return E2M1_MAGNITUDES[magnitude_code] * power(k) in E4M3_SET


def exact_scale_bytes(elements: Iterable[tuple[int, int]]) -> list[int]:
    """All of the 255 E8M0 bytes S with which every element of an FP8 block is exact, by trying each.

    `elements` are (E2M1 code, scale byte of its group).
    """
    distinct = {(code & 7, scale_byte) for code, scale_byte in elements}
    return [S for S in range(255) if all(exact_in_e4m3(code, scale - S) for code, scale in distinct)]


def chosen_scale_byte(elements: Sequence[tuple[int, int]], group_scales: Iterable[int]) -> tuple[int, bool]:
    """The rule for one block: (scale byte, exact?). The reference's if exact, else the closest exact one, else not.

    `group_scales` are the scale bytes of all groups of the block, those that hold only zeros included.
    """
    reference = max(group_scales) - 6
    exact = exact_scale_bytes(elements)
    if not exact:
        return max(reference, 0), False
    return min(exact, key=lambda S: abs(S - reference)), True
