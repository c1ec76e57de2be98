"""`dsv4 verify`: prove that two checkpoints hold the same model, or that one is sound in itself."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4 import output, signals
from dsv4.commands.verify_words import print_fetches, print_findings, print_kept, print_preview
from dsv4.errors import EXIT_DONE, EXIT_SAMPLE, Interrupted
from dsv4.files import check_writable, result_file
from dsv4.machine import parse_size
from dsv4.options import (
    CacheDir,
    Json,
    MaxMemory,
    MaxWorkers,
    Quiet,
    Revision,
    Scratch,
    Token,
    Verbose,
    as_typed,
    command,
    example,
    named,
)
from dsv4.progress import Reached

if TYPE_CHECKING:
    from dsv4.commands.distributed import Ranks
    from dsv4.convert.proof.files import Files
    from dsv4.convert.proof.result import Verification
    from dsv4.convert.proof.work.settings import Settings

EPILOG = example(
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8",
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8 --inverse --report proof.html",
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8 --tensor 'layers.3.*' --json",
    "dsv4 verify ./Flash-FP8",
    "dsv4 verify hf:deepseek-ai/DeepSeek-V4-Flash hf:somebody/Flash-FP8 --sample 1%",
    "dsv4 verify hf:deepseek-ai/DeepSeek-V4-Flash ms:somebody/Flash-FP8 --dry-run",
    "torchrun --nproc-per-node 4 -m dsv4 verify ./DeepSeek-V4-Pro /shared/Pro-FP8",
)


def _write_report(report: Path, found: dict[str, Any], out: output.Output) -> None:
    from dsv4.convert.proof.report.page import render

    with result_file(report, out.warn_once) as file:
        file.write(render(found).encode())
    out.say(f"wrote {report}")


RUNNABLE = ("model.safetensors.index.json", "model.safetensors", "model0-mp*.safetensors", "model*.gguf")


def _runs(folder: Path) -> bool:
    """Is this a folder that `dsv4 run` takes, rather than a repository?"""
    return any(any(folder.glob(name)) for name in RUNNABLE)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The arguments and options of `dsv4 verify`."""

    source: Annotated[
        str,
        typer.Argument(
            parser=named,
            metavar="SOURCE",
            help="Folder, hf:org/name or ms:org/name to compare with, or check alone.",
        ),
    ]
    converted: Annotated[
        str | None,
        typer.Argument(parser=named, metavar="OUTPUT", help="The conversion: a folder, hf:org/name or ms:org/name."),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Compare headers and configs, say what the rest would take, and stop."),
    ] = False
    tensor: Annotated[str | None, typer.Option("--tensor", metavar="GLOB", help="Only tensors of this name.")] = None
    shard: Annotated[int | None, typer.Option("--shard", metavar="N", min=1, help="Only the N-th shard of OUTPUT.")] = (
        None
    )
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="SHARE", help="Compare a random share of the blocks, such as 1%."),
    ] = None
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which blocks --sample draws.")] = 0
    strict: Annotated[bool, typer.Option("--strict", help="A changed sign of zero is a difference.")] = False
    inverse: Annotated[bool, typer.Option("--inverse", help="Also check that SOURCE can be rebuilt from OUTPUT.")] = (
        False
    )
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the proof as an HTML page.")
    ] = None
    revision: Revision = None
    cache_dir: CacheDir = None
    scratch: Scratch = 2
    token: Token = None
    max_workers: MaxWorkers = None
    max_memory: MaxMemory = None
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


def _check_arguments(options: VerifyOptions) -> None:
    """Raise for a folder that is missing, and for text that names nothing, before torch is imported."""
    from dsv4.convert.hub.source import named_sides
    from dsv4.convert.proof.audit.sample import parse_sample

    named_sides(options.source, options.converted, options.revision)
    parse_sample(options.sample, options.seed)
    if options.max_memory is not None:
        parse_size(options.max_memory)


def _settings(options: VerifyOptions, ranks: "Ranks | None") -> "Settings":
    from dsv4.convert.proof.audit.sample import parse_sample
    from dsv4.convert.proof.plan import Selection
    from dsv4.convert.proof.resume.journal import default_folder
    from dsv4.convert.proof.work.settings import Settings

    return Settings(
        selection=Selection(options.tensor, options.shard),
        sample=parse_sample(options.sample, options.seed),
        strict=options.strict,
        inverse=options.inverse,
        max_workers=options.max_workers or (ranks.workers if ranks else None),
        max_memory=None if options.max_memory is None else parse_size(options.max_memory),
        journals=default_folder(),
    )


