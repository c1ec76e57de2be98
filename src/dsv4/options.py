"""What a command line can carry: options that several commands share, and how a command declares its own.

A command declares its arguments and options as the fields of a frozen dataclass, each as Typer declares a parameter,
and `command` hands the filled dataclass to the function that does the work:

    @dataclass(frozen=True, kw_only=True)
    class CopyOptions:
        source: Annotated[str, typer.Argument(parser=named, metavar="SOURCE", help="The folder to copy.")]
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
        json: Json = False

        def __post_init__(self) -> None:
            ...  # raise UsageError for options that contradict each other

    @command
    def copy(options: CopyOptions) -> None:
        ...  # the docstring is the help

The order of the fields is the order in `--help`. One more option is one more field, and no function has to list them.
"""

import functools
import os
import shlex
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo


def command(work: Callable[[Any], None]) -> Callable[..., None]:
    """Turn a function of one dataclass into a function that Typer reads as a command.

    Its keyword parameters are the dataclass's fields, with their annotations and defaults; its name and docstring are
    those of `work`. The field types are evaluated at import: name no class that only type checkers import.
    """
    hints = get_type_hints(work)
    hints.pop("return", None)
    (options,) = hints.values()
    annotations = get_type_hints(options, include_extras=True)

    @functools.wraps(work)
    def from_command_line(**values: Any) -> None:
        work(options(**values))

    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in fields(options)
    ]
    from_command_line.__annotations__ = annotations
    from_command_line.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return from_command_line


def as_typed(name: str, options: Any) -> str:
    """The command line that gives these options, for reports. Defaults are left out, and so are keys."""
    words = name.split()
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, (declared, *_) = getattr(options, field.name), hints[field.name].__metadata__
        if value == field.default or field.name in ("token", "api_key"):
            continue
        # Typer keeps the first name of an annotated option as its default.
        option = [str(declared.default)] if isinstance(declared, OptionInfo) else []
        for one in value if isinstance(value, list) else [value]:
            words += [*option, *([] if one is True else [str(one)])]
    return shlex.join(words)


def named(text: str) -> str:
    """What names a folder, repository or file on the command line: an empty one is a script's unset variable."""
    if not text:
        raise typer.BadParameter("it is empty.")
    return text


def as_text(text: str) -> str:
    """An argument that is text. Where the locale is not UTF-8, Python passes bytes it cannot decode as surrogates."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def as_folder(text: str) -> Path:
    """A path that was named. `Path("")` would be the folder you are in."""
    return Path(named(text))


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more of what happens.")]
MaxWorkers = Annotated[
    int | None,
    typer.Option("--max-workers", metavar="N", min=1, help="Number of worker threads. Default: one per core."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Limit of the process's memory, such as 8GB."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a repository.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", parser=as_folder, metavar="FOLDER", help="Cache of the hub library, if not the default one."
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", metavar="TOKEN", help="Access token, if not from the environment or the hub's own login."),
]
Scratch = Annotated[
    int, typer.Option("--scratch", min=1, metavar="N", help="Shards of a repository that are on disk at once.")
]


def example(*lines: str) -> str:
    """The epilog of a command's help: one example a line, kept unwrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
