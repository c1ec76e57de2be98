"""Counts the parameters of a checkpoint from its headers: in total, and active for one token.

The release's own numbers (V4-Flash 284B / 13B, V4-Pro 1.6T / 49B) count the main stack: the draft blocks `mtp.*`
come on top and are counted apart here. A packed FP4 byte is two parameters; block scales and the table `tid2eid`
are not parameters. A token uses all parameters except the routed experts that its router did not choose and the
tables of which it reads one row (the input embedding and, in V4.1, the engram embeddings).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.convert.checkpoint.names import block_of, expert_of, is_draft, is_routed_expert, is_scale
from dsv4.convert.checkpoint.weights import Alike, Weight

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


def family(name: str) -> str:
    """Which of `FAMILIES` a tensor belongs to; everything under `mtp.*` is one family."""
    if is_draft(name):
        return "mtp blocks"
    block = block_of(name)
    inner = block.inner if block else name.removeprefix("model.")
    for title, pattern in _FAMILIES:
        if pattern.match(inner):
            return title
    return "other"


def parameters_of(weight: Weight) -> int:
    """Parameters in one tensor: elements, FP4 unpacked; none for `tid2eid` and scales without a weight."""
    if is_scale(weight.name) or weight.name.endswith(".tid2eid"):
        return 0
    return math.prod(weight.logical_shape)


@dataclass(frozen=True)
class Parameters:
    """Counts of one checkpoint. `active` is None where the number of chosen experts is not known."""

    total: int
    active: int | None
    mtp_total: int
    mtp_active: int | None


def _active(tensors: Iterable[tuple[Alike, Weight]], chosen_experts: int | None) -> tuple[int, int | None]:
    total = active = 0
    experts: dict[str, set[int]] = {}  # numbers of the experts, and their parameters, by module
    routed: dict[str, int] = {}
    for alike, weight in tensors:
        count = alike.count * parameters_of(weight)
        total += count
        expert = expert_of(weight.name) if is_routed_expert(weight.name) else None
        if expert:
            experts.setdefault(expert.module, set()).update(alike.numbers)
            routed[expert.module] = routed.get(expert.module, 0) + count
        elif not LOOKUP_TABLES.fullmatch(weight.name):
            active += count
    if routed and chosen_experts is None:
        return total, None
    for module, count in routed.items():
        active += count * min(chosen_experts or 0, len(experts[module])) // len(experts[module])
    return total, active


def count_parameters(
    tensors: Iterable[Alike], experts_per_token: int | None, mtp_experts_per_token: int | None
) -> Parameters:
    """Count the main stack and the draft blocks. The arguments are how many routed experts a token uses in each."""
    main: list[tuple[Alike, Weight]] = []
    drafts: list[tuple[Alike, Weight]] = []
    for alike in tensors:
        if alike.weight is not None:
            (drafts if alike.weight.is_draft else main).append((alike, alike.weight))
    return Parameters(*_active(main, experts_per_token), *_active(drafts, mtp_experts_per_token))
