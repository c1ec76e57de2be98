"""Ctrl-C and SIGTERM at any moment: the process stops, says how to continue, and nothing hangs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Condition, Event, Lock
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
from patience import LONG
from program import as_program, run_warm

from dsv4 import signals
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.synthetic.geometry import Geometry
from dsv4.convert.write import output_folder
from dsv4.convert.write.journal import FinishedShard, JournalContents
from dsv4.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted
from dsv4.progress import result_of

EITHER = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TERMINATED)]
)


@pytest.fixture
def token() -> Iterator[signals.Cancel]:
    with as_program() as cancel:
        yield cancel


@EITHER
def test_a_signal_is_noted_and_raised_where_the_work_looks(
    number: signal.Signals, code: int, token: signals.Cancel
) -> None:
    token.check()
    signal.raise_signal(number)
    for _ in range(2):  # until somebody says that the command goes on
        with pytest.raises(Interrupted) as raised:
            token.check()
        assert raised.value.exit_code == code
    token.clear()
    token.check()


def test_the_first_signal_decides(token: signals.Cancel) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    token.second_leaves = False
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted) as raised:
        token.check()
    assert raised.value.exit_code == EXIT_TERMINATED


def test_other_threads_are_left_alone(token: signals.Cancel) -> None:
    """Libraries take an exception in the middle of a transfer for something to try again."""
    signal.raise_signal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(token.check).result() is None


def test_another_program_keeps_its_handlers() -> None:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
    try:
        signals.begin_work()
        with signals.raising():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.token.check()
    finally:
        signal.signal(signal.SIGINT, inherited)


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    done = True
except BaseException:
    pass
"""


def during_an_import(folder: Path) -> None:
    (folder / "swallows.py").write_text(SWALLOWS)
    sys.path.insert(0, str(folder))
    try:
        assert __import__("swallows").done
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("swallows", None)


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


def during_a_lock(method: str) -> None:
    telling = Telling(method)
    with Condition(telling):  # type: ignore[arg-type]
        pass
    assert not telling.lock.locked()


def during_a_callback() -> None:
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
    armed.append(True)
    del event  # its entry is removed by a callback, whose exceptions Python only prints
    assert not armed


@pytest.mark.parametrize("where", ["import", "acquire", "release", "callback"])
def test_nothing_swallows_it_and_nothing_is_torn_apart(where: str, token: signals.Cancel, tmp_path: Path) -> None:
    if where == "import":
        during_an_import(tmp_path)
    elif where == "callback":
        during_a_callback()
    else:
        during_a_lock(where)
    with pytest.raises(Interrupted):
        token.check()


def test_waiting_is_broken_off(token: signals.Cancel) -> None:
    """The progress of a wait is called again and again, and raises once the signal has arrived."""
    never: Future[None] = Future()
    calls: list[int] = []

    def look(count: int) -> None:
        calls.append(count)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        signals.look(count)

    with pytest.raises(Interrupted):
        result_of(never, look)
    assert calls == [0, 0]


def test_the_time_out_of_the_work_itself_is_no_reason_to_wait_on() -> None:
    failed: Future[None] = Future()
    failed.set_exception(TimeoutError("of the work"))
    with pytest.raises(TimeoutError, match="of the work"):
        result_of(failed, lambda count: pytest.fail("waited"))


def test_finished_shards_are_not_read_to_their_ends_first(
    monkeypatch: pytest.MonkeyPatch, token: signals.Cancel
) -> None:
    """A shard may be many gigabytes: the threads that compare its hash stop in between."""
    began, stopped = Event(), []

    def read(folder: Path, shard: FinishedShard, stop: Event) -> bool:
        began.set()
        stopped.append(stop.wait(LONG))
        return False

    def look(count: int) -> None:
        began.wait()
        signal.raise_signal(signal.SIGINT)
        token.check()

    monkeypatch.setattr(output_folder, "_is_intact", read)
    monkeypatch.setattr(output_folder, "source_changed", lambda *_: set())
    journal = JournalContents([], [], 0, {"a": FinishedShard("a", 1, "", {})})
    wanted: Any = [SimpleNamespace(file="a", source_shards=())]
    with pytest.raises(Interrupted), ThreadPoolExecutor(1) as pool:
        output_folder.usable_shards(Path(), journal, wanted, None, pool, look)
    assert stopped == [True]


# --- the program, in processes of its own ---

# The program with something done at a moment: {before} the imports of the command line, {between} its work and its end.
PROGRAM = """
import os, signal, sys, time
from dsv4 import __main__, signals
{before}
from dsv4 import cli
run = cli.run
def and_then(arguments):
    code = run(arguments)
    {between}
    return code
cli.run = and_then
__main__.main()
"""


def dsv4(arguments: list[str], before: str = "", between: str = "") -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(before=before, between=between)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=LONG)


@pytest.mark.slow
@EITHER
@pytest.mark.parametrize(("argument", "expected"), [("--version", 0), ("convert", 2)])
def test_after_the_last_word_it_changes_nothing(
    argument: str, expected: int, number: signal.Signals, code: int
) -> None:
    done = dsv4([argument], between=f"signals.begin_work(); os.kill(os.getpid(), {int(number)})")
    undisturbed = dsv4([argument])
    assert (done.returncode, done.stdout, done.stderr) == (expected, undisturbed.stdout, undisturbed.stderr)
    assert done.stdout or done.stderr


@EITHER
def test_before_the_work_begins_it_ends_the_process_quietly(number: signal.Signals, code: int) -> None:
    """By the system's default action, which a shell reports as the same code."""
    done = dsv4(["--version"], before=f"signals.prepare(); os.kill(os.getpid(), {int(number)})")
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    assert 128 + number == code


def test_a_second_ctrl_c_leaves_at_once() -> None:
    twice = "for _ in range(2): os.kill(os.getpid(), signal.SIGINT)"
    done = dsv4(["--version"], before=f"signals.prepare(); signals.begin_work()\n{twice}\ntime.sleep(30)")
    assert done.returncode == 130 and done.stderr.endswith(signals.AT_ONCE.decode()) and "Traceback" not in done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CALLS_BETWEEN = 1999  # of Python functions, in the main thread; a whole run makes some 50,000


@pytest.mark.slow
@EITHER
def test_at_any_moment_of_a_conversion(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """From its start to its end in small steps; every run continues what the ones before it left."""
    make_checkpoint(tmp_path / "source", geometry=Geometry(compress_ratios=(0, 4, 0)))
    command = ("convert", "source", "out", "--max-shard-size", "150KB")
    run_warm(tmp_path, "convert", "source", "whole", *command[3:])
    ends = []
    for call in count(0, CALLS_BETWEEN):
        ended = run_warm(tmp_path, *command, interrupt=(call, number))
        assert "Traceback" not in ended.stderr
        ends.append(ended.returncode)
        if ended.returncode == code:
            assert "Run the same command again" in ended.stderr
            assert not list((tmp_path / "out").rglob("*.part"))
        elif ended.returncode == 0:
            break
        else:  # before the work began
            assert (ended.returncode, ended.stderr) == (-number, "")
    assert ends[-1] == 0 and ends.count(code) >= 5, ends
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
