"""`dsv4` command lines in processes of their own, and tests that are the `dsv4` program for a while."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv4 import signals


@contextmanager
def as_program() -> Iterator[signals.Cancel]:
    """The signal handlers of `dsv4` instead of the test runner's, as if its work had begun. Yields the cancel token."""
    before = {number: signal.getsignal(number) for number in signals.CODES}
    signals.prepare()
    signals.begin_work()
    try:
        yield signals.token
    finally:
        vars(signals.token).update(vars(signals.Cancel()))
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def _runner() -> subprocess.Popen[str]:
    """See warm_dsv4.py. It ends with this process, which holds its stdin."""
    script = Path(__file__).with_name("warm_dsv4.py")
    return subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@dataclass(frozen=True)
class Ended:
    """Result of a command line."""

    returncode: int
    stdout: str
    stderr: str


def run_warm(
    folder: Path,
    *arguments: object,
    environment: Mapping[str, str] = os.environ,
    interrupt: tuple[int, int] | None = None,
) -> Ended:
    """`dsv4 …` in `folder` and a process of its own.

    interrupt: at which function call of its main thread it gets a signal, and the signal's number.
    """
    runner, files = _runner(), [folder / f".{name}" for name in ("stdout", "stderr")]
    job = {
        "arguments": [str(a) for a in arguments],
        "environment": dict(environment),
        "folder": str(folder),
        "stdout": str(files[0]),
        "stderr": str(files[1]),
        "signal": interrupt,
    }
    for file in files:
        file.write_bytes(b"")
    assert runner.stdin is not None and runner.stdout is not None
    print(json.dumps(job), file=runner.stdin, flush=True)
    code = int(runner.stdout.readline())
    return Ended(code, files[0].read_text(), files[1].read_text())
