"""Routed experts from FP4 (groups of 32) to FP8 (blocks): exact where a block scale exists that makes it so.

The scan chooses the block scales. It usually needs the group scales only, a sixteenth of the bytes; codes are read
where the group scales of a piece do not prove that the reference's block scales are exact.
"""

from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsv4 import quant
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.classify import check_groups, fp8_block
from dsv4.convert.plan.config_edit import with_expert_dtype, with_quantization, without_expert_dtype
from dsv4.convert.plan.engines import TARGETS
from dsv4.convert.plan.settings import Settings
from dsv4.quant.blocks import GROUP_SIZE, Block, scale_shape

from .dropped_scales import record
from .recipe import Counts, OutputTensor, Piece, PieceResult, Recipe, Scan
from .rows import damaged_scale, placed, read_codes, read_rows, read_scale, tiles

if TYPE_CHECKING:
    import torch

    from dsv4.quant.fp4_to_fp8 import BlockScales, CastInto

MAX_NAMED = 20  # blocks that a message lists per tensor; the manifest has the number of all


def _block_of(tensor: OutputTensor) -> Block:
    assert tensor.block is not None
    return tensor.block


class Fp4ToFp8(Recipe):
    """FP4 experts to FP8."""

    cast_format = Format.FP4
    drops_scales = True

    @cached_property
    def _cast(self) -> "CastInto":
        return quant.fp4_to_fp8_compiled.best_kernel()

    def takes(self, weight: Weight) -> bool:
        """FP4 experts."""
        return weight.is_routed_expert and weight.format is Format.FP4

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes, and one scale a block, float32 or E8M0."""
        assert weight.scale is not None
        block, shape = fp8_block(config), weight.logical_shape
        check_groups(block)
        scale_dtype, scales = "F32" if settings.scale_dtype == "f32" else "F8_E8M0", scale_shape(shape, block)
        reads = weight.info, weight.scale
        return [
            OutputTensor(
                weight.name, "F8_E4M3", shape, self, weight, reads,
                Format.FP8, scanned=True, row_unit=block.rows, block=block,
            ),
            OutputTensor(
                weight.scale.name, scale_dtype, scales, self, weight, reads,
                is_scale=True, row_unit=max(1, scales[0]), block=block,
            ),
        ]  # fmt: skip

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Choose the scales of the blocks."""
        import torch

        weight, block = piece.tensor.weight, _block_of(piece.tensor)
        assert weight.scale is not None
        groups = torch.from_numpy(read_rows(checkpoint, weight.scale, piece.start, piece.stop))
        try:
            scales = quant.fp4_to_fp8.scales_if_safe(groups, block)
        except ValueError as error:
            raise damaged_scale(weight.scale, error) from None
        if scales is None:
            scales = _choose_by_codes(checkpoint, piece, groups)
            counts = Counts(rescaled_blocks=int(scales.rescaled.sum()), inexact_blocks=int(scales.inexact.sum()))
        else:
            counts = Counts()
        counts.blocks = scales.span.numel()
        counts.max_span = int(scales.span.max()) if counts.blocks else 0
        return Scan(counts, {f.name: getattr(scales, f.name) for f in fields(scales)})

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """Its blocks, and how each would change."""
        import torch

        blocks = [(int(row), int(column)) for row, column in torch.nonzero(scan.needed["inexact"])]
        lines = [_block_change(checkpoint, tensor, scan, at) for at in blocks[:MAX_NAMED]]
        if len(blocks) > MAX_NAMED:
            lines.append(f"and {len(blocks) - MAX_NAMED} more blocks")
        return "; ".join(lines)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Codes of some rows of blocks, or all scales."""
        assert scan is not None
        scales = quant.fp4_to_fp8.BlockScales(**scan.needed)
        return _scale(piece, scales) if piece.tensor.is_scale else self._codes(checkpoint, piece, scales)

    def _codes(self, checkpoint: Checkpoint, piece: Piece, scales: "BlockScales") -> PieceResult:
        import torch

        block = _block_of(piece.tensor)
        group_bytes = torch.from_numpy(read_scale(checkpoint, piece))
        raw = read_codes(checkpoint, piece)
        packed, columns = torch.from_numpy(raw), piece.tensor.shape[1]
        data = torch.from_numpy(placed(len(raw) * columns, piece.place)).view(len(raw), columns)
        over = slice(piece.start // block.rows, -(-piece.stop // block.rows))
        chosen = scales.scale_bytes[over]
        counts = Counts(negative_zeros=self._cast(packed, group_bytes, chosen, block, data))
        if scales.inexact[over].any():
            counts.changed = _count_changed(packed, group_bytes, chosen, block, data)
        return PieceResult(data.numpy(), counts, record(piece, packed, group_bytes))

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """For the codes: negative zeros, changed elements, and statistics of the chosen block scales."""
        if tensor.is_scale:
            return {}
        entry = {"negative_zeros": counts.negative_zeros, **super().entry(tensor, counts, scan)}
        if scan is None:  # a tensor without elements
            return entry
        return entry | {
            "blocks": scan.counts.blocks,
            "max_span": scan.counts.max_span,
            "moved_blocks": scan.counts.rescaled_blocks,
            "inexact_blocks": scan.counts.inexact_blocks,
        }

    def edit_config(self, config: dict[str, Any], settings: Settings, some_kept: bool) -> dict[str, Any]:
        """`expert_dtype` as the target wants it."""
        value, config = TARGETS[settings.target].expert_dtype, with_quantization(config)
        return without_expert_dtype(config) if value is None else with_expert_dtype(config, value)

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The reference engine has `expert_dtype` only where the experts are FP4."""
        return {key: value for key, value in config.items() if key != "expert_dtype"}


