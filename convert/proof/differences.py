"""Elements that differ, as messages and JSON show them: where, both codes, both scales, both values."""

import math
from typing import Any

import numpy as np

from .compare_values import Band
from .formats import F32, Array, Format, decode, unpack

FIRST_DIFFERENCES = 5


def _value_text(number_format: Format, code: int, scale_mantissa: int, scale_exponent: int) -> str:
    values = decode(number_format, np.array([code]))
    if values.special[0]:
        return "not a number"
    mantissa, exponent = int(values.mantissa[0]) * scale_mantissa, int(values.exponent[0]) + scale_exponent
    number = math.ldexp(mantissa, exponent) * (-1 if values.negative[0] else 1)
    return repr(number)


def _element(band: Band, row: int, column: int) -> dict[str, Any]:
    """Code, scale and value of one element, for a message."""
    code = int(unpack(band.number_format, band.data[row : row + 1])[0, column])
    width = band.number_format.bits // 4
    shown: dict[str, Any] = {"code": f"0x{code:0{width}x}"}
    scales = band.scales
    if scales.raw is None:
        return {**shown, "scale": None, "value": _value_text(band.number_format, code, 1, 0)}
    at = min(row // band.block[0], scales.exponent.shape[0] - 1), column // band.block[1]
    raw, exponent = int(scales.raw[at]), int(scales.exponent[at])
    mantissa = 1 if scales.mantissa is None else int(scales.mantissa[at])
    bad = scales.bad is not None and bool(scales.bad[at])
    text = f"0x{raw:0{2 * scales.raw.itemsize}x}"
    scale = (
        f"{text} (not a scale)"
        if bad
        else f"{text} (2^{exponent})"
        if mantissa == 1
        else f"{text} ({mantissa}*2^{exponent})"
    )
    value = "not a number" if bad else _value_text(band.number_format, code, mantissa, exponent)
    return {**shown, "scale": scale, "value": value}


def first_differences(different: Array, row0: int, source: Band, output: Band) -> list[dict[str, Any]]:
    """The first few elements that differ; `row0` is the band's first row."""
    rows, columns = np.unravel_index(np.flatnonzero(different)[:FIRST_DIFFERENCES], different.shape)
    return [
        {
            "at": [row0 + int(r), int(c)],
            "source": _element(source, int(r), int(c)),
            "output": _element(output, int(r), int(c)),
        }
        for r, c in zip(rows, columns, strict=True)
    ]


def raw_difference(at: list[int], codes: list[str], dtype: str) -> dict[str, Any]:
    """One element of a tensor that is compared by bytes: codes, and values where the dtype has them."""
    shown = []
    for code in codes:
        number = int(code, 16)
        if dtype in ("F32", "BF16"):
            value = _value_text(F32, number << 16 if dtype == "BF16" else number, 1, 0)
        else:
            value = str(int.from_bytes(bytes.fromhex(code), "big", signed=dtype.startswith("I")))
        shown.append({"code": f"0x{code}", "scale": None, "value": value})
    return {"at": at, "source": shown[0], "output": shown[1]}
