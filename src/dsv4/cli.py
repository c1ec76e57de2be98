"""The `dsv4` command: names the subcommands, and turns every ending into a message and an exit code.

Each subcommand lives in `commands/<name>.py`. Those modules import only the standard library and Typer at the top
and the heavy packages inside the command, so that `dsv4 --help` answers at once.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from dsv4 import __version__, output
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
    Interrupted,
    MachineError,
    UsageError,
    printable,
)

SECONDS_UNTIL_ASKED_AGAIN = 0.05
SECONDS_OF_ASKING = 0.6  # so long may an interrupt be put off; together with the rest it is a second
# Of imports (torch swallows what is raised while it imports numpy), and of weak references.
SWALLOWING = ("<frozen importlib._bootstrap>", weakref.__file__)
LOCKING = ("acquire", "release", "__enter__", "__exit__")  # functions of any module
WAITING = ("wait", "join", "_wait_for_tstate_lock")  # those of `threading` that an exception may leave
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


def _interrupt_behind(error: BaseException | None) -> Interrupted | None:
    """The interrupt that an error came of: raised inside of a lock, one comes out as a lock that nobody holds."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error


def _report_unexpected(error: Exception) -> int:
    """A bug, unless it is an interrupt, the system's error, or a library's way to say that there is no memory."""
    explained = _interrupt_behind(error) or (explain_os_error(error) if isinstance(error, OSError) else None)
    if explained is not None:
        output.current().error(explained)
        return explained.exit_code
    if isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in NO_MEMORY):
        return _report_no_memory()
    return _report_bug(error)


def _swallowed(frame: FrameType | None) -> bool:
    """Whether an exception would get no further than the import or the callback that is going on."""
    while frame is not None and frame.f_code.co_filename not in SWALLOWING:
        frame = frame.f_back
    return frame is not None


def _locking(frame: FrameType | None) -> bool:
    """Whether a lock is just being taken or let go: raised there, an exception leaves it locked for ever, and whatever
    needs it next, a thread that is to be waited for, hangs. Waiting itself, which may take long, can be broken off."""
    if frame is None:
        return False
    name, file = frame.f_code.co_name, frame.f_code.co_filename
    return name in LOCKING or (file == threading.__file__ and name not in WAITING)


def _on_signal(number: int, frame: FrameType | None, since: float | None = None) -> None:
    error = Interrupted("interrupted", "Run the same command again.")
    if number == signal.SIGTERM:
        error.exit_code = EXIT_TERMINATED
    if not _swallowed(frame) and not _locking(frame):
        raise error
    # Ask again in a moment, but do not wait for ever.
    since = time.monotonic() if since is None else since
    if time.monotonic() - since >= SECONDS_OF_ASKING:
        output.current().error(error)
        os._exit(error.exit_code)
    signal.signal(signal.SIGALRM, lambda _, later: _on_signal(number, later, since))
    signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_ASKED_AGAIN)


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


def _ignore_signals() -> None:
    """The command is over: an interrupt, also one that was put off, has nothing left to interrupt."""
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Entry point of the `dsv4` script and of `python -m dsv4`."""
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    try:
        code = run()
        _ignore_signals()
    except Interrupted as error:  # it came after the last word, or while another error was told
        code = error.exit_code
        _ignore_signals()
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _leave(code)
    sys.exit(code)
