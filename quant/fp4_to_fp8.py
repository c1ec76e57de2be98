"""FP4 -> FP8 without changing a value: float4_e2m1fn in groups of 32 to float8_e4m3fn in blocks.

An FP8 block has one scale 2**S where its FP4 elements have one scale 2**s per group of 32. Element c * 2**s becomes
the E4M3 value c * 2**k, k = s - S. Whether that is exact is a fact about integers:

    magnitude   0.5      1        1.5      2         3        4         6
    exact for   -8..9    -9..8    -8..8    -10..7    -9..7    -11..6    -10..6      (k; zero: any k)

Below the range a bit would fall under 2**-9, the smallest E4M3 subnormal; above it the value would exceed 448.
Each group thus says which S it can live with, [s - highest k, s - lowest k], and a block has an exact form if the
intervals of its groups meet. The reference converter always takes S = (largest s in the block) - 6, which is exact
whenever the s of a block span at most 14, whatever the codes. We take the same S whenever it is exact for the codes
that are there, so that weights and scales equal the reference's; otherwise the exact S closest to it; and if there
is none, the block is reported. The sign of zero is kept (the reference loses it).

The cast itself is a table: (k, two bytes = four codes) -> four E4M3 codes. A table of 65536 entries for each k costs
6 MB once and makes one lookup out of four elements, which is several times faster than arithmetic on each. The form
in fp4_to_fp8_compiled.py, eight times as fast, has a processor's byte shuffle look up sixteen at once.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch

from . import e2m1, e4m3, e8m0
from .block_scales import Block, scale_shape

REFERENCE_SHIFT = 6  # S = max(s) - 6: the largest E2M1 value, 6, becomes 384 = 6 * 2**6 <= 448
GUARANTEED_SPAN = 14  # max(s) - min(s) up to which the reference S is exact for every code: 6 - (-8)

LOWEST_K = (None, -8, -9, -8, -10, -9, -11, -10)  # by magnitude code; the mantissa's last bit reaches 2**-9
HIGHEST_K = (None, 9, 8, 8, 7, 7, 6, 6)  # the value reaches 256 or 384; twice that exceeds 448

# From -13 down even 6 * 2**k rounds to zero; S is never so small that k exceeds 9.
TABLE_K_MIN, TABLE_K_MAX = -13, 9
CACHE_BYTES = 2**21  # codes of a matrix that torch computes at once: they and the indices stay in cache


@dataclass(frozen=True)
class BlockScales:
    """The FP8 block scales chosen for one FP4 tensor, and what they cost. All are [..., block rows, block columns].

    scale_bytes: E8M0 byte of 2**S, uint8.
    span: largest minus smallest group scale exponent of the block, int16.
    rescaled: bool, S is exact but not the reference's.
    inexact: bool, no S is exact; `scale_bytes` holds the reference's S.
    """

    scale_bytes: torch.Tensor
    span: torch.Tensor
    rescaled: torch.Tensor
    inexact: torch.Tensor


def _per_block(groups: torch.Tensor, block: Block, fill: int) -> torch.Tensor:
    """[..., rows, groups] -> [..., block rows, block columns, groups of the block], padded with `fill`."""
    wide = block.columns // e2m1.GROUP_SIZE
    pad = (0, -groups.shape[-1] % wide, 0, -groups.shape[-2] % block.rows)
    padded = torch.nn.functional.pad(groups, pad, value=fill)
    tiles = torch.unflatten(torch.unflatten(padded, -2, (-1, block.rows)), -1, (-1, wide))
    return tiles.transpose(-3, -2).flatten(-2)


def _check_scale(packed: torch.Tensor, scale_bytes: torch.Tensor, block: Block) -> None:
    if block.columns % e2m1.GROUP_SIZE:
        raise ValueError(f"an FP8 block of {block.columns} columns does not consist of groups of {e2m1.GROUP_SIZE}")
    expected = scale_shape((*packed.shape[:-1], 2 * packed.shape[-1]), Block(1, e2m1.GROUP_SIZE))
    if tuple(scale_bytes.shape) != expected:
        raise ValueError(f"the scale has shape {list(scale_bytes.shape)}, {list(expected)} expected")


def _k_limits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest k that are exact for all codes of each group, int16 [..., rows, groups].

    A group of zeros gives (-1000, 1000): it never constrains.
    """
    magnitudes = e2m1.unpack(packed) & 0b0_11_1
    short = -magnitudes.shape[-1] % e2m1.GROUP_SIZE
    padded = torch.nn.functional.pad(magnitudes, (0, short))
    groups = torch.unflatten(padded, -1, (-1, e2m1.GROUP_SIZE)).int()
    low = torch.tensor([-1000, *LOWEST_K[1:]], dtype=torch.int16, device=packed.device)
    high = torch.tensor([1000, *HIGHEST_K[1:]], dtype=torch.int16, device=packed.device)
    return low[groups].amax(-1), high[groups].amin(-1)


