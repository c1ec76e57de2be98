"""`verify(source, output)`: read the headers, plan, compare, and draw the verdict."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from dsv4.convert.proof.audit.sample import parse_sample
from dsv4.convert.proof.resume.journal import Journal
from dsv4.convert.proof.work.conclude import conclude
from dsv4.convert.proof.work.fetches import Fetch, fetches
from dsv4.convert.proof.work.findings import Findings, merged_findings
from dsv4.convert.proof.work.order import Run
from dsv4.convert.proof.work.prepare import Work, prepare
from dsv4.convert.proof.work.settings import Settings
from dsv4.errors import Dsv4Error, Interrupted
from dsv4.files import check_writable, result_file
from dsv4.machine import parse_size
from dsv4.progress import Reached, ignore

from .compare_tensor import Piece, PieceComparison, Reader, confirmed
from .files import Files, LocalFiles, RemoteFiles
from .plan import Selection
from .result import Verification
from .schedule import UNSHARED, Share, in_order, one_torch_thread
from .tally import Tally
from .whole_files import Counter, FileFindings, WholeFile, look_at

KEPT = "What was compared is kept: the same command continues with what is left."


def _compare_pieces(work: Work, runs: list[Run[Piece]], journal: Journal | None) -> None:
    """Read and compare the pieces, and add their tallies to the findings."""
    findings, files, stopped = work.findings, work.files, threading.Event()
    reader = Reader(files.get("source"), files["output"])
    is_unhashed = work.is_remote and work.settings.sample is not None

    def compare(piece: Piece) -> tuple[Tally, int]:
        began_ns = time.time_ns()

        def run() -> Tally:
            compared = findings.compared[piece.tensor]
            return PieceComparison(compared, piece, reader, work.band, work.settings.inverse, stopped).run()

        return (confirmed(run) if is_unhashed else run()), began_ns

    compared = in_order(runs, compare, work.workers, stopped, findings.advance, list(work.streamed.values()))
    with closing(compared) as results:
        for piece, (tally, began_ns) in results:
            if journal is not None:
                journal.add(findings.compared[piece.tensor], piece, tally, began_ns)
                findings.is_kept = journal.holds
            findings.add(piece, tally)


def _look_at_files(work: Work, runs: list[Run[WholeFile]], journal: Journal | None) -> None:
    """Hash the files of one checkpoint and look at the tensors in them."""
    findings, stopped, counter, files = work.findings, threading.Event(), Counter(), work.output.files

    def look(file: WholeFile) -> tuple[FileFindings, int]:
        began_ns, tensors = time.time_ns(), findings.compared
        return look_at(file, files, lambda piece: tensors[piece.tensor], work.band, counter.add, stopped), began_ns

    def report(_: int = 0) -> None:
        findings.advance(counter.taken())

    looked = in_order(runs, look, work.workers, stopped, report, list(work.streamed.values()))
    with closing(looked) as results:
        for file, (found, began_ns) in results:
            if journal is not None and found.sha256 == work.sha256_said(file):
                tallies = [tally for _, tally in found.tallies]
                journal.add_file(file, found.sha256, findings.compared, tallies, began_ns)
                findings.is_kept = journal.holds
            findings.hashes[file.name] = found.sha256
            findings.add_all(found.tallies)
    report()


def _compare(work: Work, planned: Callable[[list[Fetch]], None], continues: Reached) -> None:
    """Do this process's share: read the files that the manifest lists, then all other pieces."""
    work.findings.advance()
    journal = work.journal()
    work.findings.is_kept = journal is not None and journal.holds
    with journal or nullcontext():
        files, pieces = work.files_left(journal), work.left(journal)
        if len(files) < len(work.whole):
            continues(len(work.whole) - len(files), len(work.whole))
        of_files, runs = work.runs_of_files(files), work.runs(pieces)
        if work.is_remote:
            planned(fetches(work, of_files, runs, pieces))
        if files:
            _look_at_files(work, of_files, journal)
        _compare_pieces(work, runs, journal)


@contextmanager
def _explained(findings: Findings) -> Iterator[None]:
    """Errors say what is kept."""
    try:
        yield
    except Interrupted as error:
        raise findings.so_far(error) from None
    except Dsv4Error as error:
        if findings.is_kept:
            error.hint = f"{error.hint} {KEPT}".strip()
        raise


def verify_files(
    source: Files | None,
    output: Files,
    settings: Settings,
    share: Share = UNSHARED,
    headers: Reached = ignore,
    progress: Reached = ignore,
    planned: Callable[[list[Fetch]], None] = lambda fetched: None,
    continues: Reached = ignore,
) -> Verification:
    """`verify` on files that may be remote, by one of several processes.

    `headers` is called with (headers read, all headers); then `continues` with (files that an interrupted run found
    whole, files to read whole), if there are such; then `planned` with what each remote side fetches, if there is
    one; then `progress` with the number of bytes, and with 0 while a step takes long. All are called in the calling
    thread, and their exceptions end the work. With a `share` this process compares its part of the tensors, exchanges
    findings with the others, and returns the result of all.
    """
    started, findings = time.monotonic(), Findings(progress)
    with _explained(findings), one_torch_thread():
        work = prepare(source, output, settings, share, headers, findings)
        _compare(work, planned, continues)
        for files in work.files.values():
            if isinstance(files, RemoteFiles):
                files.check_unchanged()
        result = conclude(work, merged_findings(findings, share), locate=settings.sample is None)
    return replace(result, seconds=time.monotonic() - started)


def verify(
    source: str | os.PathLike[str] | Files,
    output: str | os.PathLike[str] | Files | None = None,
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
    """`dsv4.convert.verify`, whose options these are, of folders and of files that the caller has opened."""
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
            stack.enter_context(closing(LocalFiles(Path(side)))) if isinstance(side, str | os.PathLike) else side
            for side in (source, output)
            if side is not None
        ]
        result = verify_files(sources[0] if sources else None, converted, settings)
    if report is not None:
        with result_file(os.fspath(report), warnings.warn) as file:
            file.write(result.to_html().encode())
    return result
