"""Several shards in flight: scanned, computed, hashed and written at the same time, published in the plan's order.

One core's SHA-256 is slower than a disk, and a file's hash cannot be divided among cores; so there are as many shards
in flight as keep the workers busy, and no more, because a killed run loses the shards in flight. The next shard starts
when the last piece of the one before it is submitted, or when a worker is idle although that one is scanned or waits
for its hash.
Each shard has a thread that drives it (shard.py). The caller's thread starts shards, reports progress, and takes the
finished ones in order, so the visible files and the error raised are those of writing one shard after the other.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock
from types import TracebackType
from typing import Self

from dsv4.convert.checkpoint.storage import Storage
from dsv4.convert.plan.shards import OutputShard
from dsv4.convert.write.atomic_file import AtomicFile, abort_all
from dsv4.convert.write.journal import FinishedShard
from dsv4.progress import SECONDS_BETWEEN_CALLS, Progress

Written = tuple[AtomicFile, FinishedShard]


class Flight:
    """One shard in flight, for its thread: counts bytes written, and raises once the run has stopped."""

    def __init__(self, news: Event) -> None:
        self._news, self._lock = news, Lock()
        self._advanced = 0
        self.stopped = False
        self.next_may_begin = False
        self.file: AtomicFile | None = None

    def advance(self, count: int) -> None:
        """Count bytes that were written. Raises CancelledError once the run has stopped."""
        if self.stopped:
            raise CancelledError
        if count:
            with self._lock:
                self._advanced += count
            self._news.set()

    def let_next_begin(self) -> None:
        """Allow the next shard to start: this one does not keep the workers busy."""
        if not self.next_may_begin:
            self.next_may_begin = True
            self._news.set()

    def taken(self) -> int:
        """Bytes since the last call."""
        with self._lock:
            count, self._advanced = self._advanced, 0
        return count


@dataclass
class _Running:
    shard: OutputShard
    flight: Flight
    future: Future[Written] = field(init=False)


class InFlight:
    """Writes shards with `write`, at most `limit` of them at a time.

    Use as a context manager: at its end all threads have ended and files that were not committed are removed.
    """

    def __init__(
        self, write: Callable[[OutputShard, Flight], Written], storage: Storage, limit: int, progress: Progress
    ) -> None:
        self._write, self._storage, self._progress = write, storage, progress
        self._limit = limit
        self._threads = ThreadPoolExecutor(limit, "dsv4-shard")
        self._news = Event()
        self._waiting: deque[OutputShard] = deque()
        self._running: deque[_Running] = deque()  # also those that are done and not yet taken

    def _sources(self, more: Sequence[OutputShard] = ()) -> set[str]:
        """Source shards that must stay readable."""
        shards = [*(running.shard for running in self._running if not running.future.done()), *more]
        return {name for shard in shards for name in shard.source_shards}

    def _prepare(self, begun: Sequence[OutputShard] = ()) -> None:
        """Prepare the source shards of the shards in flight, and start to fetch the next."""
        upcoming = self._waiting[0].source_shards if self._waiting else ()
        self._storage.prepare(self._sources(begun), upcoming)

    def _may_begin(self) -> bool:
        """Whether the next shard may start now; none starts after a failure."""
        if not self._waiting or not self._running:
            return bool(self._waiting)
        ended = [running.future for running in self._running if running.future.done()]
        if any(future.exception() for future in ended):
            return False
        if len(self._running) - len(ended) >= self._limit or len(self._running) >= 2 * self._limit:
            return False
        return self._running[-1].flight.next_may_begin and self._storage.is_ready(self._sources([self._waiting[0]]))

    def _begin(self) -> None:
        running = _Running(self._waiting.popleft(), Flight(self._news))
        self._prepare([running.shard])
        running.future = self._threads.submit(self._write, running.shard, running.flight)
        running.future.add_done_callback(lambda _: self._news.set())
        self._running.append(running)

    def _wait(self) -> None:
        """Report progress, and wait for a shard to finish or to allow the next."""
        self._progress(sum(running.flight.taken() for running in self._running))
        self._news.wait(SECONDS_BETWEEN_CALLS)
        self._news.clear()

    def written(self, shards: Sequence[OutputShard]) -> Iterator[Written]:
        """Each shard with its file, complete but not yet committed, in the order of `shards`.

        Raises the error of the first shard that failed, after the shards before it were taken.
        """
        self._waiting.extend(shards)
        while self._waiting or self._running:
            while self._may_begin():
                self._begin()
            first = self._running[0]
            if not first.future.done():
                self._wait()
                continue
            self._progress(first.flight.taken())
            yield first.future.result()
            self._running.popleft()
            if self._running or self._waiting:
                self._prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in self._running:
            running.flight.stopped = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        abort_all([running.flight.file for running in self._running if running.flight.file is not None], error)
