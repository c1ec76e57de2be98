"""Quantized weights that keep their codes, with block scales in the requested dtype.

E8M0 bytes become float32 powers of two, and float32 powers of two become E8M0 bytes. Both ways are exact; a float32
scale that is no power of two is an error. Group scales of FP4 weights are E8M0 in every release and stay so.

FP8 weights in the MX form have one scale for 32 elements of a row. In the release's form they have one for a block:
exact where all scales of a block are equal, as they are if the weight came from there, and an error where not.
"""

from typing import Any

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.config import weight_block
from dsv4.convert.checkpoint.editions.table import block_by_name
from dsv4.convert.checkpoint.forms.form import MX_BLOCK
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import Block, scale_shape

from .copy import copied, copied_scale
from .recipe import Array, OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import check_scale, read_rows


class Scales(Recipe):
    """Codes as they are, scales in another dtype."""

    def takes(self, weight: Weight) -> bool:
        """Every quantized weight."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes and the scale."""
        block = weight_block(config)
        if weight.block == MX_BLOCK and weight.format is Format.FP8 and block not in (None, MX_BLOCK):
            if block_by_name(weight.name, config) is None:
                return [copied(weight), self._block_scale(weight, Block(*block), settings.scale_dtype)]
        return [copied(weight), self._scale(weight, settings.scale_dtype)]

    def _block_scale(self, weight: Weight, block: Block, scale_dtype: str | None) -> OutputTensor:
        scale, shape = weight.scale, scale_shape(weight.logical_shape, block)
        assert scale is not None
        dtype = "F32" if scale_dtype == "f32" else "F8_E8M0"
        return OutputTensor(scale.name, dtype, shape, self, weight, (scale,), is_scale=True, block=block)

    def _scale(self, weight: Weight, scale_dtype: str | None) -> OutputTensor:
        scale = weight.scale
        assert scale is not None
        if scale.dtype == "F8_E8M0" and scale_dtype == "f32" and weight.format is Format.FP8:
            return OutputTensor(scale.name, "F32", scale.shape, self, weight, (scale,), is_scale=True)
        if scale.dtype == "F32" and scale_dtype == "e8m0":
            return OutputTensor(scale.name, "F8_E8M0", scale.shape, self, weight, (scale,), is_scale=True)
        return copied_scale(weight)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Scales of some rows. Raises InputError for a float32 scale that is no power of two."""
        import torch

        info = piece.tensor.source
        if piece.tensor.block is not None:
            return PieceResult(_joined(checkpoint, piece, piece.tensor.block))
        raw = read_rows(checkpoint, info, piece.start, piece.stop)
        check_scale(raw, info)
        if info.dtype == "F8_E8M0":
            return PieceResult(quant.e8m0.decode(torch.from_numpy(raw)).numpy())
        try:
            return PieceResult(quant.e8m0.exact(torch.from_numpy(raw).view(torch.float32)).numpy())
        except ValueError as error:
            raise InputError(f"'{info.name}': {error}", "Keep float32 scales: --scale-dtype f32.") from None


def _joined(checkpoint: Checkpoint, piece: Piece, block: Block) -> Array:
    """One scale for each block of some rows of blocks. Raises InputError if a block has several."""
    import torch

    info, wide = piece.tensor.source, block.columns // MX_BLOCK[1]
    rows = []
    for row in range(piece.start, piece.stop):
        raw = read_rows(checkpoint, info, row * block.rows, min((row + 1) * block.rows, info.shape[0]))
        check_scale(raw, info)
        first = raw[:1, ::wide]
        if (np.repeat(first, wide, axis=1)[:, : raw.shape[1]] != raw).any():
            raise InputError(
                f"'{info.name}': scales differ within a block of {block.rows} x {block.columns}",
                "It was not made from a release: FP8 in its blocks would round it. --to bf16 is exact.",
            )
        rows.append(first)
    scales = np.concatenate(rows)
    return quant.e8m0.decode(torch.from_numpy(scales)).numpy() if piece.tensor.dtype == "F32" else scales


RECIPE = Scales()
