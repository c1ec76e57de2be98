"""Options that several commands share, defined once so that their wording never drifts."""

from pathlib import Path
from typing import Annotated

import typer

from dsv4.errors import UsageError


def named(text: str) -> str:
    """What names a folder, repository or file on the command line: an empty one is a script's unset variable."""
    if not text:
        raise typer.BadParameter("it is empty.")
    return text


def as_folder(text: str) -> Path:
    """A path that was named. `Path("")` would be the folder you are in."""
    return Path(named(text))


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more of what happens.")]
MaxWorkers = Annotated[
    int | None,
    typer.Option("--max-workers", metavar="N", min=1, help="Threads that work at once. Default: one per core."),
]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Bound on working memory, such as 2GB.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a repository.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", parser=as_folder, metavar="FOLDER", help="The hub library's cache, if not where it usually is."
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", metavar="TOKEN", help="Access token, if not from the environment or the hub's own login."),
]
Scratch = Annotated[
    int, typer.Option("--scratch", min=1, metavar="N", help="Shards of a hub's source that are on disk at once.")
]

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """`5GB` -> 5000000000, `512MiB` -> 536870912, `1000` -> 1000; decimal units unless they carry an `i`.

    Raises UsageError for anything else, zero and negative sizes included.
    """
    upper = text.strip().upper()
    digits = upper.rstrip("BKMGTI")
    unit = upper[len(digits) :].strip()
    factor = _UNITS.get(unit, _UNITS.get(unit.removesuffix("B")))
    try:
        size = int(float(digits) * factor) if factor else 0
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"'{text}' is not a size", "Write a number and a unit, such as 5GB, 512MiB or 100000.")
    return size


def example(*lines: str) -> str:
    """The epilog of a command's help: one example a line, kept unwrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
