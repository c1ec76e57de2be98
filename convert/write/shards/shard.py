"""One output shard: scan, then read, compute, hash and write its pieces, overlapped.

Workers compute pieces; the calling thread, one for each shard in flight, takes them in file order and puts them into
blocks, which two more threads hash and write (see pipeline.py). The number of pieces in
memory is bounded, for shards of any size.
"""

from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import Counts, OutputTensor, Piece, split
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.journal import FinishedShard

from .in_flight import Flight, Written
from .pieces import HashedPiece, bytes_of, compute_piece
from .pipeline import ShardPipeline
from .scan import ScannedShard, scan_shard
from .workers import Workers


@dataclass
class _TensorState:
    """Running digests and counts of the tensor being written."""

    output: Any = field(default_factory=blake3)
    source: Any = field(default_factory=blake3)
    counts: Counts = field(default_factory=Counts)

    def add(self, hashed: HashedPiece) -> None:
        """Include a piece."""
        self.counts.add(hashed.result.counts)
        if hashed.piece.is_whole:
            return
        self.output.update(bytes_of(hashed.result.data))
        if hashed.result.source is not None:
            self.source.update(bytes_of(hashed.result.source))

    def digests(self, last: HashedPiece) -> tuple[str, str]:
        """BLAKE3 of the tensor and of its source, "" if that is not hashed; `last` is its last piece."""
        if last.piece.is_whole:
            return last.digest, last.source_digest
        return self.output.hexdigest(), "" if last.result.source is None else self.source.hexdigest()


class ManifestBuilder:
    """Turns pieces, given in file order, into the manifest entries of their tensors."""

    def __init__(self, scanned: ScannedShard) -> None:
        self._scanned = scanned
        self._entries: dict[str, dict[str, Any]] = {}
        self._state = _TensorState()

    def _entry(self, tensor: OutputTensor, counts: Counts, digests: tuple[str, str]) -> dict[str, Any]:
        source = tensor.source
        entry: dict[str, Any] = {
            "source_name": source.name,
            "source_dtype": source.dtype,
            "source_shape": list(source.shape),
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "shard": self._scanned.shard.file,
            "blake3": digests[0],
        }
        if digests[1]:
            entry["source_blake3"] = digests[1]
        if tensor.rank_slice:
            entry["slice"] = {
                "dim": tensor.rank_slice.dim,
                "index": tensor.rank_slice.index,
                "count": tensor.rank_slice.count,
            }
        return entry | tensor.recipe.entry(tensor, counts, self._scanned.scan_of(tensor))

    def add(self, hashed: HashedPiece) -> None:
        """Include one piece; the last one completes its tensor."""
        self._state.add(hashed)
        tensor = hashed.piece.tensor
        if hashed.piece.stop == tensor.rows:
            self._entries[tensor.name] = self._entry(tensor, self._state.counts, self._state.digests(hashed))
            self._state = _TensorState()

    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries of all tensors by name; those without elements, which have no pieces, come last."""
        nothing = blake3().hexdigest(), ""
        for tensor in self._scanned.shard.tensors:
            if not tensor.nbytes:
                self._entries[tensor.name] = self._entry(tensor, Counts(), nothing)
            elif tensor.made_by_scan_of:
                self._entries[tensor.name]["source_blake3"] = self._entries[tensor.made_by_scan_of]["source_blake3"]
        return self._entries


def _write_pieces(
    checkpoint: Checkpoint, scanned: ScannedShard, pipeline: ShardPipeline, workers: Workers, flight: Flight
) -> FinishedShard:
    """Compute, hash and write all pieces of a shard; returns when they are written."""

    def compute(piece: Piece) -> HashedPiece:
        return compute_piece(checkpoint, piece, scanned.scan_of(piece.tensor))

    shard, manifest = scanned.shard, ManifestBuilder(scanned)
    pieces = (piece for tensor in shard.tensors for piece in split(tensor))
    pipeline.begin(shard.header)
    with closing(workers.map(compute, pieces, flight.advance, flight.let_next_begin)) as computed:
        for _, hashed in computed:
            pipeline.put(bytes_of(hashed.result.data))
            if hashed.piece.stop == hashed.piece.tensor.rows:
                pipeline.put(memoryview(bytes(shard.container.padding(hashed.piece.tensor.nbytes))))
            manifest.add(hashed)
    return FinishedShard(shard.file, shard.size, pipeline.finish(), manifest.entries())


def _write_file(
    checkpoint: Checkpoint, scanned: ScannedShard, folder: Path, workers: Workers, flight: Flight
) -> Written:
    """Write a scanned shard to its file, which is removed on an error. A run that stops removes its files itself."""

    def hash_is_late() -> None:
        if workers.has_free:
            flight.let_next_begin()

    flight.file = file = AtomicFile(folder / scanned.shard.file, scanned.shard.size)
    pipeline = ShardPipeline(file, workers.blocks, flight.advance, hash_is_late)
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

    scanned = scan_shard(checkpoint, shard, settings, workers, flight.advance, use_idle_workers)
    use_idle_workers()  # the file system may take long to allocate the file
    try:
        return _write_file(checkpoint, scanned, folder, workers, flight)
    finally:
        workers.give_back(scanned.spared_bytes)
