"""What an engine will meet in a folder: layout, formats, scales, config and side files, gathered once.

Two layouts are told apart by the names of the files: a Hugging Face folder, and the reference engine's
`model{i}-mp{N}.safetensors`, one file per rank and a config.json with that engine's own keys.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv4.convert.checkpoint.config import weight_block
from dsv4.convert.checkpoint.inventory import describes_v4
from dsv4.convert.checkpoint.names import (
    block_of,
    expert_of,
    find_scale,
    is_expert_matrix,
    is_routed_expert,
    is_wo_a,
    rank_file,
)
from dsv4.convert.checkpoint.reader import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    Checkpoint,
    Progress,
    TensorInfo,
    no_progress,
    read_file,
    read_json,
)
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.inspect.findings import Finding, routed_expert_dtypes, scale_findings, structure_findings
from dsv4.convert.inspect.parameters import is_fp4, logical_shape
from dsv4.errors import InputError, printable

# The reference engine's names of the dimensions that it splits.
ENGINE_KEYS = {
    "num_attention_heads": "n_heads",
    "moe_intermediate_size": "moe_inter_dim",
    "hidden_size": "dim",
}


@dataclass
class Facts:
    """One folder as the rules see it. `unreadable` says why the rest is empty, if it is."""

    folder: str
    layout: Literal["hf", "mp"]
    config: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    experts: set[str] = field(default_factory=set)
    expert_scales: set[str] = field(default_factory=set)
    wo_a: set[str] = field(default_factory=set)
    quantized: bool = False
    ragged: list[str] = field(default_factory=list)
    mtp: bool = False
    ranks: int = 0
    problems: list[Finding] = field(default_factory=list)
    unreadable: InputError | None = None

    def dimension(self, key: str) -> int | None:
        """A width of the config, by its name in the release, whatever the layout calls it."""
        name = ENGINE_KEYS.get(key, key) if self.layout == "mp" else key
        value = self.config.get(name)
        return value if type(value) is int and value > 0 else None

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of FP8 blocks."""
        return weight_block(self.config) or (128, 128)


def _add_tensors(facts: Facts, tensors: dict[str, TensorInfo]) -> None:
    facts.experts |= routed_expert_dtypes(tensors)
    rows, columns = facts.block
    for info in tensors.values():
        block, scale = block_of(info.name), find_scale(info.name, tensors)
        facts.mtp |= bool(block and block.stack == "mtp")
        if is_expert_matrix(info.name) and scale:
            facts.expert_scales.add(scale.dtype)
        if is_wo_a(info.name):
            facts.wo_a.add({"F8_E4M3": "fp8", "BF16": "bf16"}.get(info.dtype, info.dtype))
        quantized = info.dtype == "F8_E4M3" or is_fp4(info, scale)
        facts.quantized |= quantized
        if quantized and len(info.shape) == 2 and not is_fp4(info, scale):
            height, width = logical_shape(info, tensors)
            if height % rows or width % columns:
                facts.ragged.append(info.name)


def _hf(storage: Folder, headers: Progress) -> Facts:
    facts = Facts(storage.label, "hf")
    try:
        checkpoint = Checkpoint.open(storage, headers)
    except InputError as error:
        facts.unreadable = error
        return facts
    facts.config, facts.files = checkpoint.config, set(checkpoint.files)
    _add_tensors(facts, checkpoint.tensors)
    if describes_v4(facts.config):
        facts.problems += structure_findings(facts.config, checkpoint.tensors)
    facts.problems += scale_findings(checkpoint.tensors, facts.block)
    facts.problems = [finding for finding in facts.problems if finding.level == "problem"]
    return facts


def _ranks(names: list[str], label: str) -> tuple[list[str], int]:
    """Rank files in order and the number of ranks. Raises InputError unless there is exactly one set, complete."""
    matches = {file: name for name in names if (file := rank_file(name))}
    counts = {file.ranks for file in matches}
    if len(counts) != 1:
        raise InputError(f"{label}: files of {len(counts)} different numbers of ranks", "Convert into an empty folder.")
    (ranks,) = counts
    found = {file.rank: name for file, name in matches.items()}
    if sorted(found) != list(range(ranks)):
        raise InputError(f"{label}: {len(found)} of {ranks} rank files are there", "Run the conversion again.")
    return [found[rank] for rank in range(ranks)], ranks


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
            facts.problems.append(Finding("problem", f"{printable(odd)} is not in every rank (rank {rank})"))
    experts = [_expert_numbers(tensors) for tensors in per_rank]
    together = set().union(*experts)
    blocks = {module for module, _ in together}
    wanted = facts.dimension("n_routed_experts")
    if sum(map(len, experts)) != len(together) or (wanted and len(together) != wanted * len(blocks)):
        text = f"the ranks hold {len(together)} routed experts in {len(blocks)} blocks; {wanted} in each expected"
        facts.problems.append(Finding("problem", text))


def _mp(storage: Folder, sizes: dict[str, int], headers: Progress) -> Facts:
    facts = Facts(storage.label, "mp", files=set(sizes))
    try:
        names, facts.ranks = _ranks(list(sizes), storage.label)
        if CONFIG_NAME in sizes:
            facts.config = read_json(storage, CONFIG_NAME, sizes[CONFIG_NAME], MAX_CONFIG_BYTES)
        per_rank = []
        for name in names:
            per_rank.append(read_file(storage, name, sizes[name])[1])
            headers(len(per_rank), len(names))
    except InputError as error:
        facts.unreadable = error
        return facts
    for tensors in per_rank:
        _add_tensors(facts, tensors)
        facts.problems += [f for f in scale_findings(tensors, facts.block) if f.level == "problem"]
    _check_ranks(facts, per_rank)
    return facts


def gather(folder: Path, headers: Progress = no_progress) -> Facts:
    """Facts about a folder. Raises InputError if it is not a folder or holds no safetensors file at all."""
    with Folder(folder) as storage:
        sizes = storage.sizes()
        if not any(name.endswith(".safetensors") for name in sizes):
            raise InputError(f"{storage.label}: holds no .safetensors file", "Name the folder of a checkpoint.")
        return _mp(storage, sizes, headers) if any(map(rank_file, sizes)) else _hf(storage, headers)
