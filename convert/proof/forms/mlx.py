"""MXFP4 and MXFP8 of MLX, as `verify` reads them: its own reader of shapes, its own table of names.

A matrix is 32-bit words beside `scales`, one E8M0 byte for 32 elements: the number of words for one scale says how many
bits an element has. Stacks of experts are read as matrices, the groups of wo_a as one matrix, under the release's
names. `quantization` in the config names a mode for the model and others for modules; it must be that of the tensors.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from dsv4.convert.proof.files import Entry

_STORAGE = ("quantization", "quantization_config", "released_quantization")
_GROUP = 32
_SHOWN = {4: "I8", 8: "F8_E4M3"}  # words for one scale, which is bits of an element -> dtype in a release
_STACK = re.compile(r"(.+?)\.(?:experts\.)?switch_mlp\.(gate|up|down)_proj\.(weight|scales)")
_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
_OTHER_PART = re.compile(r"(vision|aligner)\..*|image_.*")
# In this order: what a part means may depend on those around it.
_RENAMED = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"^model\.", ""),
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.gate\.e_score_correction_bias", ".gate.bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
        (r"\.(kv|k|gate)_proj\.", r".w\1."),
        (r"\.scales$", ".scale"),
    )
)


class Stored(NamedTuple):
    """What a file's tensor is in the release: name and entry; `fault` if it cannot be read, "" if it can."""

    name: str
    entry: Entry
    fault: str = ""


def is_described(config: dict[str, Any]) -> bool:
    """Whether a config.json says how MLX has quantized the weights."""
    inner = config.get("quantization")
    return isinstance(inner, dict) and {"bits", "group_size"} <= inner.keys()


def without_storage(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that MLX has for how weights are stored; any other config as it is."""
    return {k: v for k, v in config.items() if k not in _STORAGE} if is_described(config) else config


def holds(entries: Iterable[Entry]) -> bool:
    """Whether tensors are stored as MLX does it."""
    return any(entry.name.endswith(".scales") and entry.dtype == "U8" for entry in entries)


def _name(stored: str) -> str:
    if _OTHER_PART.fullmatch(stored):
        return stored
    for pattern, text in _RENAMED:
        stored = pattern.sub(text, stored)
    return stored


def _matrices(entry: Entry) -> Iterator[Stored]:
    """The matrices of a stack, or the one that an entry holds."""
    match = _STACK.fullmatch(entry.name)
    if match is None or len(entry.shape) != 3 or not entry.shape[0]:
        name = _name(entry.name)
        joined = ".attn.wo_a." in name and len(entry.shape) == 3
        shape = (math.prod(entry.shape[:2]), entry.shape[2]) if joined else entry.shape
        yield Stored(name, replace(entry, shape=shape))
        return
    module, last = _name(match[1] + "."), {"weight": "weight", "scales": "scale"}[match[3]]
    size = entry.size // entry.shape[0]
    for expert in range(entry.shape[0]):
        one = replace(entry, shape=entry.shape[1:], offset=entry.offset + expert * size, size=size)
        yield Stored(f"{module}experts.{expert}.{_MATRICES[match[2]]}.{last}", one)


def _fault(entry: Entry, scales: Entry | None) -> str:
    """Why a matrix of words cannot be read, "" if it can."""
    if scales is None:
        return "32-bit words without scales"
    if scales.dtype != "U8":
        return f"words with {scales.dtype} scales, which are no MXFP4 and no MXFP8"
    if entry.shape[:-1] != scales.shape[:-1] or not entry.shape or entry.shape[-1] not in (
        bits * scales.shape[-1] for bits in _SHOWN
    ):  # fmt: skip
        return f"words {list(entry.shape)} with scales {list(scales.shape)}, which are no MXFP4 and no MXFP8"
    return ""


def released(entries: Iterable[Entry]) -> Iterator[Stored]:
    """Everything that the files of an MLX folder hold, as a release has it."""
    by_name = {entry.name: entry for entry in entries}
    for name, entry in by_name.items():
        scales = by_name.get(name.removesuffix("weight") + "scales") if name.endswith(".weight") else None
        if entry.dtype == "U32" and name.endswith(".weight"):
            if fault := _fault(entry, scales):
                yield Stored(_name(name), entry, fault)
                continue
            assert scales is not None
            dtype = _SHOWN[entry.shape[-1] // scales.shape[-1]]
            entry = replace(entry, dtype=dtype, shape=(*entry.shape[:-1], 4 * entry.shape[-1]))
        elif name.endswith(".scales") and entry.dtype == "U8":
            entry = replace(entry, dtype="F8_E8M0")
        yield from _matrices(entry)


def faults(config: dict[str, Any], bits: dict[str, int]) -> Iterator[str]:
    """Sentences about modules of which `quantization` and tensors differ. bits: of each quantized module, by its name.

    A loader quantizes the modules that the config names, and the others that have scales.
    """
    said = config["quantization"]
    for module, found in bits.items():
        inner = said.get(module, said)
        inner = inner if isinstance(inner, dict) else {}
        pair = inner.get("bits"), inner.get("group_size")
        if pair != (found, _GROUP):
            yield f"quantization says of {module}: {pair[0]} bits in groups of {pair[1]}; it is {found} in {_GROUP}"
    for module, inner in said.items():
        if isinstance(inner, dict) and module not in bits:
            yield f"quantization names {module}, which is not quantized"
