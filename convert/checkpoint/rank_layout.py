"""The reference engine's layout, `model{i}-mp{N}.safetensors`: names, and which slice each rank holds.

Rank i gets its share of the routed experts (under their global numbers), equal slices of the tensor parallel weights,
and a copy of everything else. The rules are those of the reference converter, as tables.

The n-gram tables of V4.1 are sliced although no number of ranks need divide their rows: every rank has as many, the
next whole number, and the places behind the last row are filled, codes with 0 and scales with 1.
"""

import re
from dataclasses import dataclass, replace

from dsv4.errors import InputError, UsageError
from dsv4.quant.blocks import Block

from .names import expert_of

# Names of Hugging Face conversions to the reference engine's; none of them occurs in the releases.
RENAMES = (
    ("self_attn", "attn"),
    ("mlp", "ffn"),
    ("weight_scale_inv", "scale"),
    ("e_score_correction_bias", "bias"),
)
SLICED_ROWS = re.compile(
    r"^(embed|head)\.weight$|\.attn\.wq_b\.|\.indexer\.wq_b\.|\.attn\.wo_a\.|\.attn\.attn_sink$"
    r"|\.indexer\.weights_proj\.|\.markov_head\.(markov_w[12]|embed|head)\.|\.engram\.embed\."
)
SLICED_COLUMNS = re.compile(r"\.attn\.wo_b\.")
VISION = re.compile(r"^(vision|aligner)\.")  # its `mlp` keeps its name
# Copies of embedding and head in a draft block are not written. The older converter drops every name with `emb` or a
# last `head.weight`; the newer one names the two, because a Markov head has an embedding too.
DRAFT_COPY = re.compile(r"^mtp\.(?!.*\.markov_head\.).*(emb|head\.weight$)")
PADDED_ROWS = re.compile(r"(?:.*\.)?layers\.(\d+)\.engram\.embed\.(?:weight|scale)")  # of V4.1; the group: its layer


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count` along dimension `dim`. filled: places at its end that hold nothing of the whole."""

    dim: int
    index: int
    count: int
    filled: int = 0

    def apply_to(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the slice, with what fills it up."""
        return (*shape[: self.dim], -(-shape[self.dim] // self.count), *shape[self.dim + 1 :])

    def bounds(self, length: int) -> tuple[int, int]:
        """[start, stop) of the slice in a dimension of `length`, without what fills it up."""
        step = -(-length // self.count)
        return min(self.index * step, length), min((self.index + 1) * step, length)


def mp_name(name: str) -> str:
    """The reference engine's name of a tensor."""
    name = name.removeprefix("model.")
    if VISION.search(name):
        return name
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


MOST_RANKS_NAMED = 64  # in the hint of an error


def mp_slice(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> Slice | None:
    """The slice of a tensor that a rank holds; None for all of it. Raises UsageError if it cannot be divided."""
    name = mp_name(name)
    dim = 0 if SLICED_ROWS.search(name) else 1 if SLICED_COLUMNS.search(name) else None
    if dim is None or ranks == 1:
        return None
    if dim >= len(shape) or (shape[dim] % ranks and not PADDED_ROWS.fullmatch(name)):
        length = shape[dim] if dim < len(shape) else 1
        fitting = [str(n) for n in range(1, min(length, MOST_RANKS_NAMED) + 1) if length % n == 0]
        raise UsageError(
            f"'{name}' has shape {list(shape)}: dimension {dim} cannot be divided by {ranks} ranks",
            f"--model-parallel {', '.join(fitting)} divide it.",
        )
    cut = Slice(dim, rank, ranks)
    start, stop = cut.bounds(shape[dim])
    return replace(cut, filled=cut.apply_to(shape)[dim] - (stop - start))


def check_blocks(name: str, shape: tuple[int, ...], cut: Slice, block: Block) -> None:
    """Raises UsageError if a slice of a block-scaled weight would cut a block: its scale cannot be divided."""
    if cut.apply_to(shape)[cut.dim] % block[cut.dim]:
        raise UsageError(
            f"'{name}' has shape {list(shape)}: {cut.count} ranks would cut its blocks of "
            f"{block.rows} x {block.columns}",
            "Choose fewer ranks: --model-parallel.",
        )


def count_experts(names: list[str]) -> dict[str, int]:
    """Number of routed experts of each layer or draft block, by the name before `.experts.`."""
    counts: dict[str, int] = {}
    for name in names:
        if expert := expert_of(name):
            counts[expert.module] = max(counts.get(expert.module, 0), expert.number + 1)
    return counts


def rank_of_expert(name: str, counts: dict[str, int], ranks: int) -> int | None:
    """The rank that holds a routed expert's tensor; None for any other tensor. Raises InputError if N does not fit."""
    expert = expert_of(name)
    if expert is None:
        return None
    count = counts[expert.module]
    if count % ranks:
        raise InputError(
            f"{expert.module} has {count} experts: {ranks} ranks cannot share them equally",
            "Choose another --model-parallel.",
        )
    return expert.number // (count // ranks)


def skipped(name: str) -> bool:
    """Whether the layout leaves a tensor out."""
    return DRAFT_COPY.search(mp_name(name)) is not None
