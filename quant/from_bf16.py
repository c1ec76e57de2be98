"""BF16 -> FP4 and FP8: the way back, exact where the values came from there.

A block (1 x 32 of FP4; 128 x 128 or 32 x 32 of FP8) gets one scale 2**s. The smallest with which nothing saturates,
2**ceil(log2(largest magnitude / largest code)), is the rule of the releases. A larger one only drops low bits, so a
block has an exact form if and only if it is exact with that scale (or with 2**-127, if that is larger).

The releases took the largest magnitude before rounding: a group of FP4 whose largest element was 3.2 has the code 3 as
its largest, and BF16 shows that as the code 6 of half the scale. So where the largest code would be the largest of the
format and every element is exact under twice the scale, that scale is taken. A group of rounded numbers that really had
the smaller scale would have to be without the codes 0.5 and 1.5, which is rare: 1 in 50 000. Either way the values are
equal.

Blocks that have no exact form are rounded to nearest, ties to even, with the rule of the releases, and counted: that is
how a model that was trained in BF16 gets into the release's format. The sign of zero is kept.

`from_bf16.c` does it in one pass over memory. The form in torch stands in where there is no compiler, for values near
the lower end of BF16's range, and for tensors that are not on the CPU; it gives the same bits.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from dsv4 import compiled

from . import e2m1, e4m3, e8m0
from .block_scales import FP4_BLOCK, Block, block_amax, expand_scale, power_of_two_above, scale_shape
from .fp8_to_fp4 import Fp4Error

CHUNK_ELEMENTS = 2**19  # elements that torch computes at once
FLOAT64_ELEMENTS = 2**17  # the same, where it computes in float64: float32 loses the smallest
WIDEST_BLOCK = 2**15  # columns, of the compiled form: it counts in 16 bits


@dataclass(frozen=True)
class _Format:
    """A number format: its codes, and its largest value."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    largest: float


_E2M1 = _Format(e2m1.encode, e2m1.decode, e2m1.MAX)
_E4M3 = _Format(e4m3.encode, e4m3.decode, e4m3.MAX)


class BlockForm(NamedTuple):
    """codes uint8 [rows, columns] (FP4: packed, [rows, columns/2]), scale_bytes uint8 and changed int32, one a block.

    changed: how many elements of a block have another value; 0 if the block is exact.
    """

    codes: torch.Tensor
    scale_bytes: torch.Tensor
    changed: torch.Tensor


def in_blocks(values: torch.Tensor, block: Block) -> torch.Tensor:
    """[rows, columns] -> [block rows, block columns, rows of a block, columns of a block].

    A view if the blocks are whole, else a copy that is padded with zeros.
    """
    rows, columns = values.shape
    short = 0, -columns % block.columns, 0, -rows % block.rows
    padded = torch.nn.functional.pad(values, short) if any(short) else values
    return torch.unflatten(torch.unflatten(padded, 0, (-1, block.rows)), -1, (-1, block.columns)).transpose(1, 2)


def _scales_in_torch(values: torch.Tensor, block: Block, target: _Format) -> torch.Tensor:
    """E8M0 byte of each block of float32 values that are BF16."""
    amax = block_amax(values, block)
    scale = power_of_two_above(amax, target.largest)
    doubtful = amax == target.largest * e8m0.decode(scale)
    if doubtful.any():
        coarser = e8m0.decode(scale[doubtful] + 1)
        scaled = in_blocks(values, block)[doubtful] / coarser[:, None, None]
        scale[doubtful] += (target.decode(target.encode(scaled)) == scaled).all(-1).all(-1)
    return scale


