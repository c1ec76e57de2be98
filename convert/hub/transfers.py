"""Downloads in worker threads.

The libraries block until a file has arrived, so each of their calls runs in a worker. The calling thread waits and
calls its progress ten times a second with the bytes that arrived since the last call. If the progress raises, because
of Ctrl-C or an error, each transfer ends when its next bytes arrive.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

from dsv4.progress import SECONDS_BETWEEN_CALLS, Progress, result_of

SECONDS_TO_STOP = 0.5  # how long `close` waits for transfers to end; a silent server may take minutes

Parameters = ParamSpec("Parameters")
Item = TypeVar("Item")
Result = TypeVar("Result")


class TransferCancelled(BaseException):
    """Raised inside a transfer when the run is over. A BaseException, so that no library retries it."""


class Transfers:
    """A pool of threads that fetch. `abort` ends transfers that do not call their meter.

    Call the methods from the thread that created it; the meters may be used in any thread.
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

    def mapped(
        self, function: Callable[[Item], Result], items: Iterable[Item], window: int, progress: Progress
    ) -> Iterator[Result]:
        """The results for the items, in their order, at most `window` of them started and not yet taken."""
        pending = deque[Future[Result]]()
        for item in items:
            pending.append(self.start(function, item))
            if len(pending) == window:
                yield self.result(pending.popleft(), progress)
        while pending:
            yield self.result(pending.popleft(), progress)

    def close(self) -> None:
        """Stop all transfers and wait up to SECONDS_TO_STOP for them to end. May be called again."""
        self.stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = {future for future in self._started if not future.done()}
        if running:
            self._abort()
            wait(running, SECONDS_TO_STOP)


class FileMeter:
    """The progress of one file: adds the bytes received to the total, never more than the size of the file.

    The libraries call it in the fetching thread, with a negative number when they restart a file.
    """

    def __init__(self, size: int, transfers: Transfers) -> None:
        self._size, self._transfers, self._done = size, transfers, 0

    def __call__(self, count: int) -> None:
        """`count` more bytes arrived. Raises TransferCancelled when the run is over."""
        if self._transfers.stopped.is_set():
            raise TransferCancelled
        self._set(self._done + count)

    def restart(self) -> None:
        """Count the file from 0 again."""
        self._set(0)

    def finish(self) -> None:
        """Count the whole file as received, whether it was fetched or found."""
        self._set(self._size)

    def _set(self, done: int) -> None:
        done = min(max(done, 0), self._size)
        self._transfers.add(done - self._done)
        self._done = done
