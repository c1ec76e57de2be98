"""One output shard: scan, then read, compute, hash and write its pieces, overlapped.

Workers compute pieces; the calling thread, one for each shard in flight, takes them in file order and puts them into
blocks, which more threads hash and write (see pipeline.py). The number of pieces in
memory is bounded, for shards of any size.
"""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.convert.checkpoint.forms.recorded_scales import KEY, PlacedScales, Record, Texts, dump, joined
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import Counts, OutputTensor, Piece, PieceResult, filling, split, tasks
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.journal import FinishedShard
from dsv4.progress import Progress, Scaled

from .hashing import FileHash
from .in_flight import Flight, Written
from .pipeline import ShardPipeline
from .scan import ScannedShard, bytes_to_scan, scan_shard
from .workers import Workers


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The memory of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class _RecordedScales:
    """The recorded scales of the tensors of a shard, one after the other, within the shard's limit.

    Of a tensor for which not enough is left of it, nothing is recorded: its way back has equal values, and may have
    other scales.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: dict[str, list[PlacedScales]] = {}
        self._count = 0

    def add(self, scales: Record) -> None:
        """Include those of a piece. More of them than characters are left would not fit."""
        self._count += sum(len(found.places) for found in scales.values())
        if self._count > self._left:
            self._parts = {}
            return
        for form, found in scales.items():
            self._parts.setdefault(form, []).append(found)

    def finish(self) -> dict[str, Texts]:
        """The key for the manifest's entry, if there are any; the next tensor begins."""
        texts = {form: text for form, parts in sorted(self._parts.items()) if (text := dump(joined(parts)))}
        self._parts, self._count = {}, 0
        size = sum(map(len, texts.values()))
        if not texts or size > self._left:
            return {}
        self._left -= size
        return {KEY: texts}


class ManifestBuilder:
    """Turns pieces, given in file order, into the manifest entries of their tensors."""

    def __init__(self, scanned: ScannedShard) -> None:
        self._scanned = scanned
        self._entries: dict[str, dict[str, Any]] = {}
        self._counts, self._recorded = Counts(), _RecordedScales(scanned.shard.record_limit)

    def _entry(self, tensor: OutputTensor, counts: Counts) -> dict[str, Any]:
        source = tensor.source
        entry: dict[str, Any] = {
            "source_name": source.name,
            "source_dtype": source.dtype,
            "source_shape": list(source.shape),
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "shard": self._scanned.shard.file,
        }
        if tensor.rank_slice:
            entry["slice"] = {
                "dim": tensor.rank_slice.dim,
                "index": tensor.rank_slice.index,
                "count": tensor.rank_slice.count,
            }
        return entry | tensor.recipe.entry(tensor, counts, self._scanned.scan_of(tensor))

    def add(self, piece: Piece, result: PieceResult) -> None:
        """Include one piece; the last one completes its tensor."""
        self._counts.add(result.counts)
        self._recorded.add(result.scales)
        if piece.is_last:
            self._entries[piece.tensor.name] = self._entry(piece.tensor, self._counts) | self._recorded.finish()
            self._counts = Counts()

    def entries(self, prefix_sha256: dict[str, str]) -> dict[str, dict[str, Any]]:
        """The entries of all tensors by name; those without elements, which have no pieces and no digest, come last.

        prefix_sha256: of the tensors with elements.
        """
        for name, digest in prefix_sha256.items():
            self._entries[name]["prefix_sha256"] = digest
        for tensor in self._scanned.shard.tensors:
            if not tensor.nbytes:
                self._entries[tensor.name] = self._entry(tensor, Counts())
        return self._entries


def _pieces(shard: OutputShard, place: int) -> Iterator[Piece]:
    """The pieces of a shard in the order of the file. place: where its data begins."""
    for tensor in shard.tensors:
        yield from split(tensor, place)
        place += tensor.nbytes + shard.container.padding(tensor.nbytes)


def _write_pieces(
    checkpoint: Checkpoint, scanned: ScannedShard, pipeline: ShardPipeline, workers: Workers, flight: Flight
) -> FinishedShard:
    """Compute, hash and write all pieces of a shard; returns when they are written."""

    def computed_of(piece: Piece) -> PieceResult:
        if piece.is_filling:
            return filling(piece)
        return piece.tensor.recipe.compute(checkpoint, piece, scanned.scan_of(piece.tensor))

    def compute(task: list[Piece]) -> list[PieceResult]:
        return [computed_of(piece) for piece in task]

    shard, manifest, header = scanned.shard, ManifestBuilder(scanned), scanned.shard.header
    pipeline.begin(header)
    todo = tasks(_pieces(shard, len(header)))
    with closing(workers.map(compute, todo, flight.advance, flight.let_next_begin)) as computed:
        for task, results in computed:
            for piece, result in zip(task, results, strict=True):
                pipeline.put(bytes_of(result.data))
                if piece.is_last:
                    pipeline.mark(piece.tensor.name)
                    pipeline.put(memoryview(bytes(shard.container.padding(piece.tensor.nbytes))))
                manifest.add(piece, result)
    sha256 = pipeline.finish()
    return FinishedShard(shard.file, shard.size, sha256, manifest.entries(pipeline.prefix_sha256))


def _write_file(
    checkpoint: Checkpoint, scanned: ScannedShard, folder: Path, workers: Workers, flight: Flight, progress: Progress
) -> Written:
    """Write a scanned shard to its file, which is removed on an error. A run that stops removes its files itself."""

    def hash_is_late() -> None:
        if workers.has_free:
            flight.let_next_begin()

    flight.file = file = AtomicFile(folder / scanned.shard.file, scanned.shard.size)
    pipeline = ShardPipeline(file, FileHash(workers.hashing), workers.blocks, progress, hash_is_late)
    try:
        return file, _write_pieces(checkpoint, scanned, pipeline, workers, flight)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file.path)
        pipeline.stop()
        if not isinstance(error, CancelledError):
            file.abort()
        raise


def write_shard(
    checkpoint: Checkpoint, shard: OutputShard, settings: Settings, folder: Path, workers: Workers, flight: Flight
) -> Written:
    """Scan and write one shard; the file is complete but not yet committed.

    On any error the file is removed. The caller commits the file and then records the shard.
    """

    def use_idle_workers() -> None:
        if workers.has_room:
            flight.let_next_begin()

    to_scan = bytes_to_scan(shard)
    half = to_scan // 2  # of what is scanned, half counts once it is scanned, the other half when it is written
    progress = Scaled(flight.advance, to_scan, half)
    scanned = scan_shard(checkpoint, shard, settings, workers, progress, use_idle_workers)
    use_idle_workers()  # the file system may take long to allocate the file
    progress = Scaled(flight.advance, scanned.shard.data_bytes, shard.data_bytes - half)
    try:
        return _write_file(checkpoint, scanned, folder, workers, flight, progress)
    finally:
        workers.give_back(scanned.spared_bytes)
