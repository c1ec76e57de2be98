"""Records the scales that a conversion drops and its way back would not choose, and reads the records of the source.

What a record is, is in checkpoint/forms/recorded_scales.py. Places are of whole tensors, also those that a rank's slice
of rows records; slices of columns have no record.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.forms.recorded_scales import PlacedScales, Record, block_of, form_key, load
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.quant.blocks import Block, scale_shape

from .recipe import Piece
from .rows import source_rows

if TYPE_CHECKING:
    import torch


def _form(weight: Weight) -> tuple[str, Block]:
    assert weight.block is not None
    return form_key(weight.format.value, weight.block), weight.block


def record(piece: Piece, codes: "torch.Tensor", scale: "torch.Tensor") -> Record:
    """The record for a piece of a quantized weight, from its codes and scales (E8M0 bytes, or float32)."""
    import torch

    weight, cut = piece.tensor.weight, piece.tensor.rank_slice
    if cut is not None and cut.dim != 0:
        return {}
    try:
        scale_bytes = quant.e8m0.exact(scale) if scale.dtype == torch.float32 else scale
    except ValueError:
        return {}  # the release's formats have no such scales
    form, block = _form(weight)
    differs = quant.scale_choice.not_by_rule(codes, scale_bytes, block, weight.format is Format.FP4)
    places = np.flatnonzero(differs.numpy())
    first = source_rows(piece)[0] // block.rows * scale_bytes.shape[1]
    return {form: PlacedScales(places + first, scale_bytes.numpy().reshape(-1)[places])} if len(places) else {}


def _scales(checkpoint: Checkpoint, name: str, form: str, shape: tuple[int, ...]) -> PlacedScales | None:
    """What the source's manifest says of a form of a weight of `shape`; None for nothing."""
    text, block = checkpoint.recorded_scales.get(name, {}).get(form), block_of(form)
    if text is None or block is None:
        return None
    found = load(text, math.prod(scale_shape(shape, block)))
    return found if len(found.places) else None


def passed_on(checkpoint: Checkpoint, piece: Piece) -> Record:
    """What the source's manifest says of other forms that the weight had; with its first piece."""
    weight = piece.tensor.weight
    if piece.start or piece.tensor.rank_slice is not None:
        return {}
    others = checkpoint.recorded_scales.get(weight.name, {}).keys() - {_form(weight)[0]}
    found = {form: _scales(checkpoint, weight.name, form, weight.logical_shape) for form in sorted(others)}
    return {form: scales for form, scales in found.items() if scales is not None}


def recorded(
    checkpoint: Checkpoint, piece: Piece, target: Format, block: Block
) -> "tuple[torch.Tensor, torch.Tensor] | None":
    """Places and bytes of the recorded scales of a piece of a BF16 weight that becomes `target`, counted from its first
    row. None if there are none."""
    import torch

    shape = piece.tensor.source.shape
    found = _scales(checkpoint, piece.tensor.weight.name, form_key(target.value, block), shape)
    if found is None or piece.tensor.rank_slice is not None:
        return None
    wide, (start, stop) = scale_shape(shape, block)[1], source_rows(piece)
    first, last = start // block.rows * wide, -(-stop // block.rows) * wide
    begin, end = np.searchsorted(found.places, (first, last))
    if begin == end:
        return None
    return torch.from_numpy(found.places[begin:end] - first), torch.from_numpy(found.scale_bytes[begin:end].copy())
