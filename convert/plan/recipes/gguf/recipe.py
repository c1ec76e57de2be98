"""`--to gguf`: assigns the tensors to files.

The model is one file, or splits of at most `--max-shard-size`; a draft block has a file of its own, with copies of
embedding and head, as llama.cpp loads it. Vision tensors, and draft stages of the DSpark editions, are left out,
with a note. A tensor that the table of names does not have is an error.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dsv4.convert.checkpoint.editions.table import check_config, describes_v4
from dsv4.convert.checkpoint.forms.gguf.container import TEXT, U32, Entry
from dsv4.convert.checkpoint.forms.gguf.keys import ARCHITECTURE, FILE_TYPE, RELEASED_DTYPES, entries_of
from dsv4.convert.checkpoint.forms.gguf.names import (
    DRAFT,
    DRAFT_HEAD,
    DRAFT_PROJECTION,
    EXPERTS,
    LAYER,
    PROJECTIONS,
    ROOT,
    block_name,
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
DRAFT_STEM = f"mtp-{NAME}"
COPIES = ("embed.weight", "head.weight")  # of the main model, in the file of the draft block
Group = list[OutputTensor]


class _Blocks:
    """The groups of tensors that the weights of one file become; a stack is one group, in the place of its first."""

    def __init__(self, weights: Sequence[Weight], settings: Settings, config: dict[str, Any]) -> None:
        self._settings, self._config = settings, config
        self._weights = {weight.name: weight for weight in weights}
        self._done: set[str] = set()

    def _stack(self, prefix: str, block: int, matrix: str) -> OutputTensor:
        names = [f"{prefix}ffn.experts.{e}.{matrix}.weight" for e in range(self._config["n_routed_experts"])]
        missing = [name for name in names if name not in self._weights]
        if missing:
            raise InputError(f"'{missing[0]}' is missing: a stack needs all {len(names)} experts")
        self._done.update(names)
        return stack(block_name(block, EXPERTS[matrix]), [self._weights[name] for name in names])

    def _of_block(self, weight: Weight, prefix: str, block: int, inner: str, names: dict[str, str]) -> OutputTensor:
        expert = expert_of(weight.name)
        matrix = expert.inner.removesuffix(".weight") if expert else ""
        if matrix in EXPERTS:
            return self._stack(prefix, block, matrix)
        if inner in PROJECTIONS:
            self._done.update(prefix + name for name in PROJECTIONS)
            return projections(block_name(block, DRAFT_PROJECTION), [self._weights[prefix + n] for n in PROJECTIONS])
        if inner not in names:
            raise InputError(f"'{weight.name}' has no place in llama.cpp's architecture {ARCHITECTURE}")
        return tensor_of(block_name(block, names[inner]), weight, self._settings, self._config)

    def groups(self, layers: int) -> Iterator[Group]:
        """One group for each tensor of the file."""
        for weight in self._weights.values():
            block = block_of(weight.name)
            if weight.name in self._done:
                continue
            if block is None:
                if weight.name not in ROOT:
                    raise InputError(f"'{weight.name}' has no place in llama.cpp's architecture {ARCHITECTURE}")
                yield [tensor_of(ROOT[weight.name], weight, self._settings, self._config)]
                continue
            prefix = f"{block.stack}.{block.number}."
            number = block.number + (layers if block.stack == "mtp" else 0)
            names = LAYER | DRAFT if block.stack == "mtp" else LAYER
            if block.stack == "mtp" and block.inner in DRAFT_HEAD:
                yield [tensor_of(ROOT[block.inner], weight, self._settings, self._config)]
                continue
            yield [self._of_block(weight, prefix, number, block.inner, names)]
            if block.stack == "mtp" and block.inner == "norm.weight":
                yield [tensor_of(ROOT["norm.weight"], weight, self._settings, self._config)]


def _released_dtypes(weights: Iterable[Weight]) -> Entry:
    """What the release has in another dtype than the file, so that it can be read back in the release's."""
    found = {}
    for weight in weights:
        vector = weight.info.dtype == "BF16" and len(weight.info.shape) < 2
        if weight.format is Format.FP8 or weight.info.dtype == "I64" or vector:
            found[weight.name] = weight.info.dtype
    return Entry(RELEASED_DTYPES, TEXT, json.dumps(found, separators=(",", ":")))


def _shards(groups: list[Group], keys: list[Entry], stem: str, settings: Settings) -> list[OutputShard]:
    filled = list(fill_shards(groups, settings))
    total = sum(len(group) for group in filled)
    shards = []
    for number, group in enumerate(filled, 1):
        container = Gguf(tuple(keys), number, len(filled), total, stem)
        shards.append(OutputShard.of(container.file_name(number, len(filled)), group, container))
    return shards


class ToGguf(Joining):
    """GGUF for llama.cpp. A weight alone becomes the tensor that it would be without its stack."""

    alone = STACKED

    def shards(
        self, weights: list[Weight], settings: Settings, checkpoint: Checkpoint
    ) -> tuple[list[OutputShard], list[str]]:
        """The files of the model and of its draft block, and what is left out."""
        config = checkpoint.released
        if not describes_v4(config):
            raise InputError(
                f"config.json: model_type is {config.get('model_type')}; llama.cpp's {ARCHITECTURE} is DeepSeek-V4",
                "Other forms take it: --to mxfp4, mxfp8, mlx or nvfp4.",
            )
        check_config(config)
        main = [w for w in weights if not w.is_draft and not LEFT_OUT.fullmatch(w.name)]
        drafts = [w for w in weights if w.is_draft]
        hashed = {f"layers.{layer}.ffn.gate.bias" for layer in range(config["num_hash_layers"])}
        dropped = [w for w in main if w.name in hashed]
        main = [w for w in main if w.name not in hashed]
        tokens, notes = tokenizer_entries(checkpoint)
        if vision := [w for w in weights if LEFT_OUT.fullmatch(w.name)]:
            notes.append(f"{len(vision)} tensors of the vision part are left out: llama.cpp has them in another file")
        if dropped:
            notes.append(f"{len(dropped)} router biases of hash layers are left out: nothing reads them")
        general = [Entry("general.name", TEXT, NAME), Entry("general.file_type", U32, FILE_TYPE),
                   Entry("general.quantization_version", U32, 2)]  # fmt: skip

        def files(some: list[Weight], stem: str, stages: int, limits: Settings) -> list[OutputShard]:
            groups = list(_Blocks(some, settings, config).groups(config["num_hidden_layers"]))
            keys = [*general, *entries_of(config, stages), *tokens, _released_dtypes(some)]
            return _shards(groups, keys, stem, limits)

        found = files(main, NAME, 0, settings)
        if len(draft_stages(w.name for w in drafts)) == 1 and "mtp.0.e_proj.weight" in {w.name for w in drafts}:
            copies = [w for w in main if w.name in COPIES]
            one_file = replace(settings, max_shard_bytes=2**63)
            return [*found, *files([*copies, *drafts], DRAFT_STEM, 1, one_file)], notes
        if drafts:
            notes.append(
                f"{len(drafts)} tensors of draft stages are left out: this form has one draft block of V4 only"
            )
        return found, notes


RECIPE = ToGguf()
