"""`dsv4 doctor`: will an engine load a folder and compute the right thing?"""

import shlex
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output
from dsv4.convert.plan.engines import EngineName
from dsv4.errors import EXIT_DIFFERENCE, printable
from dsv4.opening import opening
from dsv4.options import Json, Quiet, example, named

if TYPE_CHECKING:
    from dsv4.convert.doctor.rules import Check

WIDTH = 80


def _print(out: output.Output, check: "Check") -> None:
    head = f"{check.status:9}{check.rule:21}"
    indent = " " * len(head)
    wrap = textwrap.TextWrapper(WIDTH, head, indent, break_long_words=False, break_on_hyphens=False)
    for line in wrap.wrap(check.text):
        out.text(line)
    if check.status != "ok" and check.fix:
        wrap.initial_indent = indent
        for line in wrap.wrap(check.fix):
            out.text(line)


def _verdict(out: output.Output, engine: str, checks: "tuple[Check, ...]", loads: bool | None) -> None:
    out.text()
    if loads:
        how = ", started as said above" if any(check.rule == "start" for check in checks) else ""
        out.text(f"{engine} will load it and compute the right thing{how}.")
        return
    if loads is None:
        out.text(f"Nobody has shown that {engine} loads this and computes the right thing.")
    else:
        out.text(f"{engine} will NOT load this as it is and compute the right thing.")
    for command in dict.fromkeys(check.command for check in checks if check.command):
        out.text(f"  {command}")  # one line, however long: it is there to be pasted


def doctor(
    folder: Annotated[
        str, typer.Argument(parser=named, metavar="OUTPUT", help="Folder of a checkpoint, converted or not.")
    ],
    engine: Annotated[EngineName, typer.Option("--for", help="The engine that is to load it.")],
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", metavar="N", min=1, help="Also check the split over N ranks.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether an engine will load a folder and compute the right thing, and what to change if not.

    Exit code 0 if it will, 1 if not or if that is not known.
    """
    out = output.configure(json, quiet)
    from dsv4.convert.doctor.rules import diagnose

    with opening(out) as headers:
        diagnosis = diagnose(folder, engine, tensor_parallel, headers)
    out.result(diagnosis.to_json())
    for check in diagnosis.checks:
        _print(out, check)
    _verdict(out, engine, diagnosis.checks, diagnosis.loads)
    if not diagnosis.loads:
        raise typer.Exit(EXIT_DIFFERENCE)
    here = shlex.join(["dsv4", "run", folder, "-p", "Hello"])
    out.hint(f"start it: {diagnosis.start}" if diagnosis.start else f"try it here first: {printable(here)}")


EPILOG = example(
    "dsv4 doctor ./Flash-FP8 --for vllm",
    "dsv4 doctor ./Flash-FP8 --for sglang --tensor-parallel 8",
    "dsv4 doctor ./Flash-mp8 --for reference",
)
