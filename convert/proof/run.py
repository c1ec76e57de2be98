"""`verify(source, output)`: read the headers, plan, compare, and draw the verdict."""

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch

from dsv4.convert.proof.audit.draw import Sample, draw, parse_sample
from dsv4.convert.proof.audit.odds import Audit
from dsv4.convert.proof.forms.gguf import gguf_names, open_gguf
from dsv4.convert.proof.forms.nvfp4 import join_scales
from dsv4.convert.proof.resume.journal import Journal, open_journal
from dsv4.errors import Dsv4Error, Interrupted, UsageError
from dsv4.files import check_writable, result_file
from dsv4.machine import parse_size, usable_cores
from dsv4.progress import Reached, ignore
from dsv4.text import human_bytes, some_of

from .compare_tensor import Piece, PieceComparison, Reader, confirmed, plan_pieces, threads_and_band
from .config import (
    check_config,
    check_needed_keys,
    check_pointers,
    compare_configs,
    compare_side_files,
    declares_powers_of_two,
    identity,
)
from .files import Files, LocalFiles, RemoteFiles, shard_names
from .layout import Checkpoint, open_checkpoint
from .manifest import Manifest, check_manifest, read_manifest
from .plan import ComparedTensor, Selection, absent_and_needed, plan_pair, plan_scan, select
from .result import Verification, code_problems, tensor_results
from .schedule import UNSHARED, Share, in_order
from .tally import Statistics, Tally
from .whole_files import Counter, FileFindings, WholeFile, bytes_to_read, file_of, look_at, plan_files

RANGES_AT_ONCE = 16  # threads that wait for range requests of a sample
NAMES_SHOWN = 5
KEPT = "What was compared is kept: the same command continues with what is left."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare and how: see `verify`. journals: folder for what an interrupted run has compared, if any."""

    selection: Selection = field(default_factory=Selection)
    sample: Sample | None = None
    strict: bool = False
    inverse: bool = False
    max_workers: int | None = None
    max_memory: int | None = None
    journals: Path | None = None


@dataclass
class Findings:
    """The findings of one process so far: bytes read and a tally per compared tensor. progress: in bytes."""

    progress: Reached
    compared: list[ComparedTensor] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    hashes: dict[str, str] = field(default_factory=dict)
    read: int = 0
    total: int = 0
    continued: int = 0  # bytes of `read` that an earlier run has read
    is_kept: bool = False  # whether the same command continues with what is left
    audit: Audit | None = None  # the drawn blocks, for a sample

    def advance(self, count: int = 0) -> None:
        """Count bytes that were read, and report how far the work is."""
        self.read += count
        self.progress(self.read, self.total)

    def add(self, piece: Piece, tally: Tally, read: int | None = None) -> None:
        """Count a finished piece. read: bytes that were not counted yet, if not all of the piece's."""
        self.statistics.take_histograms(self.compared[piece.tensor].name, tally)
        self.tallies[piece.tensor].add(tally)
        self.advance(piece.size if read is None else read)

    def so_far(self, error: Interrupted) -> Interrupted:
        """The interruption, with a message about the share of the work that was done and the differences found."""
        differing = sum(bool(tally.different or tally.copies_differ) for tally in self.tallies)
        found = f"{differing} tensors differ so far" if differing else "no difference so far"
        percent = 100 * self.read // max(self.total, 1)
        when = f"after {percent}% of {human_bytes(self.total)}: {found}" if self.total else "before any tensor was read"
        again = "continues with what is left" if self.is_kept else "starts from the beginning"
        explained = Interrupted(f"interrupted {when}", f"Nothing was changed. The same command {again}.")
        explained.exit_code = error.exit_code
        return explained


def _merged(own: Findings, share: Share) -> Findings:
    """The findings of all processes, the same in each of them."""
    if share.count == 1:
        return own
    tallies = {number: tally for number, tally in enumerate(own.tallies) if tally != Tally()}
    merged = Findings(own.progress, own.compared, [Tally() for _ in own.tallies])
    each = share.gather((tallies, own.statistics, own.hashes, own.read, own.continued))
    for some, statistics, hashes, read, continued in each:
        for number, tally in some.items():
            merged.tallies[number].add(tally)
        merged.statistics.add_histograms(statistics)
        merged.hashes |= hashes
        merged.read += read
        merged.continued += continued
    return merged


