"""The `dsv4` command: names the subcommands, and turns every ending into a message and an exit code.

Each subcommand lives in `commands/<name>.py`. Those modules import only the standard library and Typer at the top
and the heavy packages inside the command, so that `dsv4 --help` answers at once.
"""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from dsv4 import __version__, output, signals
from dsv4.commands import convert, demo, doctor, download, encode, env, inspect, verify
from dsv4.commands.run import command as run_command
from dsv4.distributed import launched
from dsv4.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Dsv4Error,
    InputError,
    MachineError,
    UsageError,
    printable,
)

# What torch's allocators, Python's threads and the dynamic loader say when memory is refused: none raises MemoryError.
NO_MEMORY = ("allocate memory", "out of memory", "can't start new thread", "failed to map segment", "bad_alloc")

app = typer.Typer(
    name="dsv4",
    help="Convert DeepSeek-V4 checkpoints without changing a value, prove it, and run them.",
    epilog="Exit codes: 0 done or identical, 1 different, 2 wrong usage, 3 bad input, 4 the machine said no.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsv4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


class _Command(typer.core.TyperCommand):
    """A command whose usage line names its arguments plainly, `SOURCE [OUTPUT]`, as every manual does."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without Typer's braces around what is required."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


# What `dsv4 --help` says of each: short enough for one line of 80 columns.
for _module, _function, _help in (
    (demo, demo.demo, "See it all on a small checkpoint, made on the spot."),
    (inspect, inspect.inspect, "Show what is in a checkpoint, from its headers alone."),
    (download, download.download, "Fetch a checkpoint from a hub and check every byte."),
    (convert, convert.convert, "Convert a checkpoint without changing a value."),
    (verify, verify.verify, "Prove that two checkpoints hold the same model."),
    (run_command, run_command.run, "Answer prompts, or compare the logits of two checkpoints."),
    (doctor, doctor.doctor, "Say whether an engine will load a folder, and how."),
    (encode, encode.encode, "Print the exact prompt that messages become."),
    (env, env.env, "Show versions, devices, memory and disks."),
):
    app.command(_function.__name__, cls=_Command, short_help=_help, epilog=_module.EPILOG)(_function)


def explain_os_error(error: OSError) -> Dsv4Error:
    """What the operating system refused, as an error with the right exit code and something to do about it."""
    where = printable(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    text = f"{where}: {error.strerror}" if where else (error.strerror or str(error))
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return InputError(text, "Check the path.")
    hints = {
        errno.ENOSPC: "Free some disk space and run the same command again: finished files are kept.",
        errno.EDQUOT: "The disk quota is used up. Free some space and run the same command again.",
        errno.EFBIG: "The file size limit (ulimit -f) or the file system does not allow a file this large.",
        errno.EACCES: "Check the permissions of the folder.",
        errno.EROFS: "The file system is read-only. Choose another folder.",
        errno.ENOMEM: "Lower --max-memory or --max-workers.",
        errno.EIO: "The disk reports an error. Check it before you trust anything on it.",
    }
    return MachineError(text, hints.get(error.errno or 0, ""))


def _report_bug(error: BaseException) -> int:
    if os.environ.get("DSV4_DEBUG"):
        traceback.print_exception(error)
    text = printable(f"{type(error).__name__}: {error}")
    output.current().error(
        Dsv4Error(f"this is a bug in dsv4: {text}", "Please report it with the traceback that DSV4_DEBUG=1 shows.")
    )
    return EXIT_BUG


def _report_no_memory() -> int:
    output.current().error(MachineError("out of memory", "Lower --max-memory or --max-workers."))
    return MachineError.exit_code


def _report_unexpected(error: Exception) -> int:
    """A bug, unless it is the system's error, or a library's way to say that there is no memory."""
    if isinstance(error, OSError):
        explained = explain_os_error(error)
        output.current().error(explained)
        return explained.exit_code
    if isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in NO_MEMORY):
        return _report_no_memory()
    return _report_bug(error)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` is asked for, known before the command line is understood, and also if it never will be."""
    return "--json" in arguments[: arguments.index("--") if "--" in arguments else None]


def _report_usage(wrong: BaseException | None) -> None:
    """What Typer found wrong with the command line, as the JSON object if one was asked for. The words are printed."""
    if wrong is not None and hasattr(wrong, "format_message"):
        context = getattr(wrong, "ctx", None)
        hint = f"Try: {context.command_path} --help" if context is not None else "Try: dsv4 --help"
        output.current().result({"error": wrong.format_message(), "hint": hint, "exit_code": EXIT_USAGE})


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Nothing that a user can cause ends in a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    ranks = None
    with contextlib.suppress(UsageError):  # the command itself says what is wrong with the launcher's variables
        ranks = launched()
    output.configure(json_mode=_wants_json(arguments), ranks=ranks)
    try:
        app(args=arguments)
    except SystemExit as error:
        if error.code == EXIT_USAGE:
            _report_usage(error.__context__)
        return error.code if isinstance(error.code, int) else EXIT_DONE
    except output.ClosedPipe as error:
        return error.exit_code
    except Dsv4Error as error:
        if os.environ.get("DSV4_DEBUG"):
            traceback.print_exception(error)
        output.current().error(error)
        return error.exit_code
    except MemoryError:
        return _report_no_memory()
    except Exception as error:  # the one place where a bug becomes exit code 70
        return _report_unexpected(error)
    return EXIT_DONE


def _leave(code: int) -> NoReturn:
    """End the process without taking the interpreter and torch apart, which alone takes half a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> None:
    """Entry point of the `dsv4` script and of `python -m dsv4`."""
    signals.prepare()
    code = run()
    signals.end_work()
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _leave(code)
    sys.exit(code)
