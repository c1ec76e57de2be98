"""The `dsv4` command: names the subcommands, and turns every ending into a message and an exit code.

Each subcommand lives in `command_<name>.py`. Those modules import only the standard library and Typer at the top
and the heavy packages inside the command, so that `dsv4 --help` answers at once.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from dsv4 import (
    __version__,
    command_convert,
    command_demo,
    command_doctor,
    command_download,
    command_encode,
    command_env,
    command_inspect,
    command_run,
    command_verify,
    output,
)
from dsv4.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_TERMINATED,
    Dsv4Error,
    InputError,
    Interrupted,
    MachineError,
    printable,
)

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


app.command("demo", epilog=command_demo.EPILOG)(command_demo.demo)
app.command("inspect", epilog=command_inspect.EPILOG)(command_inspect.inspect)
app.command("download", epilog=command_download.EPILOG)(command_download.download)
app.command("convert", epilog=command_convert.EPILOG)(command_convert.convert)
app.command("verify", epilog=command_verify.EPILOG)(command_verify.verify)
app.command("run", epilog=command_run.EPILOG)(command_run.run)
app.command("doctor", epilog=command_doctor.EPILOG)(command_doctor.doctor)
app.command("encode", epilog=command_encode.EPILOG)(command_encode.encode)
app.command("env", epilog=command_env.EPILOG)(command_env.env)


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


def _on_signal(number: int, frame: FrameType | None) -> None:
    error = Interrupted("interrupted", "Run the same command again to continue: finished files are kept.")
    if number == signal.SIGTERM:
        error.exit_code = EXIT_TERMINATED
    raise error


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Nothing that a user can cause ends in a traceback."""
    output.configure()
    try:
        app(args=arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_DONE
    except output.ClosedPipe as error:
        return error.exit_code
    except Dsv4Error as error:
        if os.environ.get("DSV4_DEBUG"):
            traceback.print_exception(error)
        output.current().error(error)
        return error.exit_code
    except OSError as error:
        explained = explain_os_error(error)
        output.current().error(explained)
        return explained.exit_code
    except MemoryError:
        output.current().error(MachineError("out of memory", "Lower --max-memory or --max-workers."))
        return MachineError.exit_code
    except Exception as error:  # the one place where a bug becomes exit code 70
        return _report_bug(error)
    return EXIT_DONE


def main() -> None:
    """Entry point of the `dsv4` script and of `python -m dsv4`."""
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    sys.exit(run())
