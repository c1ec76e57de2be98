"""In which order pieces are compared when the shards of one side, or of both, have to be fetched.

Both sides hold the same tensors in shards of different cuts, so a shard of one side is needed with several of the
other. Pieces that need the same shards are one run. The next run is the one that has the fewest bytes to fetch: so
one side advances by a shard, then the other, and where both sides are in the same order every shard is fetched once,
with one shard of each side on disk and the next one arriving. Only where the orders differ more than the scratch area
holds is a shard fetched again; the plan counts that.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Generic, TypeVar

from dsv4.convert.proof.files import RemoteFiles

Item = TypeVar("Item")
Shards = tuple[frozenset[str], ...]  # of each remote side


@dataclass(frozen=True)
class Run(Generic[Item]):
    """Items that need the same shards. kept: shards that are on disk and needed later; fetched: those that arrive."""

    shards: Shards
    kept: Shards
    fetched: Shards
    items: tuple[Item, ...]


@dataclass
class _Area:
    """The scratch area of one side: at most `slots` shards. waiting: how many runs still need each shard."""

    slots: int
    bytes_of: Callable[[str], int]
    waiting: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: set[str] = field(default_factory=set)

    def cost(self, shards: frozenset[str]) -> int:
        """Bytes to fetch."""
        return sum(map(self.bytes_of, shards - self.held))

    def take(self, shards: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Hold the shards of a run. Returns (those kept beside them, those fetched)."""
        fetched = shards - self.held
        kept = [name for name in self.held - shards if self.waiting[name]]
        kept.sort(key=lambda name: (-self.bytes_of(name), name))  # what is dropped is fetched again: the smallest
        kept = kept[: max(0, self.slots - len(shards))]
        self.held = {*kept, *shards}
        for name in shards:
            self.waiting[name] -= 1
        return frozenset(kept), fetched


def _next(areas: Sequence[_Area], waiting: dict[Shards, int], using: dict[tuple[int, str], set[Shards]]) -> Shards:
    """The run with the fewest bytes to fetch; of equal ones that whose shards are needed the least afterwards.

    waiting: the runs that are left, and their places in the order of the tensors.
    """
    held = [(number, name) for number, area in enumerate(areas) for name in area.held]
    candidates = {shards for place in held for shards in using[place]}
    if not candidates:
        return next(iter(waiting))

    def rank(shards: Shards) -> tuple[int, int, int]:
        cost = sum(area.cost(names) for area, names in zip(areas, shards, strict=True))
        left = min(area.waiting[name] for area, names in zip(areas, shards, strict=True) for name in names)
        return cost, left, waiting[shards]

    return min(candidates, key=rank)


def plan_runs(
    items: Sequence[Item], shards_of: Callable[[Item], Shards], remote: Sequence[RemoteFiles]
) -> list[Run[Item]]:
    """All items in runs. `shards_of(item)`: the shards that it needs of each of the `remote` checkpoints.

    Raises UsageError if a run needs more shards of a side than may be on disk at once.
    """
    groups: dict[Shards, list[Item]] = {}
    for item in items:
        groups.setdefault(shards_of(item), []).append(item)
    areas = [_Area(files.slots(), cache(files.bytes_to_fetch)) for files in remote]
    using: dict[tuple[int, str], set[Shards]] = defaultdict(set)
    for number, (files, area) in enumerate(zip(remote, areas, strict=True)):
        files.check_needs([shards[number] for shards in groups])
        for shards in groups:
            for name in shards[number]:
                area.waiting[name] += 1
                using[number, name].add(shards)
    runs: list[Run[Item]] = []
    waiting = {shards: place for place, shards in enumerate(groups)}
    while waiting:
        shards = _next(areas, waiting, using)
        del waiting[shards]
        for number, names in enumerate(shards):
            for name in names:
                using[number, name].discard(shards)
        taken = [area.take(names) for area, names in zip(areas, shards, strict=True)]
        kept, fetched = (tuple(one[i] for one in taken) for i in (0, 1))
        runs.append(Run(shards, kept, fetched, tuple(groups[shards])))
    return runs
