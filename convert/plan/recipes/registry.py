"""Finds the recipe of a conversion. Recipes are imported when a plan is made: they need torch, command lines do not."""

from functools import cache
from importlib import import_module
from typing import Any

from dsv4.convert.checkpoint.config import quantization
from dsv4.convert.checkpoint.names import is_released_in_fp8
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.engines import To
from dsv4.convert.plan.settings import CONVERSIONS, Settings

from . import bf16, copy, from_bf16, scales
from .recipe import OutputTensor, Recipe


@cache
def recipe_of(to: To) -> Recipe:
    """The recipe of a conversion, by the table of settings.py."""
    recipe: Recipe = import_module(f"{__package__}.{CONVERSIONS[to].recipe}").RECIPE
    return recipe


def from_bf16_of(weight: Weight, settings: Settings, config: dict[str, Any]) -> Recipe | None:
    """The recipe that quantizes a BF16 weight as the release has it; None if the weight stays.

    wo_a follows its option. Other dense weights, and experts of draft stages, are converted where nothing in the
    checkpoint is quantized, or the file says that the release has them in FP8: in a quantized checkpoint somebody left
    them in BF16 on purpose.
    """
    experts = CONVERSIONS[settings.to].bf16_experts
    if not from_bf16.FP8.takes(weight):
        return None
    if weight.is_wo_a:
        return from_bf16.FP8 if settings.wo_a == "fp8" else None
    anything = not quantization(config)
    if experts and weight.is_routed_expert and (anything or not weight.is_draft):
        return from_bf16.FP4 if experts == "fp4" else from_bf16.FP8
    returns = weight.info.released_dtype == "F8_E4M3" or (anything and is_released_in_fp8(weight.name))
    return from_bf16.FP8 if experts and returns else None


def outputs_of(weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
    """The tensors that one source weight (and its scale) becomes, before any slicing."""
    recipe = recipe_of(settings.to)
    if weight.format is Format.PLAIN:
        recipe = from_bf16_of(weight, settings, config) or copy.RECIPE
    elif settings.wo_a == "bf16" and weight.is_wo_a:
        recipe = bf16.RECIPE
    elif not recipe.takes(weight):
        recipe = scales.RECIPE
    return recipe.outputs(weight, settings, config)
