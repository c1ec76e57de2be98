"""Copies tensors byte for byte: plain ones, and quantized weights with their scales."""

from typing import Any

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.settings import Settings

from .recipe import Counts, OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import check_scale, count_nan, read_rows, read_words, slice_columns, source_rows


class Copy(Recipe):
    """Byte for byte. Scales of quantized weights are checked, NaN codes are counted."""

    def takes(self, weight: Weight) -> bool:
        """Any weight can be copied."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The tensor, and its scale if it has one, as they are."""
        return kept(weight)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """The source's bytes, or the slice of a rank."""
        tensor, info = piece.tensor, piece.tensor.source
        if tensor.in_words:
            data = read_words(checkpoint, info, piece.start, piece.stop, piece.place)
        else:
            data = slice_columns(read_rows(checkpoint, info, *source_rows(piece), piece.place), piece)
        counts = Counts()
        if tensor.is_scale and tensor.weight.format is not Format.PLAIN:
            check_scale(data, info)
        elif tensor.format is Format.FP8:
            counts.nan = count_nan(data)
        return PieceResult(data, counts)

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """The number of NaN codes in the source, if there are any."""
        return {"nan_codes": counts.nan} if counts.nan else {}


RECIPE = Copy()


def copied(weight: Weight) -> OutputTensor:
    """The weight itself."""
    info = weight.info
    return OutputTensor(weight.name, info.dtype, info.shape, RECIPE, weight, (info,), weight.format, bytewise=True)


def copied_scale(weight: Weight) -> OutputTensor:
    """The scale of a weight that has one."""
    scale = weight.scale
    assert scale is not None
    return OutputTensor(scale.name, scale.dtype, scale.shape, RECIPE, weight, (scale,), is_scale=True, bytewise=True)


def kept(weight: Weight) -> list[OutputTensor]:
    """A weight and its scale as they are."""
    return [copied(weight)] if weight.scale is None else [copied(weight), copied_scale(weight)]
