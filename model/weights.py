"""Weights: the tensors that a checkpoint must have, and how each stored format decodes to float32.

A `Matrix` keeps a weight as it is on disk (packed FP4, FP8 with E8M0 or float32 scales, BF16, float32) and knows how to
decode rows of it to float32. Every format decodes to the exact value before any product, so a checkpoint and its FP8
or BF16 conversion compute with the same numbers. Whether a layer quantizes its INPUT is a property of the layer's
name, never of the stored format: it is part of the model, and a BF16 conversion must not lose it.

`dsv4.convert.checkpoint` says which tensors there must be, how each is stored, and which scale belongs to it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from dsv4.convert.checkpoint.editions.table import tensors_of
from dsv4.convert.checkpoint.editions.v4 import COPY_CONFIG, Shape
from dsv4.convert.checkpoint.names import block_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight, find_weights
from dsv4.errors import InputError
from dsv4.quant.block_scales import FP4_BLOCK, Block, dequantize_fp4, dequantize_fp8

from .config import Config

FLOAT4_E2M1FN, FLOAT8_E4M3FN, BFLOAT16, FLOAT32 = "float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float32"
QUANTIZED_FORMATS = {Format.FP4: FLOAT4_E2M1FN, Format.FP8: FLOAT8_E4M3FN}
PLAIN_FORMATS = {"BF16": BFLOAT16, "F32": FLOAT32}
EMBEDDING = "embed.weight"
DSPARK_ONLY = re.compile(r"main_proj\.|main_norm\.|markov_head\.|confidence_head\.")
TABLES = re.compile(r"^embed\.weight$|\.markov_head\.(markov_w1|embed)\.weight$")  # read row by row


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


class DraftStages(NamedTuple):
    """The draft stages of a checkpoint, `mtp.{M}`: MTP as in Flash and Pro, or DSpark; 0 blocks without any."""

    kind: Literal["mtp", "dspark"]
    blocks: int


NO_STAGES = DraftStages("mtp", 0)


def draft_stages(names: Iterable[str]) -> DraftStages:
    """Which draft stages there are, from the tensors' names: `num_nextn_predict_layers` is 1 in DSpark editions too."""
    blocks = [block for block in map(block_of, names) if block is not None and block.stack == "mtp"]
    if any(DSPARK_ONLY.match(block.inner) for block in blocks):
        return DraftStages("dspark", len({block.number for block in blocks}))
    return DraftStages("mtp", sum(block.inner == "e_proj.weight" for block in blocks))


def check_stages(stages: DraftStages, config: Config) -> None:
    """Raise InputError for draft stages of one edition beside the config of another."""
    if stages.kind == "dspark" and config.dspark is None:
        raise InputError(
            "the draft stages are DSpark's ('mtp.0.main_proj.weight'), config.json has no dspark_block_size",
            COPY_CONFIG,
        )
    if stages.kind == "mtp" and stages.blocks and config.dspark is not None:
        raise InputError(
            "config.json has dspark_block_size, the draft stages are MTP blocks ('mtp.0.e_proj.weight')", COPY_CONFIG
        )


def required_weights(checkpoint: Checkpoint, config: Config, stages: DraftStages) -> dict[str, Weight]:
    """Every tensor of the main stack and of the draft stages by name, scales left out, as it is stored.

    Raises InputError naming the first tensor that is missing, or that is not what config.json asks for.
    """
    if len(config.compress_ratios) < config.num_hidden_layers + stages.blocks:
        raise InputError(f"config.json: compress_ratios has no entry for {stages.blocks} draft stage(s)")
    shapes = tensors_of(checkpoint.config, stages.blocks)
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
    elif format_of(weight) is None or (TABLES.search(info.name) and weight.format is not Format.PLAIN):
        raise InputError(f"'{info.name}' is {info.dtype}, which this engine has no decoder for")


def format_of(weight: Weight) -> str | None:
    """The format of a weight, as `Matrix.format` names it; None for one that this engine does not decode."""
    return QUANTIZED_FORMATS.get(weight.format) or PLAIN_FORMATS.get(weight.info.dtype)
