"""How long work reports to its caller, and how the caller stops it: one callback, called in the caller's own thread.

Work calls its progress with the number of bytes (or other units) done since the last call, and with 0 while it waits,
at least ten times a second. Whatever the callback raises ends the work.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Progress = Callable[[int], None]
Result = TypeVar("Result")

SECONDS_BETWEEN_CALLS = 0.1


def ignore(count: int) -> None:
    """The progress of a caller that wants none."""


def result_of(future: Future[Result], progress: Progress) -> Result:
    """The result of a future, with `progress(0)` called while it is waited for. Raises what the work or it raises."""
    while not wait([future], SECONDS_BETWEEN_CALLS).done:
        progress(0)
    return future.result()