def _left_to_compare(findings: Findings, pieces: list[Piece], journal: Journal | None) -> list[Piece]:
    """The pieces that no interrupted run has compared; what one has found of the others is added to the findings."""
    left = []
    for piece in pieces:
        tally = None if journal is None else journal.proved(findings.compared[piece.tensor], piece)
        if tally is None:
            left.append(piece)
        else:
            findings.continued += piece.size
            findings.add(piece, tally)
    return left


def _compare_pieces(
    findings: Findings,
    pieces: list[Piece],
    files: dict[str, Files],
    settings: Settings,
    workers: int,
    band: int,
    journal: Journal | None = None,
) -> None:
    """Read and compare the pieces, and add their tallies to the findings."""
    pieces = _left_to_compare(findings, pieces, journal)
    stopped = threading.Event()
    reader = Reader(files.get("source"), files["output"])
    remote = {side: some for side, some in files.items() if isinstance(some, RemoteFiles)}
    by_ranges = settings.sample is not None and bool(remote)
    if by_ranges:
        remote = {}  # no shard is fetched

    def compare(piece: Piece) -> tuple[Tally, int]:
        began_ns = time.time_ns()

        def run() -> Tally:
            compared = findings.compared[piece.tensor]
            return PieceComparison(compared, piece, reader, band, settings.inverse, stopped).run()

        return (confirmed(run) if by_ranges else run()), began_ns

    def shards_of(piece: Piece) -> tuple[frozenset[str], ...]:
        tensors = list(findings.compared[piece.tensor].tensors()) if remote else []
        return tuple(frozenset(n for s, tensor in tensors if s == side for n in tensor.shards) for side in remote)

    work = in_order(pieces, compare, workers, stopped, findings.advance, list(remote.values()), shards_of)
    with closing(work) as results:
        for piece, (tally, began_ns) in results:
            if journal is not None:
                journal.add(findings.compared[piece.tensor], piece, tally, began_ns)
                findings.is_kept = journal.holds
            findings.add(piece, tally)


def _look_at_files(findings: Findings, whole: list[WholeFile], output: Checkpoint, workers: int, band: int) -> None:
    """Hash files of one checkpoint and look at the tensors in them."""
    stopped, counter, files = threading.Event(), Counter(), output.files
    remote = [files] if isinstance(files, RemoteFiles) else []

    def look(file: WholeFile) -> FileFindings:
        return look_at(file, files, lambda piece: findings.compared[piece.tensor], band, counter.add, stopped)

    def shards_of(file: WholeFile) -> tuple[frozenset[str], ...]:
        tensors = [t for piece in file.pieces for _, t in findings.compared[piece.tensor].tensors()] if remote else []
        return (frozenset({file.name} & set(output.shards)).union(*(t.shards for t in tensors)),) if remote else ()

    def report(_: int = 0) -> None:
        findings.advance(counter.taken())

    with closing(in_order(whole, look, workers, stopped, report, remote, shards_of)) as results:
        for file, found in results:
            findings.hashes[file.name] = found.sha256
            for piece, tally in found.tallies:
                findings.add(piece, tally, read=0)
    report()


def _check_files(source: Checkpoint | None, output: Checkpoint) -> None:
    """Compare configs and side files with each other, and configs and indexes with the headers."""
    if source is not None:
        compare_configs(source, output)
        compare_side_files(source, output)
    for side in (source, output):
        if side is not None:
            check_config(side)
            check_pointers(side)
            if absent := absent_and_needed(side, alone=source is None):
                names = some_of(absent, NAMES_SHOWN)
                side.problem("index", f"lists {len(absent)} tensors that no shard holds: {names}")
    if source is None:
        check_needed_keys(output)
    if source is None and (unlisted := output.ignored.not_listed):  # no other side says that it is not needed
        names = some_of(unlisted, NAMES_SHOWN)
        output.problem("index", f"does not list {len(unlisted)} tensors that its shards hold: {names}")


