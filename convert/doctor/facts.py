"""The facts about a folder that the rules compare with an engine's row: layout, formats, scales, config, side files.

The names of the files tell two layouts apart: a Hugging Face folder, and the reference engine's
`model{i}-mp{N}.safetensors`, one file per rank and a config.json with that engine's own keys.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.config import weight_block
from dsv4.convert.checkpoint.editions.table import ENGRAM_TABLE
from dsv4.convert.checkpoint.editions.view import release_view
from dsv4.convert.checkpoint.foreign import ForeignQuantization, foreign_quantization
from dsv4.convert.checkpoint.forms.gguf.files import is_gguf
from dsv4.convert.checkpoint.names import (
    expert_of,
    is_released_in_fp8,
    is_routed_expert,
    rank_file,
)
from dsv4.convert.checkpoint.other_files import misnamed, refuse_other_weights
from dsv4.convert.checkpoint.rank_files import check_engine_config, from_ranks, rank_file_names
from dsv4.convert.checkpoint.reader import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    Checkpoint,
    TensorInfo,
    read_files,
    read_json,
)
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.checkpoint.weights import Format, Weight, expert_formats, find_weights
from dsv4.convert.inspect.findings import Finding, scale_findings, structure_findings
from dsv4.convert.plan.engines import FolderLayout, Stored
from dsv4.errors import InputError
from dsv4.files import Kind
from dsv4.progress import Reached, ignore


@dataclass
class Facts:
    """One folder as the rules use it.

    checkpoint: the opened folder, for planning a conversion; None if it has faults. files: names of all files.
    experts, wo_a, tables: formats (fp4, fp8, bf16, or another dtype) of the routed experts, of attn.wo_a and of n-gram
    tables. draft_experts: the format of the draft stages' experts if it differs from that of all others, else ""; if it
    differs, the other fields leave them out. expert_scales: dtypes of the experts' block scales.
    quantized: whether any weight is FP4 or FP8. unquantized: weights that are neither and that releases have in
    FP8, but for wo_a and n-gram tables.
    partial_blocks: FP8 weights whose sides are no multiples of the block. mtp: whether there are draft blocks.
    ranks: number of rank files. problems: faults in names, shapes and scales.
    notes: lines about ignored files and tensors. misnamed: files that are something else, such
    as git-LFS pointers.
    foreign: the quantization of another tool, if it has one; names, shapes and scales are not checked then.
    form: the form of another tool that it is stored in and dsv4 reads, "" for the release's.
    unreadable: why the folder cannot be read, and all the rest is empty; None if it can.
    """

    folder: str
    layout: FolderLayout
    checkpoint: Checkpoint | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    experts: set[str] = field(default_factory=set)
    draft_experts: str = ""
    expert_scales: set[str] = field(default_factory=set)
    wo_a: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    quantized: bool = False
    unquantized: list[str] = field(default_factory=list)
    partial_blocks: list[str] = field(default_factory=list)
    mtp: bool = False
    ranks: int = 0
    problems: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    misnamed: dict[str, Kind] = field(default_factory=dict)
    foreign: ForeignQuantization | None = None
    form: str = ""
    unreadable: InputError | None = None

    def dimension(self, key: str) -> int | None:
        """A positive count of the config, by its name in the release; None if it is absent or something else."""
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else None

    @property
    def stored(self) -> Stored:
        """The formats that caveats depend on."""
        return Stored(layout=self.layout, experts=self.experts, wo_a=self.wo_a, quantized=self.quantized, mtp=self.mtp)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of FP8 blocks."""
        return weight_block(self.config) or (128, 128)


def _add_weights(facts: Facts, weights: dict[str, Weight]) -> None:
    formats = expert_formats(weights.values())
    facts.draft_experts = "".join(formats.drafts) if formats.drafts_differ else ""
    facts.experts |= formats.main if facts.draft_experts else formats.every
    for name, weight in weights.items():
        facts.mtp |= weight.is_draft
        if weight.is_routed_expert and weight.scale and weight.stored in facts.experts:
            facts.expert_scales.add(weight.scale.dtype)
        if weight.is_wo_a:
            facts.wo_a.add(weight.stored)
        elif ENGRAM_TABLE.fullmatch(name):
            facts.tables.add(weight.stored)
        elif weight.format is Format.PLAIN and is_released_in_fp8(name):
            facts.unquantized.append(name)
        facts.quantized |= weight.format is not Format.PLAIN
        if weight.format is Format.FP8 and len(weight.info.shape) == 2:
            rows, columns = facts.block
            height, width = weight.info.shape
            if height % rows or width % columns:
                facts.partial_blocks.append(name)


