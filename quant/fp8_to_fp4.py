"""FP8 -> FP4: back to float4_e2m1fn where an exact form exists.

A group of 32 elements of one row gets one scale 2**s. The finest s with which nothing saturates is the one that puts
the largest magnitude at 4 or 6, the top binade of E2M1; a coarser one would only drop low bits. So a group has an
exact form if and only if it is exact with that s (or with the smallest legal s, 2**-127, if that is larger): decoding
what was encoded and comparing decides it. An upcast checkpoint always goes back to equal values this way.
"""

from typing import NamedTuple

import torch

from dsv4.quant import e2m1, e4m3, e8m0
from dsv4.quant.block_scales import Block, block_amax, decode_scale, expand_scale


class Fp4Form(NamedTuple):
    """packed uint8 [rows, columns/2], scale_bytes uint8 [rows, ceil(columns/32)], exact bool like scale_bytes."""

    packed: torch.Tensor
    scale_bytes: torch.Tensor
    exact: torch.Tensor


GROUP = Block(1, e2m1.GROUP_SIZE)
TOP_EXPONENT = 2  # 4 and 6 are 1.0 and 1.5 * 2**2


def _encode(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Codes of values / 2**exponent, one exponent per group."""
    return e2m1.encode(torch.ldexp(values, -expand_scale(exponent, tuple(values.shape), GROUP)))


def _group_exponents(scale: torch.Tensor, shape: tuple[int, ...], block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Block scales as significand in [1, 2) and exponent, float32 and int32, one per element and one per group."""
    significand, exponent = torch.frexp(decode_scale(scale))
    wide = expand_scale(significand * 2, shape, block)
    groups = expand_scale(exponent - 1, shape, block)[..., :: e2m1.GROUP_SIZE]
    return wide, groups


def cast(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> Fp4Form:
    """E4M3 codes (uint8 [..., rows, columns], columns even) with block scales (E8M0 or float32) -> nearest FP4 form.

    block.columns must be a multiple of 32. Groups that are not `exact` are rounded to nearest, ties to even, with the
    smallest scale with which nothing saturates. Raises ValueError on NaN codes and on scales that are not legal.
    """
    if block.columns % e2m1.GROUP_SIZE:
        raise ValueError(f"groups of {e2m1.GROUP_SIZE} do not fit into blocks of {block.columns} columns")
    if e4m3.is_nan(codes).any():
        raise ValueError("a code is NaN, which FP4 cannot hold")
    significand, base = _group_exponents(scale, tuple(codes.shape), block)
    # The exponents of block and group are taken apart from the values, so that nothing overflows float32.
    values = e4m3.decode(codes) * significand
    amax = block_amax(values, GROUP)
    relative = torch.frexp(amax).exponent - 1 - TOP_EXPONENT
    relative = torch.where(amax == 0, 0, relative)
    finest = (base + relative).clamp(-e8m0.BIAS, e8m0.MAX_BYTE - e8m0.BIAS) - base
    trial = _encode(values, finest)
    same = torch.ldexp(e2m1.decode(trial), expand_scale(finest, tuple(codes.shape), GROUP)) == values
    exact = block_amax((~same).float(), GROUP) == 0
    # Rounding: 6 * 2**finest may be exceeded (7 stands between 6 and 8); one step coarser then.
    safe = torch.where(amax > torch.ldexp(torch.full_like(amax, e2m1.MAX), finest), finest + 1, finest)
    rounded = torch.where(exact, finest, safe)
    final = torch.where(expand_scale(exact, tuple(codes.shape), GROUP), trial, _encode(values, rounded))
    return Fp4Form(e2m1.pack(final), (rounded + base + e8m0.BIAS).to(torch.uint8), exact)


class Fp4Error(NamedTuple):
    """How far an FP4 form is from the FP8 values: elements changed, sums of squares (float64), largest error."""

    changed: int
    squared_error: float
    squared_value: float
    max_error: float


def error(form: Fp4Form, codes: torch.Tensor, scale: torch.Tensor, block: Block) -> Fp4Error:
    """Compare in float64, which holds every product of code and scale exactly. Arguments as for `cast`."""
    shape = tuple(codes.shape)
    old = e4m3.decode(codes).double() * expand_scale(decode_scale(scale), shape, block).double()
    new_scale = expand_scale(e8m0.decode(form.scale_bytes), shape, GROUP).double()
    difference = (e2m1.decode(e2m1.unpack(form.packed)).double() * new_scale - old).abs()
    return Fp4Error(
        int(torch.count_nonzero(difference)),
        float((difference**2).sum()),
        float((old**2).sum()),
        float(difference.max()),
    )
