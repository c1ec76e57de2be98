"""Reads the release's weights out of a model as vLLM and SGLang build it.

Both keep `w13_weight` [experts, w1 over w3, in] and `w2_weight` for routed experts, put some matrices one below the
other into one parameter, and keep the block scales of `weight` beside it. They differ in names.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .record import Record, decode, parts

TABLE_BLOCK = (1, 32)  # of n-gram tables, which have their scales in a parameter `scale`
NO_WEIGHTS = ("weight_scale", "w13_weight_", "w2_weight", "k_scale", "v_scale")  # beginnings of parameters' names


class Spelling(NamedTuple):
    """names: replaced in turn, they make the release's name of an engine's. fused: parameter -> the matrices in it.
    vision: the same as names, for what is below `vision.`.
    """

    names: tuple[tuple[str, str], ...]
    fused: dict[str, tuple[str, str]]
    vision: tuple[tuple[str, str], ...] = ()

    def released(self, name: str) -> str:
        """The release's name of a parameter, but for fused ones."""
        name = name.removeprefix("model.")
        for old, new in self.vision if name.startswith("vision.") else self.names:
            name = name.replace(old, new)
        return name


def _scale(module: Any, name: str) -> Any:
    found = (getattr(module, name + suffix, None) for suffix in ("_scale_inv", "_scale"))
    return next((scale for scale in found if scale is not None), None)


def _is_table(module: Any) -> bool:
    """Whether a module is an n-gram table: FP8 rows, and scales that are no `weight_scale`."""
    weight, scale = getattr(module, "weight", None), getattr(module, "scale", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(scale, torch.Tensor):
        return False
    return weight.dtype == torch.float8_e4m3fn


def _experts(stem: str, module: Any, block: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of all routed experts of a layer, one at a time: decoded, they are large."""
    for leaf, names in (("w13_weight", ("w1", "w3")), ("w2_weight", ("w2",))):
        weight, scale = getattr(module, leaf), _scale(module, leaf)
        for number in range(len(weight)):
            pieces = weight[number].chunk(len(names))
            scales = [None] * len(names) if scale is None else scale[number].chunk(len(names))
            for name, piece, one in zip(names, pieces, scales, strict=True):
                values = piece if one is None else decode(piece, one, block)
                yield f"{stem}.experts.{number}.{name}.weight", values


def _fused(name: str, spelling: Spelling) -> tuple[str, ...]:
    """The release's names of the matrices in a parameter."""
    fused = next((part for part in spelling.fused if f".{part}." in name), None)
    return (name,) if fused is None else tuple(name.replace(fused, part) for part in spelling.fused[fused])


def _dense(name: str, module: Any, parameter: Any, spelling: Spelling, record: Record) -> Iterator[Any]:
    names = _fused(name, spelling)
    scale = _scale(module, "weight") if name.endswith(".weight") else None
    if parameter.dim() < 2 and scale is None:
        yield name, parameter.data
        return
    rows = len(parameter)
    first = min(rows, record.shapes.get(names[0], [rows // len(names)])[0])
    sizes = [first, rows - first] if len(names) > 1 else [rows]
    yield from zip(names, parts(parameter.data, scale, sizes, record.block), strict=True)


def held(model: Any, spelling: Spelling, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """(release's name, values) of every weight in the model. Of buffers only `tid2eid` is one."""
    modules = dict(model.named_modules())
    tables = ((name, tensor) for name, tensor in model.named_buffers() if name.endswith("tid2eid"))
    for name, parameter in (*model.named_parameters(), *tables):
        owner, _, leaf = name.rpartition(".")
        source = spelling.released(name)
        if _is_table(modules[owner]):
            if leaf == "weight":
                yield source, decode(parameter.data, modules[owner].scale, TABLE_BLOCK)
        elif leaf == "w13_weight":
            yield from _experts(source.split(".experts.")[0], modules[owner], record.block)
        elif not leaf.startswith(NO_WEIGHTS):
            yield from _dense(source, modules[owner], parameter, spelling, record)


def describe(model: Any, config: Any, quantization: Any, record: Record) -> None:
    """The classes that the engine chose."""
    record.choices["config"] = type(config).__name__
    record.choices["quantization"] = str(quantization or "none")
    record.choices["model"] = f"{type(model).__module__}.{type(model).__name__}"
    for what, sign in (("experts", "w13_weight"), ("linear layers", "weight_scale_inv")):
        found = next((m for m in model.modules() if hasattr(m, sign) and hasattr(m, "quant_method")), None)
        if found is not None:
            record.choices[what] = type(found.quant_method).__name__
