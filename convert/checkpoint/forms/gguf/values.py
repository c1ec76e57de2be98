"""The byte order of values in a GGUF file, and the release's bytes for the same values.

A block of MXFP4 has 17 bytes for 32 elements: the E8M0 byte, then byte j with the codes of element j (low nibble) and
of element j + 16. The release's byte i has elements 2i and 2i + 1. With a = bytes 0..7 and b = bytes 8..15 of the one,
the other has `a & 15 | b << 4` at its even places and `a >> 4 | b & 0xF0` at its odd ones, and the way back is the
same.
"""

import numpy as np

from dsv4.convert.checkpoint.forms.tensor import Array, Encoding

GROUP, BLOCK_BYTES = 32, 17
_LOW, _FOUR = np.uint64(0x0F0F_0F0F_0F0F_0F0F), np.uint64(4)


def _mixed(first: Array, last: Array) -> tuple[Array, Array]:
    """`first & 15 | last << 4` and `first >> 4 | last & 0xF0` of bytes, eight at a time: uint64 [n] -> uint8 [n, 8]."""
    low = (first & _LOW) | ((last & _LOW) << _FOUR)
    high = ((first >> _FOUR) & _LOW) | (last & ~_LOW)
    return low.view(np.uint8).reshape(-1, 8), high.view(np.uint8).reshape(-1, 8)


def to_blocks(codes: Array, scales: Array) -> Array:
    """Codes uint8 [n, 16] in the release's order and E8M0 bytes [n] -> blocks uint8 [n, 17]."""
    blocks = np.empty((len(codes), BLOCK_BYTES), np.uint8)
    words = np.ascontiguousarray(codes).view(np.uint64)
    blocks[:, 0] = scales
    blocks[:, 1::2], blocks[:, 2::2] = _mixed(words[:, 0], words[:, 1])
    return blocks


def codes_of_blocks(blocks: Array) -> Array:
    """Blocks uint8 [n, 17] -> codes uint8 [n, 16] in the release's order."""
    even, odd = (np.ascontiguousarray(blocks[:, at::2]).view(np.uint64)[:, 0] for at in (1, 2))
    return np.concatenate(_mixed(even, odd), axis=1)


def scales_of_blocks(blocks: Array) -> Array:
    """Blocks uint8 [n, 17] -> their E8M0 bytes [n, 1]."""
    return np.ascontiguousarray(blocks[:, :1])


def _halves(raw: Array) -> Array:
    """float32 -> bfloat16. Raises ValueError for a value that is none."""
    halves = raw.view(np.uint16).reshape(-1, 2)
    if halves[:, 0].any():
        raise ValueError("a float32 value that is no BF16, though the release has BF16 there")
    return np.ascontiguousarray(halves[:, 1:]).view(np.uint8)


def _widened(raw: Array) -> Array:
    return raw.view(np.int32).astype(np.int64).view(np.uint8).reshape(-1, 8)


def _of_q8_0(raw: Array) -> Array:
    """Q8_0 -> float32: a float16 factor and 32 signed bytes. Exact: 11 and 7 significant bits."""
    factor = np.ascontiguousarray(raw[:, :2]).view(np.float16).astype(np.float32)
    values: Array = factor * np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32)
    return values.view(np.uint8)


CODES = Encoding(BLOCK_BYTES, GROUP // 2, codes_of_blocks)
SCALES = Encoding(BLOCK_BYTES, 1, scales_of_blocks)
Q8_0 = Encoding(34, 4 * GROUP, _of_q8_0)
BF16_AS_F32 = Encoding(4, 2, _halves)
I64_AS_I32 = Encoding(4, 8, _widened)


def column_range(row_bytes: int, start: int, stop: int) -> Encoding:
    """Bytes [start, stop) of every row of `row_bytes`."""
    return Encoding(row_bytes, stop - start, lambda raw: np.ascontiguousarray(raw[:, start:stop]))
