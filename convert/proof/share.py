"""One verification by several processes: who does which pieces, and how the parts come together.

Every process plans the same pieces from the same headers, so who does what needs no messages: neighbours stay
together, because they lie in the same shards, and each process gets about the same number of bytes. What they found is
exchanged once at the end, and each of them draws the same verdict from all of it. If one is gone there is no verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """The work of process `index` of `count`. `gather` waits for all and returns what each brought, in order."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def of(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
        """The items of this process: a run of neighbours, cut where the sum of the sizes passes equal parts."""
        total, before = sum(sizes), 0
        mine = []
        for item, size in zip(items, sizes, strict=True):
            middle = 2 * before + size  # twice where it lies, to stay whole; at the very end if nothing has a size
            if min(middle * self.count // max(2 * total, 1), self.count - 1) == self.index:
                mine.append(item)
            before += size
        return mine

    def merged(self, found: dict[str, Any]) -> dict[str, Any]:
        """All entries of all processes; their keys are disjoint."""
        return {key: value for part in self.gather(found) for key, value in part.items()}


ALONE = Share()
