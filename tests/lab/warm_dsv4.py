"""Runs `dsv4` command lines, each in a process of its own, without importing torch again for every one of them.

One JSON object a line on stdin: arguments, environment, folder, files for stdout and stderr, and `signal`, null or the
number of the function call in its main thread at which the process sends itself a signal, and the signal's number. A
fork runs the command; the answer is its exit code. Only what reads no environment is imported before the fork: the hub
libraries are not.
"""

import contextlib
import io
import json
import os
import sys

import torch  # noqa: F401

import dsv4.convert.write.run  # noqa: F401
from dsv4 import cli, signals
from dsv4.quant import fp4_to_fp8, fp4_to_fp8_compiled, fp8_to_fp4, to_bf16  # noqa: F401  # all that a conversion needs


def send_at(call: int, number: int) -> None:
    """Send this process a signal when its main thread calls a Python function for the n-th time from here."""
    left = call

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal left
        left -= event == "call"
        if left <= 0:
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    sys.setprofile(count)


def run(job: dict[str, object]) -> int:
    """One command line in this process, from here to its exit code."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["dsv4", *job["arguments"]]
    if job["signal"] is not None:
        send_at(*job["signal"])
    try:
        cli.main()
    except SystemExit as error:
        return error.code or 0
    return 0


def start(job: dict[str, object]) -> int:
    """A fork that runs one command line; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = run(job)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until stdin ends. The commands do not wait for the disk."""
    os.fsync = lambda descriptor: None
    signals.prepare()
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(["convert", "--help"])  # makes the command-line library import what it needs
    for line in sys.stdin:
        job = json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1]), flush=True)


if __name__ == "__main__":
    main()
