"""Checks that the `quantization_config` of compressed-tensors describes the tensors beside it.

A group says bits and group size for the modules that its targets name: by name, by a regular expression (`re:`), or by
their class, which for every matrix but the embedding is Linear. Names come first, classes last. `ignore` takes
modules out again. What a loader then expects must be what the tensors are, module by module.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from dsv4.convert.proof.layout import Tensor
from dsv4.convert.proof.plan import Weight

METHOD = "compressed-tensors"
_CLASS = "Linear"
_NOT_LINEAR = ("embed",)
_BITS = {"E2M1": 4, "E4M3": 8}
_SUFFIXES = (".weight", ".weight_packed")


def is_described(quantization: Any) -> bool:
    """Whether a `quantization_config` is of compressed-tensors."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


@cache
def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return target == module


def _listed(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _expected(quantization: dict[str, Any], module: str) -> tuple[Any, Any] | None:
    """(bits, group size) that a loader expects of a module; None for a module that it takes for unquantized."""
    linear = module.rpartition(".")[2] not in _NOT_LINEAR
    if any(_matches(name, module) for name in _listed(quantization.get("ignore"))):
        return None
    groups = quantization.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    by_name = [g for g in groups if any(_matches(target, module) for target in _listed(g.get("targets")))]
    by_class = [g for g in groups if linear and _CLASS in _listed(g.get("targets"))]
    for group in (*by_name, *by_class):
        weights = group.get("weights")
        return (weights.get("num_bits"), weights.get("group_size")) if isinstance(weights, dict) else (None, None)
    return None


def _module(tensor: Tensor) -> str | None:
    """The module of a stored matrix, by the name that the file has; None for other tensors."""
    stored = tensor.slices[0].name
    suffix = next((suffix for suffix in _SUFFIXES if stored.endswith(suffix)), None)
    return stored.removesuffix(suffix) if suffix and len(tensor.shape) == 2 else None


def faults(quantization: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Weight]) -> Iterator[str]:
    """Sentences about modules whose config and tensors differ. weights: those with scales."""
    for name, tensor in tensors.items():
        module = _module(tensor)
        if module is None:
            continue
        weight, said = weights.get(name), _expected(quantization, module)
        found = (_BITS[weight.number_format.name], weight.block[1]) if weight else None
        if weight is not None and weight.block[0] != 1:
            yield f"{name} has scales of {weight.block[0]} rows; {METHOD} has one row to a group"
        elif found != said:
            words = [f"{pair[0]} bits in groups of {pair[1]}" if pair else "not quantized" for pair in (said, found)]
            yield f"config_groups say of {module}: {words[0]}; it is {words[1]}"
