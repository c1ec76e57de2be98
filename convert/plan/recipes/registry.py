"""Finds the recipe of a conversion. Recipes are imported when a plan is made: they need torch, command lines do not."""

from functools import cache
from importlib import import_module
from typing import Any

from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.settings import CONVERSIONS, Settings, To

from . import bf16, blocks, copy, scales
from .recipe import OutputTensor, Recipe


@cache
def recipe_of(to: To) -> Recipe:
    """The recipe of a conversion, by the table of settings.py."""
    recipe: Recipe = import_module(f"{__package__}.{CONVERSIONS[to].recipe}").RECIPE
    return recipe


def outputs_of(weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
    """The tensors that one source weight (and its scale) becomes, before any slicing."""
    recipe = recipe_of(settings.to)
    if weight.format is Format.PLAIN:
        back = CONVERSIONS[settings.to].way_back and blocks.is_released_in_fp8(weight)
        recipe = blocks.RECIPE if back else copy.RECIPE
    elif settings.wo_a == "bf16" and weight.is_wo_a:
        recipe = bf16.RECIPE
    elif not recipe.takes(weight):
        recipe = scales.RECIPE
    return recipe.outputs(weight, settings, config)
