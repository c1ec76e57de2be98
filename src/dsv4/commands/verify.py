"""`dsv4 verify`: prove that two checkpoints hold the same model, or that one is sound in itself."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4 import output, signals
from dsv4.errors import EXIT_DONE, EXIT_SAMPLE, InputError, Interrupted
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
    as_folder,
    as_typed,
    command,
    example,
    named,
)
from dsv4.text import aligned, human_bytes, human_seconds, some_of

if TYPE_CHECKING:
    from dsv4.convert.proof.files import Files
    from dsv4.convert.proof.result import Verification
    from dsv4.convert.proof.run import Settings
    from dsv4.distributed import Ranks

EPILOG = example(
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8",
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8 --inverse --report proof.html",
    "dsv4 verify ./DeepSeek-V4-Flash ./Flash-FP8 --tensor 'layers.3.*' --json",
    "dsv4 verify ./Flash-FP8",
    "dsv4 verify hf:deepseek-ai/DeepSeek-V4-Flash ./Flash-FP8",
    "torchrun --nproc-per-node 4 -m dsv4 verify ./DeepSeek-V4-Pro /shared/Pro-FP8",
)
SHOWN = 20  # differing tensors listed without -v
BLOCKS_SHOWN = 8


def _describe(difference: dict[str, Any], verbose: bool) -> list[str]:
    """A tensor that differs, in a few lines: where, how much, which blocks, the first element (`-v`: more of each)."""
    limit = len(difference.get("blocks", [])) if verbose else BLOCKS_SHOWN
    words = [difference["reason"]] if difference.get("reason") else []
    if count := difference.get("different_elements"):
        words.append(f"{count:,} of {difference['elements']:,} elements differ")
    head = f"{difference['status']} {difference['name']}"
    lines = ["  ".join(filter(None, (head, ", ".join(words))))]
    if blocks := difference.get("blocks"):
        size = "x".join(map(str, difference["block"]))
        some = " ".join(f"({row},{column})" for row, column, _ in blocks[:limit])
        more = difference["different_blocks"] - limit
        lines.append(f"    in {size} blocks {some}" + (f" and {more} more" if more > 0 else ""))
    for number, first in enumerate(difference.get("first_differences", [])[: None if verbose else 1]):
        a, b = first["source"], first["output"]
        at = ", ".join(map(str, first["at"]))
        shown = [s["code"] + (f" * {s['scale']}" if s["scale"] else "") + f" = {s['value']}" for s in (a, b)]
        lines.append(f"    {'then' if number else 'first'} at [{at}]: source {shown[0]}, output {shown[1]}")
    return lines


def _print_differences(out: output.Output, differences: list[dict[str, Any]]) -> None:
    names = {difference["name"] for difference in differences}
    # A scale differs because its weight does: one line for both.
    differences = [d for d in differences if d["name"].removesuffix("scale") + "weight" not in names]
    listed = differences if out.verbose else differences[:SHOWN]
    for difference in listed:
        for line in _describe(difference, out.verbose):
            out.text(line)
    if len(differences) > len(listed):
        out.text(f"  and {len(differences) - len(listed)} more (-v lists all, --json has the details)")


def _print_blocks(out: output.Output, found: dict[str, Any]) -> None:
    if blocks := found["statistics"].get("fp8_blocks"):
        out.text(
            f"FP8 blocks from FP4: {blocks['count']:,}, largest scale span 2^{max(map(int, blocks['spans']))} of "
            f"2^{blocks['span_limit']}, smallest headroom {blocks['smallest_headroom']}"
        )
        if moved := blocks["other_scale_than_reference"]:
            out.text(f"{moved:,} of them with another scale than the reference converter's")


def _print_signs(out: output.Output, found: dict[str, Any]) -> None:
    for key, words in (
        ("negative_zeros_became_positive", "negative zeros became positive"),
        ("positive_zeros_became_negative", "positive zeros became negative"),
    ):
        if found[key]:
            out.text(f"{found[key]:,} {words} (equal in value; --strict makes this a difference)")


def _print_errors(out: output.Output, found: dict[str, Any]) -> None:
    """How far values are apart, by the kind of tensor."""
    if not found["errors"]:
        return
    head = ["tensors that differ", "number", "largest error", "mean error"]
    rows = [
        [kind, str(e["tensors"]), f"{e['largest_error']:.3g}", f"{e['mean_error']:.3g}"]
        for kind, e in list(found["errors"].items())[:SHOWN]
    ]
    for line in aligned([head, *rows], right=[1, 2, 3]):
        out.text(line)


def _print_inverse(out: output.Output, found: dict[str, Any]) -> None:
    inverse = found.get("inverse")
    if inverse is None:
        return
    if not inverse["codes"]:
        out.text("inverse: no FP4 weight was stored in another format, nothing to rebuild")
    elif not inverse["sign"] and not inverse["wrong"]:
        out.text(f"inverse: all {inverse['codes']:,} FP4 codes were rebuilt: the source could be deleted")
    else:
        back = inverse["codes"] - inverse["sign"] - inverse["wrong"]
        out.text(f"inverse: {back:,} of {inverse['codes']:,} FP4 codes were rebuilt")
    for key, why in (("sign_of_zero_lost_in", "the sign of zero is gone"), ("not_rebuilt", "values differ")):
        if names := inverse[key]:
            out.text(f"  {why} in {len(names)} tensors: {some_of(names, SHOWN)}")


def _print_findings(out: output.Output, result: "Verification", found: dict[str, Any]) -> None:
    from dsv4.convert.proof.index import ignored_lines

    _print_differences(out, found["differences"])
    _print_errors(out, found)
    for line in ignored_lines(found["ignored"]):
        out.text(line)
    for problem in found["problems"]:
        if problem["severity"] != "note" or out.verbose:
            out.text(f"{problem['where']} {problem['area']}: {problem['text']}")
    rows = [[s, f"{found['counts'][s]:,}", w] for s, w in found["statuses"].items() if found["counts"][s]]
    for line in aligned(rows, right=[1]) if rows and result.source is not None else []:
        out.text(line)
    _print_blocks(out, found)
    _print_signs(out, found)
    _print_inverse(out, found)
    out.text(result.verdict)
    rate = (result.read_bytes - result.continued_bytes) / max(result.seconds, 1e-9)
    if result.continued_bytes:
        earlier = human_bytes(result.continued_bytes)
        out.say(f"{earlier} of it was compared by a run that was interrupted; its files have not changed since")
    what = f"{human_bytes(result.read_bytes)} of {result.what_was_read} read"
    out.say(f"{what} in {human_seconds(result.seconds)}, {human_bytes(rate)}/s")


def _write_report(report: Path, found: dict[str, Any], out: output.Output) -> None:
    from dsv4.convert.proof.report.page import render

    with result_file(report, out.warn_once) as file:
        file.write(render(found).encode())
    out.say(f"wrote {report}")


def _runs(folder: Path) -> bool:
    """Is this a folder that `dsv4 run` takes, rather than rank files or a repository?"""
    names = ("model.safetensors.index.json", "model.safetensors")
    return any((folder / name).is_file() for name in names) or any(folder.glob("model*.gguf"))


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The arguments and options of `dsv4 verify`."""

    source: Annotated[
        str,
        typer.Argument(
            parser=named, metavar="SOURCE", help="Folder (or hf:, ms: org/name) to compare with, or to check alone."
        ),
    ]
    converted: Annotated[
        Path | None, typer.Argument(parser=as_folder, metavar="OUTPUT", help="Folder of the converted one.")
    ] = None
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
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Rebuild SOURCE's FP4 codes from OUTPUT: could SOURCE be deleted?")
    ] = False
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


