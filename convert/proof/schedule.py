"""The order of the work: which process compares which pieces, on which threads, and when shards have to be fetched.

Pieces run on threads, not processes: reading and every array operation release the interpreter's lock, and tallies
need no copying. The calling thread submits the pieces in order, a bounded number at a time, and takes their tallies in
the same order. The calling thread also fetches shards of a remote checkpoint, before it submits the pieces that read
them, so no worker waits for a shard.

Several processes may share one verification. Each plans the same pieces from the same headers, so dividing them needs
no messages: neighbouring pieces stay together, because they lie in the same shards, and each process gets about the
same number of bytes. The findings are exchanged once at the end, and each process draws the same verdict from all of
them. If a process is missing there is no verdict.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from dsv4.progress import Progress, bounded_map

from .files import RemoteFiles

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECES_AHEAD = 2  # per thread: one that is computed and one that waits


@dataclass(frozen=True)
class Share:
    """The work of process `index` of `count`. `gather` waits for all processes and returns their values in order."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def of(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
        """The items of this process: neighbours, cut where the sum of the sizes passes equal parts."""
        total, before = sum(sizes), 0
        own = []
        for item, size in zip(items, sizes, strict=True):
            middle = 2 * before + size  # twice the item's middle, to stay an integer
            if min(middle * self.count // max(2 * total, 1), self.count - 1) == self.index:
                own.append(item)
            before += size
        return own


UNSHARED = Share()


def in_order(
    items: Sequence[Item],
    function: Callable[[Item], Result],
    workers: int,
    stopped: threading.Event,
    progress: Progress,
    remote: Sequence[RemoteFiles],
    shards_of: Callable[[Item], tuple[frozenset[str], ...]],
) -> Generator[tuple[Item, Result], None, None]:
    """(item, result) in order, computed by `workers` threads. At the end, also by an error, all threads have ended.

    Then `stopped` is set too, for functions that take long.
    `shards_of(item)` names the shards to fetch from each of the `remote` checkpoints before the item is computed.
    """
    runs = [(shards, list(some)) for shards, some in groupby(items, shards_of)]
    for number, files in enumerate(remote):
        files.check_needs([shards[number] for shards, _ in runs])
    with ThreadPoolExecutor(workers, "verify") as pool:
        try:
            for position, (shards, some) in enumerate(runs):
                upcoming = runs[position + 1][0] if position + 1 < len(runs) else shards
                for number, files in enumerate(remote):
                    files.prepare(shards[number], upcoming[number])
                yield from bounded_map(pool, function, some, PIECES_AHEAD * workers, progress)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    for files in remote:
        files.prepare(())
