"""`--to gguf`: assigns the tensors to files.

The model is one file, or splits of at most `--max-shard-size`. Drafts have a file of their own, as llama.cpp loads it:
an MTP block with copies of embedding and head, or the stages of DSpark. Vision tensors are left out, with a note. A
tensor that the table of names does not have is an error.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4.convert.checkpoint.editions.table import check_config, describes_v4
from dsv4.convert.checkpoint.forms.gguf.container import TEXT, U32, Entry
from dsv4.convert.checkpoint.forms.gguf.keys import (
    ARCHITECTURE,
    FILE_TYPE,
    RELEASED_DTYPES,
    STAGES_ARCHITECTURE,
    entries_of,
    stage_entries,
)
from dsv4.convert.checkpoint.forms.gguf.names import (
    COPIES,
    DRAFT_PROJECTION,
    EXPERTS,
    IMAGE_BIAS,
    PROJECTIONS,
    FileNames,
    draft_block_names,
    draft_stage_names,
    model_names,
)
from dsv4.convert.checkpoint.names import block_of, draft_stages, expert_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes.recipe import Joining, OutputTensor
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard, fill_shards
from dsv4.errors import InputError

from .container import NAME, Gguf
from .tensors import STACKED, projections, stack, tensor_of
from .tokenizer import tokenizer_entries

LEFT_OUT = re.compile(r"(vision|aligner)\..*|image_.*")
DRAFT_STEM, STAGES_STEM = f"mtp-{NAME}", f"dspark-{NAME}"  # llama.cpp finds such files beside the model's
DSPARK_KEY = "dspark_block_size"
Group = list[OutputTensor]


class _Tensors:
    """The tensors of one file; a stack stands in the place of its first matrix."""

    def __init__(self, weights: Sequence[Weight], names: FileNames, settings: Settings, config: dict[str, Any]) -> None:
        self._names, self._settings, self._config = names, settings, config
        self._weights = {weight.name: weight for weight in weights}
        self._done: set[str] = set()

    def _stack(self, prefix: str, matrix: str) -> OutputTensor:
        names = [f"{prefix}ffn.experts.{e}.{matrix}.weight" for e in range(self._config["n_routed_experts"])]
        missing = [name for name in names if name not in self._weights]
        if missing:
            raise InputError(f"'{missing[0]}' is missing: a stack needs all {len(names)} experts")
        self._done.update(names)
        return stack(self._names.in_block(prefix, EXPERTS[matrix]), [self._weights[name] for name in names])

    def _pair(self, prefix: str) -> OutputTensor:
        self._done.update(prefix + inner for inner in PROJECTIONS)
        name = self._names.in_block(prefix, DRAFT_PROJECTION)
        return projections(name, [self._weights[prefix + inner] for inner in PROJECTIONS])

    def _of(self, weight: Weight) -> list[OutputTensor]:
        block, expert = block_of(weight.name), expert_of(weight.name)
        prefix, inner = (f"{block.stack}.{block.number}.", block.inner) if block else ("", weight.name)
        matrix = expert.inner.removesuffix(".weight") if expert else ""
        if prefix in self._names.blocks and matrix in EXPERTS:
            return [self._stack(prefix, matrix)]
        if DRAFT_PROJECTION in self._names.inner and inner in PROJECTIONS:
            return [self._pair(prefix)]
        if not (names := self._names.of(prefix, inner)):
            raise InputError(f"'{weight.name}' has no place in llama.cpp's architecture {ARCHITECTURE}")
        return [tensor_of(name, weight, self._settings, self._config) for name in names]

    def groups(self) -> Iterator[Group]:
        """One group for each tensor of the file."""
        for weight in self._weights.values():
            if weight.name not in self._done:
                yield from ([tensor] for tensor in self._of(weight))


def _released_dtypes(weights: Iterable[Weight]) -> Entry:
    """What the release has in another dtype than the file, so that it can be read back in the release's."""
    found = {}
    for weight in weights:
        vector = weight.info.dtype == "BF16" and len(weight.info.shape) < 2
        if weight.format is Format.FP8 or weight.info.dtype == "I64" or vector:
            found[weight.name] = weight.info.dtype
    return Entry(RELEASED_DTYPES, TEXT, json.dumps(found, separators=(",", ":")))


@dataclass(frozen=True)
class _Drafts:
    """The draft stages of a checkpoint, and the file that they go to. copies: weights of the model that it repeats."""

    weights: list[Weight]
    names: FileNames
    keys: list[Entry]
    stem: str
    architecture: str = ARCHITECTURE
    copies: tuple[str, ...] = ()