def _codes_in_torch(
    values: torch.Tensor, scale: torch.Tensor, block: Block, target: _Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of float32 values under E8M0 scales, a byte each, and how many elements of each block change."""
    scaled = values / expand_scale(e8m0.decode(scale), tuple(values.shape), block)
    codes = target.encode(scaled)
    return codes, in_blocks(target.decode(codes) != scaled, block).sum((-1, -2), dtype=torch.int32)


def _chunks(rows: int, columns: int, block: Block) -> Iterator[slice]:
    step = max(block.rows, CHUNK_ELEMENTS // max(columns, 1) // block.rows * block.rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def in_torch(values: torch.Tensor, block: Block, target: _Format) -> BlockForm:
    """The form in torch, whatever the device, in chunks of rows. Arguments and errors as for `to_fp8`."""
    if not torch.isfinite(values).all():
        raise ValueError("NaN and infinity cannot be quantized")
    parts = []
    rows, columns = values.shape
    for some in _chunks(rows, columns, block):
        wide = values[some].float()
        scale = _scales_in_torch(wide, block, target)
        codes, changed = _codes_in_torch(wide, scale, block, target)
        parts.append((e2m1.pack(codes) if target is _E2M1 else codes, scale, changed))
    return BlockForm(*(torch.cat(found) for found in zip(*parts, strict=True)))


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library()
    if library is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.dsv4_bf16_to_fp8.restype = library.dsv4_bf16_to_fp4.restype = count
        library.dsv4_bf16_to_fp8.argtypes = [pointer, count, count, count, count, pointer, pointer, pointer]
        library.dsv4_bf16_to_fp4.argtypes = [pointer, count, count, pointer, pointer, pointer]
    return library


def _compiled(values: torch.Tensor, block: Block, target: _Format) -> BlockForm | None:
    """The compiled form; None where it is not built, does not fit the tensor, or leaves out a block."""
    library = _library()
    plain = values.device.type == "cpu" and values.is_contiguous()
    if library is None or not plain or block.columns > WIDEST_BLOCK:
        return None
    shape = rows, columns = (values.shape[0], values.shape[1])
    scales = torch.empty(scale_shape(shape, block), dtype=torch.uint8)
    changed = torch.empty(scales.shape, dtype=torch.int32)
    codes = torch.empty((rows, columns // 2 if target is _E2M1 else columns), dtype=torch.uint8)
    outputs = codes.data_ptr(), scales.data_ptr(), changed.data_ptr()
    if target is _E2M1:
        left_out = library.dsv4_bf16_to_fp4(values.data_ptr(), rows, columns, *outputs)
    else:
        left_out = library.dsv4_bf16_to_fp8(values.data_ptr(), rows, columns, *block, *outputs)
    return None if left_out else BlockForm(codes, scales, changed)


def _convert(values: torch.Tensor, block: Block, target: _Format) -> BlockForm:
    found = _compiled(values, block, target)
    return in_torch(values, block, target) if found is None else found


def to_fp8(values: torch.Tensor, block: Block) -> BlockForm:
    """bfloat16 [rows, columns] -> E4M3 codes with one E8M0 scale a block. Raises ValueError on NaN and infinity."""
    return _convert(values, block, _E4M3)


def to_fp4(values: torch.Tensor) -> BlockForm:
    """bfloat16 [rows, even columns] -> packed E2M1 codes with one E8M0 scale per 32 of a row.

    Raises ValueError on NaN and infinity, and for an odd number of columns.
    """
    if values.shape[-1] % 2:
        raise ValueError(f"two codes share a byte, but the last dimension is {values.shape[-1]}")
    return _convert(values, FP4_BLOCK, _E2M1)


def _in_some_blocks(
    values: torch.Tensor, block: Block, at: tuple[torch.Tensor, ...], scale_bytes: torch.Tensor, target: _Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of some blocks under other scales, a byte each, [n, rows, columns], and which blocks are exact."""
    scaled = in_blocks(values, block)[at].double() / e8m0.decode(scale_bytes).double()[:, None, None]
    codes = target.encode(scaled.clamp(-target.largest, target.largest))
    return codes, (target.decode(codes) == scaled).flatten(1).all(1)


def with_scales(
    form: BlockForm, values: torch.Tensor, block: Block, places: torch.Tensor, scale_bytes: torch.Tensor
) -> BlockForm:
    """A form of `values` with other scales for some blocks: for those in which every element is exact under them.

    places: int64 [n], of blocks, counted row by row. scale_bytes: uint8 [n]. Other blocks, and places that are none,
    change nothing.
    """
    packed = form.codes.shape != values.shape
    target, stored = (_E2M1, Block(1, block.columns // 2)) if packed else (_E4M3, block)
    valid = (places >= 0) & (places < form.scale_bytes.numel()) & (scale_bytes != e8m0.NAN)
    blocks, scales, changed = in_blocks(form.codes.clone(), stored), form.scale_bytes.clone(), form.changed.clone()
    places, scale_bytes = places[valid], scale_bytes[valid]
    step = max(1, FLOAT64_ELEMENTS // (block.rows * block.columns))
    for start in range(0, len(places), step):
        some, wanted = places[start : start + step], scale_bytes[start : start + step]
        at = some // scales.shape[1], some % scales.shape[1]
        codes, exact = _in_some_blocks(values, block, at, wanted, target)
        chosen = at[0][exact], at[1][exact]
        blocks[chosen] = (e2m1.pack(codes) if packed else codes)[exact]
        scales[chosen], changed[chosen] = wanted[exact], 0
    whole = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
    rows, columns = form.codes.shape
    return BlockForm(whole[:rows, :columns].contiguous(), scales, changed)


def decode(form: BlockForm, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """The values of a form of a tensor of `shape`, float64, which holds each exactly."""
    packed = form.codes.shape != shape
    codes = e2m1.decode(e2m1.unpack(form.codes)) if packed else e4m3.decode(form.codes)
    return codes.double() * expand_scale(e8m0.decode(form.scale_bytes), shape, block).double()


def error(form: BlockForm, values: torch.Tensor, block: Block) -> Fp4Error:
    """How far a form is from the values that it was made of."""
    old = values.double()
    difference = (decode(form, tuple(values.shape), block) - old).abs()
    return Fp4Error(
        int(torch.count_nonzero(difference)),
        float((difference**2).sum()),
        float((old**2).sum()),
        float(difference.max()),
    )
