"""Weights: the tensors that a checkpoint must have, and how each stored format decodes to float32.

A `Matrix` keeps a weight as it is on disk (packed FP4, FP8 with E8M0 or float32 scales, BF16, float32) and knows how to
decode rows of it to float32. Every format decodes to the exact value before any product, so a checkpoint and its FP8
or BF16 conversion compute with the same numbers. Whether a layer quantizes its INPUT is a property of the layer's
name, never of the stored format: it is part of the model, and a BF16 conversion must not lose it.

`dsv4.convert.checkpoint` says which tensors there must be, how each is stored, and which scale belongs to it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dsv4.convert.checkpoint.editions.table import tensors_of
from dsv4.convert.checkpoint.editions.v4 import Shape
from dsv4.convert.checkpoint.names import block_of
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
from dsv4.convert.checkpoint.weights import Format, Weight, find_weights
from dsv4.errors import InputError
from dsv4.quant.block_scales import FP4_BLOCK, Block, decode_scale, dequantize_fp4, dequantize_fp8
from dsv4.quant.e4m3 import is_nan

from .config import Config

FLOAT4_E2M1FN, FLOAT8_E4M3FN, BFLOAT16, FLOAT32 = "float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float32"
QUANTIZED_FORMATS = {Format.FP4: FLOAT4_E2M1FN, Format.FP8: FLOAT8_E4M3FN}
PLAIN_FORMATS = {"BF16": BFLOAT16, "F32": FLOAT32}
EMBEDDING = "embed.weight"
MODERATE_EXPONENT = 60
ROWS_PER_LOOK = 1024
DAMAGED = "The file is damaged, or the conversion that wrote it overflowed."


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] as stored. `values` holds codes or numbers, `scale` the block scales of codes."""

    name: str
    format: str
    shape: tuple[int, int]
    values: torch.Tensor
    scale: torch.Tensor | None = None
    block: Block = FP4_BLOCK
    exact_products: bool = True  # with bfloat16, in float32: few significant bits and no underflow
    # What kernels keep about this object, such as its description for C; a copy with other tensors starts without.
    kept: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def decode(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) as float32. A start inside an FP8 block is allowed."""
        stop = self.shape[0] if stop is None else stop
        if self.scale is None:
            return self.values[start:stop].to(torch.float32)
        first = start // self.block.rows * self.block.rows
        scale = self.scale[first // self.block.rows : -(-stop // self.block.rows)]
        codes = self.values[first:stop]
        decoded = (
            dequantize_fp4(codes, scale) if self.format == FLOAT4_E2M1FN else dequantize_fp8(codes, scale, self.block)
        )
        return decoded[start - first :]

    def to(self, device: torch.device) -> "Matrix":
        """The same matrix with its tensors on `device`."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, values=self.values.to(device), scale=scale)


def mtp_stages(names: Iterable[str]) -> int:
    """How many MTP blocks of the Flash and Pro kind there are: those with an e_proj.

    The three stages of the DSpark releases are wired differently; they are left out, the main model runs without.
    """
    blocks = map(block_of, names)
    return sum(b is not None and b.stack == "mtp" and b.inner == "e_proj.weight" for b in blocks)


def required_weights(checkpoint: Checkpoint, config: Config, stages: int) -> dict[str, Weight]:
    """Every tensor of the main stack and of `stages` MTP blocks by name, scales left out, as it is stored.

    Raises InputError naming the first tensor that is missing, or that is not what config.json asks for.
    """
    if len(config.compress_ratios) < config.num_hidden_layers + stages:
        raise InputError(f"config.json: compress_ratios has no entry for {stages} MTP block(s)")
    shapes = tensors_of(checkpoint.config, stages)
    missing = [name for name in shapes if name not in checkpoint.tensors]
    if missing:
        raise InputError(
            f"'{missing[0]}' is missing ({len(missing)} of the {len(shapes)} tensors that config.json asks for are)",
            "The checkpoint is incomplete, or the config belongs to another one.",
        )
    found = find_weights(checkpoint.tensors, checkpoint.config)
    weights = {name: found[name] for name in shapes}
    for name, shape in shapes.items():
        _check(weights[name], shape)
    return weights


def _check(weight: Weight, shape: Shape) -> None:
    info = weight.info
    if weight.logical_shape != shape:
        raise InputError(
            f"'{info.name}' is {info.dtype} {list(info.shape)}, config.json asks for {list(shape)}",
            "The config belongs to another checkpoint.",
        )
    if weight.fault is not None:
        raise InputError(str(weight.fault), weight.fault.hint)
    if info.name.endswith("tid2eid"):
        if info.dtype not in ("I64", "I32"):
            raise InputError(f"'{info.name}' is {info.dtype}, a table of expert ids must be I64")
    elif format_of(weight) is None or (info.name == EMBEDDING and weight.format is not Format.PLAIN):
        raise InputError(f"'{info.name}' is {info.dtype}, which this engine has no decoder for")


