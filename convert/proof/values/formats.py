"""Number formats, stated by `verify` for itself: tables computed in integers from the formats' definitions.

A finite value is `(-1)^negative * mantissa * 2^exponent` with an odd mantissa (zero: mantissa 0), so two values are
equal exactly when these integers are equal. Nothing is rounded: at the ends of E8M0 a product such as 6 * 2^127 is too
large for float32, and `(3, 128)` still represents it.

    format  sign exponent mantissa bias  meaning of the all-ones exponent
    E2M1      1      2        1      1   ordinary numbers (largest 6)
    E4M3      1      4        3      7   ordinary numbers but for 0x7F, 0xFF = NaN (largest 448)
    BF16      1      8        7    127   infinity, NaN
    F32       1      8       23    127   infinity, NaN

`conversion_table(narrow, wide)` gives, for every byte of narrow codes and every difference of block exponents, the wide
codes of the same values. It makes verifying as fast as reading: comparing a billion products becomes a table lookup and
a comparison of bytes. The table is computed here, code by code in integers, without any conversion of torch or of the
converter.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: a sign bit, `exponent_bits`, `mantissa_bits`, and which codes are not finite."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Literal["none", "last code", "last exponent"]

    @property
    def bits(self) -> int:
        """Size of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign(self) -> int:
        """The code of -0."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def lowest(self) -> int:
        """Exponent of the smallest subnormal, of which all values are multiples."""
        return 1 - self.bias - self.mantissa_bits

    @property
    def highest(self) -> int:
        """Exponent of the largest power of two."""
        return (1 << self.exponent_bits) - (2 if self.specials == "last exponent" else 1) - self.bias

    @property
    def first_special(self) -> int:
        """The first code (without sign) that is not a finite number; one past the last code if all are."""
        if self.specials == "last exponent":
            return ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return self.sign - (self.specials == "last code")

    @property
    def nan(self) -> int:
        """A NaN code, for formats that have one."""
        return self.sign - 1


E2M1 = Format("E2M1", 2, 1, 1, "none")
E4M3 = Format("E4M3", 4, 3, 7, "last code")
BF16 = Format("BF16", 8, 7, 127, "last exponent")
F32 = Format("F32", 8, 23, 127, "last exponent")


@dataclass(frozen=True)
class Values:
    """Arrays of one shape: value = (-1)^negative * mantissa * 2^exponent; `special` marks NaN and infinity."""

    negative: Array
    mantissa: Array  # int64, odd, or 0
    exponent: Array  # int64, 0 where the mantissa is 0
    special: Array


def normalize_mantissa(mantissa: Array, exponent: Array) -> tuple[Array, Array]:
    """`mantissa * 2^exponent` with an odd mantissa: its factors of two move into the exponent. Zero becomes (0, 0)."""
    lowest_bit = mantissa & -mantissa
    # float64 holds a single bit below 2^53 exactly; frexp(2^k) is (0.5, k + 1).
    shift = np.where(mantissa == 0, 0, np.frexp(lowest_bit.astype(np.float64))[1].astype(np.int64) - 1)
    return mantissa >> shift, np.where(mantissa == 0, 0, exponent + shift)


def decode(number_format: Format, codes: Array) -> Values:
    """Codes (any unsigned integer array) to exact values."""
    codes = codes.astype(np.int64)
    field = (codes >> number_format.mantissa_bits) & ((1 << number_format.exponent_bits) - 1)
    fraction = codes & ((1 << number_format.mantissa_bits) - 1)
    mantissa = np.where(field == 0, fraction, fraction | (1 << number_format.mantissa_bits))
    exponent = np.maximum(field, 1) - 1 + number_format.lowest
    mantissa, exponent = normalize_mantissa(mantissa, exponent)
    special = (codes & (number_format.sign - 1)) >= number_format.first_special
    return Values((codes & number_format.sign) != 0, mantissa, exponent, special)


def encode(number_format: Format, mantissa: int, exponent: int) -> int | None:
    """The code of the positive value `mantissa * 2^exponent` (odd mantissa), or None when there is no such code."""
    length = mantissa.bit_length()
    field = exponent + length - 1 + number_format.bias
    if field < 1:  # subnormal: a multiple of 2^lowest
        shift = exponent - number_format.lowest
        return mantissa << shift if shift >= 0 else None
    if length > number_format.mantissa_bits + 1:
        return None
    fraction = (mantissa << (number_format.mantissa_bits + 1 - length)) - (1 << number_format.mantissa_bits)
    code = (field << number_format.mantissa_bits) | fraction
    return code if code < number_format.first_special else None


@dataclass(frozen=True)
class ConversionTable:
    """For a byte of narrow codes and an exponent difference `d`: the wide codes of the same values.

    `signed[d - first, byte]` keeps the sign of zero, `folded` has +0 for both zeros. The first and the last row stand
    for all differences beyond them: there only zeros have a wide code. A narrow code without a wide code has the wide
    NaN as its entry, and `complete[d - first]` is False: a match in such a row proves something only if the wide side
    holds no NaN.
    """

    first: int
    signed: Array
    folded: Array
    complete: Array


def _code_table(narrow: Format, wide: Format, first: int, last: int, keep_sign: bool) -> Array:
    """One row per difference, one column per narrow code: the wide code."""
    values = decode(narrow, np.arange(1 << narrow.bits))
    none = wide.nan if wide.specials != "none" else 1 << wide.bits
    rows = np.full((last - first + 1, 1 << narrow.bits), none, dtype=np.int64)
    for code in range(1 << narrow.bits):
        sign = wide.sign if values.negative[code] else 0
        if values.special[code]:
            continue
        if values.mantissa[code] == 0:
            rows[:, code] = sign if keep_sign else 0
            continue
        for row, difference in enumerate(range(first, last + 1)):
            found = encode(wide, int(values.mantissa[code]), int(values.exponent[code]) + difference)
            if found is not None:
                rows[row, code] = found | sign
    return rows


def _per_byte(codes: Array, narrow: Format, wide: Format) -> Array:
    """Wide codes per narrow byte: for E2M1 both nibbles, the low one first in memory (little endian)."""
    if narrow.bits == 8:
        return codes.astype(f"uint{wide.bits}")
    byte = np.arange(256)
    low, high = codes[:, byte & 15].astype(np.uint64), codes[:, byte >> 4].astype(np.uint64)
    return (low | (high << np.uint64(wide.bits))).astype(f"uint{2 * wide.bits}")


@cache
def conversion_table(narrow: Format, wide: Format) -> ConversionTable:
    """The table of a pair of formats. `narrow` is E2M1 or E4M3, and `has_table` says which pairs exist.

    E2M1 to E2M1 does not: E2M1 has no NaN that could mark a missing code.
    """
    finite = decode(narrow, np.arange(1, narrow.first_special))
    tops = finite.exponent + np.frexp(finite.mantissa.astype(np.float64))[1] - 1
    first = wide.lowest - int(tops.max()) - 1
    last = wide.highest - int(tops.min()) + 1
    signed = _code_table(narrow, wide, first, last, keep_sign=True)
    folded = _code_table(narrow, wide, first, last, keep_sign=False)
    ordinary = np.arange(1 << narrow.bits) & (narrow.sign - 1)
    gaps = (folded == wide.nan)[:, ordinary < narrow.first_special].any(axis=1)
    special = narrow.specials != "none"  # a narrow NaN maps to the wide NaN in every row
    return ConversionTable(
        first, _per_byte(signed, narrow, wide), _per_byte(folded, narrow, wide), ~gaps & (not special)
    )


def has_table(narrow: Format, wide: Format) -> bool:
    """Whether `conversion_table` exists for the pair."""
    return (narrow is E2M1 and wide in (E4M3, BF16, F32)) or (narrow is E4M3 and wide in (E4M3, BF16, F32))


def unpack(number_format: Format, data: Array) -> Array:
    """Bytes `[rows, row bytes]` (uint8) to one code per element `[rows, columns]`; E2M1: low nibble first."""
    if number_format.bits == 4:
        return np.stack((data & 15, data >> 4), axis=-1).reshape(data.shape[0], -1)
    return data if number_format.bits == 8 else data.view(f"<u{number_format.bits // 8}")