def _check_scale_format(checkpoint: Checkpoint, findings: Findings) -> None:
    """`scale_fmt: ue8m0` promises powers of two; other float32 scales break the promise."""
    if not declares_powers_of_two(checkpoint):
        return
    for compared, tally in zip(findings.compared, findings.tallies, strict=True):
        of_two = any(tensor.factor for side, tensor in compared.tensors() if side == checkpoint.where)
        if (odd := tally.odd_scales[checkpoint.where]) and not of_two:
            text = f"scale_fmt says ue8m0, {compared.scale_name} has {odd} other float32 scales"
            checkpoint.problem("config", text)
            return


def _open_checkpoints(source: Files | None, output: Files, headers: Reached) -> tuple[Checkpoint | None, Checkpoint]:
    """Read all headers."""
    sides = [files for files in (source, output) if files is not None]
    total = sum(len(gguf_names(files) or list(shard_names(files))) for files in sides)
    numbers = count(1)

    def on_header() -> None:
        headers(next(numbers), total)

    def open_side(files: Files, where: str) -> Checkpoint:
        checkpoint = (open_gguf if gguf_names(files) else open_checkpoint)(files, where, on_header)
        join_scales(checkpoint)
        return checkpoint

    return None if source is None else open_side(source, "source"), open_side(output, "output")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Make torch compute in the calling thread: pieces run in parallel, operations do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _plan(findings: Findings, sample: Sample | None) -> list[Piece]:
    """The pieces of all tensors, or of the blocks that a sample draws."""
    if sample is None:
        return [piece for number, some in enumerate(findings.compared) for piece in plan_pieces(number, some)]
    pieces, findings.audit = draw(findings.compared, sample)
    return pieces


def _compare(
    source: Checkpoint | None,
    output: Checkpoint,
    findings: Findings,
    settings: Settings,
    share: Share,
    manifest: Manifest | None,
) -> None:
    """Do this process's share: read the files that the manifest lists, then all other tensors, or the drawn blocks."""
    files = {side.where: side.files for side in (source, output) if side is not None}
    by_ranges = settings.sample is not None and any(isinstance(some, RemoteFiles) for some in files.values())
    workers = settings.max_workers or (RANGES_AT_ONCE if by_ranges else usable_cores())
    workers, band = threads_and_band(workers, settings.max_memory, findings.compared)
    every = _plan(findings, settings.sample)
    whole = plan_files(manifest.own_files, every, findings.compared) if manifest else []
    hashed = manifest.hashed_files if manifest else frozenset()
    others = [piece for piece in every if file_of(findings.compared[piece.tensor]) not in hashed]
    pieces = share.of(others, [piece.size for piece in others])
    findings.total = sum(piece.size for piece in pieces) + sum(bytes_to_read(f, findings.compared) for f in whole)
    findings.advance()
    journal = None
    if source is not None and settings.journals is not None:
        sample = settings.sample and [settings.sample.share, settings.sample.seed]
        how = {"inverse": settings.inverse, "band": band, "share": [share.index, share.count], "sample": sample}
        journal = open_journal(settings.journals, [source, output], how)
    findings.is_kept = journal is not None and journal.holds
    with journal or nullcontext():
        if whole:
            _look_at_files(findings, whole, output, workers, band)
        _compare_pieces(findings, pieces, files, settings, workers, band, journal)


def _conclude(
    source: Checkpoint | None, output: Checkpoint, findings: Findings, manifest: Manifest | None
) -> Verification:
    """The verdict from the findings of all processes."""
    for compared, tally in zip(findings.compared, findings.tallies, strict=True):
        findings.statistics.add(compared, tally)
    sides = [side for side in (source, output) if side is not None]
    for side in sides:
        _check_scale_format(side, findings)
    if manifest is not None:
        check_manifest(output, manifest, findings.hashes)
    pairs = zip(findings.compared, findings.tallies, strict=True)
    results = [result for compared, tally in pairs for result in tensor_results(compared, tally)]
    return Verification(
        None if source is None else source.files.label,
        output.files.label,
        results,
        [problem for side in sides for problem in side.problems] + code_problems(results),
        findings.statistics,
        hashed=manifest is not None,
        ignored={side.where: ignored for side in sides if (ignored := side.ignored.to_json())},
        identity={side.where: identity(side) for side in sides},
        read_bytes=findings.read,
        continued_bytes=findings.continued,
    )


