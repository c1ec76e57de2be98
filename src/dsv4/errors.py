"""Everything a user can cause to go wrong, as one small family of exceptions.

Each class carries the exit code that scripts see, so the place that finds a problem also decides the
exit code. Imports only how text is written: every other module may import this one.

Messages quote names, values and answers as they were found: the exception escapes what could act on a terminal, once
for the command line and for Python.

Exit codes: 0 done or identical; 1 `verify` found a difference (a result, not an error); 2 wrong usage;
3 invalid or corrupt input; 4 system error; 5 `verify --sample` found no difference, which proves nothing;
70 a bug in dsv4; 130 interrupted (143 on SIGTERM).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsv4.text import printable

EXIT_DONE = 0
EXIT_DIFFERENCE = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_MACHINE = 4
EXIT_SAMPLE = 5
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Dsv4Error(Exception):
    """A problem with a message for the user: what was expected, what was found, where, and what to do.

    `hint` is the next thing to try, printed on its own line; `str(error)` is the message and that line. `details` are
    further lines under the message. Characters that could act on a terminal are escaped, newlines included: only the
    ends of these lines are newlines.
    """

    exit_code = EXIT_BUG

    def __init__(self, message: str, hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join(map(printable, (message, *details))))
        self.hint = printable(hint)

    @property
    def message(self) -> str:
        """The message and its details, without the hint."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(Dsv4Error):
    """The options or paths given do not make sense together."""

    exit_code = EXIT_USAGE


class InputError(Dsv4Error):
    """A checkpoint, config or prompt file is not what it claims to be."""

    exit_code = EXIT_INPUT


class MachineError(Dsv4Error):
    """Disk, memory, permission, lock, device or network: a retry elsewhere or later may work."""

    exit_code = EXIT_MACHINE


class LostRank(MachineError):
    """Another process of a shared run ended or cannot be reached."""


class Interrupted(Dsv4Error):
    """SIGINT or SIGTERM arrived. The message says what is kept and how to continue."""

    exit_code = EXIT_INTERRUPTED


def _lost_rank(error: RuntimeError) -> LostRank:
    """What torch.distributed says when a message between ranks failed, less its advice to programmers."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    reason = reason.removeprefix(reason[: reason.find("] ") + 2] if reason.startswith("[") else "").split(". ")[0]
    return LostRank(
        f"another rank ended or cannot be reached ({reason[:200]})",
        "Its own message, or the launcher's table, says why. What was finished is kept.",
    )


@contextmanager
def peer_failures() -> Iterator[None]:
    """While ranks exchange messages: what torch.distributed raises when that fails becomes LostRank."""
    try:
        yield
    except RuntimeError as error:
        raise _lost_rank(error) from None
