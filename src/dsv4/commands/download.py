"""`dsv4 download`: fetch a checkpoint from a hub, and check every byte of it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4 import output, signals
from dsv4.errors import Interrupted, UsageError
from dsv4.options import CacheDir, Json, Quiet, Revision, Token, Verbose, as_folder, command, example, named
from dsv4.text import counted, human_bytes

if TYPE_CHECKING:
    from dsv4.convert.hub.download import DownloadPlan, DownloadResult, Fallback
    from dsv4.convert.hub.source import HubSource

EPILOG = example(
    "dsv4 download deepseek-ai/DeepSeek-V4-Flash flash",
    "dsv4 download ms:deepseek-ai/DeepSeek-V4-Flash --include '*.json' --dry-run",
    "dsv4 download hf:deepseek-ai/DeepSeek-V4-Flash@main flash --fallback",
)


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """The command line of `dsv4 download`."""

    source: Annotated[
        str,
        typer.Argument(
            parser=named, metavar="SOURCE", help="org/name, hf:org/name or ms:org/name, with @revision if you like."
        ),
    ]
    folder: Annotated[
        Path | None,
        typer.Argument(
            parser=as_folder, metavar="FOLDER", help="Where to put the files. Default: the library's cache."
        ),
    ] = None
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PATTERN", help="Only files that match; may be repeated.")
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="No files that match; may be repeated.")
    ] = None
    revision: Revision = None
    cache_dir: CacheDir = None
    local_dir: Annotated[
        Path | None, typer.Option("--local-dir", parser=as_folder, metavar="FOLDER", help="Same as FOLDER.")
    ] = None
    fallback: Annotated[
        bool, typer.Option("--fallback", help="If this hub fails, take the missing files from the other: same hashes.")
    ] = False
    token: Token = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and stop.")] = False
    max_workers: Annotated[int, typer.Option("--max-workers", metavar="N", min=1, help="Files fetched at once.")] = 8
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        folder, local_dir, target = self.folder, self.local_dir, self.target
        if folder is not None and local_dir is not None and folder != local_dir:
            raise UsageError(
                f"FOLDER ({folder}) and --local-dir ({local_dir}) are two names for one thing", "Give one."
            )
        if target is not None and target.exists() and not target.is_dir():
            raise UsageError(f"{target} is not a folder")
        if target is not None and self.cache_dir is not None:
            raise UsageError("--cache-dir has no effect on files that go into a folder", "Give one of them.")
        if self.fallback and target is None:
            raise UsageError("--fallback mixes files of two hubs, which no hub's cache can hold", "Name a FOLDER.")

    @property
    def target(self) -> Path | None:
        """The folder for the files; None for the library's cache."""
        return self.folder or self.local_dir


def _show_plan(out: output.Output, plan: "DownloadPlan", dry_run: bool) -> None:
    present = len(plan.files) - len(plan.missing)
    say = out.text if dry_run else out.say
    say(f"{plan.snapshot.source} at commit {plan.snapshot.commit}")
    say(f"  {counted(len(plan.files), 'file')}, {human_bytes(plan.bytes)}, into {plan.root}")
    say(f"  {present} already there, {human_bytes(plan.missing_bytes)} to fetch")
    say(f"  {human_bytes(plan.free)} free on that disk")


def _source(options: DownloadOptions) -> "HubSource":
    """The repository. Raises UsageError for a folder."""
    from dsv4.convert.hub.source import parse_source

    where = parse_source(options.source, options.revision, remote=True)
    if isinstance(where, Path):
        text = f"{options.source} is a local folder: there is nothing to download"
        raise UsageError(text, "Write org/name or hf:org/name.")
    return where


def _fetch(
    options: DownloadOptions, out: output.Output, plan: "DownloadPlan", other: "Fallback | None"
) -> "DownloadResult":
    from dsv4.convert.hub.download import download

    signals.begin_work()
    try:
        with out.progress(plan.bytes, "download") as bar:
            return download(plan, workers=options.max_workers, fallback=other, progress=bar.advance, warn=out.warn)
    except Interrupted as error:
        error.hint = "Run the same command again to continue: finished files are kept."
        raise


def _show_result(out: output.Output, plan: "DownloadPlan", result: "DownloadResult", other: "Fallback | None") -> None:
    fetched = counted(len(result.fetched), "file")
    out.say(f"{fetched} fetched, {len(result.kept)} kept; every size and hash is as the hub lists.")
    if result.from_fallback and other is not None:
        out.say(f"{len(result.from_fallback)} of them came from {other.source}.")
    out.text(str(plan.root))
    out.hint(f"convert it: dsv4 convert {shlex.quote(str(plan.root))} OUTPUT")
    names = {"fetched": result.fetched, "kept": result.kept, "from_fallback": result.from_fallback}
    out.result(plan.as_json() | {what: sorted(some) for what, some in names.items()})


@contextmanager
def _suggesting_the_other_hub(options: DownloadOptions) -> Iterator[None]:
    """Add --fallback to the hint of a hub's error, unless it was given."""
    from dsv4.convert.hub.client import BadFile, NetworkError

    try:
        yield
    except (BadFile, NetworkError) as error:
        if not options.fallback:
            error.hint = f"{error.hint} --fallback takes the files that are missing from the other hub.".strip()
        raise


@command
def download(options: DownloadOptions) -> None:
    """Fetch a checkpoint from Hugging Face or ModelScope and check every byte of it.

    SOURCE is org/name or hf:org/name (Hugging Face) or ms:org/name (ModelScope), with @revision if you like. Files go
    into FOLDER, or without one into the hub library's own cache.

    A branch is resolved to a commit first. Every file is compared with the hub's listing by size and hash, and every
    shard's header is read; a bad file is fetched once more. Run the same command again after an interruption: finished
    files are checked and kept.
    """
    out = output.configure(options.json, options.quiet, options.verbose)
    from dsv4.convert.hub.download import open_with_fallback, plan_download
    from dsv4.convert.hub.fetch import Destination

    destination, source = Destination(options.target, options.cache_dir), _source(options)
    with _suggesting_the_other_hub(options):
        snapshot, other = open_with_fallback(source, options.token, destination, options.fallback, out.warn)
        plan = plan_download(snapshot, destination, options.include or (), options.exclude or ())
        _show_plan(out, plan, options.dry_run)
        if options.dry_run:
            out.result({"dry_run": True, **plan.as_json()})
            return
        _show_result(out, plan, _fetch(options, out, plan, other), other)
