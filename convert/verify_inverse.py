"""`--inverse`: from the output's values and the source's scales, the FP4 codes again.

If every code comes back, the source holds nothing that the output does not: it could be deleted. A value that the
output holds exactly gives the source's code exactly, but for zero, whose sign may be gone (the reference converter
drops it). Codes that only lack their sign are counted apart from codes that are wrong.
"""

from collections import Counter
from functools import cache

import numpy as np

from .verify_formats import E2M1, Array, decode, unpack
from .verify_values import SLOW_ELEMENTS, Band, elementwise, exact_values

NOT_A_CODE = 255  # no FP4 code has this value


@cache
def _code_of_value() -> dict[tuple[int, int], int]:
    """(odd mantissa, exponent) -> E2M1 code without sign."""
    values = decode(E2M1, np.arange(8))
    return {(int(values.mantissa[code]), int(values.exponent[code])): code for code in range(8)}


def _rebuilt_codes(source: Band, output: Band, start: int, stop: int) -> Array:
    """FP4 codes, one per element, of rows `start` to `stop`."""
    values = exact_values(output, start, stop)
    exponent = values.exponent - elementwise(source.scales.exponent, source, start, stop)
    codes = np.full(values.mantissa.shape, NOT_A_CODE, dtype=np.uint8)
    for (mantissa, power), code in _code_of_value().items():
        match = values.mantissa == mantissa
        codes[match & (exponent == power) if mantissa else match] = code
    codes[values.special] = NOT_A_CODE
    known = codes != NOT_A_CODE
    codes[known] |= (values.negative[known] << 3).astype(np.uint8)
    return codes


def rebuild(source: Band, output: Band) -> Counter[str]:
    """How many codes came back, how many lack only the sign of zero, how many are wrong."""
    found: Counter[str] = Counter()
    step = max(1, SLOW_ELEMENTS // source.columns)
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        rebuilt = _rebuilt_codes(source, output, start, stop)
        wanted = unpack(E2M1, source.data[start:stop])
        unequal = rebuilt != wanted
        sign = unequal & ((rebuilt & 7) == 0) & ((wanted & 7) == 0) & (rebuilt != NOT_A_CODE)
        found["codes"] += wanted.size
        found["sign"] += int(np.count_nonzero(sign))
        found["wrong"] += int(np.count_nonzero(unequal)) - int(np.count_nonzero(sign))
    return found
