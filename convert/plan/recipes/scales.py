"""Quantized weights that keep their codes, with block scales in the dtype that is asked for.

E8M0 bytes become float32 powers of two, and float32 powers of two become E8M0 bytes. Both ways are exact; a float32
scale that is no power of two is an error. Group scales of FP4 weights are E8M0 in every release and stay so.
"""

from typing import Any

import torch

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant import e8m0

from .copy import copied, copied_scale
from .recipe import OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import check_scale, read_rows


class Scales(Recipe):
    """Codes as they are, scales in another dtype."""

    def takes(self, weight: Weight) -> bool:
        """Every quantized weight."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes and the scale."""
        return [copied(weight), self._scale(weight, settings.scale_dtype)]

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
        info = piece.tensor.source
        raw = read_rows(checkpoint, info, piece.start, piece.stop)
        check_scale(raw, info)
        if info.dtype == "F8_E8M0":
            return PieceResult(e8m0.decode(torch.from_numpy(raw)).numpy(), raw)
        try:
            return PieceResult(e8m0.exact(torch.from_numpy(raw).view(torch.float32)).numpy(), raw)
        except ValueError as error:
            raise InputError(f"'{info.name}': {error}", "Keep float32 scales: --scale-dtype f32.") from None


RECIPE = Scales()
