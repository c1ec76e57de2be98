"""Quantized weights to BF16, without scales.

Every E2M1 and E4M3 code times a power of two is a BF16 value unless it leaves BF16's range, so the scan usually needs
the scales only. Codes are read where a scale lies near the ends of the range or is no power of two.

The manifest records the scales that the way back would not choose (dropped_scales.py).
"""

from typing import Any

from dsv4 import quant
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.config_edit import without_expert_dtype
from dsv4.convert.plan.settings import Settings

from .dropped_scales import passed_on, record
from .recipe import Counts, OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import damaged_scale, placed, read_codes, read_rows, read_scale, source_rows, tiles, typed_scale


class ToBf16(Recipe):
    """FP4 and FP8 weights to BF16."""

    drops_scales = True

    def takes(self, weight: Weight) -> bool:
        """Every quantized weight."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """One tensor: BF16 needs no scale."""
        assert weight.scale is not None and weight.block is not None
        reads = weight.info, weight.scale
        return [
            OutputTensor(
                weight.name, "BF16", weight.logical_shape, self, weight, reads,
                scanned=True, row_unit=weight.block.rows,
            )
        ]  # fmt: skip

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Count the elements that change, unless the scales prove that none does."""
        from dsv4.quant.block_scales import decode_scale

        weight = piece.tensor.weight
        assert weight.scale is not None and weight.block is not None
        start, stop = source_rows(piece)
        over = start // weight.block.rows, -(-stop // weight.block.rows)
        raw = read_rows(checkpoint, weight.scale, *over)
        try:
            if quant.to_bf16.always_exact(decode_scale(typed_scale(raw, weight.scale))):
                return Scan()
        except ValueError as error:
            raise damaged_scale(weight.scale, error) from None
        return Scan(self.compute(checkpoint, piece, None).counts)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Values of some rows, as int16 with the bits of BF16."""
        import torch

        weight = piece.tensor.weight
        assert weight.scale is not None and weight.block is not None
        scale = typed_scale(read_scale(checkpoint, piece), weight.scale)
        raw = read_codes(checkpoint, piece)
        codes, counts = torch.from_numpy(raw), Counts()
        shape = len(raw), piece.tensor.shape[1]
        values = torch.from_numpy(placed(2 * shape[0] * shape[1], piece.place)).view(torch.int16).view(shape)
        for tile in tiles(values.shape, weight.block):
            over = scale[tile.scale_rows, tile.scale_columns].contiguous()
            if weight.format is Format.FP4:
                packed = codes[tile.rows, tile.columns.start // 2 : tile.columns.stop // 2].contiguous()
                form = quant.to_bf16.from_fp4(packed, over)
            else:
                form = quant.to_bf16.from_fp8(codes[tile.rows, tile.columns].contiguous(), over, weight.block)
            values[tile.rows, tile.columns] = form.values.view(torch.int16)
            counts.changed += form.changed
        return PieceResult(values.numpy(), counts, record(piece, codes, scale) | passed_on(checkpoint, piece))

    def edit_config(self, config: dict[str, Any], settings: Settings, some_kept: bool) -> dict[str, Any]:
        """Without quantization_config, unless weights were kept: the source's config still describes those."""
        if some_kept:
            return config
        return {key: value for key, value in without_expert_dtype(config).items() if key != "quantization_config"}

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """No FP4 experts."""
        return {key: value for key, value in config.items() if key != "expert_dtype"}


RECIPE = ToBf16()
