"""How a command ends: every error becomes a message and an exit code.

The codes are those of `errors.py`. An error of the operating system gets a hint about what to do; an exception that is
none of the expected ones is a bug in dsv4, with the exit code 70.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence

from dsv4 import output
from dsv4.commands.distributed import torchrun_rank
from dsv4.errors import (
    EXIT_DONE,
    EXIT_USAGE,
    Dsv4Error,
    InputError,
    MachineError,
    UsageError,
)

# Messages of torch's allocators, Python's threads and the dynamic loader when memory is refused: none raises
# MemoryError.
NO_MEMORY = ("allocate memory", "out of memory", "can't start new thread", "failed to map segment", "bad_alloc")

# What to do about an error of the operating system.
HINTS = {
    errno.ENOSPC: "Free some disk space and run the same command again: finished files are kept.",
    errno.EDQUOT: "The disk quota is used up. Free some space and run the same command again.",
    errno.EFBIG: "The file size limit (ulimit -f) or the file system does not allow a file this large.",
    errno.EACCES: "Check the permissions of the file and of its folder.",
    errno.EROFS: "The file system is read-only. Choose another folder.",
    errno.ENOMEM: "Lower --max-memory or --max-workers.",
    errno.EIO: "The disk reports an error. Check it before you trust anything on it.",
}


def explain_os_error(error: OSError) -> Dsv4Error:
    """An error of the operating system as one with an exit code and a hint."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    text = f"{where}: {error.strerror}" if where else (error.strerror or str(error))
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return InputError(text, "Check the path.")
    return MachineError(text, HINTS.get(error.errno or 0, ""))


def explain(error: Exception) -> Dsv4Error:
    """Any exception as an error with a message, a hint and an exit code; an unexpected one is a bug."""
    if isinstance(error, Dsv4Error):
        return error
    if isinstance(error, OSError):
        return explain_os_error(error)
    library_says = str(error) if isinstance(error, RuntimeError | ImportError) else ""
    if isinstance(error, MemoryError) or any(words in library_says for words in NO_MEMORY):
        return MachineError("out of memory", "Lower --max-memory or --max-workers.")
    text = f"this is a bug in dsv4: {type(error).__name__}: {error}"
    return Dsv4Error(text, "Please report it with the traceback that DSV4_DEBUG=1 shows.")


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` is given, found without parsing the command line, which may be wrong."""
    return "--json" in arguments[: arguments.index("--") if "--" in arguments else None]


def _report_usage(wrong: BaseException | None) -> None:
    """Print Typer's error as the JSON object in JSON mode. Typer has printed it as text."""
    if wrong is not None and hasattr(wrong, "format_message"):
        context = getattr(wrong, "ctx", None)
        hint = f"Try: {context.command_path} --help" if context is not None else "Try: dsv4 --help"
        output.current().result({"error": wrong.format_message(), "hint": hint, "exit_code": EXIT_USAGE})


def run(program: Callable[..., object], arguments: Sequence[str]) -> int:
    """Run one command line of the Typer program and return its exit code.

    Nothing that a user can cause ends in a traceback.
    """
    ranks = None
    with contextlib.suppress(UsageError):  # the command reports what is wrong with the launcher's variables
        ranks = torchrun_rank()
    output.configure(json_mode=_wants_json(arguments), ranks=ranks)
    try:
        program(args=arguments)
    except SystemExit as error:
        if error.code == EXIT_USAGE:
            _report_usage(error.__context__)
        return error.code if isinstance(error.code, int) else EXIT_DONE
    except output.ClosedPipe as error:
        return error.exit_code
    except Exception as error:
        if os.environ.get("DSV4_DEBUG"):
            output.current().traceback(error)
        explained = explain(error)
        output.current().error(explained)
        return explained.exit_code
    return EXIT_DONE
