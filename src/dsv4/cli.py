"""The `dsv4` command: its subcommands and their one-line help.

Each subcommand lives in `commands/<name>.py`. Those modules import only the standard library and Typer at the top
and the heavy packages inside the command, so that `dsv4 --help` answers at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from dsv4 import __version__, endings, machine, signals
from dsv4.commands import demo, doctor, download, encode, env, inspect, verify
from dsv4.commands.convert import command as convert_command
from dsv4.commands.run import command as run_command
from dsv4.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from dsv4.text import printable

VALIDATOR = "Value error, "  # which Typer's validator puts in front of a message


class _Printable:
    """Typer prints itself what is wrong with arguments, and quotes them. They may be names of files, with any
    characters: those that could act on a terminal are escaped.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer does, with a printable message."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except Exception as error:
            if hasattr(error, "format_message"):
                message = error.message.replace(VALIDATOR, "")  # type: ignore[attr-defined]
                error.message = printable(message)  # type: ignore[attr-defined]
            raise


class _Program(_Printable, typer.core.TyperGroup):
    """`dsv4` itself."""


app = typer.Typer(
    name="dsv4",
    cls=_Program,
    help="Convert DeepSeek-V4 checkpoints without changing a value, prove it, and run them.",
    epilog="Exit codes: 0 done or identical, 1 different, 2 wrong usage, 3 bad input, 4 system error.",
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


class _Command(_Printable, typer.core.TyperCommand):
    """A command whose usage line names its arguments plainly, `SOURCE [OUTPUT]`, as every manual does."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without Typer's braces around required arguments."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


# The one-line help of each command: it fits 80 columns.
for _module, _function, _help in (
    (demo, demo.demo, "See it all on a small checkpoint, made on the spot."),
    (inspect, inspect.inspect, "Show what is in a checkpoint, from its headers alone."),
    (download, download.download, "Fetch a checkpoint from a hub and check every byte."),
    (convert_command, convert_command.convert, "Convert a checkpoint without changing a value."),
    (verify, verify.verify, "Prove that two checkpoints hold the same model."),
    (run_command, run_command.run, "Answer prompts, or compare the logits of two checkpoints."),
    (doctor, doctor.doctor, "Check a folder against an engine's rules."),
    (encode, encode.encode, "Print the exact prompt that messages become."),
    (env, env.env, "Show versions, devices, memory and disks."),
):
    app.command(_function.__name__, cls=_Command, short_help=_help, epilog=_module.EPILOG)(_function)


@cache
def program(declared: typer.Typer) -> Callable[..., object]:
    """The program that declarations make; made once, because making it takes longer than many a command."""
    return typer.main.get_command(declared)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return endings.run(program(app), arguments)


def _open_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed at start: reading ends at once, output is dropped.

    Otherwise the next file to be opened would get the number 0, 1 or 2, and messages would be written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))


def _leave(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown, which takes half a second with torch."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> None:
    """Entry point of `dsv4.__main__`."""
    signals.prepare()
    machine.limit_spinning()
    machine.limit_threads()
    _open_closed_streams()
    code = run(sys.argv[1:])
    signals.end_work()
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _leave(code)
    sys.exit(code)
