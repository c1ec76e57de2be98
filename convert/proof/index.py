"""`model.safetensors.index.json`, which decides which tensors of a folder belong to the checkpoint.

Loaders follow the index, and so does `verify`. A newer shard may supersede tensors that an older one still holds; a
shard may hold tensors that the index does not list; the index may list tensors that no shard holds; shards may lie
beside the indexed ones. These are all reported, and count neither as equal nor as different: a missing tensor shows in
the comparison with the other side. A fault in a key that no loader reads, such as the total size, is a note.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from dsv4.text import some_of

from .files import INDEX_NAME, MAX_HEADER_BYTES, Files, Shard, parse_json, read_bytes

KEYS = {"metadata", "weight_map"}
_IGNORED = {
    "superseded": "superseded tensors",
    "not_listed": "tensors that it does not list",
    "absent": "tensors that no shard holds",
    "files": "shards that it does not name",
}
NAMES_SHOWN = 5


@dataclass
class Index:
    """An index. `reason`: why it cannot be used, or ""; `notes`: faults in keys that no loader reads."""

    weight_map: dict[str, str] = field(default_factory=dict)
    total_size: object = None
    notes: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def shards(self) -> set[str]:
        """Files that the index names."""
        return set(self.weight_map.values())


def read_index(files: Files, size: int) -> Index:
    """Read the index of a folder and check its form."""
    if size > MAX_HEADER_BYTES:
        return Index(reason=f"{size} bytes, at most {MAX_HEADER_BYTES} are believable")
    try:
        value = parse_json(read_bytes(files, INDEX_NAME, 0, size))
    except ValueError as error:
        return Index(reason=str(error))
    weights = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(shard, str) for shard in weights.values()):
        return Index(reason="it has no weight_map from names to files")
    if not weights:
        return Index(reason="its weight_map is empty")
    notes = [f"has the key {key}, which an index does not have" for key in sorted(value.keys() - KEYS)]
    metadata = value.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(weights, total, notes)


@dataclass
class Ignored:
    """Shards and tensors that a folder holds or its index lists, but no loader reads."""

    superseded: list[str] = field(default_factory=list)  # tensors: the index names the copy in another shard
    not_listed: list[str] = field(default_factory=list)  # tensors of indexed shards
    absent: list[str] = field(default_factory=list)  # tensors: listed, and in no shard
    files: list[str] = field(default_factory=list)  # shards that the index does not name

    def to_json(self) -> dict[str, list[str]]:
        """Sorted names of every kind that occurs."""
        return {kind: sorted(names) for kind, names in vars(self).items() if names}


def follow(index: Index, shards: dict[str, Shard]) -> tuple[Ignored, list[str]]:
    """Remove from the shards the tensors that the index does not choose.

    Returns what is ignored, and the tensors that lie in another shard than the index says.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for shard in shards.values():
        for name in (*shard.entries, *shard.unreadable):
            holders[name].append(shard.name)
    ignored, moved = Ignored(), []
    for name, held_by in holders.items():
        chosen = index.weight_map.get(name)
        if chosen is None:
            ignored.not_listed.append(name)
        elif chosen not in held_by:
            moved.append(name)
            chosen = held_by[0]
        elif len(held_by) > 1:
            ignored.superseded.append(name)
        for shard_name in held_by:
            if shard_name != chosen:
                shards[shard_name].entries.pop(name, None)
                if reason := shards[shard_name].unreadable.pop(name, None):
                    shards[shard_name].problems.append(f"{name}: {reason}")  # no library opens the file
    readable = {name for name, shard in shards.items() if not shard.broken}
    ignored.absent = [n for n, shard_name in index.weight_map.items() if shard_name in readable and n not in holders]
    return ignored, moved


def ignored_lines(ignored: dict[str, dict[str, list[str]]]) -> list[str]:
    """One line for each kind of ignored names, side -> `Ignored.to_json()`."""
    lines = []
    for side, kinds in ignored.items():
        for kind, names in kinds.items():
            some = some_of(names, NAMES_SHOWN)
            lines.append(f"{side} index: ignored {len(names)} {_IGNORED[kind]}: {some}")
    return lines
