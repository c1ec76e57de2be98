"""What looks wrong with a checkpoint that opens: its config, its headers and its side files against each other.

`Checkpoint.open` already refuses a folder whose files do not fit together. What is left are checkpoints that load
and compute nonsense: a config that says fp8 over packed FP4, a scale of the wrong shape, an expert that is missing.
Thousands of tensors can share one fault, so findings are grouped by the name with its numbers left out.

Two levels: a problem is something an engine will trip over, a note is something worth knowing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.convert.checkpoint.config import (
    compress_ratios,
    config_string,
    expert_dtype,
    quantization,
    weight_block,
)
from dsv4.convert.checkpoint.foreign import HINT, foreign_quantization
from dsv4.convert.checkpoint.inventory import Dimensions, describes_v4, expected_tensors
from dsv4.convert.checkpoint.names import (
    count_draft_stages,
    find_scale,
    is_routed_expert,
    is_scale,
    pattern_of,
    weight_of_scale,
)
from dsv4.convert.checkpoint.reader import INDEX_NAME, MAX_INDEX_BYTES, Checkpoint, TensorInfo, layout_bytes, read_json
from dsv4.errors import printable

from .parameters import family, is_fp4, logical_shape, packs_fp4

Level = Literal["problem", "note"]

FP4_GROUP = 32
MAX_EXPERTS = 1_000_000  # V4-Pro has 23808 in all; a hostile config must not make us list billions of names
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong, and what to do about it (may be empty)."""

    level: Level
    text: str
    hint: str = ""


def _grouped(faults: Iterable[tuple[str, str]], level: Level, hint: str = "") -> Iterator[Finding]:
    """One finding for all (tensor, what is wrong) of the same pattern and wording."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, wrong in faults:
        groups.setdefault((pattern_of(name), wrong), []).append(name)
    for (_, wrong), names in groups.items():
        others = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        yield Finding(level, f"{printable(names[0])}{others}: {wrong}", hint)


def _expected_scale(info: TensorInfo, tensors: dict[str, TensorInfo], block: tuple[int, int]) -> tuple[int, ...]:
    *batch, rows, columns = logical_shape(info, tensors)
    if is_fp4(info, find_scale(info.name, tensors)):
        return (*batch, rows, -(-columns // FP4_GROUP))
    return (*batch, -(-rows // block[0]), -(-columns // block[1]))


def _scale_fault(info: TensorInfo, tensors: dict[str, TensorInfo], block: tuple[int, int]) -> str | None:
    """What is wrong with the scale of a quantized weight, or None."""
    scale = find_scale(info.name, tensors)
    if scale is None:
        return f"{info.dtype} weight without a block scale"
    if scale.dtype not in ("F8_E8M0", "F32"):
        return f"its block scale has dtype {scale.dtype}; F8_E8M0 or F32 expected"
    if len(info.shape) < 2:
        return f"a quantized weight of shape {list(info.shape)} has no rows and columns"
    row_groups = (*info.shape[:-1], -(-info.shape[-1] // FP4_GROUP))  # V4.1's engram table: FP8 in groups of 32
    allowed = {_expected_scale(info, tensors, block), *((row_groups,) if ".engram." in info.name else ())}
    if scale.shape not in allowed:
        expected = list(_expected_scale(info, tensors, block))
        return f"block scale of shape {list(scale.shape)}; {expected} expected for a weight {list(info.shape)}"
    return None


def scale_findings(tensors: dict[str, TensorInfo], block: tuple[int, int]) -> Iterator[Finding]:
    """Weights without a fitting block scale, and scales without a weight."""
    faults = []
    for info in tensors.values():
        if is_scale(info.name):
            if weight_of_scale(info.name) not in tensors:
                faults.append((info.name, "a block scale without its weight"))
        elif info.dtype == "F8_E4M3" or is_fp4(info):
            fault = _scale_fault(info, tensors, block)
            if fault:
                faults.append((info.name, fault))
    yield from _grouped(faults, "problem", "Download the checkpoint again, or convert it again from the release.")


def routed_expert_dtypes(tensors: dict[str, TensorInfo]) -> set[str]:
    """How the routed experts are stored, MTP blocks included: fp4, fp8, bf16, or the header's tag of anything else."""
    found = set()
    for info in tensors.values():
        if is_routed_expert(info.name) and info.name.endswith(".weight"):
            fp4 = is_fp4(info, find_scale(info.name, tensors) if info.dtype == "U8" else None)
            found.add("fp4" if fp4 else {"F8_E4M3": "fp8", "BF16": "bf16"}.get(info.dtype, info.dtype))
    return found


