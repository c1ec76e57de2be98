"""Checks the values of a weight on its stored bytes.

Nothing is converted to floats: a NaN, a sign or an exponent is a range of integers, and NumPy finds the largest of a
few hundred KB at the speed of the processor's cache. Data is checked piece by piece, so no temporary is larger than a
piece. NumPy releases the interpreter's lock, so several threads can check at once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsv4.quant import e4m3, e8m0

MODERATE_EXPONENT = 60
BYTES_PER_LOOK = 1 << 18
INFINITY_BITS = 0x7F800000  # of float32; above it are the NaNs
MANTISSA_BITS = 23


def _pieces(data: torch.Tensor, kind: type[np.generic]) -> Iterator[NDArray[Any]]:
    """The bytes of a contiguous tensor as integers of a kind, a piece at a time."""
    words = data.view(torch.uint8).flatten().numpy().view(kind)
    step = BYTES_PER_LOOK // words.itemsize
    return (words[at : at + step] for at in range(0, len(words), step))


def has_nan(codes: torch.Tensor) -> bool:
    """Whether float8_e4m3fn codes have a NaN: 0x7F, the largest signed byte, or 0xFF, the largest unsigned one."""
    return any(
        piece.max() == e4m3.SIGN | e4m3.NAN or piece.view(np.int8).max() == e4m3.NAN
        for piece in _pieces(codes, np.uint8)
    )


def _range_of(scale: torch.Tensor) -> tuple[int, int]:
    """The least and the greatest bit pattern: signed, of float32, in the order of the values; E8M0 has no sign."""
    kind = np.int32 if scale.dtype == torch.float32 else np.uint8
    ends = [(int(piece.min()), int(piece.max())) for piece in _pieces(scale, kind)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def are_scales(scale: torch.Tensor) -> bool:
    """Whether block scales (float8_e8m0fnu or float32, not empty) are all positive and finite."""
    low, high = _range_of(scale)
    return 0 < low and high < INFINITY_BITS if scale.dtype == torch.float32 else high < e8m0.NAN


def are_moderate_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether codes times these scales have as few significant bits as the codes, far from the ends of float32."""
    low, high = _range_of(scale)
    if scale.dtype == torch.float32:
        set_anywhere = [int(np.bitwise_or.reduce(piece)) for piece in _pieces(scale, np.int32)]
        if any(bits & ((1 << MANTISSA_BITS) - 1) for bits in set_anywhere):
            return False
        low, high = low >> MANTISSA_BITS, high >> MANTISSA_BITS
    return e8m0.BIAS - MODERATE_EXPONENT <= low and high <= e8m0.BIAS + MODERATE_EXPONENT


def has_tiny_values(values: torch.Tensor) -> bool:
    """Whether bfloat16 values other than zero lie below 2**-MODERATE_EXPONENT."""
    smallest = (127 - MODERATE_EXPONENT) << 7
    for piece in _pieces(values, np.uint16):
        before = piece & np.uint16(0x7FFF)
        before -= np.uint16(1)  # zero becomes the largest
        if before.min() < smallest - 1:
            return True
    return False