def _settings(options: VerifyOptions, ranks: "Ranks | None") -> "Settings":
    from dsv4.convert.proof.audit.draw import parse_sample
    from dsv4.convert.proof.plan import Selection
    from dsv4.convert.proof.resume.journal import default_folder
    from dsv4.convert.proof.run import Settings

    return Settings(
        selection=Selection(options.tensor, options.shard),
        sample=parse_sample(options.sample, options.seed),
        strict=options.strict,
        inverse=options.inverse,
        max_workers=options.max_workers or (ranks.workers if ranks else None),
        max_memory=None if options.max_memory is None else parse_size(options.max_memory),
        journals=default_folder() if options.converted is not None else None,
    )


@contextmanager
def _opened(options: VerifyOptions, out: output.Output, progress: Callable[[int, int], None]) -> Iterator["Files"]:
    """SOURCE: a folder, or a repository whose shards are fetched into a temporary folder."""
    from dsv4.convert.hub.source import missing_folder, parse_source
    from dsv4.convert.proof.files import LocalFiles

    where, converted = parse_source(options.source, options.revision), options.converted
    if isinstance(where, Path):
        if not where.is_dir():
            raise missing_folder(options.source)
        with closing(LocalFiles(where)) as folder:
            yield folder
        return
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.storage import HubFiles, open_hub_storage

    if converted is not None and not converted.is_dir():
        raise InputError(f"{converted} is not a folder", "Give the folder of the converted checkpoint.")
    hub = HubOptions(
        options.token, options.cache_dir, options.scratch, warn=out.warn, detail=out.detail, headers=progress,
        progress=signals.look,
    )  # fmt: skip
    with TemporaryDirectory(prefix=".dsv4-verify-", dir=converted or Path.cwd()) as scratch:
        with closing(open_hub_storage(where, Path(scratch) / "shards", hub)) as storage:
            yield HubFiles(storage)


