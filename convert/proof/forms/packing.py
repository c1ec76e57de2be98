"""Bytes of a file that hold a tensor's bytes in another order, or in another type of the same values.

`Packing` says how many bytes of a file make how many of the tensor, and how. It is applied where bytes are read, so
that everything that compares sees the tensor as the release stores it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4.convert.proof.values.formats import Array


@dataclass(frozen=True, slots=True)
class Packing:
    """`unpack` makes uint8 [n, unpacked] of uint8 [n, packed]."""

    packed: int
    unpacked: int
    unpack: Callable[[Array], Array]


def _mxfp4_codes(blocks: Array) -> Array:
    """ggml's block: a scale, then byte j = element j | element j + 16 << 4. The release: element 2i | 2i + 1 << 4."""
    low, high = blocks[:, 1:] & 15, blocks[:, 1:] >> 4
    elements = np.concatenate((low, high), axis=1)  # 0 .. 31, one a byte
    packed: Array = elements[:, 0::2] | (elements[:, 1::2] << 4)
    return packed


def _mxfp4_scales(blocks: Array) -> Array:
    return blocks[:, :1].copy()


def _q8_0(blocks: Array) -> Array:
    """A float16 factor and 32 signed bytes: float32 holds each product exactly."""
    factor = blocks[:, :2].copy().view("<f2").astype("<f4")
    products: Array = blocks[:, 2:].copy().view("i1").astype("<f4") * factor
    return products.view(np.uint8)


def _int32_to_int64(raw: Array) -> Array:
    return raw.copy().view("<i4").astype("<i8").view(np.uint8)


MXFP4_CODES = Packing(17, 16, _mxfp4_codes)
MXFP4_SCALES = Packing(17, 1, _mxfp4_scales)
Q8_0_VALUES = Packing(34, 128, _q8_0)
WIDE_INTEGERS = Packing(4, 8, _int32_to_int64)


def half_of_rows(row_bytes: int, second: bool) -> Packing:
    """One of two matrices that lie side by side."""
    half = row_bytes // 2
    return Packing(row_bytes, half, lambda raw: raw[:, half:].copy() if second else raw[:, :half].copy())


def half_of_q8_0_rows(row_bytes: int, second: bool) -> Packing:
    """The same of Q8_0, where half a row is whole blocks: float32 values."""
    half = half_of_rows(row_bytes, second)
    made = half.unpacked // Q8_0_VALUES.packed * Q8_0_VALUES.unpacked
    return Packing(row_bytes, made, lambda raw: _q8_0(half.unpack(raw).reshape(-1, 34)).reshape(len(raw), made))
