"""`dsv4 doctor`: checks whether an engine reads a folder right, by the rules that dsv4 has for it."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output
from dsv4.convert.plan.engines import EngineName
from dsv4.errors import EXIT_DIFFERENCE
from dsv4.options import Json, Quiet, example, named
from dsv4.text import wrapped

if TYPE_CHECKING:
    from dsv4.convert.doctor.rules import Check, Diagnosis

WIDTH = 80


def _print_check(out: output.Output, check: "Check") -> None:
    head = f"{check.status:9}{check.rule:21}"
    indent = " " * len(head)
    out.lines(wrapped(check.text, WIDTH, head, indent))
    if check.status != "ok":
        out.lines(wrapped(check.fix, WIDTH, indent, indent))


def _print_verdict(out: output.Output, diagnosis: "Diagnosis") -> None:
    engine, evidence = diagnosis.engine, diagnosis.evidence
    verdicts = {
        True: f"The folder fits every rule for {engine}.",
        False: f"The folder does NOT fit the rules for {engine}.",
        None: f"The folder has something that no rule for {engine} covers.",
    }
    out.text()
    out.text(verdicts[diagnosis.loads])
    rules = f"Rules: {evidence} ({evidence.executed})." if evidence else "Rules: not checked by running the engine."
    out.lines(wrapped(rules, WIDTH))
    for command in dict.fromkeys(check.command for check in diagnosis.checks if check.command):
        out.text(f"  {command}")  # one line, however long, so that it can be pasted


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
    """Check whether a folder fits every rule that dsv4 has for an engine, and say what to change if not.

    Exit code 0 if it does, 1 if it does not or if no rule covers it. The verdict says how the rules were checked.
    """
    out = output.configure(json, quiet)
    from dsv4.convert.hub.source import require_folder

    require_folder(folder)
    from dsv4.convert.doctor.rules import diagnose

    with out.opening() as headers:
        diagnosis = diagnose(folder, engine, tensor_parallel, headers)
    out.result(diagnosis.to_json())
    for check in diagnosis.checks:
        _print_check(out, check)
    _print_verdict(out, diagnosis)
    if not diagnosis.loads:
        raise typer.Exit(EXIT_DIFFERENCE)
    here = shlex.join(["dsv4", "run", folder, "-p", "Hello"])
    out.hint(f"start it: {diagnosis.start}" if diagnosis.start else f"try it here first: {here}")


EPILOG = example(
    "dsv4 doctor ./Flash-FP8 --for vllm",
    "dsv4 doctor ./Flash-FP8 --for sglang --tensor-parallel 8",
    "dsv4 doctor ./Flash-mp8 --for reference",
)
