"""Before a shard is written: does every block of it have an exact form in the target format?

The answer decides the header (with `keep`, a tensor without one stays as it is), so it must be known before the first
byte. For FP4 -> FP8 the scan also yields the block scales, and usually needs the group scales only, a sixteenth of
the bytes: codes are read where scales alone do not prove exactness. So does BF16, whose exponent range only scales
near its ends can leave. FP8 -> FP4 must look at every code.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import torch

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.engines import Layout
from dsv4.convert.plan.plan import Op, OutputShard, OutputTensor, kept_instead_of, output_order
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError, printable
from dsv4.quant import e2m1, e4m3, fp4_to_fp8, to_bf16
from dsv4.quant.block_scales import Block, decode_scale
from dsv4.quant.fp4_to_fp8 import BlockScales

from .pieces import Counts, make, split

ELEMENTS_AT_ONCE = 2**22  # looking at codes takes about ten bytes an element
MAX_NAMED = 20  # blocks of a tensor that a message lists; the manifest counts them all


@dataclass(frozen=True)
class Finding:
    """What the scan of one weight found. `inexact` says it in words, "" if an exact form exists."""

    tensor: OutputTensor
    scales: BlockScales | None = None
    inexact: str = ""


@dataclass(frozen=True)
class ScannedShard:
    """A shard as it will be written, and the block scales of its FP8 casts by weight name."""

    shard: OutputShard
    scales: dict[str, BlockScales] = field(default_factory=dict)
    inexact: tuple[str, ...] = ()  # names of tensors without an exact form


def _choose_by_codes(checkpoint: Checkpoint, tensor: OutputTensor, groups: torch.Tensor, block: Block) -> BlockScales:
    """Block scales of a weight whose group scales prove nothing, a few rows of blocks at a time."""
    rows, columns = tensor.shape
    step = max(1, ELEMENTS_AT_ONCE // (block.rows * columns)) * block.rows
    parts = []
    for start in range(0, rows, step):
        packed = checkpoint.read_tensor(tensor.weight.name, start, start + step).view(torch.uint8)
        parts.append(fp4_to_fp8.choose_block_scales(packed, groups[start : start + step], block))
    return BlockScales(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(BlockScales)))


def _block_change(
    checkpoint: Checkpoint, tensor: OutputTensor, groups: torch.Tensor, scales: BlockScales, at: tuple[int, int]
) -> str:
    """How one block without an exact form would change under the reference's scale."""
    block, (row, column) = tensor.block, at
    assert block is not None
    top, wide = row * block.rows, block.columns // e2m1.GROUP_SIZE
    packed = checkpoint.read_tensor(tensor.weight.name, top, top + block.rows).view(torch.uint8)
    half = block.columns // 2
    cut = packed[:, column * half : (column + 1) * half].contiguous()
    cut_groups = groups[top : top + block.rows, column * wide : (column + 1) * wide].contiguous()
    chosen = scales.scale_bytes[row : row + 1, column : column + 1]
    old = fp4_to_fp8.exact_values(cut, cut_groups, chosen, block)
    new = e4m3.decode(fp4_to_fp8.cast(cut, cut_groups, chosen, block)).double()
    changed, lost = int(torch.count_nonzero(old != new)), int(torch.count_nonzero((old != 0) & (new == 0)))
    worst = float(((old - new) / old)[old != 0].abs().max())
    span = int(scales.span[row, column])
    return f"block ({row}, {column}) spans 2^{span}: {changed} elements change, {lost} to zero, by up to {worst:.0%}"


