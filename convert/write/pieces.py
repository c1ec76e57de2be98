"""From source bytes to output bytes, a bounded piece at a time: what the workers do.

A piece is a range of rows of one output tensor. It is read with `pread`, computed in blocks that stay in the cache
of a core, and handed on as one buffer with what was counted on the way. Pieces do not know of each other, so any
number of workers, in any order, gives the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo, row_count
from dsv4.convert.plan.classify import Format, Weight
from dsv4.convert.plan.plan import Op, OutputTensor
from dsv4.errors import InputError, printable
from dsv4.quant import e4m3, e8m0, fp4_to_fp8, fp8_to_fp4, to_bf16
from dsv4.quant.block_scales import Block
from dsv4.quant.fp4_to_fp8 import BlockScales, CastInto

PIECE_BYTES = 8 * 2**20  # output bytes of a piece: an expert matrix of V4-Flash is one
CACHE_BYTES = 2**21  # output bytes computed at once: intermediate tensors stay in cache, calls are few
# Reading a piece, its output and the intermediate tensors of one block, for every operation.
PIECE_MEMORY = 6 * PIECE_BYTES

BLOCKWISE = (Op.FP8_CODES, Op.FP4_CODES, Op.FP4_SCALE, Op.BF16)  # pieces of these begin at a row of blocks

Array = np.ndarray[Any, np.dtype[Any]]


class Piece(NamedTuple):
    """Rows [start, stop) of an output tensor."""

    tensor: OutputTensor
    start: int
    stop: int


@dataclass
class Counts:
    """What was met in some pieces of a tensor; pieces add up."""

    negative_zeros: int = 0  # of FP4 codes cast to FP8
    nan: int = 0  # E4M3 NaN codes copied
    changed: int = 0  # elements whose value is not the source's
    squared_error: float = 0.0  # of FP4 casts: sum of squares, and of the values themselves
    squared_value: float = 0.0
    max_error: float = 0.0

    def add(self, other: "Counts") -> None:
        """Include another piece's counts."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name == "max_error" else mine + theirs)


@dataclass
class Made:
    """The bytes of a piece, and the source bytes it came from (None where they are the same)."""

    data: Array
    source: Array | None = None
    counts: Counts = field(default_factory=Counts)


