"""`verify(source, output)`: the driver. Plans, shares the work among threads, puts the pieces together again.

Every piece of work is independent of every other, so several processes can do some each (see verify_share.py).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from dsv4.errors import Interrupted, UsageError, printable

from .charts import gigabytes
from .compare_tensor import PieceWork, piece_bytes, plan_pieces
from .config import check_config, compare_configs, compare_side_files, declares_powers_of_two
from .crew import Crew, Held
from .files import Files, LocalFiles, shard_names
from .layout import Checkpoint, open_checkpoint
from .manifest import check_manifest, hash_files, read_manifest
from .plan import Unit, plan_pair, plan_scan
from .reader import Reader
from .result import Statistics, Verification
from .selection import Selection, select
from .share import ALONE, Share
from .status import code_problems, unit_results
from .tally import Tally

BAND_BYTES = 1 << 20  # of the larger side: what a core's cache holds, and enough to outweigh the calls
BYTES_PER_BAND_BYTE = 12  # buffers, table positions and masks of a thread at its worst
MIN_BAND_BYTES = 1 << 16

Advance = Callable[[int], None]


def _checked_memory(workers: int, max_memory: int | None) -> tuple[int, int]:
    """(workers, bytes of a band) that fit into `max_memory`."""
    if max_memory is None:
        return workers, BAND_BYTES
    workers = min(workers, max(1, max_memory // (MIN_BAND_BYTES * BYTES_PER_BAND_BYTE)))
    band = min(BAND_BYTES, max_memory // workers // BYTES_PER_BAND_BYTE)
    if band < MIN_BAND_BYTES:
        least = MIN_BAND_BYTES * BYTES_PER_BAND_BYTE
        raise UsageError(f"--max-memory {max_memory} is too little", f"Give at least {least} bytes.")
    return workers, band


def _open(side: str | os.PathLike[str] | Files) -> Files:
    return LocalFiles(Path(side)) if isinstance(side, str | os.PathLike) else side


@dataclass
class _Run:
    """One verification at work."""

    source: Checkpoint | None
    output: Checkpoint
    selection: Selection
    workers: int
    band_bytes: int
    inverse: bool
    on_start: Callable[[int], None]
    advance: Advance
    share: Share
    read: int = 0
    total: int = 0
    differing: set[str] = field(default_factory=set)

    def _advance(self, count: int) -> None:
        self.read += count
        self.advance(count)

    def _tallies(self, units: list[Unit], statistics: Statistics, hashing: int) -> list[Tally]:
        every = [piece for index, unit in enumerate(units) for piece in plan_pieces(index, unit, self.band_bytes)]
        sizes = [piece_bytes(units[piece.unit], piece) for piece in every]
        pieces = self.share.of(every, sizes)
        files = {side.where: side.files for side in (self.source, self.output) if side is not None}
        reader = Reader(files.get("source"), self.output.files)
        held = Held(files, units, pieces)
        crew = Crew(units, pieces, lambda unit: PieceWork(unit, reader, self.band_bytes, self.inverse), held)
        tallies = [Tally() for _ in units]
        self.total = sum(self.share.of(sizes, sizes)) + hashing
        self.on_start(self.total)
        for index, found in crew.run(min(self.workers, max(len(pieces), 1))):
            if isinstance(found, Tally):
                statistics.take_histograms(units[index].name, found)
                tallies[index].add(found)
                if found.different or found.copies_differ:
                    self.differing.add(units[index].name)
                continue
            self._advance(units[index].size * found // max(units[index].elements, 1))
        return tallies

    def _merge(self, tallies: list[Tally], statistics: Statistics) -> tuple[list[Tally], Statistics]:
        """What all processes found, put together in each of them."""
        if self.share.count == 1:
            return tallies, statistics
        found = {index: tally for index, tally in enumerate(tallies) if tally != Tally()}
        parts = self.share.gather((found, statistics, self.read))
        merged, total, self.read = [Tally() for _ in tallies], Statistics(), 0
        for some, counts, read in parts:
            for index, tally in some.items():
                merged[index].add(tally)
            total.take_codes(counts)
            self.read += read
        return merged, total

    def _check_files(self) -> None:
        """What can be said before any tensor is read."""
        if self.source is not None:
            compare_configs(self.source, self.output)
            compare_side_files(self.source, self.output)
            check_config(self.source)
        check_config(self.output)

    def _check_scale_format(self, units: list[Unit], tallies: list[Tally]) -> None:
        """`scale_fmt: ue8m0` promises powers of two; float32 scales that are none break it."""
        for checkpoint in (self.source, self.output):
            if checkpoint is not None and declares_powers_of_two(checkpoint):
                for unit, tally in zip(units, tallies, strict=True):
                    if count := tally.odd_scales[checkpoint.where]:
                        text = f"scale_fmt says ue8m0, {printable(unit.scale_name)} has {count} other float32 scales"
                        checkpoint.problem("config", text)
                        break

    def interrupted(self, error: Interrupted) -> Interrupted:
        """How far it came, and what was found until then."""
        share = 100 * self.read // max(self.total, 1)
        found = f"{len(self.differing)} tensors differ so far" if self.differing else "no difference so far"
        when = f"after {share}% of {gigabytes(self.total)}: {found}" if self.total else "before any tensor was read"
        told = Interrupted(f"interrupted {when}", error.hint)
        told.exit_code = error.exit_code
        return told

    def __call__(self) -> Verification:
        units = plan_scan(self.output) if self.source is None else plan_pair(self.source, self.output)
        units, unchecked = select(units, self.selection, self.output)
        self._check_files()
        manifest = read_manifest(self.output, self.share) if self.source is None else None
        statistics = Statistics()
        tallies = self._tallies(units, statistics, 0 if manifest is None else manifest.bytes_to_hash)
        hashes = {} if manifest is None else hash_files(self.output, manifest, self._advance)
        tallies, statistics = self._merge(tallies, statistics)
        for unit, tally in zip(units, tallies, strict=True):
            statistics.add(unit, tally)
        self._check_scale_format(units, tallies)
        if manifest is not None:
            check_manifest(self.output, manifest, self.share.merged(hashes))
        results = [r for unit, tally in zip(units, tallies, strict=True) for r in unit_results(unit, tally)]
        problems = [p for side in (self.source, self.output) if side is not None for p in side.problems]
        return Verification(
            None if self.source is None else self.source.files.label,
            self.output.files.label,
            results,
            problems + code_problems(results),
            statistics,
            inverse=self.inverse,
            hashed=manifest is not None,
            selection=self.selection.describe(),
            unchecked=unchecked,
            read_bytes=self.read,
        )


def _nothing(_: int) -> None:
    pass


def _untold(done: int, total: int) -> None:
    pass


def _open_all(sides: list[Files], headers: Callable[[int, int], None]) -> list[Checkpoint]:
    """The headers of the output, or of source and output."""
    total, numbers = sum(len(list(shard_names(files))) for files in sides), count(1)
    names = ("source", "output")[-len(sides) :]
    return [
        open_checkpoint(files, name, lambda: headers(next(numbers), total))
        for files, name in zip(sides, names, strict=True)
    ]


def verify(
    source: str | os.PathLike[str] | Files,
    output: str | os.PathLike[str] | Files | None = None,
    *,
    selection: Selection | None = None,
    strict: bool = False,
    inverse: bool = False,
    max_workers: int | None = None,
    max_memory: int | None = None,
    headers: Callable[[int, int], None] = _untold,
    on_start: Callable[[int], None] = _nothing,
    advance: Advance = _nothing,
    share: Share = ALONE,
) -> Verification:
    """Does `output` hold the same model as `source`? With one checkpoint only: is it sound in itself?

    `source` and `output` are folders or `Files`. `strict` makes a changed sign of zero a difference; `inverse`
    rebuilds the source's FP4 codes from the output's values. `max_memory` (bytes) bounds the working memory of all
    `max_workers` threads. `headers(done, total)` is told of shards whose headers are read, then `on_start(total)` and
    `advance(count)` of bytes, for progress bars.
    With a `share` this process does its part of the work, meets the others, and returns what all found.

    Raises InputError when there is no checkpoint at all, UsageError for a selection that selects nothing; whatever
    else is wrong with the files is in the result.
    """
    if inverse and output is None:
        raise UsageError("--inverse needs the source too", "Give SOURCE and OUTPUT.")
    workers, band = _checked_memory(max_workers or os.cpu_count() or 1, max_memory)
    started = time.monotonic()
    sides = [source] if output is None else [source, output]
    opened = [_open(side) for side in sides]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread per band; the bands are the parallelism
    try:
        found = _open_all(opened, headers)
        first = None if output is None else found[0]
        run = _Run(first, found[-1], selection or Selection(), workers, band, inverse, on_start, advance, share)
        try:
            result = run()
        except Interrupted as error:
            raise run.interrupted(error) from None
    finally:
        torch.set_num_threads(threads)
        for files in opened:
            if isinstance(files, LocalFiles):
                files.close()
    result.strict, result.seconds = strict, time.monotonic() - started
    return result
