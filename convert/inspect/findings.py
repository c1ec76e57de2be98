"""Faults of a checkpoint that opens: compares its config, its headers and its side files with each other.

`Checkpoint.open` already refuses a folder whose files do not fit together. This module finds checkpoints that load
but compute nonsense: a config that says fp8 over packed FP4, a scale of the wrong shape, an expert that is missing.
Thousands of tensors can share one fault, so findings are grouped by the name with its numbers left out.

Two levels: a problem makes an engine fail or compute wrongly, a note does not.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.convert.checkpoint.config import config_string, expert_dtype, quantization, weight_block
from dsv4.convert.checkpoint.editions.spellings import contradictions, respelled
from dsv4.convert.checkpoint.editions.table import Edition, check_signs, describes_v4, edition_of
from dsv4.convert.checkpoint.editions.v4 import COPY_CONFIG
from dsv4.convert.checkpoint.foreign import HINT, foreign_quantization
from dsv4.convert.checkpoint.forms.rank_files import RANK_FILES
from dsv4.convert.checkpoint.names import count_draft_stages, is_scale, pattern_of, weight_of_scale
from dsv4.convert.checkpoint.other_files import misnamed
from dsv4.convert.checkpoint.reader import Checkpoint, layout_bytes
from dsv4.convert.checkpoint.weights import DAMAGED, ExpertFormats, Format, Weight
from dsv4.convert.plan.engines import ENGINES
from dsv4.errors import InputError

Level = Literal["problem", "note"]

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Finding:
    """One fault or note, and what to do about it (may be empty)."""

    level: Level
    text: str
    hint: str = ""


def _grouped(faults: Iterable[tuple[str, str]], level: Level, hint: str = "") -> Iterator[Finding]:
    """One finding for all (tensor, fault) with the same name pattern and text."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, wrong in faults:
        groups.setdefault((pattern_of(name), wrong), []).append(name)
    for (_, wrong), names in groups.items():
        others = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        yield Finding(level, f"{names[0]}{others}: {wrong}", hint)


def scale_findings(weights: Mapping[str, Weight]) -> Iterator[Finding]:
    """Weights without a fitting block scale, and scales without a weight."""
    faults = [(w.fault.tensor, w.fault.text) for w in weights.values() if w.fault is not None]
    orphans = [
        (name, "a block scale without its weight")
        for name in weights
        if is_scale(name) and weight_of_scale(name) not in weights
    ]
    yield from _grouped([*faults, *orphans], "problem", DAMAGED)


def _mixture(formats: ExpertFormats) -> Iterator[Finding]:
    """Experts of mixed formats. Draft stages in another format than the main stack are usual and no fault."""
    held = ", ".join(sorted(formats.every))
    if formats.drafts_differ:
        (main,), (drafts,) = formats.main, formats.drafts
        yield Finding("note", f"the experts of the draft stages are stored as {drafts}, those of the layers as {main}")
    elif len(formats.every) > 1:
        yield Finding("problem", f"routed experts are stored in several ways: {held}",
                      "Engines look at one expert or at the config, and take all alike.")  # fmt: skip


def _expert_dtype(config: dict[str, Any], formats: ExpertFormats, in_ranks: bool) -> Iterator[Finding]:
    """What the config says about experts. in_ranks: in rank files, which only the reference engine reads."""
    declared = expert_dtype(config)
    stored = formats.main or formats.drafts
    yield from _mixture(formats)
    if not stored or not describes_v4(config):
        return
    if declared is None and stored == {"fp4"}:
        reader = "the reference engine" if in_ranks else "transformers"
        yield Finding("problem", f"config.json has no expert_dtype and the experts are FP4: {reader} assumes fp8",
                      'Add "expert_dtype": "fp4".')  # fmt: skip
    elif declared is None and stored == {"fp8"} and not in_ranks:
        yield Finding("note", "config.json has no expert_dtype and the experts are FP8: vLLM assumes fp4",
                      'SGLang and transformers read it right; for vLLM add "expert_dtype": "fp8".')  # fmt: skip
    elif declared in ("fp4", "fp8") and declared not in stored:
        held = ", ".join(sorted(stored))
        yield Finding("problem", f"config.json says expert_dtype {declared}, the experts are {held}",
                      "An engine that believes the config loads nonsense. Convert again.")  # fmt: skip


