"""What will be written, as data: output shards, their tensors in file order, exact sizes. Nothing is read or written.

`make_plan` turns the headers of a checkpoint and the Settings into a Plan in seconds, however large the model. What
`--dry-run` prints, what disk space is asked for and what the workers do all come from it, so they cannot disagree.

Within a shard tensors lie as the safetensors library orders them, by dtype and then by name. Across shards they keep
the order of the source, so that a source that arrives shard by shard is consumed in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dsv4.convert.checkpoint.foreign import refuse_foreign
from dsv4.convert.checkpoint.header import build_header
from dsv4.convert.checkpoint.names import rank_file_name
from dsv4.convert.checkpoint.rank_layout import (
    check_blocks,
    count_experts,
    mp_name,
    mp_slice,
    rank_of_expert,
    skipped,
)
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes import bf16, copy, scales
from dsv4.convert.plan.recipes.recipe import OutputTensor
from dsv4.convert.plan.recipes.registry import recipe_of
from dsv4.errors import InputError, printable
from dsv4.text import natural_order

from .classify import classify
from .engines import Layout
from .settings import DEFAULT_MAX_SHARD_BYTES, Settings

# The order of the safetensors library: alignment first, so that every tensor starts at a multiple of its element size.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip

# Unless larger shards than usual are asked for, one draws on at most two source shards: a source that arrives shard by
# shard then needs room for two, whatever their sizes.
MAX_SOURCE_SHARDS = 2


@dataclass(frozen=True)
class OutputShard:
    """One output file: its tensors in data order."""

    file: str
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the data."""
        return build_header({t.name: (t.dtype, t.shape) for t in self.tensors})

    @property
    def data_bytes(self) -> int:
        """Bytes of data."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @property
    def source_shards(self) -> tuple[str, ...]:
        """The source shards that must be there to make this one, sorted."""
        return tuple(sorted({info.shard for t in self.tensors for info in t.reads}))


@dataclass(frozen=True)
class Plan:
    """All of a conversion."""

    settings: Settings
    shards: tuple[OutputShard, ...]
    source_bytes: int
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(shard.size for shard in self.shards)


def output_order(tensor: OutputTensor) -> tuple[int, str]:
    """Sort key of a tensor within its shard."""
    return DTYPE_ORDER.index(tensor.dtype), tensor.name


def outputs_of(weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
    """The tensors that one source weight (and its scale) becomes, before any slicing."""
    recipe = recipe_of(settings.to)
    if weight.format is Format.PLAIN:
        recipe = copy.RECIPE
    elif settings.wo_a == "bf16" and weight.is_wo_a:
        recipe = bf16.RECIPE
    elif not recipe.takes(weight):
        recipe = scales.RECIPE
    return recipe.outputs(weight, settings, config)


def _in_source_order(checkpoint: Checkpoint) -> list[Weight]:
    return sorted(classify(checkpoint), key=lambda w: (w.info.shard, natural_order(w.name)))


def _groups(weights: list[Weight], settings: Settings, config: dict[str, Any]) -> Iterator[list[OutputTensor]]:
    """Tensors of each shard of the Hugging Face layout, filled up to the limit; weight and scale stay together."""
    group: list[OutputTensor] = []
    filled, sources = 0, set[str]()
    merges = settings.max_shard_bytes > DEFAULT_MAX_SHARD_BYTES
    for weight in weights:
        outputs = outputs_of(weight, settings, config)
        size = sum(o.nbytes for o in outputs)
        needs = {info.shard for o in outputs for info in o.reads}
        crowded = not merges and len(sources | needs) > MAX_SOURCE_SHARDS
        if group and (filled + size > settings.max_shard_bytes or crowded):
            yield group
            group, filled, sources = [], 0, set()
        group += outputs
        filled += size
        sources |= needs
    if group:
        yield group


def _hf_shards(weights: list[Weight], settings: Settings, config: dict[str, Any]) -> list[OutputShard]:
    groups = list(_groups(weights, settings, config))
    return [
        OutputShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(sorted(group, key=output_order)))
        for i, group in enumerate(groups, 1)
    ]


def _mp_tensor(output: OutputTensor, rank: int, ranks: int) -> OutputTensor:
    """One rank's part of a tensor, under the reference engine's name and dtype tag."""
    part = mp_slice(output.name, output.shape, rank, ranks)
    packed = output.format is Format.FP4
    dtype = "F4" if packed else output.dtype
    shape = output.weight.logical_shape if packed else output.shape
    if part is not None:
        if output.weight.block is not None:
            check_blocks(output.weight.name, output.weight.logical_shape, part, output.weight.block)
        shape = part.apply_to(shape)
    return replace(output, name=mp_name(output.name), dtype=dtype, shape=shape, part=part)


def kept_instead_of(output: OutputTensor, layout: Layout) -> list[OutputTensor]:
    """What a weight without an exact form becomes under `--on-inexact keep`: the source tensors unchanged, under the
    layout's name and dtype tag, and cut to the slice of the same rank."""
    kept = copy.kept(output.weight)
    if layout == "hf":
        return kept
    rank, ranks = (output.part.index, output.part.count) if output.part else (0, 1)
    return [_mp_tensor(tensor, rank, ranks) for tensor in kept]


