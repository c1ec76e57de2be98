"""Transfers in threads of their own, watched by the thread that asked for them.

The libraries block until a file has arrived, so every call of theirs runs in a thread. The thread that waits calls its
progress several times a second with the bytes that arrived meanwhile; if that raises, because of Ctrl-C or an error,
the transfers end at the next bytes that arrive.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

from dsv4.progress import SECONDS_BETWEEN_CALLS, Progress, result_of

SECONDS_TO_STOP = 0.5  # of waiting for transfers that were stopped; a server that says nothing more may take minutes

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stopped(BaseException):
    """Ends a transfer from within when the run is over; no library may take it for something to retry."""


class Transfers:
    """Threads that fetch. `abort` ends transfers that do not call their meter.

    Methods are for the thread that made it, except that other threads may use the meters.
    """

    def __init__(self, threads: int, abort: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(threads, "fetch")
        self._abort = abort
        self._started: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._arrived = 0
        self.stopped = threading.Event()

    def start(
        self, function: Callable[Parameters, Result], *arguments: Parameters.args, **more: Parameters.kwargs
    ) -> Future[Result]:
        """Call a function in one of the threads."""
        future = self._pool.submit(function, *arguments, **more)
        self._started = {other for other in self._started if not other.done()} | {future}
        return future

    def add(self, count: int) -> None:
        """`count` more bytes arrived, in any thread."""
        with self._lock:
            self._arrived += count

    def _report(self, progress: Progress) -> None:
        with self._lock:
            count, self._arrived = self._arrived, 0
        progress(count)

    def result(self, future: Future[Result], progress: Progress) -> Result:
        """Wait for the result of a call."""
        return result_of(future, lambda count: self._report(progress))

    def finish(self, future: Future[Result], progress: Progress) -> None:
        """Wait until a call has ended, however it ends."""
        for _ in self.completed([future], progress):
            pass

    def completed(self, futures: Iterable[Future[Result]], progress: Progress) -> Iterator[Future[Result]]:
        """Each of the futures as soon as it is done."""
        pending = set(futures)
        while pending:
            self._report(progress)
            done, pending = wait(pending, SECONDS_BETWEEN_CALLS, FIRST_COMPLETED)
            yield from done
        self._report(progress)

    def close(self) -> None:
        """Stop what is under way, and wait a moment for it to end. May be called again."""
        self.stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = {future for future in self._started if not future.done()}
        if running:
            self._abort()
            wait(running, SECONDS_TO_STOP)


class FileMeter:
    """The progress of one file's transfer: bytes are added to the sum of all, and never more than the file has.

    The libraries call it in the thread that fetches, with a negative number when they start a file again.
    """

    def __init__(self, size: int, transfers: Transfers) -> None:
        self._size, self._transfers, self._done = size, transfers, 0

    def __call__(self, count: int) -> None:
        """`count` more bytes arrived. Raises Stopped when the run is over."""
        if self._transfers.stopped.is_set():
            raise Stopped
        self._set(self._done + count)

    def restart(self) -> None:
        """The file starts again."""
        self._set(0)

    def finish(self) -> None:
        """The file is there, however it came."""
        self._set(self._size)

    def _set(self, done: int) -> None:
        done = min(max(done, 0), self._size)
        self._transfers.add(done - self._done)
        self._done = done
