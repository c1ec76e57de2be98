"""The base class of conversions to MX formats: weights in E4M3 with one E8M0 scale for 32 elements of a row.

An FP4 code is an E4M3 code of the same value under the same scale, and an FP8 code keeps its bits under its block's
scale, repeated. So the result is exact, whatever the codes, unless a float32 block scale is no power of two: then
`--on-inexact round` quantizes the weight anew.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes.copy import copied
from dsv4.convert.plan.recipes.recipe import Array, Counts, OutputTensor, Piece, PieceResult, Recipe, Scan
from dsv4.convert.plan.recipes.rows import (
    check_scale,
    count_nan,
    placed,
    read_codes,
    read_rows,
    read_scale,
    source_rows,
    typed_scale,
)
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import FP4_BLOCK, scale_shape

if TYPE_CHECKING:
    import torch

    from dsv4.quant.fp4_to_fp8 import CastInto

SCALE_SUFFIX = ".weight_scale"


def sibling(weight: Weight, suffix: str) -> str:
    """`X.weight` -> `X` and the suffix."""
    return weight.name.removesuffix(WEIGHT_SUFFIX) + suffix


def check_columns(weight: Weight) -> None:
    """Raises InputError for a weight whose rows are not whole groups of 32."""
    columns = weight.logical_shape[1]
    if columns % FP4_BLOCK.columns:
        raise InputError(
            f"'{weight.name}' has {columns} columns, which are not groups of {FP4_BLOCK.columns}",
            "The MX formats have no place for a part of a group: --to bf16 is exact.",
        )


class MxRecipe(Recipe):
    """E4M3 with scales of 1 x 32, under the release's name of the weight and `weight_scale`. Subclasses add to it."""

    cast_format = Format.FP4

    @cached_property
    def _cast(self) -> "CastInto":
        return quant.fp4_to_fp8_compiled.best_kernel()

    def takes(self, weight: Weight) -> bool:
        """Every quantized weight."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes and the scale."""
        assert weight.scale is not None
        check_columns(weight)
        return [self._codes(weight), self._scales(weight)]

    def _codes(self, weight: Weight) -> OutputTensor:
        assert weight.scale is not None and weight.block is not None
        if weight.format is Format.FP8 and weight.scale.dtype == "F8_E8M0":
            return copied(weight)
        return OutputTensor(
            weight.name, "F8_E4M3", weight.logical_shape, self, weight, (weight.info, weight.scale), Format.FP8,
            scanned=weight.format is Format.FP8, row_unit=weight.block.rows,
        )  # fmt: skip

    def _scales(self, weight: Weight) -> OutputTensor:
        assert weight.scale is not None and weight.block is not None
        shape = scale_shape(weight.logical_shape, FP4_BLOCK)
        reads = (weight.scale,) if weight.scale.dtype == "F8_E8M0" else (weight.info, weight.scale)
        return OutputTensor(
            sibling(weight, SCALE_SUFFIX), "U8", shape, self, weight, reads, is_scale=True, row_unit=weight.block.rows
        )

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """For float32 block scales: count the elements that change, if a scale is no power of two."""
        scale = _float_scale(checkpoint, piece)
        if _powers_of_two(scale):
            return Scan()
        return Scan(_requantized(checkpoint, piece, scale)[2])

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """The reason, and the number of elements that change."""
        return f"float32 block scales that are no powers of two: {scan.counts.changed} elements change"

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Codes, or scales, of some rows."""
        if scan is not None and not scan.is_exact:
            codes, scales, counts = _requantized(checkpoint, piece, _float_scale(checkpoint, piece))
            return PieceResult(scales) if piece.tensor.is_scale else PieceResult(codes, counts)
        if piece.tensor.is_scale:
            return PieceResult(_spread(checkpoint, piece))
        if piece.tensor.weight.format is Format.FP8:
            codes = read_rows(checkpoint, piece.tensor.weight.info, *source_rows(piece), piece.place)
            return PieceResult(codes, Counts(nan=count_nan(codes)))
        return self._from_fp4(checkpoint, piece)

    def _from_fp4(self, checkpoint: Checkpoint, piece: Piece) -> PieceResult:
        import torch

        scale = torch.from_numpy(read_scale(checkpoint, piece))
        raw = read_codes(checkpoint, piece)
        packed, columns = torch.from_numpy(raw), piece.tensor.shape[1]
        data = torch.from_numpy(placed(len(raw) * columns, piece.place)).view(len(raw), columns)
        zeros = self._cast(packed, scale, scale, FP4_BLOCK, data)
        return PieceResult(data.numpy(), Counts(negative_zeros=zeros))

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """For the codes: negative zeros of FP4, NaN codes of FP8, changed elements."""
        entry = super().entry(tensor, counts, scan)
        if counts.nan:
            entry["nan_codes"] = counts.nan
        if tensor.weight.format is Format.FP4 and not tensor.is_scale:
            entry["negative_zeros"] = counts.negative_zeros
        return entry

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The reference engine has `expert_dtype` only where the experts are FP4."""
        return {key: value for key, value in config.items() if key != "expert_dtype"}


def _float_scale(checkpoint: Checkpoint, piece: Piece) -> "torch.Tensor":
    """The block scales over the rows of a piece, float32."""
    scale = piece.tensor.weight.scale
    assert scale is not None
    typed = typed_scale(read_scale(checkpoint, piece), scale)
    return typed if scale.dtype == "F32" else quant.e8m0.decode(typed)


def _powers_of_two(scale: "torch.Tensor") -> bool:
    try:
        quant.e8m0.exact(scale)
    except ValueError:
        return False
    return True


def _spread(checkpoint: Checkpoint, piece: Piece) -> Array:
    """The scale of each 32 elements of some rows: the scale of their block, as E8M0 bytes."""
    import torch

    weight, (start, stop) = piece.tensor.weight, source_rows(piece)
    scale, block = weight.scale, weight.block
    assert scale is not None and block is not None
    raw = read_rows(checkpoint, scale, start // block.rows, -(-stop // block.rows))
    check_scale(raw, scale)
    exponents = raw if scale.dtype == "F8_E8M0" else quant.e8m0.exact(torch.from_numpy(raw).view(torch.float32)).numpy()
    wide = np.repeat(exponents, max(1, block.columns // FP4_BLOCK.columns), axis=1)[:, : piece.tensor.shape[1]]
    return np.ascontiguousarray(np.repeat(wide, block.rows, axis=0)[: stop - start])


def _requantized(checkpoint: Checkpoint, piece: Piece, scale: "torch.Tensor") -> tuple[Array, Array, Counts]:
    """Codes and scales of rows whose block scales have no exact form, and how many elements change."""
    import torch

    from dsv4.quant.block_scales import expand_scale

    weight = piece.tensor.weight
    assert weight.block is not None
    codes = torch.from_numpy(read_codes(checkpoint, piece))
    exact = quant.e4m3.decode(codes).double() * expand_scale(scale, tuple(codes.shape), weight.block).double()
    found, scales = quant.quantize_fp8(exact.float(), FP4_BLOCK)
    back = (
        quant.e4m3.decode(found).double()
        * expand_scale(quant.e8m0.decode(scales), tuple(codes.shape), FP4_BLOCK).double()
    )
    return found.numpy(), scales.numpy(), Counts(changed=int(torch.count_nonzero(back != exact)))
