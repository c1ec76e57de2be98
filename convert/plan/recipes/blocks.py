"""BF16 weights that are FP8 in the release, back to FP8 blocks: exact where the values came from there.

A block's scale is the smallest power of two with which no code saturates. A value that was an E4M3 code under another
power of two is then a code too: a smaller scale only has more fine steps. The scan checks that for every element.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.names import scale_name
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.classify import fp8_block
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import Block, scale_shape

from .recipe import Array, Counts, OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import read_rows, tiles

if TYPE_CHECKING:
    import torch


def is_released_in_fp8(weight: Weight) -> bool:
    """Whether a BF16 weight is FP8 in the release, by what its file says."""
    return weight.info.dtype == "BF16" and weight.info.released_dtype == "F8_E4M3" and len(weight.info.shape) == 2


class ToBlocks(Recipe):
    """BF16 weights to FP8 with block scales."""

    def takes(self, weight: Weight) -> bool:
        """BF16 weights that are FP8 in the release."""
        return is_released_in_fp8(weight)

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes, and one scale a block."""
        block, shape, reads = fp8_block(config), weight.info.shape, (weight.info,)
        dtype, scales = "F32" if settings.scale_dtype == "f32" else "F8_E8M0", scale_shape(shape, block)
        return [
            OutputTensor(
                weight.name, "F8_E4M3", shape, self, weight, reads, Format.FP8,
                scanned=True, row_unit=block.rows, block=block,
            ),
            OutputTensor(scale_name(weight.name), dtype, scales, self, weight, reads, is_scale=True, block=block),
        ]  # fmt: skip

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Choose the scales, and count the elements that are not codes under them."""
        import torch

        _, scales, changed = _quantized(checkpoint, piece, piece.start, piece.stop)
        return Scan(Counts(changed=changed), {"scales": torch.from_numpy(scales)})

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Codes of some rows, or scales of some rows of blocks."""
        assert scan is not None
        if piece.tensor.is_scale:
            chosen = scan.needed["scales"][piece.start : piece.stop]
            return PieceResult((quant.e8m0.decode(chosen) if piece.tensor.dtype == "F32" else chosen).numpy())
        codes, _, changed = _quantized(checkpoint, piece, piece.start, piece.stop)
        return PieceResult(codes, counts=Counts(changed=changed))


def _quantized(checkpoint: Checkpoint, piece: Piece, start: int, stop: int) -> tuple[Array, Array, int]:
    """Codes and E8M0 scales of some rows, and how many elements change."""
    import torch

    from dsv4.quant.block_scales import expand_scale

    info, block = piece.tensor.source, piece.tensor.block
    assert block is not None
    raw = read_rows(checkpoint, info, start, stop).view(np.int16)
    codes = np.empty(raw.shape, np.uint8)
    scales = np.empty(scale_shape(raw.shape, block), np.uint8)
    changed = 0
    for tile in tiles(raw.shape, block):
        values = torch.from_numpy(raw[tile.rows, tile.columns].copy()).view(torch.bfloat16).float()
        found, chosen = _quantize(values, block, info.name)
        codes[tile.rows, tile.columns] = found.numpy()
        scales[tile.scale_rows, tile.scale_columns] = chosen.numpy()
        back = quant.e4m3.decode(found) * expand_scale(quant.e8m0.decode(chosen), tuple(values.shape), block)
        changed += int(torch.count_nonzero(back != values))
    return codes, scales, changed


def _quantize(values: "torch.Tensor", block: Block, name: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    try:
        return quant.quantize_fp8(values, block)
    except ValueError as error:
        raise InputError(f"'{name}': {error}", "The source is damaged: download it again.") from None


RECIPE = ToBlocks()
