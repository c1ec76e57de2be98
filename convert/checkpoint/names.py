"""Parses names of tensors and files. No other module of dsv4 does, except the independent proof.

The release calls tensors `embed.weight`, `head.weight`, `norm.weight`, `layers.{L}.attn.wkv.weight`,
`layers.{L}.ffn.experts.{E}.w1.weight` and, in draft stage M, `mtp.{M}.…`. The block scale of `<stem>.weight` is
`<stem>.scale`. Hugging Face conversions write `model.` in front, `self_attn` for `attn`, `mlp` for `ffn` and
`weight_scale_inv` for `scale`. Both spellings are read.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from sys import intern
from typing import Literal, NamedTuple, TypeVar

Stack = Literal["layers", "mtp"]

WEIGHT_SUFFIX = ".weight"
SCALE_SUFFIXES = (".scale", ".weight_scale_inv")  # block scales that dsv4 reads, the release's first
# Scales of other quantizations: a checkpoint that has them is described, not converted.
FOREIGN_SCALE_SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale")

_BLOCK = re.compile(r"(?:model\.)?(layers|mtp)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.+)")
_FFN = re.compile(r"(?:.*\.)?(?:ffn|mlp)")
_EXPERT_MATRIX = re.compile(r"(?:.*\.)?(?:ffn|mlp)\.experts\.\d+\.w[123]\.weight")
_WO_A = re.compile(r".*\.(?:self_)?attn\.wo_a\.weight")
# The weights, beside those of routed experts, that every release quantizes.
_QUANTIZED = re.compile(
    r"(?:self_)?attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight|(?:ffn|mlp)\.shared_experts\.w[123]\.weight"
    r"|engram\.(?:embed|wkv)\.weight|(?:e_proj|h_proj|main_proj)\.weight"
)
_RANK_FILE = re.compile(r"model(\d{1,5})-mp(\d{1,5})\.safetensors")
_CACHED_NAMES = 1 << 18  # V4-Pro has 145116, and each is asked for several times
_CACHED_PARTS = 1 << 12  # of names: one for each layer, and what stands behind its number

T = TypeVar("T")


class BlockName(NamedTuple):
    """`layers.3.attn.wkv.weight` parsed: stack `layers`, number 3, inner name `attn.wkv.weight`."""

    stack: Stack
    number: int
    inner: str


class ExpertName(NamedTuple):
    """`layers.3.ffn.experts.7.w1.weight` parsed: module `layers.3.ffn`, number 7, inner name `w1.weight`."""

    module: str
    number: int
    inner: str


class RankFile(NamedTuple):
    """`model{rank}-mp{ranks}.safetensors`: the share of one rank of the reference engine."""

    rank: int
    ranks: int


@lru_cache(maxsize=_CACHED_NAMES)
def block_of(name: str) -> BlockName | None:
    """The layer or draft stage that a tensor belongs to; None for a tensor outside of them."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    return BlockName("layers" if match[1] == "layers" else "mtp", int(match[2]), match[3])


@lru_cache(maxsize=_CACHED_NAMES)
def expert_of(name: str) -> ExpertName | None:
    """The numbered expert that a tensor belongs to, in any module; None for any other tensor."""
    match = _EXPERT.fullmatch(name)
    return ExpertName(intern(match[1]), int(match[2]), intern(match[3])) if match else None


def without_expert(name: str) -> tuple[str, str, str]:
    """(what stands before the number of an expert, what stands behind it, the number) in a tensor's name.

    Of a tensor of no expert: the name, and twice "". What else is asked of a name does not depend on the number.
    """
    module, found, rest = name.rpartition(".experts.")
    number, _, inner = rest.partition(".")
    return (module, inner, number) if found and inner and number.isdecimal() else (name, "", "")


@lru_cache(maxsize=_CACHED_PARTS)
def _is_feed_forward(module: str) -> bool:
    return _FFN.fullmatch(module) is not None


def is_routed_expert(name: str) -> bool:
    """Whether a tensor, a weight or its scale, belongs to a routed expert of the main stack or of a draft stage."""
    expert = expert_of(name)
    return expert is not None and _is_feed_forward(expert.module)


@lru_cache(maxsize=_CACHED_NAMES)
def is_expert_matrix(name: str) -> bool:
    """Whether a tensor is one of the three matrices w1, w2, w3 of a routed expert."""
    return _EXPERT_MATRIX.fullmatch(name) is not None


def is_wo_a(name: str) -> bool:
    """Whether a tensor is the grouped output projection, which the reference engine holds in BF16."""
    return _WO_A.fullmatch(name) is not None


def is_draft(name: str) -> bool:
    """Whether a tensor belongs to a draft stage. Most names lack the word: they are not parsed."""
    block = block_of(name) if "mtp." in name else None
    return block is not None and block.stack == "mtp"


def is_released_in_fp8(name: str) -> bool:
    """Whether it is a weight, of no routed expert, that the releases have in FP8."""
    block = block_of(name)
    return block is not None and _QUANTIZED.fullmatch(block.inner) is not None


def draft_stages(names: Iterable[str]) -> set[int]:
    """Numbers of the draft stages `mtp.{M}` that some tensor belongs to."""
    blocks = map(block_of, filter(is_draft, names))
    return {block.number for block in blocks if block is not None}


def count_draft_stages(names: Iterable[str]) -> int:
    """The number of draft stages: the highest one and all below it, even where a lower one is missing."""
    return 1 + max(draft_stages(names), default=-1)


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales. `hc_attn_scale` and similar names are parameters."""
    return name.endswith((*SCALE_SUFFIXES, *FOREIGN_SCALE_SUFFIXES))


def scale_name(weight: str) -> str:
    """The release's name of the block scale of a weight."""
    return weight.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIXES[0]


def scales_of(weight: str, tensors: Mapping[str, T]) -> list[T]:
    """The tensors that have the names of a weight's block scale. More than one is a fault of the checkpoint."""
    if not weight.endswith(WEIGHT_SUFFIX):
        return []
    stem = weight.removesuffix(WEIGHT_SUFFIX)
    return [tensors[stem + suffix] for suffix in SCALE_SUFFIXES if stem + suffix in tensors]


def weight_of_scale(scale: str) -> str:
    """The name of the weight that a scale belongs to. Raises ValueError for a name that `is_scale` denies."""
    for suffix in (*SCALE_SUFFIXES, *FOREIGN_SCALE_SUFFIXES):
        if scale.endswith(suffix):
            return scale.removesuffix(suffix) + WEIGHT_SUFFIX
    raise ValueError(f"{scale} is not the name of a scale")


def rank_file(file: str) -> RankFile | None:
    """Rank and number of ranks from a file name of the reference engine's layout; None for any other name."""
    match = _RANK_FILE.fullmatch(file)
    return RankFile(int(match[1]), int(match[2])) if match else None


def rank_file_name(rank: int, ranks: int) -> str:
    """Name of the file of one rank in the reference engine's layout."""
    return f"model{rank}-mp{ranks}.safetensors"


def pattern_of(name: str) -> str:
    """`layers.3.ffn.experts.7.w1.weight` -> `layers.{L}.ffn.experts.{E}.w1.weight`: one pattern for all."""
    name = re.sub(r"\bexperts\.\d+\.", "experts.{E}.", name)
    return re.sub(r"\b(layers|mtp)\.\d+\.", lambda m: f"{m[1]}.{{{'L' if m[1] == 'layers' else 'M'}}}.", name)
