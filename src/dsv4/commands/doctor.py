"""`dsv4 doctor`: checks whether an engine reads a folder right, by dsv4's rules and by the engine's own loader."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output
from dsv4.convert.plan.engines import EngineName
from dsv4.errors import EXIT_DIFFERENCE, UsageError
from dsv4.options import Json, Quiet, example, named

if TYPE_CHECKING:
    from dsv4.convert.doctor.context import Check
    from dsv4.convert.doctor.diagnosis import Diagnosis
    from dsv4.referee.loaders.loader import Loaded, Wanted


def _print_check(out: output.Output, check: "Check") -> None:
    head = f"{check.status:9}{check.rule:21}"
    indent = " " * len(head)
    out.paragraph(check.text, head, indent)
    if check.status != "ok":
        out.paragraph(check.fix, indent, indent)


def _print_rules(out: output.Output, diagnosis: "Diagnosis") -> None:
    engine, evidence = diagnosis.engine, diagnosis.evidence
    verdicts = {
        True: f"The folder fits every rule for {engine}.",
        False: f"The folder does NOT fit the rules for {engine}.",
        None: f"The folder has something that no rule for {engine} covers.",
    }
    out.text(verdicts[diagnosis.loads])
    rules = f"Rules: {evidence} ({evidence.executed})." if evidence else "Rules: not checked by running the engine."
    out.paragraph(rules)


def _print_loaded(out: output.Output, diagnosis: "Diagnosis", loaded: "Loaded") -> None:
    if diagnosis.loads:
        verdict = f"{loaded.engine} loads the folder and holds its values; no kernel and no forward pass ran."
    elif loaded.right:
        verdict = f"{loaded.engine} holds the folder's values, but something else does NOT fit: see above."
    else:
        verdict = f"{loaded.engine} does NOT load the folder right."
    out.paragraph(verdict)


def _print(out: output.Output, diagnosis: "Diagnosis", loaded: "Loaded | None") -> None:
    for check in diagnosis.checks:
        _print_check(out, check)
    out.text()
    if loaded is None:
        _print_rules(out, diagnosis)
    else:
        _print_loaded(out, diagnosis, loaded)
    for command in dict.fromkeys(check.command for check in diagnosis.checks if check.command):
        out.text(f"  {command}")  # one line, however long, so that it can be pasted


def _load(diagnosis: "Diagnosis", wanted: "Wanted", out: output.Output) -> "Loaded | None":
    """Run the engine's loader, unless dsv4 itself cannot read the folder."""
    from dsv4.referee.loaders.loader import load

    if diagnosis.checkpoint is None:
        out.warn("the loader was not run: the folder is not a Hugging Face folder that dsv4 can read")
        return None
    return load(diagnosis.checkpoint, diagnosis.engine, wanted, out)


def doctor(
    folder: Annotated[
        str, typer.Argument(parser=named, metavar="OUTPUT", help="Folder of a checkpoint, converted or not.")
    ],
    engine: Annotated[EngineName, typer.Option("--for", help="The engine that is to load it.")],
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            parser=named,
            metavar="PATH",
            help="The Python that has the engine: also run the engine's own loader on the CPU, and compare values.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="With --python: load all of a large checkpoint, not a sample of it.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", min=1, help="With --python: longest time for the loader. Default: 3600."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", metavar="N", min=1, help="Also check the split over N ranks.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check whether a folder fits every rule that dsv4 has for an engine, and say what to change if not.

    Exit code 0 if it does, 1 if it does not or if no rule covers it. The verdict says how the rules were checked. With
    --python the engine itself loads the folder, and what it holds in memory is compared with the folder's values.
    """
    out = output.configure(json, quiet)
    if python is None and (everything or timeout is not None):
        raise UsageError(f"{'--all' if everything else '--timeout'} belongs to --python", "Name the engine's Python.")
    from dsv4.convert.hub.source import require_folder

    require_folder(folder)
    from dsv4.convert.doctor.diagnosis import diagnose

    with out.opening() as headers:
        diagnosis = diagnose(folder, engine, tensor_parallel, headers)
    loaded = None
    if python is not None:
        from dsv4.referee.loaders.loader import SECONDS, Wanted, combined

        loaded = _load(diagnosis, Wanted(python, everything, timeout or SECONDS), out)
        diagnosis = diagnosis if loaded is None else combined(diagnosis, loaded)
    out.result(diagnosis.to_json() | {"loader": None if loaded is None else loaded.to_json()})
    _print(out, diagnosis, loaded)
    if not diagnosis.loads:
        raise typer.Exit(EXIT_DIFFERENCE)
    here = shlex.join(["dsv4", "run", folder, "-p", "Hello"])
    out.hint(f"start it: {diagnosis.start}" if diagnosis.start else f"try it here first: {here}")


EPILOG = example(
    "dsv4 doctor ./Flash-FP8 --for vllm",
    "dsv4 doctor ./Flash-FP8 --for vllm --python /opt/vllm/bin/python",
    "dsv4 doctor ./Flash-FP8 --for sglang --tensor-parallel 8",
    "dsv4 doctor ./Flash-mp8 --for reference",
)
