"""The values of one tensor, their codes and scales, and the distribution of all three.

The corner (first rows and columns) is shown as stored and as decoded. The distribution is over the whole tensor, read
in pieces of bounded size: how often each FP4 code or scale byte occurs, and for floating point values how many lie in
each [2**e, 2**(e+1)). That histogram shows whether a format can hold them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4.convert.checkpoint.names import is_scale, scales_of
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
from dsv4.convert.checkpoint.weights import Format, find_weights
from dsv4.errors import InputError
from dsv4.progress import Progress, ignore
from dsv4.quant import e2m1
from dsv4.quant.block_scales import Block, dequantize_fp4, dequantize_fp8

CORNER_ROWS, CORNER_COLUMNS = 4, 6
CHUNK_ELEMENTS = 1 << 22  # 16 MiB as float32
LOWEST_EXPONENT = -1074  # of the smallest subnormal float64
# Of tensors that have no scale.
NAMES = {
    "F8_E4M3": "float8_e4m3fn without a scale", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F32": "float32",
    "F16": "float16", "I64": "int64", "I8": "int8",
}  # fmt: skip


@dataclass
class TensorView:
    """The facts that `--tensor` shows. Codes and scales are of the corner; counts are of the whole tensor."""

    info: TensorInfo
    format: str
    shape: tuple[int, ...]  # in elements
    scale: TensorInfo | None
    block: Block | None
    values: list[list[float]] = field(default_factory=list)
    codes: list[list[int]] = field(default_factory=list)
    scales: list[list[float]] = field(default_factory=list)
    elements: int = 0
    zeros: int = 0
    negative_zeros: int = 0
    nans: int = 0
    minimum: float | None = None
    maximum: float | None = None
    sum_of_squares: float = 0.0
    code_counts: dict[int, int] = field(default_factory=dict)  # FP4 codes
    scale_counts: dict[int, int] = field(default_factory=dict)  # exponent of the scales: 2**e
    exponent_counts: dict[int, int] = field(default_factory=dict)  # floor(log2(|value|)) of nonzero values

    @property
    def root_mean_square(self) -> float | None:
        """Over all elements that are numbers; None where the tensor has none."""
        numbers = self.elements - self.nans
        return (self.sum_of_squares / numbers) ** 0.5 if numbers else None


def _describe(info: TensorInfo, checkpoint: Checkpoint) -> TensorView:
    """Classify the tensor by its dtype and its scale; a scale on its own counts as plain."""
    scales = scales_of(info.name, checkpoint.tensors)
    alone = {one.name: one for one in (info, *scales)}
    weight = find_weights(alone, checkpoint.config)[info.name]
    if weight.scale is None or weight.format is Format.PLAIN:
        return TensorView(info, NAMES.get(info.dtype, info.dtype), info.shape, None, None)
    if weight.fault is not None:
        raise InputError(str(weight.fault), weight.fault.hint)
    name = "float4_e2m1fn, two to a byte" if weight.format is Format.FP4 else "float8_e4m3fn"
    return TensorView(info, name, weight.logical_shape, weight.scale, weight.block)


def _chunks(view: TensorView) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK_ELEMENTS, cut between blocks."""
    rows = view.shape[0] if view.shape else 1
    width = max(1, view.info.nbytes // max(rows, 1))
    step = view.block.rows if view.block else 1
    count = max(1, CHUNK_ELEMENTS // width // step) * step
    yield from ((start, min(start + count, rows)) for start in range(0, rows, count))


def _decode(view: TensorView, checkpoint: Checkpoint, start: int, stop: int) -> tuple[torch.Tensor, ...]:
    """(stored codes, values, scales) of rows [start, stop); codes and scales are empty where there are none."""
    stored = checkpoint.read_tensor(view.info.name, start, stop)
    nothing = torch.empty(0)
    if view.scale is None or view.block is None:
        codes = stored.view(torch.uint8) if stored.element_size() == 1 and stored.dtype != torch.bool else nothing
        return codes, stored, nothing
    height = view.block.rows
    scale = checkpoint.read_rows(view.scale, start // height, -(-stop // height))
    try:
        if view.format.startswith("float4"):
            return e2m1.unpack(stored.view(torch.uint8)), dequantize_fp4(stored.view(torch.uint8), scale), scale
        return stored.view(torch.uint8), dequantize_fp8(stored, scale, view.block), scale
    except ValueError as error:
        raise InputError(f"{view.info.name}: {error}") from None


def _corner(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat[:CORNER_ROWS, :CORNER_COLUMNS]


def _add_counts(values: torch.Tensor, lowest: int, into: dict[int, int]) -> None:
    """How often each whole number occurs; none is below `lowest`, and the largest is not far above."""
    counts = torch.bincount(values.flatten() - lowest)
    for position in counts.nonzero().flatten().tolist():
        into[position + lowest] = into.get(position + lowest, 0) + int(counts[position])


def _add_exponents(values: torch.Tensor, into: dict[int, int]) -> None:
    """floor(log2(|v|)) of nonzero finite values, exact, subnormals included."""
    if values.numel():
        _add_counts(torch.frexp(values)[1] - 1, LOWEST_EXPONENT, into)


def _add_values(view: TensorView, values: torch.Tensor) -> None:
    view.elements += values.numel()
    if not values.numel():
        return
    # float32 holds every value of every format here but float64 and the integers
    numbers = values.flatten().to(
        torch.float32 if values.is_floating_point() and values.itemsize <= 4 else torch.float64
    )
    nan = torch.isnan(numbers)
    if nan.any():
        view.nans += int(nan.sum())
        numbers = numbers[~nan]
    zero = numbers == 0
    view.zeros += int(zero.sum())
    view.negative_zeros += int(torch.signbit(numbers[zero]).sum())
    if not numbers.numel():
        return
    low, high = (float(edge) for edge in numbers.aminmax())
    view.minimum = low if view.minimum is None else min(view.minimum, low)
    view.maximum = high if view.maximum is None else max(view.maximum, high)
    view.sum_of_squares += float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2
    shown = ~zero if math.isfinite(high - low) else ~zero & torch.isfinite(numbers)
    _add_exponents(numbers[shown], view.exponent_counts)


def view_tensor(checkpoint: Checkpoint, name: str, progress: Progress = ignore) -> TensorView:
    """Read one tensor and its scale.

    progress: called with the number of bytes read since the last call. Raises InputError for an unknown name, and for
    a scale that does not fit.
    """
    if name not in checkpoint.tensors:
        near = sorted(other for other in checkpoint.tensors if name in other and not is_scale(other))[:3]
        hint = f"Did you mean {', '.join(near)}?" if near else "`--tensors` lists the names."
        raise InputError(f"{checkpoint.storage.label}: there is no tensor '{name}'", hint)
    view = _describe(checkpoint.tensors[name], checkpoint)
    for start, stop in _chunks(view):
        codes, values, scales = _decode(view, checkpoint, start, stop)
        if start == 0:
            view.values = _corner(values.float() if values.is_floating_point() else values).tolist()
            view.codes = _corner(codes).tolist() if codes.numel() else []
            view.scales = _corner(scales.float()).tolist() if scales.numel() else []
        if view.format.startswith("float4"):
            _add_counts(codes, 0, view.code_counts)
        _add_values(view, values)
        _add_exponents(scales.float(), view.scale_counts)
        progress(view.info.nbytes * (stop - start) // max(view.shape[0] if view.shape else 1, 1))
    return view


def _ordered(counts: dict[int, int]) -> dict[str, int]:
    return {str(key): counts[key] for key in sorted(counts)}


def _plain(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they become text."""
    return value if value is None or math.isfinite(value) else str(value)


def as_json(view: TensorView) -> dict[str, Any]:
    """The object that `--tensor NAME --json` prints."""
    return {
        "name": view.info.name,
        "dtype": view.info.dtype,
        "format": view.format,
        "shape": list(view.shape),
        "shard": view.info.shard,
        "bytes": view.info.nbytes,
        "scale": None if view.scale is None else {
            "name": view.scale.name, "dtype": view.scale.dtype, "shape": list(view.scale.shape),
            "block": list(view.block or ()),
        },
        "values": [[_plain(value) for value in row] for row in view.values],
        "codes": view.codes,
        "scales": [[_plain(value) for value in row] for row in view.scales],
        "elements": view.elements,
        "zeros": view.zeros,
        "negative_zeros": view.negative_zeros,
        "nans": view.nans,
        "minimum": _plain(view.minimum),
        "maximum": _plain(view.maximum),
        "root_mean_square": _plain(view.root_mean_square),
        "code_counts": _ordered(view.code_counts),
        "scale_exponents": _ordered(view.scale_counts),
        "value_exponents": _ordered(view.exponent_counts),
    }  # fmt: skip
