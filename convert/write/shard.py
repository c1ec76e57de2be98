"""One output shard: scan, then read, compute, hash and write its pieces, overlapped.

Workers make pieces; the calling thread takes them in file order and puts them into blocks, which two more threads hash
and write (see shard_outflow.py). At most `window` pieces are alive at a time, which bounds memory whatever the size of
the shard. hashlib, preadv, write, torch and the compiled cast all let go of the interpreter's lock, so threads are
enough.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.plan import Op, OutputShard, OutputTensor
from dsv4.convert.plan.settings import Settings
from dsv4.quant.fp4_to_fp8 import BlockScales, CastInto

from .atomic_file import AtomicFile
from .journal import FinishedShard
from .pieces import Counts, Made, Piece, make, split
from .pipeline import Outflow
from .scan import ScannedShard, scan_shard

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """Threads that make pieces, how far they may run ahead, the form of the cast they take, and one thread each that
    hashes and writes shards."""

    pool: Executor
    window: int
    cast: CastInto
    hasher: Executor
    writer: Executor

    def map_in_order(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results of `function` in the order of `items`, at most `window` of them unclaimed."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self.pool.submit(function, item))
                if len(waiting) >= self.window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass
class _Hashed:
    """A made piece with the digests of whole tensors already taken, where the piece is a whole tensor."""

    piece: Piece
    made: Made
    whole: bool
    sha256: str = ""
    source_sha256: str = ""


@dataclass
class _Tensor:
    """Running digests and counts of the tensor being written."""

    sha256: Any = field(default_factory=hashlib.sha256)
    source_sha256: Any = field(default_factory=hashlib.sha256)
    counts: Counts = field(default_factory=Counts)


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _make_hashed(checkpoint: Checkpoint, piece: Piece, scales: BlockScales | None, cast: CastInto) -> _Hashed:
    made = make(checkpoint, piece, scales, cast)
    hashed = _Hashed(piece, made, whole=piece.start == 0 and piece.stop == piece.tensor.rows)
    if hashed.whole:
        hashed.sha256 = hashlib.sha256(_bytes(made.data)).hexdigest()
        if made.source is not None:
            hashed.source_sha256 = hashlib.sha256(_bytes(made.source)).hexdigest()
    return hashed


def _block_statistics(scales: BlockScales) -> dict[str, int]:
    return {
        "blocks": scales.span.numel(),
        "max_span": int(scales.span.max()) if scales.span.numel() else 0,
        "moved_blocks": int(scales.moved.sum()),
        "inexact_blocks": int(scales.inexact.sum()),
    }


def _entry(tensor: OutputTensor, file: str, state: _Tensor, digests: tuple[str, str]) -> dict[str, Any]:
    """The manifest entry of a finished tensor, without statistics of its blocks."""
    source = tensor.source
    entry: dict[str, Any] = {
        "source_name": source.name,
        "source_dtype": source.dtype,
        "source_shape": list(source.shape),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "shard": file,
        "sha256": digests[0],
    }
    if digests[1]:
        entry["source_sha256"] = digests[1]
    if tensor.part:
        entry["slice"] = {"dim": tensor.part.dim, "index": tensor.part.index, "count": tensor.part.count}
    counts = state.counts
    if tensor.op is Op.FP8_CODES:
        entry["negative_zeros"] = counts.negative_zeros
    if counts.nan:
        entry["nan_codes"] = counts.nan
    if counts.changed:
        entry["changed_elements"] = counts.changed
    if counts.squared_value:
        entry["relative_rms_error"] = (counts.squared_error / counts.squared_value) ** 0.5
        entry["max_error"] = counts.max_error
    return entry


class _Entries:
    """Takes pieces in file order, passes their bytes on, and turns each finished tensor into a manifest entry."""

    def __init__(self, scanned: ScannedShard, outflow: Outflow) -> None:
        self._scanned, self._outflow = scanned, outflow
        self.of_tensors: dict[str, dict[str, Any]] = {}
        self._state = _Tensor()

    def take(self, hashed: _Hashed) -> None:
        """Pass one piece on; close its tensor if it was the last."""
        piece, made, state = hashed.piece, hashed.made, self._state
        data = _bytes(made.data)
        self._outflow.put(data)
        state.counts.add(made.counts)
        if not hashed.whole:
            state.sha256.update(data)
            if made.source is not None:
                state.source_sha256.update(_bytes(made.source))
        if piece.stop == piece.tensor.rows:
            self._close(hashed)

    def _close(self, hashed: _Hashed) -> None:
        tensor, state = hashed.piece.tensor, self._state
        if hashed.whole:
            digests = hashed.sha256, hashed.source_sha256
        else:
            source = state.source_sha256.hexdigest() if hashed.made.source is not None else ""
            digests = state.sha256.hexdigest(), source
        entry = _entry(tensor, self._scanned.shard.file, state, digests)
        if tensor.op is Op.FP8_CODES:
            entry |= _block_statistics(self._scanned.scales[tensor.weight.name])
        self.of_tensors[tensor.name] = entry
        self._state = _Tensor()


def _empty_entries(shard: OutputShard) -> dict[str, dict[str, Any]]:
    """Entries of tensors without elements: they have no pieces."""
    nothing = hashlib.sha256().hexdigest()
    return {t.name: _entry(t, shard.file, _Tensor(), (nothing, "")) for t in shard.tensors if not t.nbytes}


def write_shard(
    checkpoint: Checkpoint,
    shard: OutputShard,
    settings: Settings,
    folder: Path,
    workers: Workers,
    advance: Callable[[int], None],
) -> tuple[AtomicFile, FinishedShard]:
    """Scan and write one shard; the file is complete but not yet committed. `advance` is told of data bytes written.

    On any error nothing is left behind. The caller commits the file and then records the shard.
    """
    scanned = scan_shard(checkpoint, shard, settings, workers.map_in_order)
    final = scanned.shard
    pieces = (piece for tensor in final.tensors if tensor.nbytes for piece in split(tensor))
    file = AtomicFile(folder / final.file, final.size)
    outflow = Outflow(file, workers.hasher, workers.writer, advance)
    try:
        outflow.begin(final.header)
        entries, scales = _Entries(scanned, outflow), scanned.scales
        for hashed in workers.map_in_order(
            lambda piece: _make_hashed(checkpoint, piece, scales.get(piece.tensor.weight.name), workers.cast), pieces
        ):
            entries.take(hashed)
        sha256 = outflow.finish()
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file.path)
        try:
            outflow.stop()
        finally:
            file.abort(error)
        raise
    return file, FinishedShard(final.file, final.size, sha256, entries.of_tensors | _empty_entries(final))