def _expert_dtype(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Iterator[Finding]:
    stored, declared = routed_expert_dtypes(tensors), expert_dtype(config)
    if len(stored) > 1:
        yield Finding("note", f"routed experts are stored in several ways: {', '.join(sorted(stored))}")
    if not stored or not describes_v4(config):
        return
    if declared is None and stored == {"fp4"}:
        yield Finding("problem", "config.json has no expert_dtype and the experts are FP4: transformers assumes fp8",
                      'Add "expert_dtype": "fp4".')  # fmt: skip
    elif declared is None and stored == {"fp8"}:
        yield Finding("note", "config.json has no expert_dtype and the experts are FP8: vLLM assumes fp4",
                      'SGLang and transformers read it right; for vLLM add "expert_dtype": "fp8".')  # fmt: skip
    elif declared in ("fp4", "fp8") and declared not in stored:
        held = ", ".join(sorted(stored))
        yield Finding("problem", f"config.json says expert_dtype {declared}, the experts are {held}",
                      "An engine that believes the config loads nonsense. Convert again.")  # fmt: skip


def _quantization(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Iterator[Finding]:
    quantized = any(info.dtype == "F8_E4M3" for info in tensors.values())
    declared = quantization(config)
    if quantized and config_string(declared, "quant_method") != "fp8":
        yield Finding("problem", "there are FP8 weights, but quantization_config does not say quant_method fp8",
                      "Copy quantization_config from the release.")  # fmt: skip
    elif declared and not quantized and not any(packs_fp4(info) for info in tensors.values()):
        yield Finding("problem", "config.json has a quantization_config, but no tensor is quantized",
                      "Remove the key, or engines will look for scales.")  # fmt: skip
    if quantized and weight_block(config) is None:
        yield Finding("problem", "quantization_config.weight_block_size is missing or not two counts")


def structure_findings(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Iterator[Finding]:
    """Names and shapes of the tensors against the dimensions of the config."""
    if not describes_v4(config):
        shown = printable(str(config.get("model_type"))[:40])
        yield Finding("note", f"model_type {shown}: names and shapes are not checked against the config")
        return
    dimensions, ratios = Dimensions.read(config), compress_ratios(config)
    if isinstance(dimensions, list):
        yield Finding("problem", f"config.json lacks {', '.join(dimensions)}", "Copy config.json from the release.")
        return
    if ratios is None or len(ratios) < dimensions.num_hidden_layers:
        found = "no list of counts" if ratios is None else f"{len(ratios)} entries"
        needed = f"one for each of {dimensions.num_hidden_layers} layers needed"
        yield Finding("problem", f"compress_ratios: {found}; {needed}")
        return
    mtp = count_draft_stages(tensors)
    blocks = dimensions.num_hidden_layers + mtp
    if blocks * max(dimensions.n_routed_experts, 1) > MAX_EXPERTS:
        yield Finding("problem", f"{blocks} layers of {dimensions.n_routed_experts} experts are not believable")
        return
    yield from _names_and_shapes(expected_tensors(dimensions, ratios, mtp), tensors)


def _optional(name: str) -> bool:
    """Tensors that only some editions have: draft stages, vision, and the router biases of the vision edition."""
    return family(name) in ("mtp blocks", "vision") or name.endswith((".ffn.gate.bias", ".ffn.gate.bias_vl"))


def _names_and_shapes(expected: dict[str, tuple[int, ...]], tensors: dict[str, TensorInfo]) -> Iterator[Finding]:
    absent = ((name, "missing") for name in expected if name not in tensors)
    yield from _grouped(absent, "problem", "Download the checkpoint again; nothing can stand in for a tensor.")
    shapes = (
        (name, f"shape {list(logical_shape(tensors[name], tensors))}, the config asks for {list(shape)}")
        for name, shape in expected.items()
        if name in tensors and logical_shape(tensors[name], tensors) != shape
    )
    yield from _grouped(shapes, "problem", "config.json and the shards come from different checkpoints.")
    strangers = (name for name in tensors if name not in expected and not is_scale(name) and not _optional(name))
    unknown = "not a tensor of the architecture that the config describes"
    yield from _grouped(((name, unknown) for name in strangers), "note")


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    absent = [name for name in SIDE_FILES if name not in checkpoint.files]
    if absent:
        hint = "Copy them from the release: engines need them for text."
        yield Finding("note", f"missing: {', '.join(absent)}", hint)
    if INDEX_NAME in checkpoint.files:
        index = read_json(checkpoint.storage, INDEX_NAME, checkpoint.files[INDEX_NAME], MAX_INDEX_BYTES)
        metadata = index.get("metadata")
        declared = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = layout_bytes(checkpoint.tensors)
        if declared != actual:
            shown = printable(str(declared)[:40])
            yield Finding("note", f"the index says total_size {shown}, the tensors have {actual} bytes")


def check_checkpoint(checkpoint: Checkpoint) -> list[Finding]:
    """Every finding about an opened checkpoint, problems first."""
    config, tensors = checkpoint.config, checkpoint.tensors
    foreign = foreign_quantization(config, tensors)
    if foreign is not None:  # names, dtypes, shapes and scales are those of another tool
        return [Finding("problem", f"the checkpoint is {foreign}", HINT), *_files(checkpoint)]
    found = [
        *_quantization(config, tensors),
        *_expert_dtype(config, tensors),
        *structure_findings(config, tensors),
        *scale_findings(tensors, weight_block(config) or (128, 128)),
        *_files(checkpoint),
    ]
    return sorted(found, key=lambda finding: finding.level != "problem")
