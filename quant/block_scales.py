"""Quantized tensors: codes and the scales of their blocks, to values and back. The blocks are those of `blocks`.

Scales are powers of two by convention; a power of two scales a code without rounding, so dequantizing to float32 is
exact as long as the product is a float32 (it always is for E8M0 scales up to 2**119).
"""

import torch

from . import e2m1, e4m3, e8m0
from .blocks import FP4_BLOCK as FP4_BLOCK
from .blocks import Block as Block
from .blocks import scale_shape as scale_shape


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Block scales as stored (float8_e8m0fnu, or bytes of it as uint8, or float32) -> float32.

    Raises ValueError on NaN, on byte 255, and on float32 scales that are not positive and finite.
    """
    values = scale if scale.dtype == torch.float32 else e8m0.decode(scale)
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError("a block scale is not positive and finite (float8_e8m0fnu byte 255 is NaN)")
    return values


def expand_scale(scale: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """Scales [..., ceil(rows/height), ceil(columns/width)] -> one per element. Raises ValueError on a misfit."""
    expected = scale_shape(shape, block)
    if tuple(scale.shape) != expected:
        raise ValueError(f"the scale has shape {list(scale.shape)}, a weight {list(shape)} needs {list(expected)}")
    by_row = scale.repeat_interleave(block.rows, -2)[..., : shape[-2], :]
    return by_row.repeat_interleave(block.columns, -1)[..., : shape[-1]]


def _multiply(values: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    product = values * expand_scale(decode_scale(scale), tuple(values.shape), block)
    if torch.isinf(product).any():
        raise ValueError("an element times its block scale exceeds float32")
    return product


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 [..., rows, columns/2] (uint8 or int8), scale [..., rows, ceil(columns/32)] -> float32, exact.

    Raises ValueError when shapes do not fit, on a NaN scale, or when a value exceeds float32.
    """
    return _multiply(e2m1.decode(e2m1.unpack(packed)), scale, FP4_BLOCK)


def dequantize_fp8(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """E4M3 [..., rows, columns] (uint8 or float8_e4m3fn) and its block scale -> float32.

    Exact for power-of-two scales; any other float32 scale rounds once, in this product. E4M3 NaN stays NaN.
    Raises ValueError when shapes do not fit, on a NaN scale, or when a value exceeds float32.
    """
    return _multiply(e4m3.decode(codes), scale, block)


def block_amax(values: torch.Tensor, block: Block) -> torch.Tensor:
    """Largest magnitude of each block, float32 [..., ceil(rows/height), ceil(columns/width)]."""
    rows, columns = values.shape[-2:]
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % block.columns, 0, -rows % block.rows))
    by_rows = torch.unflatten(padded, -2, (-1, block.rows))
    tiles = torch.unflatten(by_rows, -1, (-1, block.columns))
    return tiles.amax(dim=(-3, -1))


def power_of_two_above(amax: torch.Tensor, largest_code: float) -> torch.Tensor:
    """E8M0 byte of 2**ceil(log2(amax / largest_code)), uint8; 2**0 where amax is 0 or the quotient vanishes.

    `largest_code` is at least 2, so that no byte exceeds 254.
    """
    bits = (amax / largest_code).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    above = torch.where(exponent == 0, mantissa > 1 << 22, exponent + (mantissa != 0))
    return torch.where(bits == 0, e8m0.BIAS, above).to(torch.uint8)


def _quantizable(values: torch.Tensor) -> torch.Tensor:
    values = values.to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("NaN and infinity cannot be quantized")
    return values


def quantize_fp8(values: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [..., rows, columns] -> (E4M3 codes uint8, E8M0 scale bytes uint8), nearest, ties to even.

    The scale of a block is the smallest power of two with which nothing saturates. Raises ValueError on NaN, infinity.
    """
    values = _quantizable(values)
    scale = power_of_two_above(block_amax(values, block), e4m3.MAX)
    return e4m3.encode(values / expand_scale(e8m0.decode(scale), tuple(values.shape), block)), scale


def quantize_fp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [..., rows, even columns] -> (packed E2M1 bytes [..., columns/2], E8M0 bytes), nearest, ties to even.

    The scale of a group of 32 is the smallest power of two with which nothing saturates. Raises ValueError on NaN,
    infinity or an odd number of columns.
    """
    values = _quantizable(values)
    scale = power_of_two_above(block_amax(values, FP4_BLOCK), e2m1.MAX)
    codes = e2m1.encode(values / expand_scale(e8m0.decode(scale), tuple(values.shape), FP4_BLOCK))
    return e2m1.pack(codes), scale
