"""The plan of a conversion: output shards, their tensors in file order, exact sizes. No data is read or written.

`make_plan` makes a Plan from the headers of a checkpoint and the Settings, in seconds for any size of model. The output
of `--dry-run`, the required disk space and the work itself all come from the plan, so they agree.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dsv4.convert.checkpoint.editions.table import edition_of
from dsv4.convert.checkpoint.foreign import refuse_foreign
from dsv4.convert.checkpoint.forms.rank_files import RANK_FILES
from dsv4.convert.checkpoint.reader import CONFIG_NAME, Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes.recipe import piece_memory
from dsv4.convert.plan.recipes.registry import from_bf16_of, recipe_of
from dsv4.errors import InputError
from dsv4.machine import collection_paused
from dsv4.text import counted, natural_order

from .classify import classify
from .container import SAFETENSORS, Container
from .settings import CONVERSIONS, Settings
from .shards import Joins, OutputShard, hf_shards, rank_shards


@dataclass(frozen=True)
class Plan:
    """All of a conversion."""

    settings: Settings
    container: Container
    shards: tuple[OutputShard, ...] = field(repr=False)
    source_bytes: int
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(shard.size for shard in self.shards)

    @property
    def tensors(self) -> int:
        """Number of output tensors; one that is in the files of several ranks counts in each."""
        return sum(len(shard.tensors) for shard in self.shards)

    @cached_property
    def piece_memory(self) -> int:
        """Most bytes of memory that one piece takes, see `piece_memory`."""
        # Of each kind one: there are 150,000 tensors of 50 kinds.
        kinds = {
            (t.dtype, t.shape, t.row_unit, t.bytewise, t.rank_slice is None, t.source.dtype, t.source.shape): t
            for shard in self.shards
            for t in shard.tensors
        }
        return max(map(piece_memory, kinds.values()), default=1)

    @property
    def spared_bytes(self) -> int:
        """Most bytes of one shard that its scan can compute and keep."""
        return max((sum(t.nbytes for t in shard.tensors if t.made_by_scan_of) for shard in self.shards), default=0)

    @property
    def record_limit(self) -> int:
        """Most characters of recorded scales in the manifest."""
        return sum(shard.record_limit for shard in self.shards)

    @property
    def last_files(self) -> tuple[str, ...]:
        """The files that loaders look for, in the order in which they are written, after everything else."""
        index = self.container.index_name if self.settings.layout == "hf" else ""
        return (index, CONFIG_NAME) if index else (CONFIG_NAME,)


def _check_experts(weights: list[Weight], settings: Settings) -> None:
    """Raises InputError for experts that the conversion cannot cast: they would stay, against the new config.

    Experts of draft stages may have another format than the others and are copied.
    """
    if recipe_of(settings.to).cast_format is None:
        return
    bf16 = bool(CONVERSIONS[settings.to].bf16_experts)
    for weight in weights:
        if weight.format is Format.PLAIN and weight.is_routed_expert and not weight.is_draft:
            if weight.stored == "bf16" and bf16:
                continue
            raise InputError(
                f"'{weight.name}' is {weight.info.dtype}, neither FP4 nor FP8: "
                f"--to {settings.to} would be a new quantization",
                "Convert it --to fp4 first." if weight.stored == "bf16" else "--to same keeps it as it is.",
            )


def _notes(weights: list[Weight], settings: Settings, config: dict[str, Any]) -> list[str]:
    """Lines for the user about this source with these settings."""
    notes = []
    wanted = recipe_of(settings.to).cast_format
    plain = [w for w in weights if w.format is Format.PLAIN]
    returning = {w.name for w in plain if from_bf16_of(w, settings, config) is not None}
    if wanted is not None and not any(
        (w.format is wanted or w.name in returning) and w.is_routed_expert for w in weights
    ):
        notes.append(f"no routed expert is {wanted.value.upper()}: only the layout changes")
    drafts = sum(w.is_routed_expert and w.is_draft and w.name not in returning for w in plain)
    if wanted is not None and drafts:
        notes.append(f"{drafts} expert matrices of draft stages are neither FP4 nor FP8 and stay as they are")
    if returning:
        notes.append(f"{counted(len(returning), 'BF16 weight')} to be quantized as in the release, where that is exact")
    if CONVERSIONS[settings.to].way_back:
        rounded = sum(w.info.released_dtype == "F8_E4M3" and w.info.dtype == "F32" for w in weights)
        if rounded:
            notes.append(f"{rounded} weights that the release has in FP8 were rounded to Q8_0: they become float32")
    return notes


def _in_order(weights: list[Weight]) -> list[Weight]:
    """By shard of the source and then by name. A shard at a time: keys of all names at once take 50 MB for V4-Pro."""
    by_shard: dict[str, list[Weight]] = {}
    for weight in weights:
        by_shard.setdefault(weight.info.shard, []).append(weight)
    ordered = (sorted(by_shard[shard], key=lambda w: natural_order(w.name)) for shard in sorted(by_shard))
    return [weight for some in ordered for weight in some]


def _shards(weights: list[Weight], settings: Settings, checkpoint: Checkpoint) -> tuple[list[OutputShard], list[str]]:
    """The output shards, and what the recipe says of them."""
    recipe = recipe_of(settings.to)
    if isinstance(recipe, Joins):
        return recipe.shards(weights, settings, checkpoint)
    layout = hf_shards if settings.layout == "hf" else rank_shards
    return layout(weights, settings, checkpoint.released, SAFETENSORS), []


def _lacking(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What a folder for engines has beside its shards and rank files do not: the reference engine needs neither."""
    if checkpoint.form is not RANK_FILES or settings.layout == "mp":
        return []
    wanted = edition_of(checkpoint.released).encoder, "generation_config.json"
    lacking = [name for name in wanted if name not in checkpoint.files]
    return [f"not beside rank files: {', '.join(lacking)}; copy from the release"] if lacking else []


def make_plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    """Plan a conversion. Raises InputError when the checkpoint cannot be converted as asked."""
    if CONVERSIONS[settings.to].keeps_codes and checkpoint.form.name:
        raise InputError(
            f"the checkpoint is in the form of {checkpoint.form.name}: --to {settings.to} keeps the release's form",
            "--to fp4 leads back to that.",
        )
    if not CONVERSIONS[settings.to].keeps_codes or settings.layout == "mp":
        refuse_foreign(checkpoint.config, checkpoint.tensors)
    with collection_paused():
        weights = _in_order(classify(checkpoint))
        _check_experts(weights, settings)
        shards, told = _shards(weights, settings, checkpoint)
    source_bytes = sum(shard.size for shard in checkpoint.shards.values())
    notes = *checkpoint.notes, *_notes(weights, settings, checkpoint.released), *told, *_lacking(checkpoint, settings)
    return Plan(settings, shards[0].container if shards else SAFETENSORS, tuple(shards), source_bytes, notes)
