"""The safetensors index decides which tensors a checkpoint consists of and which shard each is read from.

Loaders follow the index, and so does dsv4. It reports in one line each what it ignores: files that the index does not
name, older copies of a tensor in other shards than the index says (a newer shard overlays them), tensors of a shard
that the index does not name, and names that no shard has. Of the last two, a tensor that the model needs is an error.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from dsv4.errors import InputError
from dsv4.text import some_of

from .config import Config
from .editions.table import edition_of
from .header import check_twins
from .names import count_draft_stages, is_scale
from .storage import check_component

T = TypeVar("T")


def shown(names: list[str]) -> str:
    """The first three names and how many more there are, for a message."""
    return some_of(names, 3)


def weight_map_of(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Tensor name -> shard, from the object in an index file, which `where` names. Raises InputError."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{where}: weight_map must map tensor names to shard names")
    if not weight_map:
        raise InputError(f"{where}: weight_map names no tensor", "Download the index again.")
    for shard in set(weight_map.values()):
        check_component(shard, where)
        if not shard.endswith(".safetensors"):
            raise InputError(f"{where}: '{shard}' is not a .safetensors file")
    check_twins(sorted(set(weight_map.values())), where)
    check_twins(list(weight_map), where)
    return weight_map


def shards_of(weight_map: Mapping[str, str], sizes: Mapping[str, int], label: str) -> list[str]:
    """The shards that an index names, sorted. Raises InputError if one is missing."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in sizes]
    if missing:
        text = f"{label}: {len(missing)} of {len(shards)} shards are missing: {shown(missing)}"
        raise InputError(text, "Finish the download first.")
    return shards


def ignored_files(shards: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """One line that names the .safetensors files outside the index, [] if there are none."""
    others = sorted({name for name in sizes if "/" not in name and name.endswith(".safetensors")} - set(shards))
    return [f"ignored, because no index names it: {shown(others)}"] if others else []


@dataclass(frozen=True)
class Selection:
    """The tensors that an index chooses, and one line for each kind of tensor that it leaves out.

    absent: names of the index that no shard has. unlisted: tensors of the shards that the index does not name.
    """

    tensors: dict[str, Any]
    absent: list[str]
    unlisted: list[str]
    notes: list[str]


def select(weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, T]], where: str) -> Selection:
    """Choose tensors as an index says. `shards`: what each holds, by tensor name.

    Raises InputError if a tensor is in another shard than the index names.
    """
    held: dict[str, str] = {}
    for shard, tensors in shards.items():
        held |= dict.fromkeys(tensors, shard)
    if held == weight_map and len(held) == sum(map(len, shards.values())):
        return Selection(dict(chain.from_iterable(tensors.items() for tensors in shards.values())), [], [], [])
    chosen = {n: info for shard, tensors in shards.items() for n, info in tensors.items() if weight_map.get(n) == shard}
    holders = Counter(chain.from_iterable(shards.values()))
    elsewhere = [name for name in weight_map if name not in chosen and name in holders]
    if elsewhere:
        text = f"{where}: names {len(elsewhere)} tensors that are not in their shard: {shown(elsewhere)}"
        raise InputError(text, "Download the index and all shards from the same revision.")
    absent = [name for name in weight_map if name not in holders]
    unlisted = [name for name in holders if name not in weight_map]
    overlaid = [name for name in chosen if holders[name] > 1]
    notes = {
        "ignored, because the index names another shard for it: an older copy of": overlaid,
        "ignored, because no shard has it, though the index names it:": absent,
        "ignored, because the index does not name it, though a shard has it:": unlisted,
    }
    return Selection(chosen, absent, unlisted, [f"{text} {shown(names)}" for text, names in notes.items() if names])


def _needed(names: list[str], all_names: Iterable[str], config: Config) -> list[str]:
    """The names that a model of this config needs; for an unknown edition all names except scales.

    Whether a scale is missing follows from its weight, see weights.py.
    """
    weights = [name for name in names if not is_scale(name)]
    edition = edition_of(config)
    try:
        known = edition.tensors(config, count_draft_stages(all_names)) if weights and edition.tensors else None
    except InputError:
        known = None  # nothing follows from a config like this
    if known is None:
        return weights
    return [name for name in weights if name in known or edition.optional.fullmatch(name)]


def check_needed(selection: Selection, config: Config, where: str) -> None:
    """Raises InputError if a tensor that the model needs is in no shard, or in a shard but not in the index."""
    names = [*selection.tensors, *selection.absent, *selection.unlisted]
    if missing := _needed(selection.absent, names, config):
        text = f"{where}: names {len(missing)} tensors that the model needs and no shard has: {shown(missing)}"
        raise InputError(text, "Download the checkpoint again.")
    if missing := _needed(selection.unlisted, names, config):
        text = f"{where}: does not name {len(missing)} tensors that the model needs and a shard has: {shown(missing)}"
        raise InputError(text, "Download the index again.")
