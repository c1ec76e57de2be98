"""The compiled forms of the loops that look at every byte: `convert/proof/c/bands.c`, which the proof has for itself.

Each gives what the form in numpy gives, or None where it cannot be used: the library was not built, the processor lacks
the instructions, or the bands are not made of whole groups. The caller then takes the form in numpy.
"""

import ctypes
from functools import cache

import numpy as np

from dsv4 import compiled

from .formats import E2M1, E4M3, Array, conversion_table

GROUP = 32  # elements that C looks at together: they share both scales


class _Scales(ctypes.Structure):
    """`struct scales` of bands.c."""

    _fields_ = [
        ("exponents", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_groups", ctypes.c_int64),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """The library; None where there is none."""
    library = compiled.library()
    if library is None:
        return None
    pointer, count, limit = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.dsv4_proof_largest.argtypes = [pointer, count, ctypes.c_uint8]
    library.dsv4_proof_largest.restype = ctypes.c_uint8
    library.dsv4_proof_count.argtypes = [pointer, count, pointer]
    library.dsv4_proof_count.restype = None
    if library.dsv4_proof_has_table_lookup():
        scales = ctypes.POINTER(_Scales)
        library.dsv4_proof_fp4_in_fp8.argtypes = [
            pointer, pointer, count, count, scales, scales, pointer, limit, limit, pointer,
        ]  # fmt: skip
    return library


def largest(data: Array, mask: int) -> int | None:
    """The largest of `byte & mask` in contiguous uint8 data, 0 of none."""
    library = _library()
    if library is None or not data.flags.c_contiguous:
        return None
    return int(library.dsv4_proof_largest(data.ctypes.data, data.size, mask))


def count(data: Array) -> Array | None:
    """How often each byte occurs in contiguous uint8 data: int64 [256]."""
    library = _library()
    if library is None or not data.flags.c_contiguous:
        return None
    uses = np.empty(256, np.int64)
    library.dsv4_proof_count(data.ctypes.data, data.size, uses.ctypes.data)
    return uses


@cache
def _tables() -> tuple[int, Array]:
    """(first difference, `[difference, E2M1 code]` -> E4M3 byte): the low nibble's byte of `conversion_table`."""
    table = conversion_table(E2M1, E4M3)
    return table.first, np.ascontiguousarray((table.signed[:, :16] & 0xFF).astype(np.uint8))


def _scales(exponents: Array, block: tuple[int, int], columns: int) -> _Scales | None:
    """Exponents `[block rows, block columns]` for C; None if a block is not whole groups."""
    if exponents.dtype != np.int32 or not exponents.flags.c_contiguous:
        return None
    if block[1] < columns and block[1] % GROUP:
        return None
    return _Scales(exponents.ctypes.data, exponents.shape[1], block[0], min(block[1], columns) // GROUP)


def fp4_in_fp8(
    fp4: Array, fp8: Array, fp4_scales: tuple[Array, tuple[int, int]], fp8_scales: tuple[Array, tuple[int, int]]
) -> tuple[int, int] | None:
    """(zeros that are negative in FP4 alone, in FP8 alone) if all values are equal; None if not, or if C cannot say.

    fp4 uint8 `[rows, columns / 2]`, fp8 uint8 `[rows, columns]`. scales: exponents (int32), and the block's rows and
    columns.
    """
    library, (rows, columns) = _library(), fp8.shape
    contiguous = fp4.flags.c_contiguous and fp8.flags.c_contiguous
    if library is None or not library.dsv4_proof_has_table_lookup() or columns % GROUP or not contiguous:
        return None
    narrow, wide = _scales(*fp4_scales, columns), _scales(*fp8_scales, columns)
    if narrow is None or wide is None:
        return None
    first, tables = _tables()
    signs = np.empty(2, np.int64)
    equal = library.dsv4_proof_fp4_in_fp8(
        fp4.ctypes.data, fp8.ctypes.data, rows, columns // GROUP, narrow, wide,
        tables.ctypes.data, first, first + len(tables) - 1, signs.ctypes.data,
    )  # fmt: skip
    return (int(signs[0]), int(signs[1])) if equal else None