def _facts_of_folder(storage: Folder, headers: Reached) -> Facts:
    facts = Facts(storage.label, "hf")
    try:
        checkpoint = Checkpoint.open(storage, headers)
    except InputError as error:
        facts.unreadable = error
        return facts
    facts.checkpoint, facts.config, facts.files = checkpoint, checkpoint.config, set(checkpoint.files)
    facts.form = checkpoint.form.name
    facts.layout = "gguf" if is_gguf(checkpoint.files) else facts.layout
    facts.notes, facts.misnamed = checkpoint.notes, misnamed(storage, checkpoint.files)
    facts.foreign = foreign_quantization(facts.config, checkpoint.tensors)
    if facts.foreign is not None:
        return facts
    weights = find_weights(checkpoint.tensors, facts.config)
    _add_weights(facts, weights)
    facts.problems += [*structure_findings(facts.config, weights), *scale_findings(weights)]
    facts.problems = [finding for finding in facts.problems if finding.level == "problem"]
    return facts


def _expert_numbers(tensors: dict[str, TensorInfo]) -> set[tuple[str, int]]:
    """(module, number) of every routed expert."""
    experts = (expert_of(name) for name in tensors if is_routed_expert(name))
    return {(expert.module, expert.number) for expert in experts if expert is not None}


def _check_ranks(facts: Facts, per_rank: list[dict[str, TensorInfo]]) -> None:
    """Ranks hold the same tensors except for the experts, and together all experts, each once."""
    dense = [{name for name in tensors if not is_routed_expert(name)} for tensors in per_rank]
    for rank, names in enumerate(dense):
        if names != dense[0]:
            odd = sorted(names ^ dense[0])[0]
            facts.problems.append(Finding("problem", f"{odd} is not in every rank (rank {rank})"))
    experts = [_expert_numbers(tensors) for tensors in per_rank]
    together = set().union(*experts)
    twice = sum(map(len, experts)) != len(together)
    for drafts, key in ((False, "n_routed_experts"), (True, "dspark_n_routed_experts")):
        wanted = facts.dimension(key) or facts.dimension("n_routed_experts")
        held = {expert for expert in together if expert[0].startswith("mtp.") == drafts}
        blocks = {module for module, _ in held}
        if twice or (wanted and len(held) != wanted * len(blocks)):
            text = f"the ranks hold {len(held)} routed experts in {len(blocks)} blocks; {wanted} in each expected"
            facts.problems.append(Finding("problem", text))
            return


def _facts_of_rank_files(storage: Folder, sizes: dict[str, int], headers: Reached) -> Facts:
    facts = Facts(storage.label, "mp", files=set(sizes), misnamed=misnamed(storage, sizes))
    config: dict[str, Any] = {}
    try:
        names = rank_file_names(sizes, storage.label)
        if CONFIG_NAME in sizes:
            config = read_json(storage, CONFIG_NAME, sizes[CONFIG_NAME], MAX_CONFIG_BYTES)
            check_engine_config(config, storage.label)
            facts.config = release_view(config)
        shards, found = read_files(storage, names, sizes, headers)
        per_rank = list(found.values())
    except InputError as error:
        facts.unreadable = error
        return facts
    facts.ranks = len(per_rank)
    for tensors in per_rank:
        weights = find_weights(tensors, facts.config)
        _add_weights(facts, weights)
        facts.problems += scale_findings(weights)
    _check_ranks(facts, per_rank)
    if not facts.problems:
        try:
            facts.checkpoint = from_ranks(storage, config, sizes, shards, per_rank)
        except InputError as error:
            facts.problems.append(Finding("problem", error.message))
    return facts


def gather(folder: Path, headers: Reached = ignore) -> Facts:
    """Facts about a folder, from its headers. Raises InputError if it is no folder or holds no tensors."""
    with Folder(folder) as storage:
        sizes = storage.sizes()
        if not any(name.endswith(".safetensors") for name in sizes) and not is_gguf(sizes):
            refuse_other_weights(storage, sizes)
            raise InputError(f"{storage.label}: holds no .safetensors file", "Name the folder of a checkpoint.")
        if any(map(rank_file, sizes)) and INDEX_NAME not in sizes:
            return _facts_of_rank_files(storage, sizes, headers)
        return _facts_of_folder(storage, headers)
