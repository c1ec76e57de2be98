"""FP4 and FP8 -> BF16.

E2M1 and E4M3 have at most four significant bits and BF16 has eight, so with power-of-two scales the product is exact
within BF16's exponent range, which is float32's. A code and its scale byte together are sixteen bits: the products
are a table. With any other float32 scale the product rounds, once: the float32 product is nudged before it is cut to
BF16 where rounding twice would give another result than rounding once.
"""

from functools import cache
from typing import NamedTuple

import torch

from . import e2m1, e4m3, e8m0
from .block_scales import FP4_BLOCK, Block, decode_scale, expand_scale

HALF_WAY = 0x8000  # the low 16 bits of a float32 that lies midway between two BF16 values


class Bf16Form(NamedTuple):
    """values bfloat16 [..., rows, columns]; changed: how many elements do not equal code * scale (NaN not counted)."""

    values: torch.Tensor
    changed: int


def _count_changed(differs: torch.Tensor, product: torch.Tensor) -> int:
    return int(torch.count_nonzero((differs | torch.isinf(product)) & ~torch.isnan(product)))


def _from_power_of_two(values: torch.Tensor, scale: torch.Tensor) -> Bf16Form:
    """The product is a float32 exactly, so cutting it to BF16 is the only rounding."""
    product = values * scale
    rounded = product.to(torch.bfloat16)
    return Bf16Form(rounded, _count_changed(rounded.float() != product, product))


def _from_any(values: torch.Tensor, scale: torch.Tensor) -> Bf16Form:
    product = values * scale
    error = values.double() * scale.double() - product.double()  # exact: 4 + 24 significant bits fit into 53
    bits = product.view(torch.int32)
    away = ((bits & 0xFFFF) == HALF_WAY) & (error != 0)
    nudge = torch.where((error > 0) == (product > 0), 1, -1)
    rounded = torch.where(away, bits + nudge, bits).to(torch.int32).view(torch.float32).to(torch.bfloat16)
    return Bf16Form(rounded, _count_changed((rounded.float() != product) | (error != 0), product))


def always_exact(scale: torch.Tensor) -> bool:
    """Whether scales alone (float32, decoded) prove that every E2M1 or E4M3 code times its scale is a BF16 value.

    True if all are powers of two in 2**-110..2**110: then 2**-9 * scale and 448 * scale are normal BF16 values.
    """
    significand, exponent = torch.frexp(scale)
    return bool(((significand == 0.5) & (exponent.abs() <= 110)).all())


def _bits(values: torch.Tensor) -> torch.Tensor:
    """BF16 bits of exact products, as int32."""
    return values.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF


@cache
def _fp4_pairs(device: torch.device) -> torch.Tensor:
    """int32 [256 * 256]: the two BF16 values of a byte of codes, by scale byte and byte; the even element low."""
    scale = e8m0.decode(torch.arange(256, dtype=torch.uint8, device=device))[:, None]
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    low, high = (_bits(e2m1.decode(nibble) * scale) for nibble in (byte & 0x0F, byte >> 4))
    return (low | high << 16).flatten()


@cache
def _fp8_values(device: torch.device) -> torch.Tensor:
    """int16 [256 * 256]: BF16 bits by scale byte and E4M3 code."""
    scale = e8m0.decode(torch.arange(256, dtype=torch.uint8, device=device))[:, None]
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return (e4m3.decode(codes) * scale).to(torch.bfloat16).view(torch.int16).flatten()


def look_up_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 uint8 [..., rows, columns/2], whole groups, with E8M0 scale bytes that are `always_exact` -> BF16.

    Nothing is checked, so that a device does not wait for an answer.
    """
    groups = torch.unflatten(packed, -1, (-1, e2m1.GROUP_SIZE // 2))
    index = groups + scale.to(torch.int32).unsqueeze(-1) * 256
    pairs = torch.index_select(_fp4_pairs(packed.device), 0, index.flatten())
    return pairs.view(torch.bfloat16).view(*packed.shape[:-1], -1)


def from_fp4(packed: torch.Tensor, scale: torch.Tensor) -> Bf16Form:
    """Packed E2M1 uint8 [..., rows, columns/2] with E8M0 scale bytes uint8 [..., rows, ceil(columns/32)] -> BF16."""
    decoded = decode_scale(scale)
    if always_exact(decoded) and packed.shape[-1] % (e2m1.GROUP_SIZE // 2) == 0:
        return Bf16Form(look_up_fp4(packed, scale), 0)
    values = e2m1.decode(e2m1.unpack(packed))
    return _from_power_of_two(values, expand_scale(decoded, tuple(values.shape), FP4_BLOCK))


def from_fp8(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> Bf16Form:
    """E4M3 uint8 [..., rows, columns] with block scales (E8M0 bytes uint8, or float32) -> BF16. NaN stays NaN."""
    decoded = decode_scale(scale)
    if always_exact(decoded):
        index = expand_scale(e8m0.exact(decoded).to(torch.int32) * 256, tuple(codes.shape), block) + codes
        return Bf16Form(
            torch.index_select(_fp8_values(codes.device), 0, index.flatten()).view(torch.bfloat16).view(codes.shape), 0
        )
    values = e4m3.decode(codes)
    wide = expand_scale(decoded, tuple(values.shape), block)
    return _from_any(values, wide) if scale.dtype == torch.float32 else _from_power_of_two(values, wide)