@contextmanager
def _opened(options: VerifyOptions, out: output.Output, on_header: Reached) -> "Iterator[list[Files]]":
    """Both sides: folders, or repositories whose shards are fetched into temporary folders. Commits are pinned here."""
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.source import named_sides
    from dsv4.convert.sides import open_sides

    hub = HubOptions(
        options.token, options.cache_dir, options.scratch, warn=out.warn, detail=out.detail, headers=on_header,
        progress=signals.look,
    )  # fmt: skip
    with open_sides(named_sides(options.source, options.converted, options.revision), hub) as sides:
        yield sides


def _compare(options: VerifyOptions, out: output.Output, ranks: "Ranks | None") -> "Verification":
    """Compare, with a progress bar over headers and then one over bytes."""
    from dsv4.convert.proof.run import verify_files
    from dsv4.convert.proof.schedule import UNSHARED, Share

    settings = _settings(options, ranks)
    share = Share(ranks.index, ranks.count, ranks.gather) if ranks else UNSHARED
    with ExitStack() as stack, ExitStack() as before:
        on_header = before.enter_context(out.opening())
        bars: list[output.ProgressBar] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                signals.begin_work()
                before.close()
                bars.append(stack.enter_context(out.progress(total, "verify")))
            bars[0].reach(done, total)

        *source, last = stack.enter_context(_opened(options, out, on_header))
        one, planned, continues = source[0] if source else None, partial(print_fetches, out), partial(print_kept, out)
        return verify_files(one, last, settings, share, on_header, progress, planned, continues)


def _preview(options: VerifyOptions, out: output.Output) -> int:
    """`--dry-run`: print the plan. Returns the exit code."""
    from dsv4.convert.proof.work.preview import preview_files

    with out.opening() as on_header, _opened(options, out, on_header) as sides:
        *source, last = sides
        preview = preview_files(source[0] if source else None, last, _settings(options, None), on_header)
    found = preview.to_json()
    out.result(found)
    print_preview(out, preview, found)
    return preview.exit_code


def _suggest(out: output.Output, result: "Verification", options: VerifyOptions) -> None:
    """The command to try after a good verdict; none for a model that `dsv4 run` does not know."""
    if options.sample is not None:
        return out.hint(f"next: {as_typed('dsv4 verify', replace(options, sample=None, seed=0, report=None))}")
    if not _runs(Path(options.source)) or not result.is_of_known_edition:
        return
    prompt = ["-p", "Hello"] if (Path(options.source) / "tokenizer.json").is_file() else ["--tokens", "0,17,4"]
    words = ["dsv4", "run", options.source, *prompt]
    if options.converted is None:
        out.hint(f"next: {shlex.join(words)}")
    elif _runs(Path(options.converted)):
        out.hint(f"next: {shlex.join([*words, '--compare', options.converted])}")


def _print_and_report(out: output.Output, result: "Verification", options: VerifyOptions) -> None:
    """Print the verdict, then write the page: the verdict is printed even if the disk is full."""
    from dsv4.convert.proof.report.page import made_by

    found = result.to_json() | {"made_by": made_by(as_typed("dsv4 verify", options))}
    out.result(found)
    print_findings(out, result, found)
    if options.report is not None and out.mode != "silent":
        _write_report(options.report, found, out)
    if result.exit_code in (EXIT_DONE, EXIT_SAMPLE):
        _suggest(out, result, options)


@command
def verify(options: VerifyOptions) -> None:
    """Read all of SOURCE and OUTPUT and decide whether they hold the same model.

    It shares no code with `convert` and reads other people's conversions too: the reference converter's
    `model{i}-mp{N}.safetensors`, float32 or E8M0 scales, merged or split shards, `model.` names. With one checkpoint
    only, it checks structure, config, codes and hashes. What is on a hub is streamed, with --scratch shards of each
    side on disk at once; with --sample only parts of shards are fetched.
    """
    from dsv4.commands.distributed import process_group, torchrun_rank

    ranks = torchrun_rank()
    out = output.configure(options.json, options.quiet, options.verbose, ranks)
    if options.report is not None and out.mode != "silent":
        check_writable(options.report)
    _check_arguments(options)
    if options.converted is not None and Path(options.converted).resolve() == Path(options.source).resolve():
        out.warn("SOURCE and OUTPUT are the same folder")
    if options.dry_run:
        raise typer.Exit(_preview(options, out))
    try:
        with process_group(ranks) if ranks else nullcontext():
            result = _compare(options, out, ranks)
            _print_and_report(out, result, options)
            if ranks:
                ranks.barrier()
    except Interrupted as error:
        if not error.hint.startswith("Nothing was changed."):  # before the comparison began
            error.hint = "Nothing was changed. The same command starts from the beginning."
        raise
    raise typer.Exit(result.exit_code)
