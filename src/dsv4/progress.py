"""How long work reports to its caller, and how the caller stops it: a callback, called in the caller's own thread.

Work calls its progress with what was done since the last call, and with 0 while it waits, at least ten times a second.
Whatever the callback raises ends the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

Progress = Callable[[int], None]
"""Called with the number of bytes, or other units, since the last call."""

Reached = Callable[[int, int], None]
"""For work that learns on the way how much there is: called with how much is done, and how much there is in all."""

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_CALLS = 0.1


def ignore(*counts: int) -> None:
    """The progress of a caller that wants none."""


def result_of(future: Future[Result], progress: Progress) -> Result:
    """The result of a future, with `progress(0)` called while it is waited for. Raises what the work or it raises."""
    while not wait([future], SECONDS_BETWEEN_CALLS).done:
        progress(0)
    return future.result()


def bounded_map(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], window: int, progress: Progress
) -> Iterator[tuple[Item, Result]]:
    """(item, result) in the order of the items, at most `window` of them submitted and not yet taken.

    `progress(0)` is called before each of them, and while one is waited for. Whoever stops early shuts the pool down.
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
