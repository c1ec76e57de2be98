"""How long-running work reports progress and is stopped: by a callback in the caller's own thread.

Work calls its progress with the number of units done since the last call, and with 0 while it waits, at least ten times
a second. An exception from the callback ends the work.
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


def ignore(*counts: int) -> None:
    """A progress callback that does nothing."""


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
