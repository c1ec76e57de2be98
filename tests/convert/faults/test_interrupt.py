"""Ctrl-C while a library is being imported: libraries swallow exceptions there, and it must count all the same."""

import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition, Event, Lock, Timer, main_thread
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest

from dsv4 import cli
from dsv4.convert.write import output_folder
from dsv4.convert.write.journal import FinishedShard, Past
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
    monkeypatch.setattr(cli, "SECONDS_OF_ASKING", 60)
    with pytest.raises(Interrupted) as raised:
        __import__(module)
        time.sleep(5)
    assert raised.value.exit_code == code
    assert not hasattr(sys.modules[module], "swallowed")  # the import itself was left alone


@pytest.mark.parametrize(("name", "code"), [("SIGINT", EXIT_INTERRUPTED), ("SIGTERM", EXIT_TERMINATED)])
def test_a_long_import_does_not_keep_it_waiting(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[int] = []  # goes on here after its end, and so ends more than once
    monkeypatch.setattr(cli.os, "_exit", ends.append)
    monkeypatch.setattr(cli, "SECONDS_OF_ASKING", 0.1)
    module = f"takes_long_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(SWALLOWS.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted):
        __import__(module)
        time.sleep(5)
    assert set(ends) == {code} and "interrupted" in capsys.readouterr().err


class Telling:
    """A lock that is interrupted at its worst moment: it is held, and nobody knows it yet."""

    def __init__(self, method: str) -> None:
        self.lock, self.method = Lock(), method

    def acquire(self) -> bool:
        self.lock.acquire()
        if self.method == "acquire":
            signal.raise_signal(signal.SIGINT)
        return True

    def release(self) -> None:
        if self.method == "release":
            signal.raise_signal(signal.SIGINT)
        self.lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.mark.parametrize("method", ["acquire", "release"])
def test_no_lock_stays_locked(method: str) -> None:
    """Python's own thread pools would wait for it at the end of the run, for ever."""
    telling = Telling(method)
    with pytest.raises(Interrupted):
        with Condition(telling):  # type: ignore[arg-type]
            pass
        time.sleep(5)
    assert not telling.lock.locked()


def test_no_callback_swallows_it() -> None:
    names: WeakValueDictionary[str, Event] = WeakValueDictionary()

    class Removed(str):
        def __hash__(self) -> int:
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGINT)
            return super().__hash__()

    armed: list[bool] = []
    event = Event()
    names[Removed("event")] = event
    with pytest.raises(Interrupted):
        armed.append(True)
        del event  # its entry is removed by a callback
        time.sleep(5)


def test_waiting_for_a_thread_is_broken_off() -> None:
    """At once, though it is the same module that waits and that locks."""
    event, started = Event(), time.monotonic()
    with pytest.raises(Interrupted):
        timer = Timer(0.2, lambda: signal.pthread_kill(main_thread().ident or 0, signal.SIGINT))
        timer.start()
        event.wait(30)
    assert time.monotonic() - started < 10


def test_finished_shards_are_not_read_to_their_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may be many gigabytes: the threads that compare its hash stop in between."""
    began, stopped = Event(), []

    def read(folder: Path, shard: FinishedShard, stop: Event) -> bool:
        began.set()
        stopped.append(stop.wait(30))
        return False

    class Pool(ThreadPoolExecutor):
        def map(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
            results = super().map(*arguments, **keywords)
            began.wait()
            signal.raise_signal(signal.SIGINT)  # when the first result is asked for
            yield from results

    monkeypatch.setattr(output_folder, "_is_intact", read)
    monkeypatch.setattr(output_folder, "source_changed", lambda *_: set())
    past = Past([], [], 0, {"a": FinishedShard("a", 1, "", {})})
    wanted: Any = [SimpleNamespace(file="a", source_shards=())]
    with pytest.raises(Interrupted), Pool(1) as pool:
        output_folder.usable_shards(Path(), past, wanted, None, pool)
    assert stopped == [True]


def test_otherwise_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)
    assert time.monotonic() - started < 1
