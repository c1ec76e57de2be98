"""The threads that compute pieces, for all shards in flight, and how many pieces may be alive at a time.

The hash, preadv, write, torch and the compiled cast all release the interpreter's lock, so threads suffice.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from types import TracebackType
from typing import Self, TypeVar

from dsv4.progress import SECONDS_BETWEEN_CALLS, Progress, result_of

from .hashing import Hashing
from .pipeline import Blocks
from .resources import Resources

T = TypeVar("T")
R = TypeVar("R")


def _nothing() -> None:
    """The default of `map`'s `all_submitted`."""


def _compute_alone() -> None:
    """Make torch compute in the calling thread: pieces run in parallel, operations do not."""
    import torch  # only now: a dry run does without

    torch.set_num_threads(1)


class Workers:
    """A pool of threads, what the files share, and two accounts: pieces alive, and results of scans that are kept.

    Use as a context manager: all threads have ended when it is left. Safe to use from several threads.
    """

    def __init__(self, resources: Resources) -> None:
        self.pool = ThreadPoolExecutor(resources.workers, "dsv4", initializer=_compute_alone)
        self._count, self._window, self._spared_bytes = resources.workers, resources.window, resources.spared_bytes
        self.blocks, self.hashing = Blocks(), Hashing(resources.shards)
        self._changed = Condition()
        self._maps = 0  # running calls of `map`; each has an equal share of the window
        self._alive = 0  # pieces that are submitted and not yet taken
        self._unfinished = 0  # pieces that are submitted and not yet computed

    @property
    def has_free(self) -> bool:
        """Whether a thread is idle."""
        return self._unfinished < self._count

    @property
    def has_room(self) -> bool:
        """Whether a thread is idle and the window has room: more pieces would keep it busy."""
        return self.has_free and self._alive < self._window

    def spare(self, count: int) -> bool:
        """Reserve memory for scan results that could be computed again. Returns whether enough was left."""
        with self._changed:
            fits = count <= self._spared_bytes
            self._spared_bytes -= count if fits else 0
        return fits

    def give_back(self, count: int) -> None:
        """Release memory that `spare` reserved."""
        with self._changed:
            self._spared_bytes += count

    @contextmanager
    def _map(self) -> Generator[None, None, None]:
        with self._changed:
            self._maps += 1
        try:
            yield
        finally:
            with self._changed:
                self._maps -= 1
                self._changed.notify_all()

    def _reserve(self, held: int) -> bool:
        """Count one more piece, unless the window is full or the caller's share of it is."""
        with self._changed:
            if self._alive >= self._window or held >= max(1, self._window // self._maps):
                return False
            self._alive += 1
            self._unfinished += 1
        return True

    def _computed(self, _: Future[R]) -> None:
        with self._changed:
            self._unfinished -= 1

    def _submit(self, function: Callable[[T], R], item: T) -> Future[R]:
        future = self.pool.submit(function, item)
        future.add_done_callback(self._computed)
        return future

    def _release(self, count: int) -> None:
        with self._changed:
            self._alive -= count
            self._changed.notify_all()

    def _wait(self, progress: Progress) -> None:
        """Wait a little for others to take their pieces."""
        with self._changed:
            self._changed.wait(SECONDS_BETWEEN_CALLS)
        progress(0)

    def map(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        progress: Progress,
        all_submitted: Callable[[], None] = _nothing,
    ) -> Generator[tuple[T, R], None, None]:
        """(item, result) in the order of `items`; all calls together hold no more results than the window.

        `progress(0)` is called before each result, and while one is waited for. all_submitted: called once, when the
        last item is. Close the generator if it is not exhausted: its share of the window is released only then.
        """
        pending: deque[tuple[T, Future[R]]] = deque()

        def take() -> tuple[T, R]:
            progress(0)
            result = result_of(pending[0][1], progress)
            item, _ = pending.popleft()
            self._release(1)
            return item, result

        with self._map():
            try:
                for item in items:
                    while not self._reserve(len(pending)):
                        if pending:
                            yield take()
                        else:
                            self._wait(progress)
                    pending.append((item, self._submit(function, item)))
                all_submitted()
                while pending:
                    yield take()
            finally:
                for _, future in pending:
                    future.cancel()
                self._release(len(pending))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.hashing.shutdown()
