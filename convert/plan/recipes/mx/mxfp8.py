"""Every quantized weight to MXFP8, as compressed-tensors stores it: format `mxfp8-quantized`."""

from collections.abc import Sequence
from typing import Any

from dsv4.convert.plan.recipes.recipe import OutputTensor

from .compressed_tensors import described
from .mx_recipe import MxRecipe


class ToMxfp8(MxRecipe):
    """FP4 and FP8 weights to MXFP8."""

    def describe_storage(self, config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
        """One group, and the modules that are not quantized."""
        return described(config, tensors)


RECIPE = ToMxfp8()
