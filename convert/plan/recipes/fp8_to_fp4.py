"""Routed experts from FP8 back to FP4: exact where every group of 32 has a scale that makes it so.

The scan reads every code. It passes its group scales on to the pieces of the scale tensor while memory allows; pieces
that get none cast their codes again.
"""

from typing import TYPE_CHECKING, Any

from dsv4 import quant
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.classify import check_groups
from dsv4.convert.plan.config_edit import with_expert_dtype, with_quantization
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import FP4_BLOCK, GROUP_SIZE, scale_shape

from .recipe import Counts, OutputTensor, Piece, PieceResult, Recipe, Scan, with_error
from .rows import read_codes, read_scale, tiles, typed_scale

if TYPE_CHECKING:
    import torch


class Fp8ToFp4(Recipe):
    """FP8 experts to FP4."""

    cast_format = Format.FP8

    def takes(self, weight: Weight) -> bool:
        """FP8 experts."""
        return weight.is_routed_expert and weight.format is Format.FP8

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """Two codes a byte, and one E8M0 scale for 32 of them."""
        assert weight.scale is not None and weight.block is not None
        check_groups(weight.block)
        rows, columns = weight.logical_shape
        if columns % 2:
            raise InputError(f"'{weight.name}' has {columns} columns: FP4 packs two elements into a byte")
        reads, scales = (weight.info, weight.scale), scale_shape((rows, columns), FP4_BLOCK)
        return [
            OutputTensor(
                weight.name, "I8", (rows, columns // 2), self, weight, reads,
                Format.FP4, scanned=True, row_unit=weight.block.rows,
            ),
            OutputTensor(
                weight.scale.name, "F8_E8M0", scales, self, weight, reads,
                is_scale=True, row_unit=weight.block.rows, made_by_scan_of=weight.name,
            ),
        ]  # fmt: skip

    def _cast(self, checkpoint: Checkpoint, piece: Piece) -> tuple["torch.Tensor", "torch.Tensor", Counts]:
        """Cast the source rows of a piece: rows, packed codes, group scales, and the error."""
        import torch

        weight = piece.tensor.weight
        assert weight.scale is not None and weight.block is not None
        scale = typed_scale(read_scale(checkpoint, piece), weight.scale)
        codes, counts = torch.from_numpy(read_codes(checkpoint, piece)), Counts()
        rows, columns = codes.shape
        packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
        groups = torch.empty(scale_shape((rows, columns), FP4_BLOCK), dtype=torch.uint8)
        for tile in tiles(codes.shape, weight.block):
            some = codes[tile.rows, tile.columns].contiguous()
            over = scale[tile.scale_rows, tile.scale_columns].contiguous()
            form = quant.fp8_to_fp4.cast(some, over, weight.block)
            packed[tile.rows, tile.columns.start // 2 : tile.columns.stop // 2] = form.packed
            groups[tile.rows, tile.columns.start // GROUP_SIZE : -(-tile.columns.stop // GROUP_SIZE)] = form.scale_bytes
            if not form.exact.all():
                counts.add(Counts(**quant.fp8_to_fp4.error(form, some, over, weight.block)._asdict()))
        return packed, groups, counts

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Cast, and keep the scales."""
        _, scales, counts = self._cast(checkpoint, piece)
        return Scan(counts, spared={"scales": scales})

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """How many elements change, and by how much."""
        counts = scan.counts
        rms = (counts.squared_error / counts.squared_value) ** 0.5
        return f"{counts.changed} elements change, relative RMS error {rms:.3g}, largest error {counts.max_error:.3g}"

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Codes, or scales, of some rows."""
        assert scan is not None
        if piece.tensor.is_scale and scan.spared:
            return PieceResult(scan.spared["scales"][piece.start : piece.stop].numpy())
        packed, scales, counts = self._cast(checkpoint, piece)
        return PieceResult(scales.numpy()) if piece.tensor.is_scale else PieceResult(packed.numpy(), counts)

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """The number of changed elements, and the error."""
        return with_error(super().entry(tensor, counts, scan), counts)

    def edit_config(self, config: dict[str, Any], settings: Settings, some_kept: bool) -> dict[str, Any]:
        """FP4 experts, whatever the target."""
        return with_expert_dtype(with_quantization(config), "fp4")

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """FP4 experts; the key comes last."""
        return {**{key: value for key, value in config.items() if key != "expert_dtype"}, "expert_dtype": "fp4"}


RECIPE = Fp8ToFp4()
