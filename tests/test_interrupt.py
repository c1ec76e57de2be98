"""Ctrl-C while a library is being imported: libraries swallow exceptions there, and it must count all the same."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4 import cli
from dsv4.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted

SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.3)
except BaseException:
    swallowed = True
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of `dsv4`, for one test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers[:2]:
        signal.signal(number, cli._on_signal)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", EXIT_INTERRUPTED), ("SIGTERM", EXIT_TERMINATED)])
def test_an_import_does_not_swallow_it(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"swallows_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(SWALLOWS.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted) as raised:
        __import__(module)
        time.sleep(5)
    assert raised.value.exit_code == code
    assert not hasattr(sys.modules[module], "swallowed")  # the import itself was left alone


def test_otherwise_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)
    assert time.monotonic() - started < 1
