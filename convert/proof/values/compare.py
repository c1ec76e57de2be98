"""Exact comparison of two row bands, whatever formats and block scales they are stored in.

Both sides are codes with block scales; the question is where `code * scale` differs. Two ways lead to the same answer:

- The lookup. When all scales are powers of two, a narrow byte and the difference of the two block exponents decide
  which wide codes have the same values (`formats.conversion_table`). Comparing bytes with the table's answer then
  compares values, at the speed of reading. Where bytes disagree, a second table that ignores the sign of zero
  separates values that differ from zeros that only changed sign. FP4 in FP8 is looked up by compiled code first
  (`compiled.py`); where that finds a difference, this form says which.
- The integers. Everything else (float32 scales that are not powers of two, scales that are not numbers, block sizes
  that do not divide each other) is decoded to `(negative, mantissa, exponent)` and multiplied in 64-bit integers:
  24 bits of scale times at most 24 bits of code.

NaN and infinity are equal to nothing, not even to themselves: no correct conversion holds them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from . import compiled
from .formats import (
    BF16,
    E2M1,
    E4M3,
    F32,
    Array,
    ConversionTable,
    Format,
    Values,
    conversion_table,
    decode,
    has_table,
    unpack,
)

SLOW_ELEMENTS = 1 << 16  # elements decoded to integers at a time: eight int64 arrays of them fit the cache


@dataclass
class Scales:
    """Block scales of a band as `mantissa * 2^exponent`: `[block rows, block columns]` each.

    `mantissa` is None when all scales are powers of two. A weight without a scale has exponent [[0]], and its block is
    the whole tensor. `bad` marks E8M0 255 and float32 scales that are not positive and finite; None if there are none.
    """

    exponent: Array  # int32
    mantissa: Array | None = None  # int64, odd
    bad: Array | None = None
    raw: Array | None = None  # the stored codes, for messages
    is_e8m0: bool = False  # raw: uint8, exponent + 127


@dataclass
class RowBand:
    """Consecutive rows of a weight: `data` is uint8 `[rows, row bytes]`, `scales` are the scales of these rows.

    `block` is (rows, columns) per scale, in elements. The band starts at a multiple of the block's rows.
    """

    number_format: Format
    data: Array
    columns: int
    scales: Scales
    block: tuple[int, int]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.data.shape[0])


@dataclass
class Comparison:
    """Result of comparing two bands of equal shape.

    `different` is bool `[rows, columns]`, or None if no value differs. `lost_sign` counts zeros that are negative in
    the first band and positive in the second, `gained_sign` the opposite.
    """

    different: Array | None = None
    lost_sign: int = 0
    gained_sign: int = 0


def no_scales() -> Scales:
    """Scales of a weight that has none: one block, 2^0."""
    return Scales(np.zeros((1, 1), dtype=np.int32))


def e8m0_scales(codes: Array) -> Scales:
    """E8M0 bytes `[block rows, block columns]`: code k is 2^(k - 127), 255 is NaN."""
    exponent = codes.astype(np.int32) - 127
    bad = codes == 255
    return Scales(exponent, None, bad if bad.any() else None, codes, is_e8m0=True)


def float_scales(codes: Array) -> Scales:
    """float32 codes (uint32) `[block rows, block columns]`; zero, negative, NaN and infinite scales are bad."""
    values = decode(F32, codes)
    bad = values.special | values.negative | (values.mantissa == 0)
    powers = bool((values.mantissa[~bad] == 1).all())
    exponent = np.where(bad, 0, values.exponent).astype(np.int32)
    return Scales(exponent, None if powers else np.where(bad, 1, values.mantissa), bad if bad.any() else None, codes)


def product_scales(codes: Array, factor: Array, divides: bool) -> Scales:
    """E4M3 codes (uint8) `[rows, columns / 16]` times one float32 (its bits, uint32 [1, 1]), or divided by it.

    Exact: 4 significant bits times 24. Zero is a scale here, of elements that are zero. NaN and negative scales are
    bad, and all of them if the factor is; as a divisor it has to be a power of two, else no quotient is exact.
    """
    first, second = decode(E4M3, codes), decode(F32, factor)
    unusable = second.special | second.negative | (second.mantissa == 0) | (divides & (second.mantissa != 1))
    bad = first.special | first.negative | unusable
    exponent = first.exponent + (-second.exponent if divides else second.exponent)
    mantissa = np.where(bad, 1, first.mantissa * second.mantissa)
    zero = mantissa == 0
    powers = bool((mantissa[~bad] == 1).all())
    exponent = np.where(bad | zero, 0, exponent).astype(np.int32)
    return Scales(exponent, None if powers else mantissa, bad if bad.any() else None, codes)


def _expand(values: Array, block: tuple[int, int], rows: int, columns: int, unit: int) -> Array:
    """Per-block values as `[rows, columns / unit]`; `unit` divides the block's columns."""
    if values.shape[0] == 1:
        tall = np.broadcast_to(values, (rows, values.shape[1]))
    else:
        tall = values if block[0] == 1 else np.repeat(values, block[0], axis=0)[:rows]
    if values.shape[1] == 1:
        return np.broadcast_to(tall, (rows, columns // unit))
    return tall if block[1] == unit else np.repeat(tall, block[1] // unit, axis=1)[:, : columns // unit]


def elementwise(values: Array, band: RowBand, start: int, stop: int) -> Array:
    """Per-block values as one per element, for rows `start` to `stop` of the band."""
    block_rows, block_columns = band.block
    row_index = np.minimum(np.arange(start, stop) // block_rows, values.shape[0] - 1)
    column_index = np.minimum(np.arange(band.columns) // block_columns, values.shape[1] - 1)
    spread: Array = values[row_index[:, None], column_index[None, :]]
    return spread


def exact_values(band: RowBand, start: int, stop: int) -> Values:
    """Rows `start` to `stop` of the band, multiplied out in integers."""
    values = decode(band.number_format, unpack(band.number_format, band.data[start:stop]))
    exponent = values.exponent + elementwise(band.scales.exponent, band, start, stop)
    mantissa, special = values.mantissa, values.special
    if band.scales.mantissa is not None:
        mantissa = mantissa * elementwise(band.scales.mantissa, band, start, stop)  # odd * odd is odd
    if band.scales.bad is not None:
        special = special | elementwise(band.scales.bad, band, start, stop)
    return Values(values.negative, mantissa, np.where(mantissa == 0, 0, exponent), special)


def _compare_integers(first: RowBand, second: RowBand) -> Comparison:
    result = Comparison()
    different = np.zeros((first.rows, first.columns), dtype=bool)
    step = max(1, SLOW_ELEMENTS // first.columns)
    for start in range(0, first.rows, step):
        stop = min(start + step, first.rows)
        a, b = exact_values(first, start, stop), exact_values(second, start, stop)
        zero = (a.mantissa == 0) & (b.mantissa == 0)
        unequal = (a.mantissa != b.mantissa) | (a.exponent != b.exponent) | (~zero & (a.negative != b.negative))
        unequal |= a.special | b.special
        different[start:stop] = unequal
        sign = zero & ~unequal & (a.negative != b.negative)
        result.lost_sign += int((sign & a.negative).sum())
        result.gained_sign += int((sign & b.negative).sum())
    result.different = different if different.any() else None
    return result


_TORCH_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_torch_tables: dict[tuple[str, str, bool], torch.Tensor] = {}


def _torch_table(narrow: Format, wide: Format, table: ConversionTable, signed: bool) -> torch.Tensor:
    key = (narrow.name, wide.name, signed)
    if key not in _torch_tables:
        rows = table.signed if signed else table.folded
        integers = torch.from_numpy(rows.view(f"i{rows.itemsize}" if rows.itemsize > 1 else "u1"))
        _torch_tables[key] = integers.reshape(-1)
    return _torch_tables[key]


def exponent_differences(narrow: RowBand, wide: RowBand, unit: int) -> Array:
    """Exponent of the narrow block minus that of the wide block, `[rows, columns / unit]` int32."""
    rows, columns = narrow.rows, narrow.columns
    a = _expand(narrow.scales.exponent, narrow.block, rows, columns, unit)
    return np.subtract(a, _expand(wide.scales.exponent, wide.block, rows, columns, unit), dtype=np.int32)


def common_unit(narrow: RowBand, wide: RowBand) -> int:
    """Columns that share both scales everywhere, or 0 when the lookup cannot be used."""
    unit = min(narrow.block[1], wide.block[1], narrow.columns)
    per_byte = 8 // narrow.number_format.bits
    fits = narrow.columns % unit == 0 and unit % per_byte == 0
    nested = all(band.block[1] % unit == 0 or band.block[1] >= narrow.columns for band in (narrow, wide))
    return unit if fits and nested else 0


def _row_index(narrow: RowBand, difference: Array, table: ConversionTable, unit: int) -> torch.Tensor:
    """Position in the flattened table for every narrow byte: int32 `[rows * row bytes]`."""
    last = table.first + len(table.signed) - 1
    offset = (np.clip(difference, table.first, last) - table.first) << 8
    bytes_per_unit = unit * narrow.number_format.bits // 8
    index = torch.from_numpy(narrow.data).to(torch.int32)
    index.view(narrow.rows, -1, bytes_per_unit).add_(torch.from_numpy(offset)[..., None])
    return index.view(-1)


def _lookup(table: torch.Tensor, index: torch.Tensor, rows: int) -> Array:
    found: Array = torch.index_select(table, 0, index).view(torch.uint8).numpy().reshape(rows, -1)
    return found


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two byte arrays are equal; in the widest integers, which is several times faster than in bytes."""
    if a.flags.c_contiguous and b.flags.c_contiguous and a.nbytes % 8 == 0:
        a, b = a.reshape(-1).view(np.uint64), b.reshape(-1).view(np.uint64)
    return bool((a == b).all())


def has_special(band: RowBand) -> bool:
    """Whether any code of the band is NaN or infinite."""
    number_format = band.number_format
    if number_format.specials == "none":
        return False
    mask, found = number_format.sign - 1, None
    if number_format.bits == 8:
        found = compiled.largest(band.data, mask)
    if found is None:
        found = int((unpack(number_format, band.data) & mask).max(initial=0))
    return found >= number_format.first_special


def _no_gaps(table: ConversionTable, difference: Array) -> bool:
    """Whether every table row in use has a wide code for every narrow code."""
    low, high = np.clip((difference.min(), difference.max()), table.first, table.first + len(table.complete) - 1)
    return bool(table.complete[low - table.first : high - table.first + 1].all())


def _explain(
    narrow: RowBand, wide: RowBand, expected: Array, index: torch.Tensor, table: ConversionTable
) -> Comparison:
    """Elements that differ in value and zeros that differ in sign, once the bytes are known to differ."""
    kind = wide.number_format
    folded = _lookup(_torch_table(narrow.number_format, kind, table, False), index, narrow.rows)
    wanted, found = unpack(kind, folded), unpack(kind, wide.data)
    zero_sign = found == kind.sign
    different = (wanted != np.where(zero_sign, 0, found)) | ((found & (kind.sign - 1)) >= kind.first_special)
    signs = (unpack(kind, expected) != found) & ~different
    gained = int(np.count_nonzero(signs & zero_sign))
    lost = int(np.count_nonzero(signs)) - gained
    return Comparison(different if different.any() else None, lost, gained)


def _compare_lookup(narrow: RowBand, wide: RowBand, unit: int) -> Comparison:
    if narrow.number_format is E2M1 and wide.number_format is E4M3:
        scales = (narrow.scales.exponent, narrow.block), (wide.scales.exponent, wide.block)
        signs = compiled.fp4_in_fp8(narrow.data, wide.data, *scales)
        if signs is not None:
            return Comparison(None, *signs)
    table = conversion_table(narrow.number_format, wide.number_format)
    difference = exponent_differences(narrow, wide, unit)
    index = _row_index(narrow, difference, table, unit)
    expected = _lookup(_torch_table(narrow.number_format, wide.number_format, table, True), index, narrow.rows)
    if same_bytes(expected, wide.data) and (_no_gaps(table, difference) or not has_special(wide)):
        return Comparison()
    return _explain(narrow, wide, expected, index, table)


def _swapped(result: Comparison) -> Comparison:
    result.lost_sign, result.gained_sign = result.gained_sign, result.lost_sign
    return result


def is_plain(band: RowBand) -> bool:
    """Whether all scales of the band are powers of two."""
    return band.scales.mantissa is None and band.scales.bad is None


def compare(first: RowBand, second: RowBand) -> Comparison:
    """Where the values of two bands of equal shape differ, and how many zeros changed sign from first to second."""
    if is_plain(first) and is_plain(second):
        narrow, wide = (first, second) if first.number_format.bits <= second.number_format.bits else (second, first)
        if has_table(narrow.number_format, wide.number_format) and (unit := common_unit(narrow, wide)):
            result = _compare_lookup(narrow, wide, unit)
            return result if narrow is first else _swapped(result)
    return _compare_integers(first, second)


def errors(first: RowBand, second: RowBand, different: Array) -> tuple[float, float]:
    """(largest, sum) of the absolute differences where `different` [rows, columns], NaN and infinity left out.

    In float64, which holds every product of a code and a scale; only the differences are rounded.
    """
    largest, total = 0.0, 0.0
    step = max(1, SLOW_ELEMENTS // first.columns)
    for start in range(0, first.rows, step):
        stop = min(start + step, first.rows)
        where = different[start:stop]
        if not where.any():
            continue
        a, b = exact_values(first, start, stop), exact_values(second, start, stop)
        where = where & ~(a.special | b.special)
        gaps = np.abs(_float64(a)[where] - _float64(b)[where])
        largest, total = max(largest, float(gaps.max(initial=0.0))), total + float(gaps.sum())
    return largest, total


def _float64(values: Values) -> Array:
    magnitude: Array = np.ldexp(values.mantissa.astype(np.float64), values.exponent.astype(np.int64))
    return np.where(values.negative, -magnitude, magnitude)


FORMATS = {"F4": E2M1, "F8_E4M3": E4M3, "BF16": BF16, "F32": F32}
