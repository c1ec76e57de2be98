"""Plans the comparison: every tensor of both checkpoints belongs to exactly one `ComparedTensor`.

A weight and its block scale are compared together, because neither has a meaning alone. How a pair is compared follows
from declared dtypes, shapes and names, never from byte counts: a weight is FP4 if its dtype is F4, or I8/U8 with two
codes a byte and a sibling scale; FP8 if its dtype is F8_E4M3. All other tensors are compared byte for byte, unless the
two sides declare different floating-point dtypes: then their values are compared.
"""

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dsv4.convert.proof.values.compare import FORMATS
from dsv4.convert.proof.values.formats import E2M1, E4M3, Format
from dsv4.errors import UsageError

from .files import DTYPE_BITS
from .layout import Checkpoint, Tensor, canonical

Kind = Literal["bytes", "values", "scan", "different", "missing", "extra", "unreadable"]

# (rows, columns) per scale. 1x32 on FP8 is the engram embedding of the V4.1 release.
_FP4_BLOCKS = ((1, 32),)
_NVFP4_BLOCKS = ((1, 16),)  # of scales in E4M3, which have a factor for the matrix
_FP8_BLOCKS = ((128, 128), (32, 32), (1, 32))
# U8: E8M0 codes, as some writers store them. The scale's shape says so: it has to fit a block size.
E8M0_DTYPES = ("F8_E8M0", "U8")
_SCALE_DTYPES = (*E8M0_DTYPES, "F32")
_QUANTIZED_DTYPES = ("I8", "U8", "F4", "F8_E4M3")


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor whose values can be compared: `rows` x `columns` elements in `number_format`, and its block scales."""

    tensor: Tensor
    number_format: Format
    rows: int
    columns: int
    scale: Tensor | None
    block: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * self.number_format.bits // 8

    @property
    def described(self) -> str:
        """Format and scales for messages, such as `E4M3, 128x128 F32 scales`."""
        if self.scale is None:
            return f"{self.number_format.name} without scale"
        kind = self.scale.dtype.removeprefix("F8_")
        return f"{self.number_format.name}, {self.block[0]}x{self.block[1]} {kind} scales"


@dataclass(frozen=True)
class ComparedTensor:
    """One tensor, or one weight with its scale, on both sides. A side that lacks the tensor has None for it."""

    name: str
    kind: Kind
    reason: str = ""
    source: Tensor | None = None
    output: Tensor | None = None
    source_weight: Weight | None = None
    output_weight: Weight | None = None
    scale_name: str = ""  # "" if there is no scale
    source_scale: Tensor | None = None
    output_scale: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(side, tensor) of the weight and of its scale, on both sides."""
        for side, found in (("source", (self.source, self.source_scale)), ("output", (self.output, self.output_scale))):
            for tensor in found:
                if tensor is not None:
                    yield side, tensor

    @cached_property
    def size(self) -> int:
        """Bytes to read."""
        return sum(tensor.size * (1 + len(tensor.copies)) for _, tensor in self.tensors())

    @cached_property
    def elements(self) -> int:
        """Elements of the tensor, without its scale."""
        if self.output_weight is not None:
            return self.output_weight.rows * self.output_weight.columns
        tensor = self.output or self.source
        return math.prod(tensor.shape) if tensor is not None else 0


