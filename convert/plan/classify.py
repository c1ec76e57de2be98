"""What each tensor is: declared by its dtype, its name, its sibling scale and the config; never guessed from sizes.

A quantized weight is `<stem>.weight` with `<stem>.scale` beside it (or `<stem>.weight_scale_inv`, as Hugging Face
conversions call it). The two may lie in different shards. Everything that is not a quantized weight or its scale is
plain and keeps its bytes, whatever its name: that is how checkpoints with tensors unknown to us convert too.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dsv4.convert.checkpoint.config import checked_expert_dtype, required_weight_block
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, is_expert_matrix, is_wo_a, scale_name, scales_of
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
from dsv4.errors import InputError, printable
from dsv4.quant.block_scales import FP4_BLOCK, Block, scale_shape

# The n-gram table of V4.1 has one scale per 32 elements of a row although it is FP8: its own third geometry.
ROW_SCALED_FP8 = re.compile(r"\.engram\.embed\.weight$")


class Format(Enum):
    """How the elements of a weight are stored."""

    FP4 = "fp4"
    FP8 = "fp8"
    PLAIN = "plain"


@dataclass(frozen=True)
class Weight:
    """One tensor that is not a scale, with the scale that belongs to it and the block it is for."""

    info: TensorInfo
    format: Format
    scale: TensorInfo | None = None
    block: Block | None = None

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.info.name

    @property
    def is_routed_expert(self) -> bool:
        """Whether the name is that of a routed expert's matrix, in the main stack or in a draft block."""
        return is_expert_matrix(self.name)

    @property
    def is_wo_a(self) -> bool:
        """Whether it is the grouped output projection, which some engines want in BF16."""
        return is_wo_a(self.name)

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape in elements: two FP4 elements share a byte of an I8 tensor; the tag F4 already counts elements."""
        shape = self.info.shape
        return (*shape[:-1], 2 * shape[-1]) if self.format is Format.FP4 and self.info.dtype == "I8" else shape


def fp8_block(config: dict[str, Any]) -> Block:
    """The block of FP8 weights. Raises InputError if the config does not say it."""
    return Block(*required_weight_block(config))


def check_groups(block: Block) -> None:
    """Raises InputError if an FP8 block is not made of whole groups of FP4."""
    if block.columns % FP4_BLOCK.columns:
        raise InputError(
            f"config.json: weight_block_size {list(block)}: its columns are not groups of {FP4_BLOCK.columns}"
        )


def _scale_of(name: str, tensors: dict[str, TensorInfo]) -> TensorInfo | None:
    found = scales_of(name, tensors)
    if len(found) > 1:
        raise InputError(f"'{printable(name)}' has two scales: {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _check_scale(weight: Weight, dtypes: tuple[str, ...]) -> None:
    scale, block = weight.scale, weight.block
    assert scale is not None and block is not None
    if scale.dtype not in dtypes:
        raise InputError(f"'{printable(scale.name)}' has dtype {scale.dtype}, {' or '.join(dtypes)} expected")
    if len(weight.info.shape) != 2:
        raise InputError(f"'{printable(weight.name)}' has shape {list(weight.info.shape)}, two dimensions expected")
    expected = scale_shape(weight.logical_shape, block)
    if scale.shape != expected:
        raise InputError(
            f"'{printable(scale.name)}' has shape {list(scale.shape)}, {list(expected)} expected: "
            f"one scale per {block.rows} x {block.columns} of {list(weight.logical_shape)}"
        )


def _fp4(info: TensorInfo, scale: TensorInfo) -> Weight:
    weight = Weight(info, Format.FP4, scale, FP4_BLOCK)
    _check_scale(weight, ("F8_E8M0",))
    return weight


def _fp8(info: TensorInfo, scale: TensorInfo, config: dict[str, Any]) -> Weight:
    block = FP4_BLOCK if ROW_SCALED_FP8.search(info.name) else fp8_block(config)
    weight = Weight(info, Format.FP8, scale, block)
    _check_scale(weight, ("F8_E8M0", "F32"))
    return weight


def _classify(info: TensorInfo, scale: TensorInfo | None, config: dict[str, Any]) -> Weight:
    if scale is not None and info.dtype in ("I8", "F4"):
        return _fp4(info, scale)
    if scale is not None and info.dtype == "F8_E4M3":
        return _fp8(info, scale, config)
    quantized = info.dtype == "F8_E4M3" or (info.dtype in ("I8", "F4") and is_expert_matrix(info.name))
    if scale is None and quantized and info.name.endswith(WEIGHT_SUFFIX):
        raise InputError(
            f"'{printable(info.name)}' is {info.dtype}, but its scale '{scale_name(info.name)}' is missing",
            "The checkpoint is incomplete: download it again.",
        )
    return Weight(info, Format.PLAIN, scale)


def _check_config(weights: list[Weight], config: dict[str, Any]) -> None:
    declared = checked_expert_dtype(config)
    for weight in weights:
        if not weight.is_routed_expert or declared is None or weight.format is Format.PLAIN:
            continue
        if weight.format.value != declared:
            raise InputError(
                f"config.json says expert_dtype '{declared}', but '{weight.name}' holds {weight.format.value}",
                "Take config.json and the shards from the same release.",
            )


def classify(checkpoint: Checkpoint) -> list[Weight]:
    """Every tensor of the checkpoint that is not the scale of another, in the order of the shards.

    Raises InputError when a scale is missing or does not fit its weight, or the config contradicts the tensors.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    scales = {name: _scale_of(name, tensors) for name in tensors}
    owned = {scale.name for scale in scales.values() if scale is not None}
    weights = [_classify(tensors[n], scales[n], config) for n in tensors if n not in owned]
    _check_config(weights, config)
    return weights
