"""Makes the `quantization_config` of compressed-tensors: the format of each module.

The library works with modules: a group names the modules whose weights it describes, by class or by a regular
expression on the name, and `ignore` names the modules of those classes that are not quantized. Names differ by layer
and expert only, so one expression matches all modules of a kind; where layers have different formats, modules are
named.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsv4.convert.checkpoint.forms.compressed_tensors import METHOD, MIXED, MXFP4, MXFP8, RELEASED_KEY
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX
from dsv4.convert.checkpoint.weights import Format
from dsv4.convert.plan.recipes.recipe import OutputTensor

_MX = {"type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
       "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}  # fmt: skip
MXFP4_WEIGHTS, MXFP8_WEIGHTS = {"num_bits": 4, **_MX}, {"num_bits": 8, **_MX}
# Of the inputs, at run time: MXFP8 beside MXFP8; groups of 128 in FP8 beside FP4, as the release computes.
MXFP8_INPUTS = {**MXFP8_WEIGHTS, "dynamic": True}
FP8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "symmetric": True,
              "dynamic": True}  # fmt: skip
GROUPS = {MXFP4: (MXFP4_WEIGHTS, FP8_INPUTS), MXFP8: (MXFP8_WEIGHTS, MXFP8_INPUTS)}


def _pattern(module: str) -> str:
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(module)) + "$"


def _named(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Expressions for `modules` that fit none of `others`; names where no expression does."""
    taken = {_pattern(module) for module in others}
    return sorted({module if (pattern := _pattern(module)) in taken else f"re:{pattern}" for module in modules})


def modules_by_format(tensors: Sequence[OutputTensor]) -> dict[str, list[str]]:
    """Format ("" for none) -> modules that have a matrix in it, by their names in the output."""
    found: dict[str, list[str]] = {"": [], MXFP4: [], MXFP8: []}
    kinds = {Format.FP4: MXFP4, Format.FP8: MXFP8, Format.PLAIN: ""}
    for tensor in tensors:
        name = tensor.weight.name
        if not tensor.is_scale and name.endswith(WEIGHT_SUFFIX) and len(tensor.shape) == 2:
            found[kinds[tensor.format]].append(name.removesuffix(WEIGHT_SUFFIX))
    return found


def quantization_config(tensors: Sequence[OutputTensor], released: dict[str, Any]) -> dict[str, Any]:
    """For an output that consists of these tensors. released: the release's keys for how its weights are stored."""
    modules = modules_by_format(tensors)
    used = [kind for kind in (MXFP4, MXFP8) if modules[kind]]
    groups = {}
    for number, kind in enumerate(used):
        weights, inputs = GROUPS[kind]
        others = [module for other in used if other != kind for module in modules[other]]
        targets = _named(modules[kind], [*others, *modules[""]])
        if kind == used[-1]:  # the class takes all but tables, such as those of the n-grams
            tables = [module for module in modules[kind] if module.endswith(".embed")]
            targets = ["Linear", *_named(tables, [*others, *modules[""]])]
        groups[f"group_{number}"] = {
            "targets": targets, "weights": weights, "input_activations": inputs, "format": kind,
        }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": used[0] if len(used) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _named(modules[""], [module for kind in used for module in modules[kind]]),
        RELEASED_KEY: released,
    }


def described(config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
    """config.json of the release -> of an output in the formats of compressed-tensors."""
    keys = ("expert_dtype", "quantization_config")
    found = quantization_config(tensors, {key: config[key] for key in keys if key in config})
    edited = {**config, "quantization_config": found}
    if "expert_dtype" in config:
        edited["expert_dtype"] = "fp4" if any(t.format is Format.FP4 for t in tensors) else "fp8"
    return edited