def split(tensor: OutputTensor) -> Iterator[Piece]:
    """The pieces of an output tensor with elements, in order, cut between blocks of rows."""
    rows, width = tensor.rows, tensor.nbytes // tensor.rows
    if tensor.op is Op.FP8_SCALE:
        yield Piece(tensor, 0, rows)
        return
    block = tensor.block or tensor.weight.block
    unit = block.rows if block is not None and tensor.op in BLOCKWISE else 1
    step = max(unit, PIECE_BYTES // max(width, 1) // unit * unit)
    for start in range(0, rows, step):
        yield Piece(tensor, start, min(start + step, rows))


def _read_rows(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int) -> Array:
    """Rows of a source tensor as bytes, uint8 [rows, bytes of a row]."""
    width = info.nbytes // row_count(info.shape, info.nbytes)
    buffer = np.empty((stop - start, width), dtype=np.uint8)
    if buffer.size:
        checkpoint.read_into(info.name, buffer.data.cast("B"), start * width)
    return buffer


def _slice_columns(raw: Array, piece: Piece) -> Array:
    part = piece.tensor.part
    if part is None or part.dim == 0:
        return raw
    begin, end = part.bounds(raw.shape[1])
    return np.ascontiguousarray(raw[:, begin:end])


def _source_rows(piece: Piece) -> tuple[int, int]:
    """Rows of the source that a piece of a rank's slice stands for."""
    part = piece.tensor.part
    if part is None or part.dim != 0:
        return piece.start, piece.stop
    begin, _ = part.bounds(piece.tensor.source.shape[0])
    return begin + piece.start, begin + piece.stop


def check_scale(raw: Array, info: TensorInfo) -> None:
    """Raises InputError if block scales (bytes of a scale tensor) hold NaN, zero, negative values or infinity."""
    bad = np.count_nonzero(raw == e8m0.NAN) if info.dtype == "F8_E8M0" else 0
    if info.dtype == "F32":
        values = raw.view(np.float32)
        bad = values.size - np.count_nonzero(np.isfinite(values) & (values > 0))
    if bad:
        what = "byte 255, NaN" if info.dtype == "F8_E8M0" else "not positive and finite"
        raise InputError(
            f"'{printable(info.name)}': {bad} block scales are {what}",
            f"{info.shard} is damaged or was never right: download it again.",
        )


def _count_nan(raw: Array) -> int:
    return int(np.count_nonzero((raw & e4m3.NAN) == e4m3.NAN))


def _copy(checkpoint: Checkpoint, piece: Piece) -> Made:
    tensor, info = piece.tensor, piece.tensor.source
    data = _slice_columns(_read_rows(checkpoint, info, *_source_rows(piece)), piece)
    counts = Counts()
    if tensor.of_scale and tensor.weight.format is not Format.PLAIN:
        check_scale(data, info)
    elif tensor.weight.format is Format.FP8:
        counts.nan = _count_nan(data)
    return Made(data, counts=counts)


def _convert_scale(checkpoint: Checkpoint, piece: Piece) -> Made:
    info = piece.tensor.source
    raw = _read_rows(checkpoint, info, piece.start, piece.stop)
    check_scale(raw, info)
    if piece.tensor.op is Op.SCALE_TO_F32:
        return Made(e8m0.decode(torch.from_numpy(raw)).numpy(), raw)
    try:
        return Made(e8m0.exact(torch.from_numpy(raw).view(torch.float32)).numpy(), raw)
    except ValueError as error:
        raise InputError(f"'{printable(info.name)}': {error}", "Keep float32 scales: --scale-dtype f32.") from None


def _fp8_scale(piece: Piece, scales: BlockScales) -> Made:
    chosen = scales.scale_bytes
    return Made((chosen if piece.tensor.dtype == "F8_E8M0" else e8m0.decode(chosen)).numpy())


def _scale_rows(weight_rows: tuple[int, int], block: Block) -> tuple[int, int]:
    return weight_rows[0] // block.rows, -(-weight_rows[1] // block.rows)


def _blocks(rows: int, width: int, unit: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about CACHE_BYTES, cut at multiples of `unit`."""
    step = max(unit, CACHE_BYTES // max(width, 1) // unit * unit)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _weight_and_scale(checkpoint: Checkpoint, piece: Piece) -> tuple[Array, Array]:
    """The source rows of a piece as bytes: of the weight, and of the scales that lie over them."""
    weight = piece.tensor.weight
    assert weight.scale is not None and weight.block is not None
    rows = _source_rows(piece)
    scale_rows = _scale_rows(rows, weight.block)
    scale = _read_rows(checkpoint, weight.scale, *scale_rows)
    check_scale(scale, weight.scale)
    return _read_rows(checkpoint, weight.info, *rows), scale


def _fp8_codes(checkpoint: Checkpoint, piece: Piece, scales: BlockScales, cast: CastInto) -> Made:
    block = piece.tensor.block
    assert block is not None
    raw, groups = _weight_and_scale(checkpoint, piece)
    packed, group_bytes = torch.from_numpy(raw), torch.from_numpy(groups)
    first = piece.start // block.rows
    data = torch.empty((len(raw), piece.tensor.shape[1]), dtype=torch.uint8)
    counts = Counts()
    for a, b in _blocks(len(raw), piece.tensor.shape[1], block.rows):
        over = slice(first + a // block.rows, first + -(-b // block.rows))
        chosen = scales.scale_bytes[over]
        counts.negative_zeros += cast(packed[a:b], group_bytes[a:b], chosen, block, data[a:b])
        if scales.inexact[over].any():
            exact = fp4_to_fp8.exact_values(packed[a:b], group_bytes[a:b], chosen, block)
            counts.changed += int(torch.count_nonzero(exact != e4m3.decode(data[a:b])))
    return Made(data.numpy(), raw, counts)


def _typed_scale(groups: Array, info: TensorInfo) -> torch.Tensor:
    tensor = torch.from_numpy(groups)
    return tensor.view(torch.float32) if info.dtype == "F32" else tensor


def _refuse_nan(checkpoint: Checkpoint, weight: Weight, raw: Array) -> None:
    """Decoded, a NaN code would become an ordinary-looking part of the output: refuse, counting all of the tensor."""
    if weight.format is not Format.FP8 or not _count_nan(raw):
        return
    rows = weight.info.shape[0]
    step = max(1, PIECE_BYTES // max(weight.info.row_bytes, 1))
    found = sum(_count_nan(_read_rows(checkpoint, weight.info, a, min(a + step, rows))) for a in range(0, rows, step))
    raise InputError(
        f"'{printable(weight.name)}' holds {found} E4M3 NaN codes, which stand for no value",
        "The source is damaged: download the shard again. (--to same copies the tensor as it is.)",
    )


def _fp4_form(checkpoint: Checkpoint, piece: Piece) -> Made:
    """FP8 codes of some rows as FP4: the packed codes or their scales, whichever the piece is of."""
    weight, block = piece.tensor.weight, piece.tensor.weight.block
    assert weight.scale is not None and block is not None
    raw, scale_raw = _weight_and_scale(checkpoint, piece)
    _refuse_nan(checkpoint, weight, raw)
    codes, scale = torch.from_numpy(raw), _typed_scale(scale_raw, weight.scale)
    counts, parts = Counts(), []
    for a, b in _blocks(len(raw), raw.shape[1], block.rows):
        over = slice(a // block.rows, -(-b // block.rows))
        form = fp8_to_fp4.cast(codes[a:b], scale[over], block)
        if piece.tensor.op is Op.FP4_SCALE:
            parts.append(form.scale_bytes)
            continue
        parts.append(form.packed)
        if not form.exact.all():
            counts.add(Counts(**fp8_to_fp4.error(form, codes[a:b], scale[over], block)._asdict()))
    return Made(torch.cat(parts).numpy(), raw, counts)


def _bf16(checkpoint: Checkpoint, piece: Piece) -> Made:
    weight, block = piece.tensor.weight, piece.tensor.weight.block
    assert weight.scale is not None and block is not None
    raw, scale_raw = _weight_and_scale(checkpoint, piece)
    _refuse_nan(checkpoint, weight, raw)
    codes, scale = torch.from_numpy(raw), _typed_scale(scale_raw, weight.scale)
    counts, parts = Counts(), []
    for a, b in _blocks(len(raw), 2 * piece.tensor.shape[1], block.rows):
        over = slice(a // block.rows, -(-b // block.rows))
        if weight.format is Format.FP4:
            form = to_bf16.from_fp4(codes[a:b], scale[over])
        else:
            form = to_bf16.from_fp8(codes[a:b], scale[over], block)
        parts.append(form.values.view(torch.int16))
        counts.changed += form.changed
    return Made(torch.cat(parts).numpy(), raw, counts)


def make(
    checkpoint: Checkpoint,
    piece: Piece,
    scales: BlockScales | None = None,
    cast: CastInto = fp4_to_fp8.cast_into,
) -> Made:
    """Read and compute one piece. Where it is cast from FP4 to FP8, `scales` are the block scales chosen for its
    weight, and `cast` is the form of the cast.

    Raises InputError for NaN scales and whatever else the source should not hold.
    """
    op = piece.tensor.op
    if op is Op.COPY:
        return _copy(checkpoint, piece)
    if op in (Op.SCALE_TO_F32, Op.SCALE_TO_E8M0):
        return _convert_scale(checkpoint, piece)
    if op in (Op.FP4_CODES, Op.FP4_SCALE):
        return _fp4_form(checkpoint, piece)
    if op is Op.BF16:
        return _bf16(checkpoint, piece)
    assert scales is not None
    return _fp8_scale(piece, scales) if op is Op.FP8_SCALE else _fp8_codes(checkpoint, piece, scales, cast)
