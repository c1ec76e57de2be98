"""How many parameters a checkpoint has, in total and at work for one token, counted from its headers.

The release's own numbers (V4-Flash 284B / 13B, V4-Pro 1.6T / 49B) count the main stack: the draft blocks `mtp.*`
come on top and are counted apart here. A packed FP4 byte is two parameters; block scales and the table `tid2eid`
are bookkeeping, not parameters. A token uses everything but the routed experts that its router did not choose and
the tables it only picks a row from (the input embedding and, in V4.1, the engram embeddings).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dsv4.convert.checkpoint.names import block_of, expert_of, find_scale, is_routed_expert, is_scale
from dsv4.convert.checkpoint.reader import TensorInfo

LOOKUP_TABLES = re.compile(r"(model\.)?embed\.weight|(model\.)?layers\.\d+\.engram\.embed\.weight")

# First match wins. The names are the release's, without `layers.{L}.`.
_FAMILIES = (
    ("routed experts", re.compile(r"ffn\.experts\.")),
    ("shared experts", re.compile(r"ffn\.shared_experts\.")),
    ("router", re.compile(r"ffn\.gate\.")),
    ("indexer", re.compile(r"attn\.indexer\.")),
    ("compressors", re.compile(r"attn\.compressor\.")),
    ("engram", re.compile(r"engram\.")),
    ("hyper-connections", re.compile(r"hc_(attn|ffn|head)_")),
    ("norms", re.compile(r"(attn_norm|ffn_norm|norm)\.weight")),
    ("attention", re.compile(r"attn\.")),
    ("embedding", re.compile(r"embed\.weight")),
    ("output head", re.compile(r"head\.weight")),
    ("vision", re.compile(r"(vision|aligner)\.|image_")),
)
FAMILIES = (*(name for name, _ in _FAMILIES), "mtp blocks", "other")


@lru_cache(maxsize=1 << 18)
def family(name: str) -> str:
    """Which of `FAMILIES` a tensor belongs to; everything under `mtp.*` is one family."""
    block = block_of(name)
    if block and block.stack == "mtp":
        return "mtp blocks"
    inner = block.inner if block else name.removeprefix("model.")
    return next((title for title, pattern in _FAMILIES if pattern.match(inner)), "other")


def packs_fp4(info: TensorInfo, scale: TensorInfo | None = None) -> bool:
    """Whether each byte of a weight holds two FP4 codes: I8 by the release's rule; U8 when it has a block scale."""
    return (info.dtype == "I8" or (info.dtype == "U8" and scale is not None)) and info.name.endswith(".weight")


def is_fp4(info: TensorInfo, scale: TensorInfo | None = None) -> bool:
    """Whether a weight holds FP4 codes: packed, or under the reference engine's tag F4, which counts elements."""
    return info.dtype == "F4" or packs_fp4(info, scale)


def logical_shape(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Shape in elements: packed FP4 has twice the columns that its header says."""
    scale = find_scale(info.name, tensors) if info.dtype == "U8" else None
    if info.shape and packs_fp4(info, scale):
        return (*info.shape[:-1], 2 * info.shape[-1])
    return info.shape


def parameters_of(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> int:
    """Parameters in one tensor: elements, FP4 unpacked; none for block scales and `tid2eid`."""
    if is_scale(info.name) or info.name.endswith(".tid2eid"):
        return 0
    return math.prod(logical_shape(info, tensors))


@dataclass(frozen=True)
class Parameters:
    """Counts of one checkpoint. `active` is None where the number of chosen experts is not known."""

    total: int
    active: int | None
    mtp_total: int
    mtp_active: int | None


def _active(
    infos: Iterable[TensorInfo], tensors: Mapping[str, TensorInfo], chosen_experts: int | None
) -> tuple[int, int | None]:
    total = active = 0
    experts: dict[str, set[int]] = {}  # numbers of the experts, and their parameters, by module
    routed: dict[str, int] = {}
    for info in infos:
        count = parameters_of(info, tensors)
        total += count
        expert = expert_of(info.name) if is_routed_expert(info.name) else None
        if expert:
            experts.setdefault(expert.module, set()).add(expert.number)
            routed[expert.module] = routed.get(expert.module, 0) + count
        elif not LOOKUP_TABLES.fullmatch(info.name):
            active += count
    if routed and chosen_experts is None:
        return total, None
    for module, count in routed.items():
        active += count * min(chosen_experts or 0, len(experts[module])) // len(experts[module])
    return total, active


def count_parameters(
    tensors: Mapping[str, TensorInfo], experts_per_token: int | None, mtp_experts_per_token: int | None
) -> Parameters:
    """Count the main stack and the draft blocks. The arguments are how many routed experts a token uses in each."""
    main = [info for info in tensors.values() if family(info.name) != "mtp blocks"]
    mtp = [info for info in tensors.values() if family(info.name) == "mtp blocks"]
    total, active = _active(main, tensors, experts_per_token)
    mtp_total, mtp_active = _active(mtp, tensors, mtp_experts_per_token)
    return Parameters(total, active, mtp_total, mtp_active)
