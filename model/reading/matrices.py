"""Reads one weight from the files into memory of the caller and checks it there, without another copy."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from dsv4.convert.checkpoint.reader import Checkpoint, Span, TensorInfo
from dsv4.convert.checkpoint.torch_tensors import as_tensor, typed
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.errors import InputError
from dsv4.model.config import Config
from dsv4.model.weights import BFLOAT16, Matrix, format_of
from dsv4.quant.block_scales import Block

from .arena import aligned
from .checks import are_moderate_powers_of_two, are_scales, has_nan, has_tiny_values

DAMAGED = "The file is damaged, or the conversion that wrote it overflowed."
Rows = tuple[int, int]
Memory = Callable[[int], torch.Tensor]
"""Called with a number of bytes: uint8 memory of that size, aligned for every dtype."""


def fresh(nbytes: int) -> torch.Tensor:
    """Memory from torch's allocator."""
    return torch.empty(nbytes, dtype=torch.uint8)


def into(memory: torch.Tensor) -> Memory:
    """This memory, for one read."""
    return lambda nbytes: memory


def _rows(weight: Weight, rows: Rows | None) -> Rows:
    return (0, weight.info.shape[0]) if rows is None else rows


def _scale_rows(weight: Weight, rows: Rows) -> Rows:
    """The rows of the block scale that belong to rows [start, stop) of a quantized weight."""
    assert weight.block is not None
    return rows[0] // weight.block.rows, -(-rows[1] // weight.block.rows)


def memory_of(weight: Weight, rows: Rows | None = None) -> int:
    """Bytes that `read_matrix` asks for: values, then block scales, each rounded up to whole lines of the cache."""
    start, stop = _rows(weight, rows)
    values = aligned((stop - start) * weight.info.row_bytes)
    if weight.format is Format.PLAIN or weight.scale is None:
        return values
    first, last = _scale_rows(weight, (start, stop))
    return values + aligned((last - first) * weight.scale.row_bytes)


def spans_of(weight: Weight, rows: Rows | None = None) -> Iterator[Span]:
    """The bytes that reading a weight reads, or rows [start, stop) of it: of the tensor, and of its block scale."""
    info, scale = weight.info, weight.scale
    start, stop = (0, info.nbytes) if rows is None else (rows[0] * info.row_bytes, rows[1] * info.row_bytes)
    yield info.name, start, stop
    if scale is not None and weight.format is not Format.PLAIN:
        first, last = (0, scale.shape[0]) if rows is None else _scale_rows(weight, rows)
        yield scale.name, first * scale.row_bytes, last * scale.row_bytes


def row_spans(weight: Weight, rows: Iterable[int]) -> Iterator[Span]:
    """The bytes of single rows."""
    for row in rows:
        yield from spans_of(weight, (row, row + 1))


def _read(checkpoint: Checkpoint, info: TensorInfo, rows: Rows, memory: torch.Tensor) -> torch.Tensor:
    """Rows [start, stop) of a tensor, at the beginning of `memory`."""
    start, stop = rows
    data = memory[: (stop - start) * info.row_bytes]
    checkpoint.read_into(info.name, data.numpy().data, start * info.row_bytes)
    return typed(data, info.dtype, (stop - start, *info.shape[1:]), info.name)


def _of_lower_blocks(scale: torch.Tensor, block: Block, rows: Rows) -> tuple[torch.Tensor, Block]:
    """Block scales of rows that begin inside a block: those of lower blocks, which the rows are whole numbers of."""
    start, stop = rows
    height = math.gcd(start, block.rows)
    if height == block.rows:
        return scale, block
    used = torch.arange(start, stop, height) // block.rows - start // block.rows
    as_bytes = scale.view(torch.uint8).view(len(scale), -1)
    return as_bytes[used].view(scale.dtype), block._replace(rows=height)


def read_matrix(
    checkpoint: Checkpoint,
    weight: Weight,
    rows: Rows | None = None,
    memory: Memory = fresh,
    exact_products: bool | None = None,
) -> Matrix:
    """A weight as stored, or rows [start, stop) of it, in one piece of `memory_of` bytes.

    exact_products: what an earlier read of the same rows found, which is then not looked for again; nor is a NaN.
    Raises InputError for a NaN, a bad scale, or a file that ends too early.
    """
    name, stored, over = weight.name, format_of(weight), _rows(weight, rows)
    assert stored is not None, "required_weights lets no other through"
    held = memory(memory_of(weight, over))
    shape = over[1] - over[0], weight.logical_shape[1]
    values = _read(checkpoint, weight.info, over, held)
    if weight.format is Format.PLAIN:
        if exact_products is None:
            exact_products = stored == BFLOAT16 and not has_tiny_values(values)
        return Matrix(name, stored, shape, values, exact_products=exact_products)
    assert weight.scale is not None and weight.block is not None, "a quantized weight without fault has both"
    scale = _read(checkpoint, weight.scale, _scale_rows(weight, over), held[aligned(values.nbytes) :])
    if exact_products is None:
        _check(weight, values, scale)
        exact_products = are_moderate_powers_of_two(scale)
    scale, block = _of_lower_blocks(scale, weight.block, over)
    return Matrix(name, stored, shape, values, scale, block, exact_products)


def _check(weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise InputError if a quantized weight holds a NaN, or a scale that is none."""
    if weight.format is Format.FP8 and has_nan(values):
        raise InputError(f"'{weight.name}' holds a NaN", DAMAGED)
    if scale.numel() and not are_scales(scale):
        assert weight.scale is not None
        raise InputError(f"'{weight.scale.name}' holds a NaN or a value that is not positive and finite")


def read_vector(checkpoint: Checkpoint, config: Config, weight: Weight, rows: Rows | None = None) -> torch.Tensor:
    """A norm, bias, sink or other small tensor (or rows of it) as float32, or a table of expert ids as int64.

    Raises InputError if a table names an expert that does not exist.
    """
    tensor = checkpoint.read_rows(weight.info, *(rows or (0, None)))
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    wrong = tensor[(tensor < 0) | (tensor >= config.n_routed_experts)]
    if len(wrong):
        raise InputError(f"'{weight.name}' names expert {int(wrong[0])}, there are {config.n_routed_experts}")
    return tensor.to(torch.int64)


def _gather(checkpoint: Checkpoint, info: TensorInfo, rows: list[int]) -> torch.Tensor:
    """Rows of a tensor in the order given, each read alone, into one buffer."""
    width = info.row_bytes
    data = bytearray(len(rows) * width)
    view = memoryview(data)
    for place, row in enumerate(rows):
        checkpoint.read_into(info.name, view[place * width : (place + 1) * width], row * width)
    return as_tensor(data, info.dtype, (len(rows), *info.shape[1:]), info.name)


def read_single_rows(checkpoint: Checkpoint, weight: Weight, rows: list[int]) -> torch.Tensor:
    """Rows of a weight in the order given, float32 [n, columns]. Raises InputError for a NaN or a bad scale."""
    checkpoint.expect(row_spans(weight, rows))
    values, stored = _gather(checkpoint, weight.info, rows), format_of(weight)
    assert stored is not None, "required_weights lets no other through"
    shape = len(rows), weight.logical_shape[1]
    if weight.scale is None or weight.block is None:
        return Matrix(weight.name, stored, shape, values).decode()
    scale = _gather(checkpoint, weight.scale, [row // weight.block.rows for row in rows])
    _check(weight, values, scale)
    return Matrix(weight.name, stored, shape, values, scale, weight.block._replace(rows=1)).decode()