def coarse_block(compared: ComparedTensor) -> tuple[int, int] | None:
    """(rows, columns) of the larger block of the two sides, by which differences are located; None without scales."""
    weights = (compared.source_weight, compared.output_weight)
    blocks = [weight.block for weight in weights if weight is not None and weight.scale is not None]
    return max(blocks, key=lambda block: block[0] * block[1], default=None)


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one row (one step along the first dimension)."""
    return math.prod(tensor.shape[1:]) * DTYPE_BITS[tensor.dtype] // 8


def logical_shape(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    """Shape in elements: a byte of I8 or U8 holds two FP4 codes if `packed`; a shape of F4 already counts elements."""
    if packed and tensor.dtype in ("I8", "U8"):
        return (*tensor.shape[:-1], tensor.shape[-1] * 2)
    return tensor.shape


def _format_of(tensor: Tensor, packed: bool) -> Format | None:
    if packed and tensor.dtype in ("I8", "U8"):
        return E2M1
    return FORMATS.get(tensor.dtype)


def understand(tensor: Tensor, scale: Tensor | None, packed: bool) -> Weight | str:
    """The tensor as a `Weight`, or the reason why its values cannot be compared.

    `packed`: an I8 or U8 tensor holds FP4 codes, because it has a scale or the other side's tensor has one.
    """
    number_format = _format_of(tensor, packed)
    if number_format is None:
        return f"{tensor.dtype} is not a format whose values are compared"
    shape = logical_shape(tensor, packed)
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if columns * number_format.bits % 8:
        return f"a row of {columns} FP4 codes ends within a byte"
    whole = Weight(tensor, number_format, rows, columns, scale, (max(rows, 1), max(columns, 1)))
    if scale is None:
        return whole
    if scale.dtype not in _SCALE_DTYPES and scale.factor is None:
        return f"its scale is {scale.dtype}, expected F8_E8M0 or F32"
    if len(shape) != 2 or number_format not in (E2M1, E4M3):
        return f"a scale beside a {tensor.dtype} tensor of shape {list(tensor.shape)} is not known"
    usual = _FP4_BLOCKS if number_format is E2M1 else _FP8_BLOCKS
    for block in _NVFP4_BLOCKS if scale.factor is not None else usual:
        if scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return replace(whole, block=block)
    return f"its scale of shape {list(scale.shape)} fits no known block size of {rows} x {columns}"


def _same_kind(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _pair_kind(pair: ComparedTensor) -> ComparedTensor:
    """How a tensor that both sides hold is compared."""
    source, output = pair.source, pair.output
    assert source is not None and output is not None
    scaled = bool(pair.scale_name)
    packed = scaled and {source.dtype, output.dtype} <= {"I8", "U8", *FORMATS}
    if not scaled and _same_kind(source, output) and source.dtype not in ("F8_E4M3", "F4"):
        return replace(pair, kind="bytes")
    shapes = logical_shape(source, packed), logical_shape(output, packed)
    if shapes[0] != shapes[1]:
        return replace(pair, kind="different", reason=f"shape {list(shapes[0])} became {list(shapes[1])}")
    a, b = understand(source, pair.source_scale, packed), understand(output, pair.output_scale, packed)
    if not isinstance(a, str) and not isinstance(b, str):
        return replace(pair, kind="values", source_weight=a, output_weight=b)
    if _same_kind(source, output) and _same_kind(pair.source_scale, pair.output_scale):
        return replace(pair, kind="bytes")
    if not scaled:
        return replace(pair, kind="different", reason=f"dtype {source.dtype} became {output.dtype}")
    side, reason = ("the source", a) if isinstance(a, str) else ("the output", b)
    return replace(pair, kind="unreadable", reason=f"in {side} {reason}")


def _has(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors or name in checkpoint.unreadable


def _scale_of(checkpoint: Checkpoint, name: str) -> str:
    """The name of a weight's block scale, "" if the checkpoint has no such tensor. It may be unreadable."""
    if not name.endswith(".weight"):
        return ""
    scale = name.removesuffix("weight") + "scale"
    return scale if _has(checkpoint, scale) else ""


def _pair_scale(source: Checkpoint, output: Checkpoint, name: str) -> str:
    """The scale that is compared together with a weight: only if both sides hold the weight."""
    both = _has(source, name) and _has(output, name)
    return (_scale_of(source, name) or _scale_of(output, name)) if both else ""


def absent_and_needed(checkpoint: Checkpoint, alone: bool) -> list[str]:
    """Tensors that the index lists, no shard holds, and the checkpoint needs: scales of quantized weights.

    A scale of a weight that is not quantized is not needed. Other tensors are needed if the other side has them; a
    checkpoint that is verified alone needs all of them.
    """
    found = []
    for name in map(canonical, checkpoint.ignored.absent):
        is_scale = name.endswith(".scale")
        weight = checkpoint.tensors.get(name.removesuffix("scale") + "weight") if is_scale else None
        if weight.dtype in _QUANTIZED_DTYPES if weight is not None else alone:
            found.append(name)
    return found


