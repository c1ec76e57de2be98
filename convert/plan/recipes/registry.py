"""The recipe behind a value of `--to`. Loaded when a plan is made: recipes need torch, command lines do not."""

from importlib import import_module

from dsv4.convert.plan.settings import CONVERSIONS, To

from .recipe import Recipe


def recipe_of(to: To) -> Recipe:
    """The recipe of a conversion, by the table of settings.py."""
    recipe: Recipe = import_module(f"{__package__}.{CONVERSIONS[to].recipe}").RECIPE
    return recipe
