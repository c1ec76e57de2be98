"""Starts a probe in an engine's interpreter, waits for it, and reads its answer.

Whatever goes wrong on the way there (no interpreter, no package, a crash, no memory, too long, no answer) is a
MachineError. An exception that the engine raised over the folder is part of the answer.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.errors import MachineError
from dsv4.progress import SECONDS_BETWEEN_CALLS, Progress

PROBES = Path(__file__).parent / "probes"
LINES_SHOWN = 8  # of what a process that failed printed last
SECONDS_TO_END = 5.0
# of the engine, where its code is another than the probe knows
OTHER_CODE = (
    "AttributeError",
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "NotImplementedError",
    "TypeError",
)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Raised:
    """An exception of the engine: at which stage, its type and message, and the place in the engine's files."""

    stage: str
    type: str
    message: str
    where: str


@dataclass(frozen=True)
class Held:
    """A weight in the engine's memory, by the release's name. loaded: False if it is what it was before loading."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    elements: tuple[float, ...]
    loaded: bool


@dataclass(frozen=True)
class Answer:
    """What a probe found: the engine's version, the classes that it chose, its exception or None, and its weights."""

    version: str
    choices: dict[str, str]
    raised: Raised | None
    weights: dict[str, Held]


def interpreter(python: str) -> str:
    """The absolute path of an interpreter that was named by path or by name. Raises MachineError if there is none."""
    found = shutil.which(python)
    if found is None:
        kind = "is no program that can be run" if Path(python).exists() else "does not exist"
        raise MachineError(f"--python {python} {kind}", "Name the Python that has the engine, such as venv/bin/python.")
    return os.path.abspath(found)  # not resolved: a link in venv/bin tells Python its packages


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(SECONDS_TO_END)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def _wait(process: "subprocess.Popen[bytes]", seconds: float, progress: Progress) -> int | None:
    """The return code; None if it takes longer than `seconds`. `progress(0)` is called meanwhile."""
    last = time.monotonic() + seconds
    try:
        while time.monotonic() < last:
            try:
                return process.wait(SECONDS_BETWEEN_CALLS)
            except subprocess.TimeoutExpired:
                progress(0)
        return process.poll()  # it may have ended while this process was stopped
    finally:
        _end(process)


def _tail(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip()][-LINES_SHOWN:]


def _failed(python: str, code: int, log: Path) -> MachineError:
    """The error for a process that ended without an answer."""
    printed = _tail(log)
    if code == -signal.SIGKILL or any("MemoryError" in line for line in printed):
        hint = "It takes as much memory as the tensors that it loads: leave out --all, or use a larger machine."
        return MachineError(f"{python} ran out of memory, or was killed", hint, printed)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return MachineError(
            f"{python} crashed ({name})", "The engine's installation may not fit this machine.", printed
        )
    hint = "Is it a Python of version 3.10 or newer with the engine installed?"
    return MachineError(f"{python} ended with code {code} and no answer", hint, printed)


def run(python: str, request: dict[str, Any], folder: Path, seconds: float, progress: Progress) -> Any:
    """Run the probe that the request names; what it wrote, parsed. Raises MachineError if it wrote nothing of use."""
    asked, answered, log = folder / "request.json", folder / "answer.json", folder / "log"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [python, str(PROBES), str(asked), str(answered)]
    with open(log, "wb") as printed:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, cwd=folder, start_new_session=True,
                env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        except OSError as error:
            raise MachineError(f"--python {python} does not start: {error.strerror}") from None
        code = _wait(process, seconds, progress)
    if code is None:
        raise MachineError(f"{python} did not finish within {seconds:g} s", "--timeout gives it longer.", _tail(log))
    if code != 0 or not answered.is_file():
        raise _failed(python, code, log)
    try:
        return json.loads(answered.read_text(encoding="utf-8"))
    except ValueError:
        raise MachineError(f"{python} answered with something that is not JSON", "", _tail(log)) from None


def parse(found: Any, python: str) -> tuple[Answer, bool]:
    """The answer, and whether its exception was raised in the probe itself. Raises MachineError for another shape."""
    try:
        weights = {
            name: Held(
                held["dtype"], tuple(held["shape"]), held["sha256"], tuple(map(float, held["elements"])), held["loaded"]
            )
            for name, held in found["weights"].items()
        }
        error = found["error"]
        raised = error and Raised(found["stage"], error["type"], error["message"], error["where"])
        return Answer(found["version"], dict(found["choices"]), raised, weights), bool(error and error["in_probe"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MachineError(f"{python} answered with something that is not a probe's answer") from None


def check_is_about_the_folder(answer: Answer, title: str, tried: Sequence[str], python: str, in_probe: bool) -> None:
    """Raise MachineError for an exception that says nothing about the folder: of the import, or of another version."""
    raised = answer.raised
    if raised is None:
        return
    said = f"{raised.type}: {raised.message}"
    if raised.stage == "import" and not answer.version:
        raise MachineError(f"{python} has no {title}: {said}", "Name the Python in which the engine is installed.")
    known = answer.version.split("+")[0] in tried
    other = raised.type in OTHER_CODE and not known
    if raised.stage in ("import", "reading back") or in_probe or other:
        version = f"{title} {answer.version}"
        hint = f"dsv4's script was tried with {title} {', '.join(tried)}."
        raise MachineError(f"{version} cannot be driven here ({raised.stage}): {said}", hint, [raised.where])
    if raised.type == "MemoryError" or "can't allocate memory" in raised.message:
        raise MachineError(f"{python} ran out of memory: {said}", "Leave out --all, or use a larger machine.")