def verify_files(
    source: Files | None,
    output: Files,
    settings: Settings,
    share: Share = UNSHARED,
    headers: Reached = ignore,
    progress: Reached = ignore,
) -> Verification:
    """`verify` on files that may be remote, by one of several processes.

    `headers` is called with (headers read, all headers); then `progress` with the number of bytes, and with 0 while a
    step takes long. Both are called in the calling thread, and their exceptions end the work. With a `share`
    this process compares its part of the tensors, exchanges findings with the others, and returns the result of all.
    """
    started = time.monotonic()
    if settings.inverse and source is None:
        raise UsageError("--inverse needs the source too", "Give SOURCE and OUTPUT.")
    if settings.inverse and settings.sample is not None:
        raise UsageError("--inverse rebuilds every code, --sample compares some", "Leave out one of them.")
    findings = Findings(progress)
    try:
        with _one_torch_thread():
            one, other = _open_checkpoints(source, output, headers)
            everything = plan_scan(other) if one is None else plan_pair(one, other)
            findings.compared, unchecked = select(everything, settings.selection, other)
            findings.tallies = [Tally() for _ in findings.compared]
            _check_files(one, other)
            is_hashed = one is None and settings.sample is None  # a sample reads no file whole
            manifest = read_manifest(other, share) if is_hashed else None
            _compare(one, other, findings, settings, share, manifest)
        result = _conclude(one, other, _merged(findings, share), manifest)
    except Interrupted as error:
        raise findings.so_far(error) from None
    except Dsv4Error as error:
        if findings.is_kept:
            error.hint = f"{error.hint} {KEPT}".strip()
        raise
    return replace(
        result,
        strict=settings.strict,
        inverse=settings.inverse,
        selection=settings.selection.describe(),
        unchecked=unchecked,
        audit=findings.audit,
        seconds=time.monotonic() - started,
    )


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tensor: str | None = None,
    shard: int | None = None,
    sample: str | float | None = None,
    seed: int = 0,
    strict: bool = False,
    inverse: bool = False,
    max_workers: int | None = None,
    max_memory: int | str | None = None,
    report: str | os.PathLike[str] | None = None,
) -> Verification:
    """Compare two checkpoints: does the folder `output` hold the same model as `source`? Or check one alone.

    tensor: a glob of tensor names. shard: one shard of `output`, counted from 1. sample: the fraction of the blocks to
    compare, "5%" or 0.05, drawn by `seed`; the verdict is then never IDENTICAL. strict: a changed sign of zero is a
    difference. inverse: rebuild the source's FP4 codes from the output's values. max_memory: bytes that the whole
    process may use, or text such as "16GB". max_workers: threads; default: the cores that this process may use.
    report: a file for the page with the proof, complete when this function returns; where its file system cannot
    fsync, with a Python warning.

    Raises InputError if a folder holds no checkpoint, UsageError if nothing is selected or the report cannot be
    written; every other fault of the files is in the result.
    """
    if report is not None:
        check_writable(os.fspath(report))
    settings = Settings(
        selection=Selection(tensor, shard),
        sample=parse_sample(sample, seed),
        strict=strict,
        inverse=inverse,
        max_workers=max_workers,
        max_memory=None if max_memory is None else parse_size(max_memory),
    )
    with ExitStack() as stack:
        *sources, converted = [
            stack.enter_context(closing(LocalFiles(Path(side)))) for side in (source, output) if side is not None
        ]
        result = verify_files(sources[0] if sources else None, converted, settings)
    if report is not None:
        with result_file(os.fspath(report), warnings.warn) as file:
            file.write(result.to_html().encode())
    return result
