"""FP4 weights as compressed-tensors stores them, format `mxfp4-pack-quantized`, and FP8 weights as MXFP8 beside them.

The library packs two codes into a byte as the release does, so the bytes of the experts stay what they are.
"""

from collections.abc import Sequence
from typing import Any

from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes import copy
from dsv4.convert.plan.recipes.recipe import OutputTensor
from dsv4.convert.plan.settings import Settings

from .compressed_tensors import described
from .mx_recipe import SCALE_SUFFIX, MxRecipe, check_columns, sibling

PACKED_SUFFIX = ".weight_packed"


class ToMxfp4(MxRecipe):
    """FP4 weights under other names, FP8 weights to MXFP8."""

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The codes and the scale."""
        if weight.format is not Format.FP4:
            return super().outputs(weight, settings, config)
        assert weight.scale is not None
        check_columns(weight)
        (rows, columns), scale = weight.logical_shape, weight.scale
        return [
            OutputTensor(
                sibling(weight, PACKED_SUFFIX), "U8", (rows, columns // 2), copy.RECIPE, weight, (weight.info,),
                Format.FP4, bytewise=True,
            ),
            OutputTensor(
                sibling(weight, SCALE_SUFFIX), "U8", scale.shape, copy.RECIPE, weight, (scale,),
                is_scale=True, bytewise=True,
            ),
        ]  # fmt: skip

    def describe_storage(self, config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
        """A group for the experts, one for the rest, and the modules that are not quantized."""
        return described(config, tensors)

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The experts are FP4, as they were."""
        return config


RECIPE = ToMxfp4()
