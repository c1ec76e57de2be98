"""Runs one `dsv4` command line as N ranks, as torchrun does, without importing torch again for every one of them.

One JSON object a line on stdin: arguments, number of ranks, folder, environment, `kill`, which says at the how many-th
call of which function of which module a rank is killed, and `weights_bytes`, how many bytes of weights `dsv4 run` may
keep in memory. Each rank is a fork with a launcher's environment; when one fails, the others are terminated. The answer
is a JSON list of exit codes; what rank i printed is in `stdout.i` and `stderr.i`.
"""

import contextlib
import importlib
import io
import json
import os
import random
import signal
import socket
import sys
import traceback
from typing import Any

import torch
import torch.distributed

from dsv4 import cli
from dsv4.commands.run import placement

TERMINATED = 128 + signal.SIGTERM


def free_port() -> int:
    """A port below those that the system gives to others meanwhile: it stays free until rank 0 listens there."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def kill_at(module: str, function: str, call: int) -> None:
    """Have this process killed when a function is called for the n-th time."""
    home = importlib.import_module(module)
    original, calls = getattr(home, function), iter(range(1, call + 1))

    def deadly(*arguments: Any, **more: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    setattr(home, function, deadly)


def rank(job: dict[str, Any], index: int, port: int) -> int:
    """One rank, from its environment to its exit code."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE=str(job["ranks"]),
        LOCAL_RANK=str(index), LOCAL_WORLD_SIZE=str(job["ranks"]),
    )  # fmt: skip
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}.{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    if str(index) in job["kill"]:
        kill_at(*job["kill"][str(index)])
    if job["weights_bytes"] is not None:
        placement.memory_for_weights = lambda *_: (job["weights_bytes"], 0)
    sys.argv = ["dsv4", *job["arguments"]]
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def start(job: dict[str, Any], index: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = rank(job, index, port)
    except BaseException:  # as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> list[int]:
    """All ranks; terminated ones are reported by what they exit with, or as a shell does."""
    port = free_port()
    children = [start(job, index, port) for index in range(job["ranks"])]
    codes: dict[int, int] = {}
    failed = False
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] and not failed:
            failed = True
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [TERMINATED if codes[child] == -signal.SIGTERM else codes[child] for child in children]


def main() -> None:
    """Serve until stdin ends. The commands do not wait for the disk."""
    os.fsync = lambda descriptor: None
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(["convert", "--help"])  # makes the command-line library import what it needs
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
