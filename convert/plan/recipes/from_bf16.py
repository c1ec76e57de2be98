"""BF16 weights to the formats that the release has them in: exact where the values came from there.

Routed experts become FP4 in groups of 32 or, with `--to fp8`, FP8 in blocks, as the Base releases have them; every
other weight that a release quantizes becomes FP8 in blocks. What a release has in BF16 is not touched (registry.py
decides). The numbers are in quant/from_bf16.py. The scan looks for a block that has no exact form, by values;
`--on-inexact round` rounds those to nearest under the scale that the release's rule gives, which is also how a model
that was trained in BF16 gets into the release's format.

Where the manifest of the source has a scale that this rule does not give (forms/recorded_scales.py), and the block is
exact under it, that scale is taken: `release -> bf16 -> release` gives the same bytes.

Scales of blocks of several rows are kept from the scan. Those of single rows are 1/64 of the source: the scan passes
them on while memory allows, and pieces that get none compute theirs again.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4 import quant
from dsv4.convert.checkpoint.editions.table import block_by_name
from dsv4.convert.checkpoint.names import scale_name
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.classify import fp8_block
from dsv4.convert.plan.config_edit import with_quantization
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import FP4_BLOCK, Block, scale_shape

from .dropped_scales import recorded
from .recipe import Counts, OutputTensor, Piece, PieceResult, Recipe, Scan, split, with_error
from .rows import read_rows, slice_columns, source_rows

if TYPE_CHECKING:
    import torch

    from dsv4.quant.from_bf16 import BlockForm

MAX_NAMED = 20  # blocks that a message lists per tensor; the manifest has the number of all


def _block_of(tensor: OutputTensor) -> Block:
    assert tensor.block is not None
    return tensor.block


class FromBf16(Recipe):
    """BF16 to codes and block scales. `fp4`: whether to FP4, else to FP8."""

    def __init__(self, fp4: bool) -> None:
        self._fp4 = fp4

    def takes(self, weight: Weight) -> bool:
        """BF16 matrices."""
        return weight.info.dtype == "BF16" and len(weight.info.shape) == 2

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes, and one scale a block."""
        rows, columns = weight.info.shape
        if self._fp4 and columns % 2:
            raise InputError(f"'{weight.name}' has {columns} columns: FP4 packs two elements into a byte")
        block, reads = self._block(weight, config), (weight.info,)
        dtype, shape = ("I8", (rows, columns // 2)) if self._fp4 else ("F8_E4M3", (rows, columns))
        scale_dtype = "F32" if settings.scale_dtype == "f32" and not self._fp4 else "F8_E8M0"
        return [
            OutputTensor(
                weight.name, dtype, shape, self, weight, reads, Format.FP4 if self._fp4 else Format.FP8,
                scanned=True, row_unit=block.rows, block=block,
            ),
            OutputTensor(
                scale_name(weight.name), scale_dtype, scale_shape((rows, columns), block), self, weight, reads,
                is_scale=True, block=block, made_by_scan_of=weight.name if block.rows == 1 else "",
            ),
        ]  # fmt: skip

    def _block(self, weight: Weight, config: dict[str, Any]) -> Block:
        if self._fp4:
            return FP4_BLOCK
        by_name = block_by_name(weight.name, config)
        return fp8_block(with_quantization(config)) if by_name is None else Block(*by_name)

    def _convert(self, checkpoint: Checkpoint, piece: Piece) -> tuple["torch.Tensor", "BlockForm"]:
        """Read the source rows of a piece: bytes, values, and their form. Raises InputError for NaN and infinity."""
        import torch

        info = piece.tensor.source
        raw = slice_columns(read_rows(checkpoint, info, *source_rows(piece)), piece)
        values = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        block = _block_of(piece.tensor)
        try:
            form = quant.from_bf16.to_fp4(values) if self._fp4 else quant.from_bf16.to_fp8(values, block)
        except ValueError as error:
            raise InputError(f"'{info.name}': {error}", "The source is damaged: download it again.") from None
        scales = recorded(checkpoint, piece, Format.FP4 if self._fp4 else Format.FP8, block)
        return values, form if scales is None else quant.from_bf16.with_scales(form, values, block, *scales)

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Choose the scales, and count the blocks without an exact form."""
        _, form = self._convert(checkpoint, piece)
        counts = Counts(
            changed=int(form.changed.sum()),
            blocks=form.changed.numel(),
            inexact_blocks=int((form.changed != 0).sum()),
        )
        scales = {"scales": form.scale_bytes}
        return Scan(counts, spared=scales) if _block_of(piece.tensor).rows == 1 else Scan(counts, needed=scales)

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """Its blocks, and how each would change. They are read again: the scan keeps their number only."""
        lines = list[str]()
        for piece in split(tensor):
            if len(lines) < MAX_NAMED and not piece.is_filling:
                lines += list(self._changes(checkpoint, piece))[: MAX_NAMED - len(lines)]
        if scan.counts.inexact_blocks > len(lines):
            lines.append(f"and {scan.counts.inexact_blocks - len(lines)} more blocks")
        return "; ".join(lines)

    def _changes(self, checkpoint: Checkpoint, piece: Piece) -> Iterator[str]:
        """One line for each of the first blocks of a piece without an exact form."""
        import torch

        values, form = self._convert(checkpoint, piece)
        block, first = _block_of(piece.tensor), piece.start // _block_of(piece.tensor).rows
        found = torch.nonzero(form.changed)[:MAX_NAMED]
        back = quant.from_bf16.decode(form, tuple(values.shape), block) if len(found) else values
        for row, column in found.tolist():
            at = np.s_[row * block.rows : (row + 1) * block.rows, column * block.columns : (column + 1) * block.columns]
            old, new = values[at].double(), back[at]
            lost, worst = int(((old != 0) & (new == 0)).sum()), float(((old - new) / old)[old != 0].abs().max())
            changed = int(form.changed[row, column])
            yield f"block ({first + row}, {column}): {changed} elements change, {lost} to zero, by up to {worst:.0%}"

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Codes, or scales, of some rows."""
        assert scan is not None
        if piece.tensor.is_scale:
            kept = (scan.needed or scan.spared).get("scales")
            scales = self._convert(checkpoint, piece)[1].scale_bytes if kept is None else kept[piece.start : piece.stop]
            return PieceResult((quant.e8m0.decode(scales) if piece.tensor.dtype == "F32" else scales).numpy())
        values, form = self._convert(checkpoint, piece)
        counts = Counts()
        if form.changed.any():
            counts = Counts(**quant.from_bf16.error(form, values, _block_of(piece.tensor))._asdict())
        return PieceResult(form.codes.numpy(), counts)

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """For the codes: blocks, changed elements, and the error."""
        if tensor.is_scale or scan is None:
            return {}
        blocks = {"blocks": scan.counts.blocks, "inexact_blocks": scan.counts.inexact_blocks}
        return with_error({**super().entry(tensor, counts, scan), **blocks}, counts)


FP4, FP8 = FromBf16(fp4=True), FromBf16(fp4=False)