def _exact_range(packed: torch.Tensor, scale_bytes: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest S byte that is exact for each block, int16, before the limits of E8M0."""
    low_k, high_k = _k_limits(packed)
    s = scale_bytes.to(torch.int16)
    return _per_block(s - high_k, block, -2000).amax(-1), _per_block(s - low_k, block, 2000).amin(-1)


def _block_extreme(scale_bytes: torch.Tensor, block: Block, largest: bool) -> torch.Tensor:
    """Largest (or smallest) group scale byte of each block, int16. Rows first: that reduction runs along memory."""
    wide = block.columns // e2m1.GROUP_SIZE
    pad = (0, -scale_bytes.shape[-1] % wide, 0, -scale_bytes.shape[-2] % block.rows)
    if any(pad):
        scale_bytes = torch.nn.functional.pad(scale_bytes, pad, value=0 if largest else e8m0.NAN)
    by_rows = torch.unflatten(scale_bytes, -2, (-1, block.rows))
    by_rows = by_rows.amax(-2) if largest else by_rows.amin(-2)
    tiles = torch.unflatten(by_rows, -1, (-1, wide))
    return (tiles.amax(-1) if largest else tiles.amin(-1)).to(torch.int16)


def _extremes(scale_bytes: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and smallest group scale byte of each block, int16. Raises ValueError if one is NaN."""
    largest = _block_extreme(scale_bytes, block, largest=True)
    if (largest == e8m0.NAN).any():
        raise ValueError("a group scale is byte 255, the NaN of float8_e8m0fnu")
    return largest, _block_extreme(scale_bytes, block, largest=False)


def scales_if_safe(scale_bytes: torch.Tensor, block: Block) -> BlockScales | None:
    """The scales of the FP8 blocks where group scales alone prove the reference's exact, else None.

    scale_bytes: E8M0, uint8 [..., rows, ceil(columns/32)]. True of every real release seen so far, and it spares
    reading the codes, sixteen times as many bytes. Raises ValueError when a scale is NaN.
    """
    largest, smallest = _extremes(scale_bytes, block)
    span, reference = largest - smallest, largest - REFERENCE_SHIFT
    if not ((span <= GUARANTEED_SPAN) & (reference >= 0)).all():
        return None
    no = torch.zeros_like(span, dtype=torch.bool)
    return BlockScales(reference.to(torch.uint8), span, no, no)


def choose_block_scales(packed: torch.Tensor, scale_bytes: torch.Tensor, block: Block) -> BlockScales:
    """The scales of the FP8 blocks of one tensor, by the rule in the module docstring.

    packed: E2M1 pairs, uint8 [..., rows, columns/2]. scale_bytes: E8M0, uint8 [..., rows, ceil(columns/32)].
    Raises ValueError when shapes do not fit or a scale is NaN.
    """
    _check_scale(packed, scale_bytes, block)
    safe = scales_if_safe(scale_bytes, block)
    if safe is not None:
        return safe
    largest, smallest = _extremes(scale_bytes, block)
    reference = largest - REFERENCE_SHIFT
    low, high = _exact_range(packed, scale_bytes, block)
    # Only the lower end of E8M0 matters: low <= 254 - 6. And where the reference S is below it, S = 0 is exact.
    low = low.clamp(min=0)
    inexact = low > high
    closest = torch.minimum(torch.maximum(reference, low), high)
    chosen = torch.where(inexact, reference, closest)
    return BlockScales(chosen.to(torch.uint8), largest - smallest, ~inexact & (chosen != reference), inexact)


def e4m3_by_exponent(device: torch.device) -> torch.Tensor:
    """uint8 [TABLE_K_MAX - TABLE_K_MIN + 1, 16]: the E4M3 code of each E2M1 code for each k."""
    k = torch.arange(TABLE_K_MIN, TABLE_K_MAX + 1, device=device)
    values = e2m1.decode(torch.arange(16, dtype=torch.uint8, device=device))
    return e4m3.encode(torch.ldexp(values.expand(len(k), 16), k[:, None].expand(-1, 16)))


@cache
def _table(device: torch.device) -> torch.Tensor:
    """int32 [(TABLE_K_MAX - TABLE_K_MIN + 1) * 65536]: four E4M3 codes for each k and each pair of bytes.

    The pair is indexed as a signed 16-bit number plus 32768, which is how a byte tensor can be read without a copy.
    """
    codes = e4m3_by_exponent(device).to(torch.int32)
    pair = torch.arange(65536, device=device) - 32768
    nibbles = [codes[:, (pair >> shift) & 0x0F] << (8 * i) for i, shift in enumerate((0, 4, 8, 12))]
    return (nibbles[0] | nibbles[1] | nibbles[2] | nibbles[3]).flatten()


@cache
def _table_offsets(device: torch.device) -> torch.Tensor:
    """int64 [TABLE_K_MAX - TABLE_K_MIN + 1]: where the table of each k has its index 0, twice, as two int32.

    A group is eight pairs of bytes, and each int64 serves two of them.
    """
    start = torch.arange(TABLE_K_MAX - TABLE_K_MIN + 1, dtype=torch.int64, device=device) * 65536 + 32768
    return start * (1 | 1 << 32)


def _k_of_groups(scale_bytes: torch.Tensor, block_bytes: torch.Tensor, block: Block) -> torch.Tensor:
    """k = s - S of each group, int16 [..., rows, groups]."""
    wide = block.columns // e2m1.GROUP_SIZE
    rows, groups = scale_bytes.shape[-2:]
    by_row = block_bytes.to(torch.int16).repeat_interleave(block.rows, -2)[..., :rows, :]
    return scale_bytes.to(torch.int16) - by_row.repeat_interleave(wide, -1)[..., :groups]


def cast(
    packed: torch.Tensor,
    scale_bytes: torch.Tensor,
    block_bytes: torch.Tensor,
    block: Block,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """E2M1 pairs and their group scales, and the FP8 block scales chosen for them -> E4M3 codes.

    packed: uint8 [..., rows, columns/2], contiguous. scale_bytes: uint8 [..., rows, ceil(columns/32)].
    block_bytes: uint8 [..., ceil(rows/block.rows), ceil(columns/block.columns)]. Returns uint8 [..., rows, columns].
    out: contiguous memory for the result, uint8. Exact where `choose_block_scales` said so; elsewhere rounded to
    nearest, ties to even, saturating.
    """
    if not packed.numel():
        return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]))
    short = -packed.shape[-1] % (e2m1.GROUP_SIZE // 2)
    if short:
        whole = cast(torch.nn.functional.pad(packed, (0, short)), scale_bytes, block_bytes, block)
        codes = whole[..., : 2 * packed.shape[-1]]
        return codes.contiguous() if out is None else out.copy_(codes)
    k = _k_of_groups(scale_bytes, block_bytes, block).clamp_(TABLE_K_MIN, TABLE_K_MAX).sub_(TABLE_K_MIN)
    start = torch.index_select(_table_offsets(packed.device), 0, k.to(torch.int32).flatten()).view(k.shape)
    twice = start.unsqueeze(-1).expand(*start.shape, 4).contiguous()
    index = twice.view(torch.int32).view(*packed.shape[:-1], -1)
    index += packed.view(torch.int16)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    codes = torch.empty(shape, dtype=torch.uint8, device=packed.device) if out is None else out
    torch.index_select(_table(packed.device), 0, index.view(-1), out=codes.view(torch.int32).view(-1))
    return codes


class CastInto(Protocol):
    """A form of the cast that writes into memory that is there, as `cast_into` does."""

    def __call__(
        self,
        packed: torch.Tensor,
        scale_bytes: torch.Tensor,
        block_bytes: torch.Tensor,
        block: Block,
        out: torch.Tensor,
    ) -> int: ...


def _count_negative_zeros(codes: torch.Tensor) -> int:
    return int(np.count_nonzero(codes.cpu().numpy() == e4m3.NEGATIVE_ZERO))  # ten times as fast as torch's own


def cast_into(
    packed: torch.Tensor,
    scale_bytes: torch.Tensor,
    block_bytes: torch.Tensor,
    block: Block,
    out: torch.Tensor,
) -> int:
    """`cast` with its result in `out`. Returns how many codes are -0, which the reference converter has not."""
    if out.dim() > 2:
        cast(packed, scale_bytes, block_bytes, block, out)
        return _count_negative_zeros(out)
    zeros, step = 0, max(1, CACHE_BYTES // max(out.shape[1], 1) // block.rows) * block.rows
    for top in range(0, len(out), step):
        rows = slice(top, top + step)
        scales = block_bytes[top // block.rows : -(-(top + step) // block.rows)]
        cast(packed[rows], scale_bytes[rows], scales, block, out[rows])
        zeros += _count_negative_zeros(out[rows])
    return zeros


def exact_values(
    packed: torch.Tensor, scale_bytes: torch.Tensor, block_bytes: torch.Tensor, block: Block
) -> torch.Tensor:
    """What the E4M3 codes ought to stand for: c * 2**k, float64 [..., rows, columns], exact for every pair of scales.

    Where `e4m3.decode(codes)` differs from it, the cast changed an element. Arguments as for `cast`.
    """
    values = e2m1.decode(e2m1.unpack(packed)).double()
    k = _k_of_groups(scale_bytes, block_bytes, block).repeat_interleave(e2m1.GROUP_SIZE, -1)[..., : values.shape[-1]]
    return torch.ldexp(values, k.double())