def _compare(options: VerifyOptions, out: output.Output, ranks: "Ranks | None") -> "Verification":
    """Compare, with a progress bar over headers and then one over bytes."""
    from dsv4.convert.proof.files import LocalFiles
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

        source = stack.enter_context(_opened(options, out, on_header))
        if options.converted is None:
            return verify_files(None, source, settings, share, on_header, progress)
        converted = stack.enter_context(closing(LocalFiles(options.converted)))
        return verify_files(source, converted, settings, share, on_header, progress)


def _suggest(out: output.Output, options: VerifyOptions) -> None:
    """The command to try after a good verdict."""
    if options.sample is not None:
        return out.hint(f"prove it: {as_typed('dsv4 verify', replace(options, sample=None, seed=0, report=None))}")
    if not _runs(Path(options.source)):
        return
    words = ["dsv4", "run", options.source, "-p", "Hello"]
    if options.converted is None:
        out.hint(f"run it: {shlex.join(words)}")
    elif _runs(options.converted):
        out.hint(f"run both: {shlex.join([*words, '--compare', str(options.converted)])}")


def _print_and_report(out: output.Output, result: "Verification", options: VerifyOptions) -> None:
    """Print the verdict, then write the page: the verdict is printed even if the disk is full."""
    from dsv4.convert.proof.report.page import made_by

    found = result.to_json() | {"made_by": made_by(as_typed("dsv4 verify", options))}
    out.result(found)
    _print_findings(out, result, found)
    if options.report is not None and out.mode != "silent":
        _write_report(options.report, found, out)
    if result.exit_code in (EXIT_DONE, EXIT_SAMPLE):
        _suggest(out, options)


@command
def verify(options: VerifyOptions) -> None:
    """Read all of SOURCE and OUTPUT and decide whether they hold the same model.

    It shares no code with `convert` and reads other people's conversions too: the reference converter's
    `model{i}-mp{N}.safetensors`, float32 or E8M0 scales, merged or split shards, `model.` names. With one checkpoint
    only, it checks structure, config, codes and hashes. A source on a hub is streamed, with --scratch of its shards on
    disk at once.
    """
    from dsv4.distributed import process_group, torchrun_rank

    ranks = torchrun_rank()
    out = output.configure(options.json, options.quiet, options.verbose, ranks)
    if options.report is not None and out.mode != "silent":
        check_writable(options.report)
    if options.converted is not None and options.converted.resolve() == Path(options.source).resolve():
        out.warn("SOURCE and OUTPUT are the same folder")
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