def _drafts(weights: list[Weight], config: dict[str, Any]) -> _Drafts | None:
    """None where llama.cpp has no file for the stages. Raises InputError for stages with gaps."""
    stages, present = sorted(draft_stages(w.name for w in weights)), {w.name for w in weights}
    if DSPARK_KEY in config and "mtp.0.main_proj.weight" in present:
        if stages != list(range(len(stages))):
            raise InputError(
                f"draft stages {', '.join(map(str, stages))}: one is missing", "Finish the download first."
            )
        kept = [w for w in weights if not w.name.endswith(IMAGE_BIAS)]
        names, keys = draft_stage_names(len(stages)), stage_entries(config, len(stages))
        return _Drafts(kept, names, keys, STAGES_STEM, STAGES_ARCHITECTURE)
    if stages == [0] and "mtp.0.e_proj.weight" in present:
        names = draft_block_names(config["num_hidden_layers"])
        return _Drafts(weights, names, entries_of(config, 1), DRAFT_STEM, copies=COPIES)
    return None


def _shards(groups: list[Group], container: Gguf, settings: Settings) -> list[OutputShard]:
    filled = list(fill_shards(groups, settings))
    total = sum(len(group) for group in filled)
    shards = []
    for number, group in enumerate(filled, 1):
        one = replace(container, number=number, count=len(filled), tensors=total)
        shards.append(OutputShard.of(one.file_name(number, len(filled)), group, one))
    return shards


def _split_off(weights: list[Weight], config: dict[str, Any]) -> tuple[list[Weight], list[str]]:
    """What the files of the model hold, and a note for each kind of tensor that they do not."""
    hashed = {f"layers.{layer}.ffn.gate.bias" for layer in range(config["num_hash_layers"])}
    main = [w for w in weights if not w.is_draft]
    vision = [w for w in main if LEFT_OUT.fullmatch(w.name)]
    dropped = [w for w in main if w.name in hashed]
    gone = {w.name for w in (*vision, *dropped)}
    notes = []
    if vision:
        notes.append(f"{len(vision)} tensors of the vision part are left out: llama.cpp has them in another file")
    if dropped:
        notes.append(f"{len(dropped)} router biases of hash layers are left out: nothing reads them")
    return [w for w in main if w.name not in gone], notes


class ToGguf(Joining):
    """GGUF for llama.cpp. A weight alone becomes the tensor that it would be without its stack."""

    alone = STACKED

    def shards(
        self, weights: list[Weight], settings: Settings, checkpoint: Checkpoint
    ) -> tuple[list[OutputShard], list[str]]:
        """The files of the model and of its drafts, and what is left out."""
        config = checkpoint.released
        if not describes_v4(config):
            raise InputError(
                f"config.json: model_type is {config.get('model_type')}; llama.cpp's {ARCHITECTURE} is DeepSeek-V4",
                "Other forms take it: --to mxfp4, mxfp8, mlx or nvfp4.",
            )
        check_config(config)
        main, left_out = _split_off(weights, config)
        tokens, notes = tokenizer_entries(checkpoint)
        general = [Entry("general.name", TEXT, NAME), Entry("general.file_type", U32, FILE_TYPE),
                   Entry("general.quantization_version", U32, 2)]  # fmt: skip

        def files(some: list[Weight], names: FileNames, container: Gguf, limits: Settings) -> list[OutputShard]:
            keys = (*general, *container.keys, *tokens, _released_dtypes(some))
            groups = list(_Tensors(some, names, settings, config).groups())
            return _shards(groups, replace(container, keys=keys), limits)

        layers = config["num_hidden_layers"]
        found = files(main, model_names(layers), Gguf(keys=tuple(entries_of(config, 0))), settings)
        stages = [w for w in weights if w.is_draft]
        drafts = _drafts(stages, config)
        if drafts is None and stages:
            left_out.append(
                f"{len(stages)} tensors of draft stages are left out: this form has one MTP block, or DSpark"
            )
        elif drafts is not None:
            if biases := len(stages) - len(drafts.weights):
                left_out.append(f"{biases} router biases for images of draft stages are left out: llama.cpp reads none")
            copies = [w for w in main if w.name in drafts.copies]
            container = Gguf(drafts.architecture, tuple(drafts.keys), stem=drafts.stem)
            found += files(
                [*copies, *drafts.weights], drafts.names, container, replace(settings, max_shard_bytes=2**63)
            )
        return found, [*notes, *left_out]


RECIPE = ToGguf()
