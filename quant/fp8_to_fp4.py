"""FP8 -> FP4: back to float4_e2m1fn where an exact form exists.

A group of 32 elements of one row gets one scale 2**s. The finest s with which nothing saturates is the one that puts
the largest magnitude at 4 or 6, the top binade of E2M1; a coarser one would only drop low bits. So a group has an
exact form if and only if it is exact with that s (or with the smallest legal s, 2**-127, if that is larger).
An upcast checkpoint always goes back to equal values this way. MXFP8 that was made of FP4 goes back to equal bytes:
where a group's codes are values of E2M1, its own scale is taken.

Everything that depends on a code is a table over its 256 values: the binade of its magnitude, and its nearest FP4
code for each distance between the FP8 scale and the group's. Scales that are no powers of two take a slower way, by
values.
"""

from functools import cache
from typing import NamedTuple

import torch

from . import e2m1, e4m3, e8m0
from .block_scales import Block, block_amax, decode_scale, expand_scale


class Fp4Form(NamedTuple):
    """packed uint8 [rows, columns/2], scale_bytes uint8 [rows, ceil(columns/32)], exact bool like scale_bytes."""

    packed: torch.Tensor
    scale_bytes: torch.Tensor
    exact: torch.Tensor


GROUP = Block(1, e2m1.GROUP_SIZE)
TOP_EXPONENT = 2  # 4 and 6 are 1.0 and 1.5 * 2**2
# k = group exponent - FP8 block exponent: 2**-9 = 4 * 2**-11 at the fine end; from 11 on all of E4M3 rounds to zero.
TABLE_K_MIN, TABLE_K_MAX = -11, 11
INEXACT = 0x80  # flag in the table: the FP4 code is not of equal value


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """k of the finest group scale by largest magnitude, int16 [128]; FP4 codes by k and E4M3 code, uint8 [.. * 256]."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes[e4m3.is_nan(codes)] = 0  # refused before the table is asked
    values = e4m3.decode(codes)
    finest = torch.frexp(values[:128]).exponent - 1 - TOP_EXPONENT
    rows = []
    for k in range(TABLE_K_MIN, TABLE_K_MAX + 1):
        scaled = values * 2.0**-k
        nearest = e2m1.encode(scaled)
        rows.append(nearest | (e2m1.decode(nearest) != scaled).to(torch.uint8) * INEXACT)
    return torch.where(values[:128] == 0, 0, finest).to(torch.int16), torch.cat(rows)


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """Columns filled up with zeros to whole groups, [..., rows, groups, 32]."""
    short = -codes.shape[-1] % e2m1.GROUP_SIZE
    return torch.unflatten(torch.nn.functional.pad(codes, (0, short)), -1, (-1, e2m1.GROUP_SIZE))


def _lookup(groups: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """FP4 codes with the INEXACT flag for E4M3 codes [..., groups, 32] at k [..., groups]."""
    _, table = _tables(groups.device)
    start = (k.clamp(TABLE_K_MIN, TABLE_K_MAX).to(torch.int32) - TABLE_K_MIN) * 256
    return torch.index_select(table, 0, (groups + start.unsqueeze(-1)).flatten()).view(groups.shape)


def _group_bytes(block_bytes: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """The FP8 scale byte over each group, int16 [..., rows, groups]."""
    by_row = block_bytes.to(torch.int16).repeat_interleave(block.rows, -2)[..., : shape[-2], :]
    groups = -(-shape[-1] // e2m1.GROUP_SIZE)
    return by_row.repeat_interleave(block.columns // e2m1.GROUP_SIZE, -1)[..., :groups]


def _cast_by_codes(codes: torch.Tensor, block_bytes: torch.Tensor, block: Block) -> Fp4Form:
    finest_k, _ = _tables(codes.device)
    groups = _padded(codes)
    base = _group_bytes(block_bytes, tuple(codes.shape), block)
    largest = (groups & 0b0_1111_111).amax(-1)
    scale = (base + finest_k[largest.int()]).clamp(0, e8m0.MAX_BYTE)
    if block == GROUP:  # MXFP8: where the codes are values of E2M1, their scale is the one that FP4 had
        scale = torch.where((_lookup(groups, torch.zeros_like(base)) & INEXACT).amax(-1) == 0, base, scale)
    found = _lookup(groups, scale - base)
    exact = (found & INEXACT).amax(-1) == 0
    if not exact.all():
        # Rounding: 7 stands between 6 and 8, so a group that exceeds 6 * 2**s goes one step coarser.
        over = e4m3.decode(largest) > torch.ldexp(torch.full_like(base, 6, dtype=torch.float32), (scale - base).float())
        scale = torch.where(~exact & over, scale + 1, scale).clamp(max=e8m0.MAX_BYTE)
        found = _lookup(groups, scale - base)
    return Fp4Form(_pack(found & 0x0F, codes.shape[-1]), scale.to(torch.uint8), exact)


def _pack(groups: torch.Tensor, columns: int) -> torch.Tensor:
    return e2m1.pack(groups.flatten(-2)[..., :columns])


def _cast_by_values(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> Fp4Form:
    """For float32 scales that are no powers of two. Exact is rare, and possible: 1.0 under a scale of 1.5."""
    significand, exponent = torch.frexp(scale)
    shape = tuple(codes.shape)
    values = e4m3.decode(codes) * expand_scale(2 * significand, shape, block)  # exact: 4 + 24 bits, then rounded once
    base = expand_scale(exponent - 1, shape, block)[..., :: e2m1.GROUP_SIZE]
    amax = block_amax(values, GROUP)
    k = torch.where(amax == 0, 0, torch.frexp(amax).exponent - 1 - TOP_EXPONENT)
    k = torch.where(amax > torch.ldexp(torch.full_like(amax, e2m1.MAX), k.float()), k + 1, k)
    k = (base + k).clamp(-e8m0.BIAS, e8m0.MAX_BYTE - e8m0.BIAS) - base
    found = e2m1.encode(torch.ldexp(values, -expand_scale(k, shape, GROUP).float()))
    same = e2m1.decode(found) == torch.ldexp(values, -expand_scale(k, shape, GROUP).float())
    same &= values == e4m3.decode(codes) * expand_scale(2 * significand, shape, block).double()  # nothing was rounded
    exact = block_amax((~same).float(), GROUP) == 0
    return Fp4Form(e2m1.pack(found), (base + k + e8m0.BIAS).to(torch.uint8), exact)


def cast(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> Fp4Form:
    """E4M3 codes (uint8 [..., rows, even columns]) with block scales (E8M0 bytes or float32) -> nearest FP4 form.

    block.columns must be a multiple of 32. Groups that are not `exact` are rounded to nearest, ties to even, with the
    smallest scale with which nothing saturates. Raises ValueError on NaN codes and on scales that are not legal.
    """
    if block.columns % e2m1.GROUP_SIZE:
        raise ValueError(f"groups of {e2m1.GROUP_SIZE} do not fit into blocks of {block.columns} columns")
    if e4m3.is_nan(codes).any():
        raise ValueError("a code is NaN, which FP4 cannot hold")
    values = decode_scale(scale)
    if scale.dtype != torch.float32:
        return _cast_by_codes(codes, scale.view(torch.uint8), block)
    try:
        return _cast_by_codes(codes, e8m0.exact(values), block)
    except ValueError:
        return _cast_by_values(codes, values, block)


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
