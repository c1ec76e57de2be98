"""One output shard: scan, then read, compute, hash and write its pieces, overlapped.

Workers make pieces; the calling thread takes them in file order and puts them into blocks, which two more threads hash
and write (see shard_outflow.py). At most `window` pieces are alive at a time, which bounds memory whatever the size of
the shard. hashlib, preadv, write, torch and the compiled cast all let go of the interpreter's lock, so threads are
enough.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.plan import OutputShard
from dsv4.convert.plan.recipes.recipe import Counts, OutputTensor, split
from dsv4.convert.plan.settings import Settings
from dsv4.progress import Progress, bounded_map

from .atomic_file import AtomicFile
from .journal import FinishedShard
from .pieces import HashedPiece, bytes_of, compute_piece
from .pipeline import Outflow
from .scan import ScannedShard, scan_shard

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """Threads that compute pieces, how far they may run ahead, and one thread each that hashes and writes shards."""

    pool: Executor
    window: int
    hasher: Executor
    writer: Executor

    def map_in_order(self, function: Callable[[T], R], items: Iterable[T], progress: Progress) -> Iterator[R]:
        """Results of `function` in the order of `items`, at most `window` of them unclaimed. Calls `progress(0)`."""
        for _, result in bounded_map(self.pool, function, items, self.window, progress):
            yield result


@dataclass
class _TensorState:
    """Running digests and counts of the tensor being written."""

    sha256: Any = field(default_factory=hashlib.sha256)
    source_sha256: Any = field(default_factory=hashlib.sha256)
    counts: Counts = field(default_factory=Counts)

    def add(self, hashed: HashedPiece) -> None:
        """Include a piece."""
        self.counts.add(hashed.result.counts)
        if hashed.piece.is_whole:
            return
        self.sha256.update(bytes_of(hashed.result.data))
        if hashed.result.source is not None:
            self.source_sha256.update(bytes_of(hashed.result.source))

    def digests(self, last: HashedPiece) -> tuple[str, str]:
        """SHA-256 of the tensor and of its source, "" if that is not hashed; `last` is its last piece."""
        if last.piece.is_whole:
            return last.sha256, last.source_sha256
        return self.sha256.hexdigest(), "" if last.result.source is None else self.source_sha256.hexdigest()


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
            "sha256": digests[0],
        }
        if digests[1]:
            entry["source_sha256"] = digests[1]
        if tensor.part:
            entry["slice"] = {"dim": tensor.part.dim, "index": tensor.part.index, "count": tensor.part.count}
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
        nothing = hashlib.sha256().hexdigest(), ""
        for tensor in self._scanned.shard.tensors:
            if not tensor.nbytes:
                self._entries[tensor.name] = self._entry(tensor, Counts(), nothing)
            elif tensor.source_hashed_with:
                self._entries[tensor.name]["source_sha256"] = self._entries[tensor.source_hashed_with]["source_sha256"]
        return self._entries


def write_shard(
    checkpoint: Checkpoint,
    shard: OutputShard,
    settings: Settings,
    folder: Path,
    workers: Workers,
    advance: Progress,
) -> tuple[AtomicFile, FinishedShard]:
    """Scan and write one shard; the file is complete but not yet committed. `advance` counts bytes of data written.

    On any error nothing is left behind. The caller commits the file and then records the shard.
    """

    def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return workers.map_in_order(function, items, advance)

    scanned = scan_shard(checkpoint, shard, settings, in_order)
    final = scanned.shard
    pieces = (piece for tensor in final.tensors for piece in split(tensor))
    file = AtomicFile(folder / final.file, final.size)
    outflow = Outflow(file, workers.hasher, workers.writer, advance)
    try:
        outflow.begin(final.header)
        manifest = ManifestBuilder(scanned)
        for hashed in in_order(lambda piece: compute_piece(checkpoint, piece, scanned.scan_of(piece.tensor)), pieces):
            outflow.put(bytes_of(hashed.result.data))
            manifest.add(hashed)
        sha256 = outflow.finish()
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file.path)
        try:
            outflow.stop()
        finally:
            file.abort(error)
        raise
    return file, FinishedShard(final.file, final.size, sha256, manifest.entries())
