"""`verify(source, output)`: the driver. Plans, shares the work among threads, puts the pieces together again.

Threads, not processes: reading and every array operation release the interpreter's lock, and tallies need no copying
between processes. Every piece is independent of every other, so a run over some of them is a part of the whole run.
"""

import fnmatch
import hashlib
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv4.errors import Interrupted, UsageError, printable

from .verify_config import check_config, compare_configs, compare_side_files, declares_powers_of_two
from .verify_files import Files, LocalFiles, Problem
from .verify_layout import Checkpoint, open_checkpoint
from .verify_manifest import check_manifest
from .verify_plan import Unit, plan_pair, plan_scan
from .verify_result import Statistics, TensorResult, Verification
from .verify_tensors import Piece, PieceWork, Reader, Tally, plan_pieces

BAND_BYTES = 1 << 20  # of the larger side: what a core's cache holds, and enough to outweigh the calls
BYTES_PER_BAND_BYTE = 12  # buffers, table positions and masks of a thread at its worst
MIN_BAND_BYTES = 1 << 16

Advance = Callable[[int], None]
# What a thread tells: elements of a unit that are done, a finished tally of it, an error, or that it has ended.
Found = tuple[int, int | Tally] | BaseException | None


@dataclass(frozen=True)
class Selection:
    """Which tensors to compare: a glob of names, one output shard (counted from 1), a share drawn by `seed`."""

    tensor: str | None = None
    shard: int | None = None
    sample: float | None = None
    seed: int = 0

    def describe(self) -> str:
        """What was left out, in words, for the verdict."""
        words = []
        if self.tensor:
            words.append(f"only tensors named '{printable(self.tensor)}'")
        if self.shard:
            words.append(f"only shard {self.shard}")
        if self.sample is not None:
            words.append(f"only a sample of {100 * self.sample:g}% of the tensors, seed {self.seed}")
        return ", ".join(words)

    def _drawn(self, name: str) -> bool:
        if self.sample is None:
            return True
        digest = hashlib.sha256(f"{self.seed}:{name}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.sample * 2**64

    def takes(self, unit: Unit, shard: str | None) -> bool:
        """Whether the unit is to be compared."""
        names = [name for name in (unit.name, unit.scale_name) if name]
        if self.tensor and not any(fnmatch.fnmatchcase(name, self.tensor) for name in names):
            return False
        if shard is not None and not any(side == "output" and shard in t.shards for side, t in unit.tensors()):
            return False
        return self._drawn(unit.name)


def _selected(units: list[Unit], selection: Selection, output: Checkpoint) -> tuple[list[Unit], list[str]]:
    shard = None
    if selection.shard is not None:
        if selection.shard > len(output.shards):
            raise UsageError(f"--shard {selection.shard}: the output has {len(output.shards)} shards")
        shard = output.shards[selection.shard - 1]
    taken = [unit for unit in units if selection.takes(unit, shard)]
    if not taken:
        raise UsageError("no tensor is selected", "Check --tensor, --shard and --sample.")
    kept = {unit.name for unit in taken}
    return taken, [unit.name for unit in units if unit.name not in kept]


class _Crew:
    """Threads that take pieces from one list and put tallies into one queue."""

    def __init__(
        self, units: list[Unit], pieces: list[Piece], make: Callable[[Unit], PieceWork], held: "_Held"
    ) -> None:
        self.units, self.pieces, self.make, self.held = units, pieces, make, held
        self.found: queue.Queue[Found] = queue.Queue(maxsize=1024)
        self.stopped = threading.Event()
        self._next = iter(range(len(pieces)))
        self._lock = threading.Lock()

    def _take(self) -> Piece | None:
        with self._lock:
            number = next(self._next, None)
        return None if number is None or self.stopped.is_set() else self.pieces[number]

    def _put(self, value: Found) -> None:
        while not self.stopped.is_set():
            try:
                return self.found.put(value, timeout=0.2)
            except queue.Full:
                continue

    def _piece(self, piece: Piece) -> None:
        unit, tally = self.units[piece.unit], Tally()
        self.held.fetch(unit)
        work = self.make(unit)
        for elements in (work.bytes if piece.row_bytes else work.values)(piece, tally, self.stopped):
            self._put((piece.unit, elements))
        self._put((piece.unit, tally))
        self.held.done(unit)

    def _work(self) -> None:
        try:
            while piece := self._take():
                self._piece(piece)
            self._put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._put(error)

    def run(self, workers: int) -> Iterator[tuple[int, int | Tally]]:
        """Elements done and tallies as they come. Threads are stopped and joined however this ends."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            running = workers
            while running:
                found = self.found.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            self.stopped.set()
            self.held.abandon()
            for thread in threads:
                thread.join()


class _Held:
    """Fetches a shard before its first read and drops it after its last."""

    def __init__(self, files: dict[str, Files], units: list[Unit], pieces: list[Piece]) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._left: Counter[tuple[str, str]] = Counter()
        for piece in pieces:
            self._left.update(self._shards(units[piece.unit]))

    @staticmethod
    def _shards(unit: Unit) -> set[tuple[str, str]]:
        return {(side, shard) for side, tensor in unit.tensors() for shard in tensor.shards}

    def fetch(self, unit: Unit) -> None:
        """Every shard of the unit is readable afterwards."""
        for side, shard in sorted(self._shards(unit)):
            self._files[side].fetch(shard)

    def abandon(self) -> None:
        """The run is over: nobody may go on waiting for a shard."""
        for files in self._files.values():
            files.abandon()

    def done(self, unit: Unit) -> None:
        """One piece of the unit is done."""
        for side, shard in self._shards(unit):
            with self._lock:
                self._left[side, shard] -= 1
                last = self._left[side, shard] == 0
            if last:
                self._files[side].drop(shard)


def _elements(unit: Unit) -> int:
    if unit.output_weight is not None:
        return unit.output_weight.rows * unit.output_weight.columns
    tensor = unit.output or unit.source
    count = 1
    for size in tensor.shape if tensor else ():
        count *= size
    return count


def _status(unit: Unit, tally: Tally) -> str:
    """Status of the unit's main tensor."""
    fixed = {"missing": "-", "extra": "+", "unreadable": "!", "different": "*", "scan": "="}
    if unit.kind in fixed:
        return fixed[unit.kind]
    if tally.different or tally.copies_differ:
        return "*"
    assert unit.source is not None and unit.output is not None
    same = not tally.bytes_differ and unit.source.dtype == unit.output.dtype
    return "=" if same or not unit.source.size + unit.output.size else "≈"


def _scale_status(unit: Unit, tally: Tally, weight: str) -> tuple[str, str]:
    """Status of the unit's scale: its bytes if they are the same, else its weight's values decide."""
    source, output = unit.source_scale, unit.output_scale
    if unit.kind in ("missing", "extra", "unreadable", "scan"):
        return weight, unit.reason
    if source is not None and output is not None:
        same = (source.dtype, source.shape) == (output.dtype, output.shape) and not tally.scale_bytes_differ
        return ("=", "") if same else ("≈" if weight in "=≈" else "*", "")
    floats = ("BF16", "F32")
    tensor = unit.output if output is None else unit.source
    if tensor is not None and tensor.dtype in floats:
        return ("≈" if weight in "=≈" else "*"), f"its factors are in the {tensor.dtype} weight"
    if weight in "=≈":
        return "≈", "absent on one side, every factor is 1"
    return ("-", "") if output is None else ("+", "")


def _reason(unit: Unit, tally: Tally) -> str:
    if tally.copies_differ:
        return "ranks hold different copies: " + ", ".join(map(printable, sorted(tally.copies_differ)))
    return unit.reason


def _results(unit: Unit, tally: Tally) -> Iterator[TensorResult]:
    status = _status(unit, tally)
    sides = [side for side, tensor in unit.tensors() if tensor.name == unit.name]
    if sides or unit.kind == "unreadable":
        yield TensorResult(unit.name, status, _reason(unit, tally), unit, tally)
    if unit.scale_name:
        scale, reason = _scale_status(unit, tally, status)
        yield TensorResult(unit.scale_name, scale, reason)


def _code_problems(results: list[TensorResult]) -> list[Problem]:
    """NaN codes and scales that are no scales: no correct conversion holds them."""
    found = []
    for result in results:
        for side in ("source", "output"):
            name = printable(result.name)
            if count := result.tally.special[side]:
                found.append(Problem("codes", side, f"{name} holds {count} codes that are not finite numbers"))
            if count := result.tally.bad_scales[side]:
                found.append(Problem("codes", side, f"{name} has {count} scales that are not positive and finite"))
    return found


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
    read: int = 0

    def _tallies(self, units: list[Unit]) -> list[Tally]:
        pieces = [piece for index, unit in enumerate(units) for piece in plan_pieces(index, unit, self.band_bytes)]
        totals = [_elements(unit) for unit in units]
        files = {side.where: side.files for side in (self.source, self.output) if side is not None}
        reader = Reader(files.get("source"), self.output.files)
        crew = _Crew(
            units,
            pieces,
            lambda unit: PieceWork(unit, reader, self.band_bytes, self.inverse),
            _Held(files, units, pieces),
        )
        tallies = [Tally() for _ in units]
        self.on_start(sum(units[index].size for index in {piece.unit for piece in pieces}))
        for index, found in crew.run(min(self.workers, max(len(pieces), 1))):
            if isinstance(found, Tally):
                tallies[index].add(found)
                continue
            done = units[index].size * found // max(totals[index], 1)
            self.read += done
            self.advance(done)
        return tallies

    def _statistics(self, units: list[Unit], tallies: list[Tally]) -> Statistics:
        statistics = Statistics()
        for unit, tally in zip(units, tallies, strict=True):
            statistics.add(unit.name, tally)
            for side, tensor in unit.tensors():
                statistics.sizes[side][tensor.dtype] += tensor.size * (1 + len(tensor.copies))
        return statistics

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

    def __call__(self) -> Verification:
        units = plan_scan(self.output) if self.source is None else plan_pair(self.source, self.output)
        units, unchecked = _selected(units, self.selection, self.output)
        self._check_files()
        tallies = self._tallies(units)
        self._check_scale_format(units, tallies)
        hashed = self.source is None and check_manifest(self.output)
        results = [r for unit, tally in zip(units, tallies, strict=True) for r in _results(unit, tally)]
        problems = [p for side in (self.source, self.output) if side is not None for p in side.problems]
        return Verification(
            None if self.source is None else self.source.files.label,
            self.output.files.label,
            results,
            problems + _code_problems(results),
            self._statistics(units, tallies),
            inverse=self.inverse,
            hashed=hashed,
            selection=self.selection.describe(),
            unchecked=unchecked,
            read_bytes=self.read,
        )


def _nothing(_: int) -> None:
    pass


def verify(
    source: str | os.PathLike[str] | Files,
    output: str | os.PathLike[str] | Files | None = None,
    *,
    selection: Selection | None = None,
    strict: bool = False,
    inverse: bool = False,
    max_workers: int | None = None,
    max_memory: int | None = None,
    on_start: Callable[[int], None] = _nothing,
    advance: Advance = _nothing,
) -> Verification:
    """Does `output` hold the same model as `source`? With one checkpoint only: is it sound in itself?

    `source` and `output` are folders or `Files`. `strict` makes a changed sign of zero a difference; `inverse`
    rebuilds the source's FP4 codes from the output's values. `max_memory` (bytes) bounds the working memory of all
    `max_workers` threads. `on_start(total)` and `advance(count)` are told of bytes, for a progress bar.

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
        names = ["output"] if output is None else ["source", "output"]
        found = [open_checkpoint(f, where) for f, where in zip(opened, names, strict=True)]
        first = None if output is None else found[0]
        run = _Run(first, found[-1], selection or Selection(), workers, band, inverse, on_start, advance)
        try:
            result = run()
        except Interrupted as error:
            raise _interrupted(error, run.read) from None
    finally:
        torch.set_num_threads(threads)
        for files in opened:
            if isinstance(files, LocalFiles):
                files.close()
    result.strict, result.seconds = strict, time.monotonic() - started
    return result


def _interrupted(error: Interrupted, done: int) -> Interrupted:
    told = Interrupted(
        f"interrupted after {done / 1e9:.1f} GB were compared", "Nothing is kept: run the same command again."
    )
    told.exit_code = error.exit_code
    return told
