"""Reads rows of source tensors for the recipes, and refuses invalid scales and codes."""

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo, row_count
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.errors import InputError
from dsv4.quant.blocks import Block

from .recipe import PIECE_BYTES, WORD, Array, Piece

if TYPE_CHECKING:
    import torch

TILE_ELEMENTS = 2**19  # elements that torch computes at once; intermediate tensors take up to 60 bytes for each


def placed(size: int, place: int) -> Array:
    """Memory of `size` bytes that begins in a page of memory where `place` does in a page of a file.

    O_DIRECT writes whole pages from whole pages: those of a result in such memory need not be copied.
    """
    room = np.empty(size + mmap.PAGESIZE, dtype=np.uint8)
    skipped = 0 if place % WORD else (place - room.ctypes.data) % mmap.PAGESIZE  # numbers stay aligned
    return room[skipped : skipped + size]


def read_rows(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int, place: int = 0) -> Array:
    """Rows [start, stop) of a source tensor as bytes, uint8 [rows, bytes of a row]. place: see `placed`."""
    width = info.nbytes // row_count(info.shape, info.nbytes)
    buffer = placed((stop - start) * width, place)
    if buffer.size:
        checkpoint.read_into(info.name, buffer.data, start * width)
    return buffer.reshape(stop - start, width)


def read_words(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int, place: int = 0) -> Array:
    """Words [start, stop) of a source tensor, of WORD bytes but for the last, as bytes. place: see `placed`."""
    buffer = placed(min(stop * WORD, info.nbytes) - start * WORD, place)
    checkpoint.read_into(info.name, buffer.data, start * WORD)
    return buffer


def source_rows(piece: Piece) -> tuple[int, int]:
    """The source rows of a piece, which may belong to a rank's slice of rows."""
    cut = piece.tensor.rank_slice
    if cut is None or cut.dim != 0:
        return piece.start, piece.stop
    begin, _ = cut.bounds(piece.tensor.source.shape[0])
    return begin + piece.start, begin + piece.stop


def slice_columns(raw: Array, piece: Piece) -> Array:
    """The columns of a rank's slice, contiguous; all of them if it is a slice of rows or none."""
    cut = piece.tensor.rank_slice
    if cut is None or cut.dim == 0:
        return raw
    begin, end = cut.bounds(raw.shape[1])
    return np.ascontiguousarray(raw[:, begin:end])


class Tile(NamedTuple):
    """A range of rows and columns of a matrix, in elements, and the corresponding range of its block scales."""

    rows: slice
    columns: slice
    scale_rows: slice
    scale_columns: slice


def tiles(shape: tuple[int, ...], block: Block) -> Iterator[Tile]:
    """Cut a matrix into tiles of whole blocks with about TILE_ELEMENTS, full rows where they fit. At least a block."""
    rows, columns = shape
    wide = max(1, TILE_ELEMENTS // block.rows // block.columns) * block.columns
    wide = min(wide, -(-columns // block.columns) * block.columns)
    high = max(1, TILE_ELEMENTS // wide // block.rows) * block.rows
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            bottom, right = min(top + high, rows), min(left + wide, columns)
            yield Tile(
                slice(top, bottom),
                slice(left, right),
                slice(top // block.rows, -(-bottom // block.rows)),
                slice(left // block.columns, -(-right // block.columns)),
            )


def check_scale(raw: Array, info: TensorInfo) -> None:
    """Raises InputError if block scales (bytes of a scale tensor) hold NaN, zero, negative values or infinity."""
    bad = 0
    if info.dtype == "F8_E8M0" and raw.size and raw.max() == quant.e8m0.NAN:
        bad = int(np.count_nonzero(raw == quant.e8m0.NAN))
    if info.dtype == "F32":
        values = raw.view(np.float32)
        bad = values.size - int(np.count_nonzero(np.isfinite(values) & (values > 0)))
    if bad:
        what = "byte 255, NaN" if info.dtype == "F8_E8M0" else "not positive and finite"
        raise InputError(
            f"'{info.name}': {bad} block scales are {what}",
            f"{info.shard} is damaged or was never right: download it again.",
        )


def damaged_scale(info: TensorInfo, error: ValueError) -> InputError:
    """The error for a scale tensor that the arithmetic refuses."""
    return InputError(f"'{info.name}': {error}", "Download its shard again.")


def typed_scale(raw: Array, info: TensorInfo) -> "torch.Tensor":
    """Bytes of block scales as float32, or as E8M0 bytes (uint8)."""
    import torch

    tensor = torch.from_numpy(raw)
    return tensor.view(torch.float32) if info.dtype == "F32" else tensor


def count_nan(raw: Array) -> int:
    """NaN codes among E4M3 codes."""
    return int(np.count_nonzero((raw & quant.e4m3.NAN) == quant.e4m3.NAN))


def _refuse_nan(checkpoint: Checkpoint, weight: Weight, raw: Array) -> None:
    """Raise InputError with the number of NaN codes of the whole tensor: decoded, they would look like values."""
    if weight.format is not Format.FP8 or not count_nan(raw):
        return
    rows = weight.info.shape[0]
    step = max(1, PIECE_BYTES // max(weight.info.row_bytes, 1))
    found = sum(count_nan(read_rows(checkpoint, weight.info, a, min(a + step, rows))) for a in range(0, rows, step))
    raise InputError(
        f"'{weight.name}' holds {found} E4M3 NaN codes, which stand for no value",
        "The source is damaged: download the shard again. (--to same copies the tensor as it is.)",
    )


def read_scale(checkpoint: Checkpoint, piece: Piece) -> Array:
    """The block scales over the source rows of a piece, as bytes. Raises InputError if one is no scale."""
    weight = piece.tensor.weight
    assert weight.scale is not None and weight.block is not None
    start, stop = source_rows(piece)
    raw = read_rows(checkpoint, weight.scale, start // weight.block.rows, -(-stop // weight.block.rows))
    check_scale(raw, weight.scale)
    return raw


def read_codes(checkpoint: Checkpoint, piece: Piece) -> Array:
    """The codes of a quantized weight for a piece, uint8 [rows, bytes]. Raises InputError if one is NaN."""
    weight = piece.tensor.weight
    raw = read_rows(checkpoint, weight.info, *source_rows(piece))
    _refuse_nan(checkpoint, weight, raw)
    return raw