def _scale(piece: Piece, scales: "BlockScales") -> PieceResult:
    chosen = scales.scale_bytes
    return PieceResult((chosen if piece.tensor.dtype == "F8_E8M0" else quant.e8m0.decode(chosen)).numpy())


def _count_changed(
    packed: "torch.Tensor", group_bytes: "torch.Tensor", chosen: "torch.Tensor", block: Block, data: "torch.Tensor"
) -> int:
    """Elements whose value is not the source's. Arguments as for `fp4_to_fp8.cast`, and the codes that it gave."""
    import torch

    changed = 0
    for tile in tiles(data.shape, block):
        left, right = tile.columns.start, tile.columns.stop
        exact = quant.fp4_to_fp8.exact_values(
            packed[tile.rows, left // 2 : right // 2].contiguous(),
            group_bytes[tile.rows, left // GROUP_SIZE : -(-right // GROUP_SIZE)].contiguous(),
            chosen[tile.scale_rows, tile.scale_columns].contiguous(),
            block,
        )
        changed += int(torch.count_nonzero(exact != quant.e4m3.decode(data[tile.rows, tile.columns])))
    return changed


def _choose_by_codes(checkpoint: Checkpoint, piece: Piece, groups: "torch.Tensor") -> "BlockScales":
    """Block scales from the codes, tile by tile, where the group scales alone do not decide."""
    import torch

    tensor, block = piece.tensor, _block_of(piece.tensor)
    packed = torch.from_numpy(read_rows(checkpoint, tensor.weight.info, piece.start, piece.stop))
    shape = scale_shape((len(groups), tensor.shape[1]), block)
    scales = quant.fp4_to_fp8.BlockScales(
        *(torch.empty(shape, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.bool, torch.bool))
    )
    for tile in tiles((len(groups), tensor.shape[1]), block):
        left, right = tile.columns.start, tile.columns.stop
        found = quant.fp4_to_fp8.choose_block_scales(
            packed[tile.rows, left // 2 : right // 2].contiguous(),
            groups[tile.rows, left // GROUP_SIZE : -(-right // GROUP_SIZE)].contiguous(),
            block,
        )
        for f in fields(scales):
            getattr(scales, f.name)[tile.scale_rows, tile.scale_columns] = getattr(found, f.name)
    return scales


def _block_change(checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan, at: tuple[int, int]) -> str:
    """How one block without an exact form would change under the reference's scale."""
    import torch

    block, (row, column) = _block_of(tensor), at
    assert tensor.weight.scale is not None
    top, bottom = row * block.rows, min((row + 1) * block.rows, tensor.shape[0])
    wide, half = block.columns // GROUP_SIZE, block.columns // 2
    packed = torch.from_numpy(read_rows(checkpoint, tensor.weight.info, top, bottom))
    groups = torch.from_numpy(read_rows(checkpoint, tensor.weight.scale, top, bottom))
    packed = packed[:, column * half : (column + 1) * half].contiguous()
    groups = groups[:, column * wide : (column + 1) * wide].contiguous()
    chosen = scan.needed["scale_bytes"][row : row + 1, column : column + 1]
    old = quant.fp4_to_fp8.exact_values(packed, groups, chosen, block)
    new = quant.e4m3.decode(quant.fp4_to_fp8.cast(packed, groups, chosen, block)).double()
    changed, lost = int(torch.count_nonzero(old != new)), int(torch.count_nonzero((old != 0) & (new == 0)))
    worst = float(((old - new) / old)[old != 0].abs().max())
    span = int(scan.needed["span"][row, column])
    return f"block ({row}, {column}) spans 2^{span}: {changed} elements change, {lost} to zero, by up to {worst:.0%}"


RECIPE = Fp4ToFp8()