def _quantization(config: dict[str, Any], weights: Mapping[str, Weight]) -> Iterator[Finding]:
    formats = {weight.format for weight in weights.values()}
    quantized = Format.FP8 in formats
    declared = quantization(config)
    if quantized and config_string(declared, "quant_method") != "fp8":
        yield Finding("problem", "there are FP8 weights, but quantization_config does not say quant_method fp8",
                      "Copy quantization_config from the release.")  # fmt: skip
    elif declared and not quantized and Format.FP4 not in formats:
        yield Finding("problem", "config.json has a quantization_config, but no tensor is quantized",
                      "Remove the key, or engines will look for scales.")  # fmt: skip
    if quantized and weight_block(config) is None:
        yield Finding("problem", "quantization_config.weight_block_size is missing or not two counts")


def structure_findings(config: dict[str, Any], weights: Mapping[str, Weight]) -> Iterator[Finding]:
    """Names and shapes of the tensors against what the edition that the config describes must have."""
    edition = edition_of(config)
    if edition.tensors is None:
        model_type = str(config.get("model_type"))[:40]
        yield Finding("note", f"model_type {model_type}: names and shapes are not checked against the config")
        return
    try:
        check_signs(config, weights)
    except InputError as error:
        yield Finding("problem", error.message, error.hint)
        return
    missing = edition.missing_keys(config)
    if missing:
        yield Finding("problem", f"config.json lacks {', '.join(missing)}", COPY_CONFIG)
    for fault in contradictions(config):
        yield Finding("problem", f"config.json: {fault}", COPY_CONFIG)
    try:
        expected = edition.tensors(config, count_draft_stages(weights))
    except InputError as error:
        if not missing:
            yield Finding("problem", error.message, error.hint)
        return
    yield from _names_and_shapes(expected, weights, edition)


def _names_and_shapes(
    expected: dict[str, tuple[int, ...]], weights: Mapping[str, Weight], edition: Edition
) -> Iterator[Finding]:
    absent = ((name, "missing") for name in expected if name not in weights)
    yield from _grouped(absent, "problem", "Download the checkpoint again; nothing can stand in for a tensor.")
    shapes = (
        (name, f"shape {list(weights[name].logical_shape)}, the config asks for {list(shape)}")
        for name, shape in expected.items()
        if name in weights and weights[name].logical_shape != shape
    )
    yield from _grouped(shapes, "problem", "config.json and the shards come from different checkpoints.")
    strangers = (n for n in weights if n not in expected and not is_scale(n) and not edition.optional.fullmatch(n))
    unknown = "not a tensor of the architecture that the config describes"
    yield from _grouped(((name, unknown) for name in strangers), "note")


def _spelling(config_json: dict[str, Any]) -> Iterator[Finding]:
    found = ", ".join(f"{key} for {release}" for key, release in respelled(config_json))
    if found:
        hint = "dsv4 reads both. An engine that knows the release's keys only drops these without a word."
        yield Finding("note", f"config.json is in the words of another tool: {found}", hint)


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    for note in checkpoint.notes:
        yield Finding("note", note)
    for name, kind in misnamed(checkpoint.storage, checkpoint.files).items():
        yield Finding("problem", f"{name}: {kind.words}", kind.hint)
    needed = ENGINES["reference"].needs if checkpoint.form is RANK_FILES else SIDE_FILES
    absent = [name for name in needed if name not in checkpoint.files]
    if absent:
        hint = "Copy them from the release: engines need them for text."
        yield Finding("note", f"missing: {', '.join(absent)}", hint)
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata")
        declared = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = layout_bytes(checkpoint.tensors)
        decoded = any(info.encoding for info in checkpoint.tensors.values())  # has other bytes in the files
        if declared != actual and not decoded:
            yield Finding("note", f"the index says total_size {str(declared)[:40]}, the tensors have {actual} bytes")


def check_checkpoint(checkpoint: Checkpoint, weights: Mapping[str, Weight], experts: ExpertFormats) -> list[Finding]:
    """Every finding about an opened checkpoint, problems first. experts: the formats of the experts in `weights`."""
    config = checkpoint.config
    foreign = foreign_quantization(config, checkpoint.tensors)
    if foreign is not None:  # another tool's names, dtypes, shapes and scales are not checked
        return [Finding("problem", f"the checkpoint is {foreign}", HINT), *_files(checkpoint)]
    found = [
        *_spelling(checkpoint.config_json),
        *_quantization(config, weights),
        *_expert_dtype(config, experts, checkpoint.form is RANK_FILES),
        *structure_findings(config, weights),
        *scale_findings(weights),
        *_files(checkpoint),
    ]
    return sorted(found, key=lambda finding: finding.level != "problem")
