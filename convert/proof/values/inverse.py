"""`--inverse`: rebuild the source's FP4 codes from the output's values and the source's scales.

If every code is rebuilt, the source holds nothing that the output does not hold: it could be deleted. An exact value of
the output gives the source's code exactly, except for the sign of zero, which the reference converter drops. Codes that
lack only their sign are counted apart from wrong codes.
"""

from collections import Counter
from functools import cache

import numpy as np
import torch

from .compare import SLOW_ELEMENTS, RowBand, common_unit, elementwise, exact_values, exponent_differences, is_plain
from .formats import E2M1, E4M3, Array, conversion_table, decode, unpack

NOT_A_CODE = 255  # FP4 codes end at 15


@cache
def _code_of_value() -> dict[tuple[int, int], int]:
    """(odd mantissa, exponent) -> E2M1 code without sign."""
    values = decode(E2M1, np.arange(8))
    return {(int(values.mantissa[code]), int(values.exponent[code])): code for code in range(8)}


def _rebuilt_codes(source: RowBand, output: RowBand, start: int, stop: int) -> Array:
    """FP4 codes of rows `start` to `stop`: uint8 `[rows, columns]`."""
    values = exact_values(output, start, stop)
    exponent = values.exponent - elementwise(source.scales.exponent, source, start, stop)
    quotient, special = values.mantissa, values.special
    if source.scales.mantissa is not None:
        quotient, rest = np.divmod(quotient, elementwise(source.scales.mantissa, source, start, stop))
        special = special | (rest != 0)
    if source.scales.bad is not None:
        special = special | elementwise(source.scales.bad, source, start, stop)
    codes = np.full(quotient.shape, NOT_A_CODE, dtype=np.uint8)
    for (mantissa, power), code in _code_of_value().items():
        match = quotient == mantissa
        codes[match & (exponent == power) if mantissa else match] = code
    codes[special] = NOT_A_CODE
    known = codes != NOT_A_CODE
    codes[known] |= (values.negative[known] << 3).astype(np.uint8)
    return codes


@cache
def _inverse_table() -> tuple[int, Array]:
    """(first difference, `[difference, E4M3 code]` -> E2M1 code): `conversion_table` read backwards."""
    table = conversion_table(E2M1, E4M3)
    inverse = np.full((len(table.signed), 256), NOT_A_CODE, dtype=np.uint8)
    for code in range(16):
        wide = table.signed[:, code] & 0xFF  # the low nibble's
        rows = np.flatnonzero(wide != E4M3.nan)
        inverse[rows, wide[rows]] = code
    return table.first, inverse


def _by_lookup(source: RowBand, output: RowBand, unit: int) -> Array:
    """FP4 codes of all rows, uint8 `[rows, columns]`, if all scales are powers of two and the output is FP8."""
    first, table = _inverse_table()
    difference = exponent_differences(source, output, unit)
    offset = (np.clip(difference, first, first + len(table) - 1) - first) << 8
    index = torch.from_numpy(output.data).to(torch.int32)
    index.view(output.rows, -1, unit).add_(torch.from_numpy(offset)[..., None])
    found: Array = torch.index_select(torch.from_numpy(table.reshape(-1)), 0, index.view(-1)).numpy()
    return found.reshape(output.rows, -1)


def _all_back(source: RowBand, rebuilt: Array) -> bool:
    """Whether packing the codes gives the source's bytes."""
    pairs = rebuilt.view("<u2")  # 0x0H0L: high nibble, low nibble
    packed = (pairs | (pairs >> 4)).astype(np.uint8)
    return int(rebuilt.max(initial=0)) < 16 and np.array_equal(packed, source.data)


def _count(source: RowBand, rebuilt: Array, start: int, stop: int) -> Counter[str]:
    wanted = unpack(E2M1, source.data[start:stop])
    unequal = rebuilt != wanted
    sign = unequal & ((rebuilt & 7) == 0) & ((wanted & 7) == 0) & (rebuilt != NOT_A_CODE)
    signs = int(np.count_nonzero(sign))
    return Counter(codes=wanted.size, sign=signs, wrong=int(np.count_nonzero(unequal)) - signs)


def rebuild(source: RowBand, output: RowBand) -> Counter[str]:
    """Counts: `codes` all of them, `sign` those that lack only the sign of zero, `wrong` those with another value."""
    unit = common_unit(source, output)
    if output.number_format is E4M3 and unit and is_plain(source) and is_plain(output):
        rebuilt = _by_lookup(source, output, unit)
        if _all_back(source, rebuilt):
            return Counter(codes=rebuilt.size, sign=0, wrong=0)
        return _count(source, rebuilt, 0, source.rows)
    found: Counter[str] = Counter()
    step = max(1, SLOW_ELEMENTS // source.columns)
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        found.update(_count(source, _rebuilt_codes(source, output, start, stop), start, stop))
    return found
