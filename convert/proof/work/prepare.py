"""All that a verification does before it reads weights: headers, plan, configs and side files, division of the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from dsv4.convert.proof.audit.draw import draw
from dsv4.convert.proof.audit.sample import Sample
from dsv4.convert.proof.compare_tensor import Piece, plan_pieces, threads_and_band
from dsv4.convert.proof.config import (
    check_config,
    check_needed_keys,
    check_side_files,
    compare_configs,
    compare_side_files,
)
from dsv4.convert.proof.files import Files, RemoteFiles, shard_names
from dsv4.convert.proof.forms.gguf import gguf_names, open_gguf
from dsv4.convert.proof.forms.nvfp4 import join_scales
from dsv4.convert.proof.forms.tables import take_filling_apart
from dsv4.convert.proof.layout import Checkpoint, open_checkpoint
from dsv4.convert.proof.manifest import Manifest, listed_hashes, read_manifest
from dsv4.convert.proof.plan import absent_and_needed, plan_pair, plan_scan, select
from dsv4.convert.proof.resume.journal import Journal, open_journal
from dsv4.convert.proof.schedule import Share
from dsv4.convert.proof.tally import Tally
from dsv4.convert.proof.whole_files import WholeFile, bytes_to_read, file_of, plan_files
from dsv4.machine import usable_cores
from dsv4.progress import Reached
from dsv4.text import counted, some_of

from .findings import Findings
from .order import Run, Shards, plan_runs
from .settings import Settings

NAMES_SHOWN = 5
RANGES_AT_ONCE = 16  # threads that wait for range requests of a sample


@dataclass(frozen=True)
class Work:
    """What is known once the headers are read. `pieces` and `whole` files are the share of this process."""

    source: Checkpoint | None
    output: Checkpoint
    settings: Settings
    share: Share
    findings: Findings
    unchecked: list[str]  # names of tensors that are not selected
    manifest: Manifest | None
    workers: int
    band: int
    pieces: list[Piece]
    whole: list[WholeFile]

    @property
    def sides(self) -> list[Checkpoint]:
        """One checkpoint or two."""
        return [side for side in (self.source, self.output) if side is not None]

    @property
    def files(self) -> dict[str, Files]:
        """Side -> its files."""
        return {side.where: side.files for side in self.sides}

    @property
    def is_remote(self) -> bool:
        """Whether a side is on a hub."""
        return any(isinstance(files, RemoteFiles) for files in self.files.values())

    @property
    def streamed(self) -> dict[str, RemoteFiles]:
        """The sides whose shards are fetched: those on a hub, but for a sample, which is read by range requests."""
        remote = {side: files for side, files in self.files.items() if isinstance(files, RemoteFiles)}
        return {} if self.settings.sample is not None else remote

    def runs(self, pieces: Sequence[Piece]) -> list[Run[Piece]]:
        """The pieces in the order in which they are compared."""
        streamed = self.streamed

        def shards_of(piece: Piece) -> Shards:
            tensors = list(self.findings.compared[piece.tensor].tensors()) if streamed else []
            return tuple(frozenset(n for s, tensor in tensors if s == side for n in tensor.shards) for side in streamed)

        return plan_runs(pieces, shards_of, list(streamed.values()))

    def runs_of_files(self, files: Sequence[WholeFile]) -> list[Run[WholeFile]]:
        """The files, which are read whole, in the order in which they are read."""
        streamed = self.streamed

        def shards_of(file: WholeFile) -> Shards:
            if not streamed:
                return ()
            tensors = [t for piece in file.pieces for _, t in self.findings.compared[piece.tensor].tensors()]
            return (frozenset({file.name} & set(self.output.shards)).union(*(t.shards for t in tensors)),)

        return plan_runs(files, shards_of, list(streamed.values()))

    def journal(self) -> Journal | None:
        """The journal of this pair or checkpoint, if any is kept."""
        if self.settings.journals is None:
            return None
        sample = self.settings.sample
        how = {
            "inverse": self.settings.inverse,
            "band": self.band,
            "share": [self.share.index, self.share.count],
            "sample": sample and [sample.share, sample.seed],
        }
        return open_journal(self.settings.journals, self.sides, self.whole, how)

    def left(self, journal: Journal | None) -> list[Piece]:
        """The pieces that no interrupted run has compared; what it found of the others is added to the findings."""
        left = []
        for piece in self.pieces:
            tally = None if journal is None else journal.proved(self.findings.compared[piece.tensor], piece)
            if tally is None:
                left.append(piece)
            else:
                self.findings.continued += piece.size
                self.findings.add(piece, tally)
        return left

    def files_left(self, journal: Journal | None) -> list[WholeFile]:
        """The files that no interrupted run has found whole; what it found of the others is added to the findings."""
        left = []
        for file in self.whole:
            said = self.sha256_said(file)
            tallies = None if journal is None else journal.proved_file(file, said, self.findings.compared)
            if tallies is None:
                left.append(file)
            else:
                size = bytes_to_read(file, self.findings.compared)
                self.findings.continued += size
                self.findings.hashes[file.name] = said
                self.findings.add_all(zip(file.pieces, tallies, strict=True))
                self.findings.advance(size)
        return left

    def sha256_said(self, file: WholeFile) -> Any:
        """The SHA-256 of one of the `whole` files in the manifest."""
        assert self.manifest is not None
        return self.manifest.sha256(file.name)


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

    one, other = None if source is None else open_side(source, "source"), open_side(output, "output")
    if one is not None:
        take_filling_apart(one, other)
    take_filling_apart(other, one)
    return one, other


def _check_files(source: Checkpoint | None, output: Checkpoint) -> None:
    """Compare configs and side files with each other, and configs and indexes with the headers."""
    if source is not None:
        compare_configs(source, output)
        compare_side_files(source, output)
    for side in (source, output):
        if side is not None:
            check_config(side)
            check_side_files(side)
            if absent := absent_and_needed(side, alone=source is None):
                names = some_of(absent, NAMES_SHOWN)
                side.problem("index", f"lists {counted(len(absent), 'tensor')} that no shard holds: {names}")
    if source is None:
        check_needed_keys(output)
    if source is None and (unlisted := output.ignored.not_listed):  # no other side says that it is not needed
        names = some_of(unlisted, NAMES_SHOWN)
        output.problem("index", f"does not list {counted(len(unlisted), 'tensor')} that its shards hold: {names}")


def _plan(findings: Findings, sample: Sample | None) -> list[Piece]:
    """The pieces of all tensors, or of the blocks that a sample draws."""
    if sample is None:
        return [piece for number, some in enumerate(findings.compared) for piece in plan_pieces(number, some)]
    pieces, findings.audit = draw(findings.compared, sample)
    return pieces


def prepare(
    source: Files | None, output: Files, settings: Settings, share: Share, headers: Reached, findings: Findings
) -> Work:
    """Read the headers, compare configs and side files, and plan. headers: see `run.verify_files`."""
    settings.check(alone=source is None)
    one, other = _open_checkpoints(source, output, headers)
    everything = plan_scan(other) if one is None else plan_pair(one, other)
    findings.compared, unchecked = select(everything, settings.selection, other)
    findings.tallies = [Tally() for _ in findings.compared]
    _check_files(one, other)
    manifest, reads_all = read_manifest(other, share) if one is None else None, settings.sample is None
    if manifest is not None and not reads_all:
        findings.hashes = listed_hashes(other, manifest)
        manifest = manifest if findings.hashes else None  # of a folder, no file is read whole
    by_ranges = settings.sample is not None and any(isinstance(some, RemoteFiles) for some in (source, output))
    most = settings.max_workers or (RANGES_AT_ONCE if by_ranges else usable_cores())
    workers, band = threads_and_band(most, settings.max_memory, findings.compared)
    every = _plan(findings, settings.sample)
    to_hash = manifest if reads_all else None
    whole = plan_files(to_hash.own_files, every, findings.compared) if to_hash else []
    hashed = to_hash.hashed_files if to_hash else frozenset()
    others = [piece for piece in every if file_of(findings.compared[piece.tensor]) not in hashed]
    pieces = share.of(others, [piece.size for piece in others])
    findings.total = sum(piece.size for piece in pieces) + sum(bytes_to_read(f, findings.compared) for f in whole)
    return Work(one, other, settings, share, findings, unchecked, manifest, workers, band, pieces, whole)
