"""What has to be compared: every tensor of both checkpoints in exactly one `Unit`.

A weight and its block scale are one unit, because neither means anything alone. How a pair is compared follows from
declared dtypes, shapes and names, never from byte counts: a weight is FP4 when its dtype is F4, or I8/U8 with two
codes a byte and a sibling scale; FP8 when its dtype is F8_E4M3. Everything else is compared byte for byte, unless
the two sides declare different floating point dtypes; then values decide.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from .compare_values import FORMATS
from .files import DTYPE_BITS
from .formats import E2M1, E4M3, Format
from .layout import Checkpoint, Tensor

Kind = Literal["bytes", "values", "scan", "different", "missing", "extra", "unreadable"]

# (rows, columns) of one scale. 1x32 on FP8 is the engram embedding of the V4.1 release.
_FP4_BLOCKS = ((1, 32),)
_FP8_BLOCKS = ((128, 128), (32, 32), (1, 32))
_SCALE_DTYPES = ("F8_E8M0", "F32")


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor whose values can be compared: `rows` x `columns` elements in `number_format`, and its scales."""

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
        """For messages: `E4M3, 128x128 F32 scales`."""
        if self.scale is None:
            return f"{self.number_format.name} without scale"
        kind = self.scale.dtype.removeprefix("F8_")
        return f"{self.number_format.name}, {self.block[0]}x{self.block[1]} {kind} scales"


@dataclass(frozen=True)
class Unit:
    """One tensor, or one weight with its scale, on both sides. `source` or `output` is None where it does not exist."""

    name: str
    kind: Kind
    reason: str = ""
    source: Tensor | None = None
    output: Tensor | None = None
    source_weight: Weight | None = None
    output_weight: Weight | None = None
    scale_name: str = ""  # set when the unit also accounts for a scale
    source_scale: Tensor | None = None
    output_scale: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the unit with its side."""
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
        """Elements of the tensor, scales not counted."""
        if self.output_weight is not None:
            return self.output_weight.rows * self.output_weight.columns
        tensor = self.output or self.source
        return math.prod(tensor.shape) if tensor is not None else 0


def coarse_block(unit: Unit) -> tuple[int, int] | None:
    """The larger block of the two sides, in which differences are located; None when neither has scales."""
    blocks = [w.block for w in (unit.source_weight, unit.output_weight) if w is not None and w.scale is not None]
    return max(blocks, key=lambda block: block[0] * block[1], default=None)


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one step along the first dimension."""
    return math.prod(tensor.shape[1:]) * DTYPE_BITS[tensor.dtype] // 8


