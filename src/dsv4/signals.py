"""SIGINT and SIGTERM: the work stops between two pieces, and the message says what is kept.

Until a command's work begins, both signals have the system's default action: the process ends at once. Nothing is
kept yet, and no import can swallow or delay the signal. `begin_work` installs a handler that only notes the signal in
the cancel token. `check` raises Interrupted once a signal is noted. Every progress bar calls it, and a long wait
calls it at least every tenth of a second. A second Ctrl-C ends the process at once.

All this is for the `dsv4` program, whose `main` calls `prepare`. In another program, such as a notebook or a test
runner, the handlers are that program's, and Ctrl-C is Python's KeyboardInterrupt.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dsv4.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted

CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
AT_ONCE = b"\nerror: interrupted a second time: left at once\n  Run the same command again.\n"

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class Cancel:
    """The cancel token: the signal that arrived, if one did."""

    def __init__(self) -> None:
        self.number = 0
        self.prepared = False
        self.second_leaves = True

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. Python runs it in the main thread, between two of its instructions."""
        if self.number and number == signal.SIGINT and self.second_leaves:
            os.write(2, AT_ONCE)
            os._exit(EXIT_INTERRUPTED)
        self.number = self.number or number

    def check(self) -> None:
        """Raise Interrupted if a signal was noted; in the main thread only, which stops those that it started."""
        if self.number and threading.current_thread() is threading.main_thread():
            error = Interrupted("interrupted", "Run the same command again.")
            error.exit_code = CODES[signal.Signals(self.number)]
            raise error

    def clear(self) -> None:
        """Forget the signal: the command goes on."""
        self.number = 0


token = Cancel()


def look(count: int = 0) -> None:
    """The progress of a wait without a bar: raises Interrupted once a signal has arrived."""
    token.check()


def _install(handler: Handler) -> None:
    for number in CODES:
        signal.signal(number, handler)


def prepare() -> None:
    """Make this process the `dsv4` program: from here on a signal ends it at once, until the work begins."""
    token.prepared = True
    _install(signal.SIG_DFL)


def begin_work() -> None:
    """From here on a signal is only noted. May be called again."""
    if token.prepared:
        _install(token.note)


def end_work() -> None:
    """Everything is printed: from here on signals are ignored."""
    _install(signal.SIG_IGN)


@contextmanager
def raising() -> Iterator[None]:
    """While a line is read from the user and nothing else happens, a signal raises Interrupted at once."""

    def note_and_raise(number: int, frame: FrameType | None) -> None:
        token.note(number, frame)
        token.check()

    if not token.prepared:
        yield
        return
    _install(note_and_raise)
    try:
        token.check()
        yield
    finally:
        _install(token.note)