def _pair(name: str, source: Checkpoint, output: Checkpoint) -> ComparedTensor:
    scale = _pair_scale(source, output, name)
    pair = ComparedTensor(
        name,
        "bytes",
        source=source.tensors.get(name),
        output=output.tensors.get(name),
        scale_name=scale,
        source_scale=source.tensors.get(scale),
        output_scale=output.tensors.get(scale),
    )
    for side in (source, output):
        for part in (name, scale):
            if part in side.unreadable:
                return replace(pair, kind="unreadable", reason=f"in the {side.where}: {side.unreadable[part]}")
    if pair.source is None or pair.output is None:
        return replace(pair, kind="missing" if pair.output is None else "extra")
    return _pair_kind(pair)


def _names(source: Checkpoint, output: Checkpoint) -> list[str]:
    """Every tensor name of both sides once, without the scales that are compared with their weights."""
    names = dict.fromkeys((*source.tensors, *source.unreadable, *output.tensors, *output.unreadable))
    scales = {_pair_scale(source, output, name) for name in names}
    return [name for name in names if name not in scales]


def plan_pair(source: Checkpoint, output: Checkpoint) -> list[ComparedTensor]:
    """Everything to compare between two checkpoints, in the order of the source's shards."""
    return [_pair(name, source, output) for name in _names(source, output)]


def _scanned(name: str, checkpoint: Checkpoint) -> ComparedTensor:
    scale_name = _scale_of(checkpoint, name)
    tensor, scale = checkpoint.tensors.get(name), checkpoint.tensors.get(scale_name)
    scanned = ComparedTensor(name, "scan", output=tensor, scale_name=scale_name, output_scale=scale)
    for part in (name, scale_name):
        if part in checkpoint.unreadable:
            return replace(scanned, kind="unreadable", reason=checkpoint.unreadable[part])
    assert tensor is not None
    if scale is None and tensor.dtype != "F8_E4M3":
        return scanned
    if scale is None and name.endswith(".weight"):
        return replace(scanned, kind="unreadable", reason="it is F8_E4M3, and no tensor holds its block scales")
    weight = understand(tensor, scale, packed=scale is not None)
    if isinstance(weight, str):
        return replace(scanned, kind="unreadable", reason=weight)
    return replace(scanned, output_weight=weight)


def plan_scan(checkpoint: Checkpoint) -> list[ComparedTensor]:
    """The plan for one checkpoint alone: all tensors, of which only quantized ones are read."""
    return [_scanned(name, checkpoint) for name in _names(checkpoint, checkpoint)]


# Which tensors are compared: all, or those that --tensor and --shard select.


@dataclass(frozen=True)
class Selection:
    """Which tensors to compare: a glob of names, one output shard (counted from 1)."""

    tensor: str | None = None
    shard: int | None = None

    def describe(self) -> str:
        """The selection as a phrase for the verdict; "" for everything."""
        words = []
        if self.tensor:
            words.append(f"only tensors named '{self.tensor}'")
        if self.shard:
            words.append(f"only shard {self.shard}")
        return ", ".join(words)

    def takes(self, compared: ComparedTensor, shard: str | None) -> bool:
        """Whether to compare it. `shard`: name of the only output shard to compare, None for all."""
        stored = {entry.name for _, tensor in compared.tensors() for entry in tensor.slices}  # names with `model.` too
        names = {compared.name, compared.scale_name, *stored}
        if self.tensor and not any(fnmatch.fnmatchcase(name, self.tensor) for name in names):
            return False
        return shard is None or any(side == "output" and shard in t.shards for side, t in compared.tensors())


def select(
    everything: list[ComparedTensor], selection: Selection, output: Checkpoint
) -> tuple[list[ComparedTensor], list[str]]:
    """(what is compared, names of the others). Raises UsageError if nothing is selected."""
    shard = None
    if selection.shard is not None:
        if not 1 <= selection.shard <= len(output.shards):
            text = f"--shard {selection.shard}: the output has {len(output.shards)} shards"
            raise UsageError(text, f"Give a number from 1 to {len(output.shards)}.")
        shard = output.shards[selection.shard - 1]
    taken = [compared for compared in everything if selection.takes(compared, shard)]
    if not taken:
        pattern = "" if selection.tensor is None else f" called '{selection.tensor}'"
        raise UsageError(f"no tensor{pattern} is selected", "Check --tensor and --shard.")
    names = {compared.name for compared in taken}
    return taken, [compared.name for compared in everything if compared.name not in names]
