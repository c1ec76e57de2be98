"""Blocks of MXFP4 as GGUF files have them, and the release's codes and scales: the same bits in another order.

A block has 17 bytes for 32 elements: the E8M0 byte, then byte j with the codes of element j (low nibble) and of element
j + 16. The release's byte i has elements 2i and 2i + 1. With a = bytes 0..7 and b = bytes 8..15 of the one, the other
has `a & 15 | b << 4` at its even places and `a >> 4 | b & 0xF0` at its odd ones, and the way back is the same.

NumPy arrays, because headers and plans do without torch. NumPy takes a dozen passes over the data; `mxfp4_blocks.c`,
where it is compiled, takes one.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from dsv4 import compiled

Array = np.ndarray[Any, np.dtype[Any]]

CODE_BYTES, BLOCK_BYTES = 16, 17  # of 32 elements
_LOW, _FOUR = np.uint64(0x0F0F_0F0F_0F0F_0F0F), np.uint64(4)


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library()
    if library is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for function, pointers in ((library.dsv4_to_mxfp4_blocks, 3), (library.dsv4_codes_of_mxfp4_blocks, 2)):
        function.restype, function.argtypes = None, [*[pointer] * pointers, count]
    return library


def _mixed(first: Array, last: Array) -> tuple[Array, Array]:
    """`first & 15 | last << 4` and `first >> 4 | last & 0xF0` of bytes, eight at a time: uint64 [n] -> uint8 [n, 8]."""
    low = (first & _LOW) | ((last & _LOW) << _FOUR)
    high = ((first >> _FOUR) & _LOW) | (last & ~_LOW)
    return low.view(np.uint8).reshape(-1, 8), high.view(np.uint8).reshape(-1, 8)


def to_blocks(codes: Array, scales: Array) -> Array:
    """Codes uint8 [n, 16] in the release's order and E8M0 bytes [n] -> blocks uint8 [n, 17]."""
    codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
    blocks = np.empty((len(codes), BLOCK_BYTES), np.uint8)
    if library := _library():
        library.dsv4_to_mxfp4_blocks(codes.ctypes.data, scales.ctypes.data, blocks.ctypes.data, len(codes))
        return blocks
    words = codes.view(np.uint64)
    blocks[:, 0] = scales
    blocks[:, 1::2], blocks[:, 2::2] = _mixed(words[:, 0], words[:, 1])
    return blocks


def codes_of_blocks(blocks: Array) -> Array:
    """Blocks uint8 [n, 17] -> codes uint8 [n, 16] in the release's order."""
    if library := _library():
        blocks, codes = np.ascontiguousarray(blocks), np.empty((len(blocks), CODE_BYTES), np.uint8)
        library.dsv4_codes_of_mxfp4_blocks(blocks.ctypes.data, codes.ctypes.data, len(blocks))
        return codes
    even, odd = (np.ascontiguousarray(blocks[:, at::2]).view(np.uint64)[:, 0] for at in (1, 2))
    return np.concatenate(_mixed(even, odd), axis=1)
