"""Runs `dsv4` command lines, each in a process of its own, without importing torch again for every one of them.

One JSON object a line on stdin: arguments, environment, folder, files for stdout and stderr. A fork runs the command;
its exit code is the answer. Only what reads no environment is imported before the fork: the hub libraries are not.
"""

import contextlib
import io
import json
import os
import sys

from dsv4 import cli


def run(job: dict[str, object]) -> int:
    """One command line in this process, from here to its exit code."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["dsv4", *job["arguments"]]
    try:
        cli.main()
    except SystemExit as error:
        return error.code or 0
    return 0


def main() -> None:
    """Serve until stdin ends."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(["convert", "--help"])  # makes the command-line library import what it needs
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 99
            try:
                code = run(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