def logical_shape(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    """Shape in elements: I8 holds two FP4 codes a byte, F4 already counts elements."""
    if packed and tensor.dtype in ("I8", "U8"):
        return (*tensor.shape[:-1], tensor.shape[-1] * 2)
    return tensor.shape


def _format_of(tensor: Tensor, packed: bool) -> Format | None:
    if packed and tensor.dtype in ("I8", "U8"):
        return E2M1
    return FORMATS.get(tensor.dtype)


def understand(tensor: Tensor, scale: Tensor | None, packed: bool) -> Weight | str:
    """The tensor as a weight, or why it cannot be understood as one.

    `packed` says that an I8 or U8 tensor holds FP4 codes: it has a scale, or its counterpart has.
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
    if scale.dtype not in _SCALE_DTYPES:
        return f"its scale is {scale.dtype}, expected F8_E8M0 or F32"
    if len(shape) != 2 or number_format not in (E2M1, E4M3):
        return f"a scale beside a {tensor.dtype} tensor of shape {list(tensor.shape)} is not known"
    for block in _FP4_BLOCKS if number_format is E2M1 else _FP8_BLOCKS:
        if scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return replace(whole, block=block)
    return f"its scale of shape {list(scale.shape)} fits no known block size of {rows} x {columns}"


def _same_kind(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _pair_kind(unit: Unit) -> Unit:
    """Both sides exist: how are they compared?"""
    source, output = unit.source, unit.output
    assert source is not None and output is not None
    scaled = bool(unit.scale_name)
    packed = scaled and {source.dtype, output.dtype} <= {"I8", "U8", *FORMATS}
    if not scaled and _same_kind(source, output) and source.dtype not in ("F8_E4M3", "F4"):
        return replace(unit, kind="bytes")
    shapes = logical_shape(source, packed), logical_shape(output, packed)
    if shapes[0] != shapes[1]:
        return replace(unit, kind="different", reason=f"shape {list(shapes[0])} became {list(shapes[1])}")
    a, b = understand(source, unit.source_scale, packed), understand(output, unit.output_scale, packed)
    if not isinstance(a, str) and not isinstance(b, str):
        return replace(unit, kind="values", source_weight=a, output_weight=b)
    if _same_kind(source, output) and _same_kind(unit.source_scale, unit.output_scale):
        return replace(unit, kind="bytes")
    if not scaled:
        return replace(unit, kind="different", reason=f"dtype {source.dtype} became {output.dtype}")
    side, reason = ("the source", a) if isinstance(a, str) else ("the output", b)
    return replace(unit, kind="unreadable", reason=f"in {side} {reason}")


def _has(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors or name in checkpoint.unreadable


def _scale_of(checkpoint: Checkpoint, name: str) -> str:
    """The name of a weight's block scale, when the checkpoint has that scale (readable or not)."""
    if not name.endswith(".weight"):
        return ""
    scale = name.removesuffix("weight") + "scale"
    return scale if _has(checkpoint, scale) else ""


def _pair_scale(source: Checkpoint, output: Checkpoint, name: str) -> str:
    """The scale that is judged together with a weight: only when the weight is on both sides."""
    both = _has(source, name) and _has(output, name)
    return (_scale_of(source, name) or _scale_of(output, name)) if both else ""


def _unit(name: str, source: Checkpoint, output: Checkpoint) -> Unit:
    scale = _pair_scale(source, output, name)
    unit = Unit(
        name,
        "bytes",
        "",
        source.tensors.get(name),
        output.tensors.get(name),
        None,
        None,
        scale,
        source.tensors.get(scale),
        output.tensors.get(scale),
    )
    for side in (source, output):
        for part in (name, scale):
            if part in side.unreadable:
                return replace(unit, kind="unreadable", reason=f"in the {side.where}: {side.unreadable[part]}")
    if unit.source is None or unit.output is None:
        return replace(unit, kind="missing" if unit.output is None else "extra")
    return _pair_kind(unit)


def _names(source: Checkpoint, output: Checkpoint) -> list[str]:
    """Every tensor name of both sides once, scales of weights left out: their weight accounts for them."""
    names = dict.fromkeys((*source.tensors, *source.unreadable, *output.tensors, *output.unreadable))
    scales = {_pair_scale(source, output, name) for name in names}
    return [name for name in names if name not in scales]


def plan_pair(source: Checkpoint, output: Checkpoint) -> list[Unit]:
    """All units of a comparison, in the order of the source's shards."""
    return [_unit(name, source, output) for name in _names(source, output)]


def _scan_unit(name: str, checkpoint: Checkpoint) -> Unit:
    scale_name = _scale_of(checkpoint, name)
    tensor, scale = checkpoint.tensors.get(name), checkpoint.tensors.get(scale_name)
    unit = Unit(name, "scan", "", None, tensor, None, None, scale_name, None, scale)
    for part in (name, scale_name):
        if part in checkpoint.unreadable:
            return replace(unit, kind="unreadable", reason=checkpoint.unreadable[part])
    assert tensor is not None
    if scale is None and tensor.dtype != "F8_E4M3":
        return unit
    weight = understand(tensor, scale, packed=scale is not None)
    if isinstance(weight, str):
        return replace(unit, kind="unreadable", reason=weight)
    return replace(unit, output_weight=weight)


def plan_scan(checkpoint: Checkpoint) -> list[Unit]:
    """All units of one checkpoint alone."""
    return [_scan_unit(name, checkpoint) for name in _names(checkpoint, checkpoint)]
