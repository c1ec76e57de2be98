"""Classifies the tensors of a checkpoint for a conversion: the first fault raises an error."""

from collections.abc import Collection, Iterable
from typing import Any

from dsv4.convert.checkpoint.config import checked_expert_dtype, required_weight_block
from dsv4.convert.checkpoint.editions.table import check_signs
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight, find_weights
from dsv4.errors import InputError
from dsv4.quant.blocks import FP4_BLOCK, Block


def fp8_block(config: dict[str, Any]) -> Block:
    """The block of FP8 weights. Raises InputError if the config does not say it."""
    return Block(*required_weight_block(config))


def check_groups(block: Block) -> None:
    """Raises InputError if an FP8 block is not made of whole groups of FP4."""
    if block.columns % FP4_BLOCK.columns:
        raise InputError(
            f"config.json: weight_block_size {list(block)}: its columns are not groups of {FP4_BLOCK.columns}"
        )


def _check_config(weights: Iterable[Weight], config: dict[str, Any]) -> None:
    declared = checked_expert_dtype(config)
    if declared is None:
        return
    others = [form for form in Format if form not in (Format.PLAIN, Format(declared))]
    for weight in weights:
        # Draft stages may have another format than the config declares.
        if weight.format in others and weight.is_routed_expert and not weight.is_draft:
            raise InputError(
                f"config.json says expert_dtype '{declared}', but '{weight.name}' holds {weight.format.value}",
                "Take config.json and the shards from the same release.",
            )


def check_weights(weights: Collection[Weight], config: dict[str, Any]) -> None:
    """Raises InputError when a scale is missing or does not fit its weight, or the config contradicts the tensors.

    Under the config of another edition no scale fits: then that is the error.
    """
    if any(weight.format is Format.FP8 for weight in weights):
        fp8_block(config)
    for weight in weights:
        if weight.fault is not None:
            check_signs(config, (weight.name for weight in weights))
            raise InputError(str(weight.fault), weight.fault.hint)
    _check_config(weights, config)


def classify(checkpoint: Checkpoint) -> list[Weight]:
    """Every tensor of the checkpoint that is not the scale of another, in the order of the shards.

    Raises InputError as `check_weights` does.
    """
    weights = list(find_weights(checkpoint.tensors, checkpoint.config).values())
    check_weights(weights, checkpoint.config)
    return weights