def format_of(weight: Weight) -> str | None:
    """The format of a weight, as `Matrix.format` names it; None for one that this engine does not decode."""
    return QUANTIZED_FORMATS.get(weight.format) or PLAIN_FORMATS.get(weight.info.dtype)


def _check_scale_values(scale: torch.Tensor, name: str) -> None:
    try:
        decode_scale(scale)
    except ValueError:
        raise InputError(f"'{name}' holds a NaN or a value that is not positive and finite") from None


def _are_moderate_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether codes times these scales have as few significant bits as the codes, far from the ends of float32."""
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) - 127
    return bool(((bits & 0x7FFFFF) == 0).all() and (exponent.abs() <= MODERATE_EXPONENT).all())


def _has_tiny_values(values: torch.Tensor) -> bool:
    """Whether a bfloat16 matrix has values other than zero below 2**-MODERATE_EXPONENT."""
    smallest = (127 - MODERATE_EXPONENT) << 7
    for start in range(0, len(values), ROWS_PER_LOOK):
        magnitude = values[start : start + ROWS_PER_LOOK].view(torch.int16) & 0x7FFF
        if ((magnitude != 0) & (magnitude < smallest)).any():
            return True
    return False


def _read_scale(
    checkpoint: Checkpoint, info: TensorInfo, block: Block, rows: tuple[int, int]
) -> tuple[torch.Tensor, Block]:
    """Block scales of rows [start, stop). If `start` is inside a block, lower blocks are returned."""
    start, stop = rows
    scale = checkpoint.read_rows(info, start // block.rows, -(-stop // block.rows))
    _check_scale_values(scale, info.name)
    height = math.gcd(start, block.rows)
    if height == block.rows:
        return scale, block
    used = torch.arange(start, stop, height) // block.rows - start // block.rows
    as_bytes = scale.view(torch.uint8).view(len(scale), -1)
    return as_bytes[used].view(scale.dtype), block._replace(rows=height)


def read_matrix(checkpoint: Checkpoint, weight: Weight, rows: tuple[int, int] | None = None) -> Matrix:
    """A weight as stored, or rows [start, stop) of it, from the files. Raises InputError for a NaN or a bad scale."""
    name, stored = weight.name, format_of(weight)
    assert stored is not None, "required_weights lets no other through"
    start, stop = (0, weight.info.shape[0]) if rows is None else rows
    shape = stop - start, weight.logical_shape[1]
    values = checkpoint.read_rows(weight.info, start, stop)
    if weight.format is Format.PLAIN:
        exact = stored == BFLOAT16 and not _has_tiny_values(values)
        return Matrix(name, stored, shape, values, exact_products=exact)
    if weight.format is Format.FP8 and is_nan(values).any():
        raise InputError(f"'{name}' holds a NaN", DAMAGED)
    assert weight.scale is not None and weight.block is not None, "a quantized weight without fault has both"
    scale, block = _read_scale(checkpoint, weight.scale, weight.block, (start, stop))
    return Matrix(name, stored, shape, values, scale, block, _are_moderate_powers_of_two(decode_scale(scale)))


def read_vector(
    checkpoint: Checkpoint, config: Config, weight: Weight, rows: tuple[int, int] | None = None
) -> torch.Tensor:
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
    """Rows of a tensor in the order given, each read alone."""
    found = checkpoint.read_rows(info, 0, 0)
    parts = [checkpoint.read_rows(info, row, row + 1).view(torch.uint8) for row in rows]
    return torch.cat([found.view(torch.uint8), *parts]).view(found.dtype)


def read_single_rows(checkpoint: Checkpoint, weight: Weight, rows: list[int]) -> torch.Tensor:
    """Rows of a weight in the order given, float32 [n, columns]. Raises InputError for a NaN or a bad scale."""
    values, stored = _gather(checkpoint, weight.info, rows), format_of(weight)
    assert stored is not None, "required_weights lets no other through"
    shape = len(rows), weight.logical_shape[1]
    if weight.scale is None or weight.block is None:
        return Matrix(weight.name, stored, shape, values).decode()
    if weight.format is Format.FP8 and is_nan(values).any():
        raise InputError(f"'{weight.name}' holds a NaN", DAMAGED)
    scale = _gather(checkpoint, weight.scale, [row // weight.block.rows for row in rows])
    _check_scale_values(scale, weight.scale.name)
    return Matrix(weight.name, stored, shape, values, scale, weight.block._replace(rows=1)).decode()
