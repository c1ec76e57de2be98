"""The order of the work: which process compares which pieces, on which threads, and when shards have to be fetched.

Pieces run on threads, not processes: reading and every array operation release the interpreter's lock, and tallies
need no copying. The calling thread submits the pieces in order, a bounded number at a time, and takes their tallies in
the same order. The calling thread also fetches shards of remote checkpoints, before it submits the pieces that read
them, so no worker waits for a shard; `work/order.py` decides in which order.

Several processes may share one verification. Each plans the same pieces from the same headers, so dividing them needs
no messages: neighbouring pieces stay together, because they lie in the same shards, and each process gets about the
same number of bytes. The findings are exchanged once at the end, and each process draws the same verdict from all of
them. If a process is missing there is no verdict.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dsv4.progress import Progress, bounded_map

from .files import RemoteFiles
from .work.order import Run

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
    runs: Sequence[Run[Item]],
    function: Callable[[Item], Result],
    workers: int,
    stopped: threading.Event,
    progress: Progress,
    remote: Sequence[RemoteFiles],
) -> Generator[tuple[Item, Result], None, None]:
    """(item, result) in the order of the runs, computed by `workers` threads. Also after an error, all threads have
    ended, and `stopped` is set, for functions that take long.

    The shards of a run are fetched, from each of the `remote` checkpoints, before its items are computed; meanwhile
    those of the next run arrive.
    """
    with ThreadPoolExecutor(workers, "verify") as pool:
        try:
            for position, run in enumerate(runs):
                after = runs[position + 1].shards if position + 1 < len(runs) else run.shards
                for number, files in enumerate(remote):
                    files.prepare(run.shards[number], [*run.kept[number], *after[number]])
                yield from bounded_map(pool, function, run.items, PIECES_AHEAD * workers, progress)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    for files in remote:
        files.prepare(())


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Make torch compute in the calling thread: pieces run in parallel, operations do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
