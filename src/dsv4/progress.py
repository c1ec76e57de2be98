"""How long-running work reports progress and is stopped: by a callback in the caller's own thread.

Work calls its progress with the number of units done since the last call, and with 0 while it waits for its threads, at
least ten times a second. Between two calls may lie one system call, such as an fsync. An exception from the callback
ends the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Progress = Callable[[int], None]
"""Called with the number of bytes, or other units, since the last call."""

Reached = Callable[[int, int], None]
"""Called with (done, total), for work that learns the total on the way."""

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_CALLS = 0.1
SECONDS_OF_A_RATE = 60.0  # a rate is that of the last minute: a burst or a pause shows in it, and is forgotten
SECONDS_BEFORE_AN_ESTIMATE = 5.0


def ignore(*counts: int) -> None:
    """A progress callback that does nothing."""


class Pace:
    """How fast work goes, and how long the rest takes."""

    def __init__(self, now: float) -> None:
        self._samples = deque([(now, 0)])

    def note(self, now: float, done: int) -> None:
        """At the time `now`, in seconds, `done` units are done."""
        if now - self._samples[-1][0] >= 1:
            self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SECONDS_OF_A_RATE:
            self._samples.popleft()

    def rate(self, now: float, done: int) -> float:
        """Units a second, over the last minute."""
        then, before = self._samples[0]
        return (done - before) / max(now - then, 1e-9)

    def seconds_left(self, now: float, done: int, total: int) -> float | None:
        """Seconds until all is done; None while too little was done to tell."""
        rate = self.rate(now, done)
        is_known = rate > 0 and now - self._samples[0][0] >= SECONDS_BEFORE_AN_ESTIMATE
        return (total - done) / rate if is_known else None


class Scaled:
    """A progress that is called with units of `whole` in all, and passes on units of `part` in all."""

    def __init__(self, progress: Progress, whole: int, part: int) -> None:
        self._progress, self._whole, self._part = progress, max(whole, 1), part
        self._done = self._passed_on = 0

    def __call__(self, count: int) -> None:
        self._done += count
        passed_on = self._done * self._part // self._whole
        self._progress(passed_on - self._passed_on)
        self._passed_on = passed_on


def result_of(future: Future[Result], progress: Progress) -> Result:
    """The result of a future, with `progress(0)` called while it is waited for. Raises what the work or it raises."""
    while True:
        try:
            return future.result(SECONDS_BETWEEN_CALLS)
        except TimeoutError:
            if future.done():  # just now, or the work itself raised it
                return future.result()
            progress(0)


def bounded_map(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], window: int, progress: Progress
) -> Iterator[tuple[Item, Result]]:
    """(item, result) in the order of the items, at most `window` of them submitted and not yet taken.

    `progress(0)` is called before each of them, and while one is waited for. A caller that stops early shuts the pool
    down.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()

    def first() -> tuple[Item, Result]:
        progress(0)
        item, future = pending.popleft()
        return item, result_of(future, progress)

    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) == window:
            yield first()
    while pending:
        yield first()