def _check_names(outputs: list[OutputTensor]) -> None:
    """Raises InputError if two tensors would get one name, such as `model.norm.weight` and `norm.weight`."""
    seen: dict[str, str] = {}
    for output in outputs:
        twin = seen.setdefault(mp_name(output.name), output.name)
        if twin != output.name:
            raise InputError(
                f"'{printable(twin)}' and '{printable(output.name)}' are one name in the reference engine's layout",
                "Remove one of them, or use --layout hf.",
            )


def _mp_shards(weights: list[Weight], settings: Settings, config: dict[str, Any]) -> list[OutputShard]:
    ranks = settings.model_parallel
    outputs = [o for w in weights for o in outputs_of(w, settings, config) if not skipped(o.name)]
    _check_names(outputs)
    experts = count_experts([o.name for o in outputs])
    by_rank: list[list[OutputTensor]] = [[] for _ in range(ranks)]
    for output in outputs:
        owner = rank_of_expert(output.name, experts, ranks)
        for rank in range(ranks) if owner is None else (owner,):
            by_rank[rank].append(_mp_tensor(output, rank, ranks))
    return [
        OutputShard(rank_file_name(rank, ranks), tuple(sorted(tensors, key=output_order)))
        for rank, tensors in enumerate(by_rank)
    ]


def _check_experts(weights: list[Weight], settings: Settings) -> None:
    """Raises InputError if experts are neither FP4 nor FP8: they would stay, and the config would say otherwise."""
    if recipe_of(settings.to).cast_format is None:
        return
    for weight in weights:
        if weight.is_routed_expert and weight.format is Format.PLAIN:
            raise InputError(
                f"'{printable(weight.name)}' is {weight.info.dtype}, neither FP4 nor FP8: "
                f"--to {settings.to} would be a new quantization",
                "--to same keeps it as it is.",
            )


def _notes(weights: list[Weight], settings: Settings) -> list[str]:
    """What a user should know about this source and these settings together."""
    notes = []
    wanted = recipe_of(settings.to).cast_format
    if wanted is not None and wanted not in {w.format for w in weights if w.is_routed_expert}:
        notes.append(f"no routed expert is {wanted.value.upper()}: only the layout changes")
    if settings.wo_a == "fp8" and any(w.is_wo_a and w.format is Format.PLAIN for w in weights):
        notes.append("wo_a is BF16 in the source and stays so: FP8 would be a new quantization")
    return notes


def make_plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Plan a conversion. Raises InputError when the checkpoint cannot be converted as asked."""
    if settings.to != "same" or settings.layout == "mp":
        refuse_foreign(checkpoint.config, checkpoint.tensors)
    weights = _in_source_order(checkpoint)
    _check_experts(weights, settings)
    layout = _hf_shards if settings.layout == "hf" else _mp_shards
    shards = layout(weights, settings, checkpoint.config)
    source_bytes = sum(shard.size for shard in checkpoint.shards.values())
    return Plan(settings, tuple(shards), source_bytes, (*checkpoint.notes, *_notes(weights, settings)))