def _scan_fp8(checkpoint: Checkpoint, tensor: OutputTensor) -> Finding:
    weight, block = tensor.weight, tensor.block
    assert weight.scale is not None and block is not None
    groups = checkpoint.read_tensor(weight.scale.name).view(torch.uint8)
    try:
        safe = fp4_to_fp8.scales_if_safe(groups, block)
    except ValueError as error:
        raise InputError(f"'{printable(weight.scale.name)}': {error}", "Download its shard again.") from None
    if safe is not None:
        return Finding(tensor, safe)
    scales = _choose_by_codes(checkpoint, tensor, groups, block)
    blocks = [(int(row), int(column)) for row, column in torch.nonzero(scales.inexact)]
    lines = [_block_change(checkpoint, tensor, groups, scales, at) for at in blocks[:MAX_NAMED]]
    if len(blocks) > MAX_NAMED:
        lines.append(f"and {len(blocks) - MAX_NAMED} more blocks")
    return Finding(tensor, scales, "; ".join(lines))


def _count_changed(checkpoint: Checkpoint, tensor: OutputTensor) -> Counts:
    counts = Counts()
    for piece in split(tensor):
        counts.add(make(checkpoint, piece).counts)
    return counts


def _scan_decoded(checkpoint: Checkpoint, tensor: OutputTensor) -> Finding:
    scale = tensor.weight.scale
    assert scale is not None
    if tensor.op is Op.BF16:
        try:
            if to_bf16.always_exact(decode_scale(checkpoint.read_tensor(scale.name))):
                return Finding(tensor)
        except ValueError as error:
            raise InputError(f"'{printable(scale.name)}': {error}", "Download its shard again.") from None
    counts = _count_changed(checkpoint, tensor)
    if not counts.changed:
        return Finding(tensor)
    words = f"{counts.changed} elements change"
    if tensor.op is Op.FP4_CODES:
        rms = (counts.squared_error / counts.squared_value) ** 0.5
        words += f", relative RMS error {rms:.3g}, largest error {counts.max_error:.3g}"
    return Finding(tensor, None, words)


def _scan_one(checkpoint: Checkpoint, tensor: OutputTensor) -> Finding:
    scan = _scan_fp8 if tensor.op is Op.FP8_CODES else _scan_decoded
    return scan(checkpoint, tensor)


def _refuse(shard: OutputShard, bad: list[Finding]) -> None:
    shown = "\n".join(f"  {printable(f.tensor.name)}: {f.inexact}" for f in bad)
    raise InputError(
        f"{len(bad)} tensors of {shard.file} have no exact form:\n{shown}",
        "--on-inexact keep leaves these tensors as they are; --on-inexact round rounds them and says so.",
    )


def _with_kept(shard: OutputShard, names: set[str], layout: Layout) -> OutputShard:
    """The shard with the weights in `names` and their scales as the source has them."""
    others = [t for t in shard.tensors if t.weight.name not in names]
    replaced = {t.weight.name: t for t in shard.tensors if t.weight.name in names}
    back = [kept for tensor in replaced.values() for kept in kept_instead_of(tensor, layout)]
    return replace(shard, tensors=tuple(sorted([*others, *back], key=output_order)))


def scan_shard(
    checkpoint: Checkpoint,
    shard: OutputShard,
    settings: Settings,
    map_in_order: Callable[[Callable[[OutputTensor], Finding], Iterable[OutputTensor]], Iterable[Finding]],
) -> ScannedShard:
    """Scan a shard's casts and settle what is written. `map_in_order` runs the scans, on threads or not.

    Raises InputError naming every tensor of the shard without an exact form, if `on_inexact` is "error".
    """
    casts = [t for t in shard.tensors if t.op in (Op.FP8_CODES, Op.FP4_CODES, Op.BF16)]
    findings = list(map_in_order(lambda tensor: _scan_one(checkpoint, tensor), casts))
    bad = [f for f in findings if f.inexact]
    if bad and settings.on_inexact == "error":
        _refuse(shard, bad)
    names = {f.tensor.weight.name for f in bad}
    scales = {f.tensor.weight.name: f.scales for f in findings if f.scales is not None}
    final = _with_kept(shard, names, settings.layout) if bad and settings.on_inexact == "keep" else shard
    return ScannedShard(final, scales, tuple(sorted(names)))
