"""Runs `dsv4 convert` again and again, each time with one system call that kills the process or fails.

A program of its own, started by the tests: torch is imported once, and every run is a fork of that one single-threaded
process (or happens in it, where nothing is killed), which makes a sweep over a hundred system calls a matter of
seconds. The functions of `os` that change files are replaced by counting ones; `convert/write/atomic_file.py` and
`dsv4/files.py` call them.

    python fault_lab.py WORKDIR SWEEP ARGUMENT...    prints {"points": N, "violations": [...]}

With `--shared` as the last argument three commands do the work: `--part 1/2`, `--part 2/2` and `--finish`. With
`--direct` as the last argument the shards, though small, are written past the page cache, as large ones are. With
`--slow-hash` as the last argument each block waits for its hash, so that as many shards are in flight as may be;
"in_flight" is how many that were in a first, undisturbed run.

After each run: nothing under a final name is incomplete, index and config.json are there only with all that they
name, the source is untouched, and the same command again ends in the same bytes as a run that nothing happened to.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hostile import GEOMETRY as TWO_LAYERS
from hostile import INDEX
from patience import LONG

from dsv4 import cli, signals
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write.atomic_file import PREFIX
from dsv4.convert.write.shards import pipeline, sha256

KILLED = 137
GEOMETRY = replace(TWO_LAYERS, compress_ratios=(0,), num_nextn_predict_layers=0)  # one layer, no MTP: 40 tensors
CHANGING = ("open", "write", "pwrite", "fsync", "replace", "ftruncate", "unlink", "mkdir", "rmdir", "allocate")
BY_DESCRIPTOR = ("write", "pwrite", "fsync", "ftruncate", "allocate")
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
SHARES = ("--part=1/2", "--part=2/2", "--finish")
HOME = {name: files if name == "allocate" else os for name in CHANGING}  # the modules that the functions are in
REAL = {name: getattr(HOME[name], name) for name in CHANGING}
REAL["fsync"] = lambda descriptor: None  # a killed process leaves the same without waiting for the disk


class SlowSha256:
    """SHA-256 that takes longer than anything else does with so little data.

    Until `wanted` shards were in flight at once, every block waits for that.
    """

    wanted, reached = 0, threading.Event()

    def __init__(self) -> None:
        self._real = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self.reached.wait(LONG)
        time.sleep(0.001)
        self._real.update(data)

    def hexdigest(self) -> str:
        return self._real.hexdigest()


@dataclass
class Fault:
    """What happens at the `at`-th call of one of `calls`: kill, torn (half a write, then kill), a signal, or an errno.

    `short` makes every write do half of what it is asked.
    """

    at: int = -1
    kind: str = ""
    calls: tuple[str, ...] = CHANGING
    short: bool = False
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # several shards call at the same time
    open_shards: int = 0
    in_flight: int = 0

    def count(self, name: str, arguments: tuple[Any, ...]) -> int:
        """The number of this call among those of `calls`, from 0; also how many shards are begun and not published."""
        with self.lock:
            self.seen.append(name)
            if ".safetensors." in str(arguments[0]):  # a temporary name
                self.open_shards += {"open": 1, "replace": -1, "unlink": -1}.get(name, 0)
                self.in_flight = max(self.in_flight, self.open_shards)
                if self.in_flight >= SlowSha256.wanted:
                    SlowSha256.reached.set()
            return sum(seen in self.calls for seen in self.seen) - 1

    def wrap(self, name: str) -> Callable[..., Any]:
        real = REAL[name]

        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **keywords)
            index = self.count(name, arguments)
            if name in self.calls and index == self.at:
                self.strike(name, arguments)
            if self.short and name in ("write", "pwrite"):
                arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)], *arguments[2:])
            return real(*arguments, **keywords)

        return call

    def strike(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.kind == "torn" and name in ("write", "pwrite"):
            REAL[name](arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
        if self.kind in ("kill", "torn"):
            os._exit(KILLED)
        if self.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.kind])
            return
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number))


@dataclass(frozen=True)
class Ending:
    """How a run ended: exit code, and unless it was to be killed, what it printed on stderr and the calls it made."""

    code: int
    words: str = ""
    calls: tuple[str, ...] = ()
    in_flight: int = 0


def run_here(commands: list[list[str]], fault: Fault) -> Ending:
    """Command lines up to one that fails, in this process, with the faulty functions in place of those of `os`."""
    words = io.StringIO()
    for name in CHANGING:
        setattr(HOME[name], name, fault.wrap(name))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(words):
            code = next((code for arguments in commands if (code := cli.run(arguments))), 0)
    finally:
        signals.token.clear()
        for name, real in REAL.items():
            setattr(HOME[name], name, real)
    return Ending(code, words.getvalue(), tuple(fault.seen), fault.in_flight)


def run(commands: list[list[str]], fault: Fault) -> Ending:
    """Command lines up to one that fails; in a fork of this process if they are to be killed."""
    if fault.kind not in ("kill", "torn"):
        return run_here(commands, fault)
    child = os.fork()
    if child == 0:
        os._exit(run_here(commands, fault).code)
    return Ending(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def is_error(words: str) -> bool:
    """Whether a message says what is wrong. A slow machine may have had time for lines of progress before it."""
    return any(line.startswith("error: ") for line in words.splitlines()) and "Traceback" not in words


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file by relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Lab:
    """One conversion, its undisturbed output, and the checks after every disturbed run."""

    def __init__(self, work: Path, options: list[str], before: list[str] | None, shared: bool = False) -> None:
        """`before`: options of an earlier conversion into the same folder, which the command then replaces.

        shared: parts write the shards, and a last command publishes.
        """
        self.source, self.output, self.start = work / "source", work / "output", work / "start"
        make_checkpoint(self.source, geometry=GEOMETRY)
        for name in ("README.md", "LICENSE", "generation_config.json", "tokenizer.json", "inference/config.json"):
            (
                self.source / name
            ).unlink()  # every file is half a dozen system calls; tokenizer_config and encoding/ stay
        self.whole = ["convert", str(self.source), str(self.output), *options]
        self.commands = [[*self.whole, share] for share in SHARES] if shared else [self.whole]
        if before is not None:
            assert run([["convert", str(self.source), str(self.start), *before]], Fault()).code == 0
        self.source_before = contents(self.source)
        self.reset()
        first = run([[*self.whole, "-q"]], Fault())  # fills the tables of the cast, which every fork then has
        assert first.code == 0, first.words
        self.in_flight = first.in_flight
        self.reset()
        self.clean = run(self.commands, Fault())
        assert self.clean.code == 0, self.clean.words
        self.expected = contents(self.output)
        self.violations: list[str] = []
        self.points = 0

    def reset(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.output)

    def complain(self, what: str, fault: Fault, ending: Ending) -> None:
        self.violations.append(
            f"{fault.kind} at {fault.at} of {fault.calls}: {what} (exit {ending.code}: {ending.words})"
        )

    def check_visible(self, fault: Fault, ending: Ending) -> None:
        """Nothing under a final name is anything but complete; what loaders look for comes last."""
        found = {
            name: digest for name, digest in contents(self.output).items() if not Path(name).name.startswith(PREFIX)
        }
        older = contents(self.start) if self.start.exists() else {}
        for name, digest in found.items():
            if digest not in (self.expected.get(name), older.get(name)):
                self.complain(f"{name} is incomplete", fault, ending)
        for last in (INDEX, "config.json"):
            models = [model for model in (self.expected, older) if last in found and found[last] == model.get(last)]
            if models and not any(self.is_whole(found, model, last) for model in models):
                self.complain(f"{last} is there without all that it stands for", fault, ending)

    def is_whole(self, found: dict[str, str], model: dict[str, str], last: str) -> bool:
        """Whether a folder has what must be there with the index (all shards) or the config (everything else)."""
        needs = [name for name in model if name.endswith(".safetensors") or last == "config.json"]
        return all(found.get(name) == model[name] for name in needs if not Path(name).name.startswith(PREFIX))

    def check_recovery(self, fault: Fault, ending: Ending) -> None:
        """The same commands end in the same bytes and leave nothing else; of parts, so does one for the rest."""
        again = run(self.commands if fault.at % 2 else [self.whole], Fault())
        if again.code != 0:
            self.complain(f"the next run ended with {again.code}: {again.words}", fault, ending)
        elif contents(self.output) != self.expected:
            names = set(contents(self.output).items()) ^ set(self.expected.items())
            self.complain(f"the next run wrote something else: {sorted(name for name, _ in names)}", fault, ending)
        if contents(self.source) != self.source_before:
            self.complain("the source was changed", fault, ending)

    def sweep(self, kind: str, calls: tuple[str, ...]) -> None:
        """Let one fault happen at each of the calls that the undisturbed run made, one run each."""
        for at in range(sum(call in calls for call in self.clean.calls)):
            self.reset()
            fault = Fault(at, kind, calls)
            ending = run(self.commands, fault)
            self.points += 1
            killed = kind in ("kill", "torn")
            if killed != (ending.code == KILLED):
                self.complain("the fault did not happen" if killed else "killed", fault, ending)
            if kind in SIGNALS:
                self.check_interrupted(fault, ending)
            elif not killed:
                self.check_error(fault, ending)
            self.check_visible(fault, ending)
            self.check_recovery(fault, ending)

    def check_error(self, fault: Fault, ending: Ending) -> None:
        """A refused call ends in exit code 4, a message and no temporary file; an fsync is not tried again.

        The system names the file of a call that has its path, the program that of one with a descriptor.
        """
        if ending.code != 4 or not is_error(ending.words):
            self.complain("expected exit code 4 and a message", fault, ending)
        struck = [call for call in ending.calls if call in fault.calls][fault.at]
        if struck in BY_DESCRIPTOR and str(self.output.parent) not in ending.words:
            self.complain(f"no file is named by a failing {struck}", fault, ending)
        if self.output.exists() and list(self.output.rglob(f"{PREFIX}*.part")):
            self.complain("a temporary file was left", fault, ending)
        if fault.calls == ("fsync",) and sum(call == "fsync" for call in ending.calls) > fault.at + 1:
            self.complain("went on to fsync after one had failed", fault, ending)

    def check_interrupted(self, fault: Fault, ending: Ending) -> None:
        """A signal ends in 128 plus its number and says how to go on, and what was begun is removed.

        One that comes when only the last file is left to write changes nothing.
        """
        struck = [i for i, call in enumerate(ending.calls) if call in fault.calls][fault.at]
        left = self.clean.calls.count("replace") - ending.calls[:struck].count("replace")
        if ending.code == 0 and left <= 1:
            return
        if ending.code != 128 + SIGNALS[fault.kind] or "Run the same command again" not in ending.words:
            self.complain("expected a hint how to continue", fault, ending)
        if self.output.exists() and list(self.output.rglob(f"{PREFIX}*.part")):
            self.complain("a temporary file was left", fault, ending)

    def short_writes(self) -> None:
        """Every write does half of what it is asked: same bytes."""
        self.reset()
        fault = Fault(short=True)
        ending = run(self.commands, fault)
        self.points += 1
        if ending.code != 0 or contents(self.output) != self.expected:
            self.complain("short writes changed the result", fault, ending)


SWEEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kill": ("kill", CHANGING),
    "torn": ("torn", ("write", "pwrite")),
    "disk_full": ("ENOSPC", ("open", "write", "pwrite", "allocate", "mkdir")),
    "bad_disk": ("EIO", ("fsync",)),
    "interrupt": ("SIGINT", CHANGING),
    "terminate": ("SIGTERM", ("replace",)),  # what differs from SIGINT is the exit code
    "forbidden": ("EACCES", ("open", "replace", "mkdir")),
}


def main() -> None:
    work, sweep, *options = sys.argv[1:]
    torch.set_num_threads(1)
    signals.prepare()
    before, shared = None, options[-1:] == ["--shared"]
    pipeline.BLOCK_BYTES = 2**13  # the shards are small: many writes in spite of that
    if options[-1:] == ["--direct"]:
        files.WRITE_BYTES = files.DIRECT_BYTES = 2**13
    if options[-1:] == ["--slow-hash"]:
        sha256.algorithm = lambda: sha256.Algorithm(SlowSha256)
        SlowSha256.wanted = int(options[options.index("--max-workers") + 1])
    options = [option for option in options if option not in ("--shared", "--direct", "--slow-hash")]
    if "--before" in options:
        cut = options.index("--before")
        before, options = options[cut + 1 :], options[:cut]
    lab = Lab(Path(work), options, before, shared)
    if sweep == "short":
        lab.short_writes()
    else:
        lab.sweep(*SWEEPS[sweep])
    found = {"points": lab.points, "in_flight": lab.in_flight, "violations": lab.violations}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
