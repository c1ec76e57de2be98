"""`dsv4 demo [FOLDER]`: the whole program on a small checkpoint, made on the spot."""

import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dsv4 import endings, output
from dsv4.errors import UsageError
from dsv4.options import as_folder, example

EPILOG = example("dsv4 demo", "dsv4 demo ./demo", "dsv4 demo --edition v4.1")


def _steps(folder: Path) -> list[list[str]]:
    """The commands of the demo, in order, as one would type them."""
    source, converted = str(folder / "source"), str(folder / "fp8")
    return [
        ["inspect", source],
        ["convert", source, converted],
        ["verify", source, converted, "--report", str(folder / "report.html")],
        ["run", source, "-p", "What changed?", "--compare", converted],
    ]


def _check_folder(folder: Path | None) -> None:
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder", "Name a new folder for the demo.")


def _make_folder(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="dsv4-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def demo(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(parser=as_folder, metavar="FOLDER", help="Folder for all files. Default: a new temporary one."),
    ] = None,
    edition: Annotated[
        str,
        typer.Option(
            "--edition", metavar="NAME", help="Edition that the small checkpoint imitates: v4, 0731, v4.1, ..."
        ),
    ] = "v4",
) -> None:
    """Make a small checkpoint, convert it, prove it and run both; every command is shown as it runs."""
    _check_folder(folder)
    from dsv4.convert.synthetic.checkpoint import EDITIONS, make_checkpoint  # imports torch: after the folder's check

    if edition not in EDITIONS:
        raise UsageError(f"--edition {edition}: the demo has no such edition", f"It has {', '.join(EDITIONS)}.")
    out = output.configure()
    place = _make_folder(folder)
    out.say(f"A small checkpoint in the release's format, random weights: {place / 'source'}")
    make_checkpoint(place / "source", geometry=EDITIONS[edition])
    for step in _steps(place):
        out.say()
        out.say(f"$ dsv4 {shlex.join(step)}")
        code = endings.run(context.find_root().command, step)
        if code:
            raise typer.Exit(code)
    out.say()
    out.say(f"Everything is in {place}; open {place / 'report.html'} in a browser.")
    out.hint("next: dsv4 convert hf:deepseek-ai/DeepSeek-V4-Flash ./Flash-FP8 --dry-run")
