"""Before a shard is written: does every weight that it casts have an exact form in the target format?

The answer decides the header (with `--on-inexact keep`, a tensor without one stays as it is), so it is needed before
the first byte is written. The recipes scan the weights piece by piece; their results are passed on to the computation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import OutputTensor, Piece, Scan, join_scans, split
from dsv4.convert.plan.settings import CONVERSIONS, Settings
from dsv4.convert.plan.shards import OutputShard
from dsv4.errors import InputError
from dsv4.progress import Progress
from dsv4.text import counted

from .workers import Workers

Scanned = tuple[OutputTensor, Scan]
NAMED = 20  # tensors without an exact form that an error describes: in weights that were trained since, all have none


@dataclass(frozen=True)
class ScannedShard:
    """A shard as it will be written, and the scans of its weights by the weight's name in the source."""

    shard: OutputShard
    scans: dict[str, Scan]

    def scan_of(self, tensor: OutputTensor) -> Scan | None:
        """The scan of the weight that an output tensor is made from."""
        return self.scans.get(tensor.weight.name)

    @property
    def spared_bytes(self) -> int:
        """Memory of the scan results that could be computed again."""
        return sum(scan.spared_bytes for scan in self.scans.values())


class _TensorScan:
    """The scan of one tensor, piece by piece. Results that may be dropped are, unless there is room for all of them."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._scans = workers, list[Scan]()
        self._spared_bytes, self._fits = 0, True

    def _drop(self) -> None:
        self._workers.give_back(self._spared_bytes)
        self._spared_bytes, self._fits = 0, False
        self._scans = [replace(scan, spared={}) for scan in self._scans]

    def add(self, scan: Scan) -> None:
        """Include the next piece."""
        self._scans.append(scan)
        if self._fits and self._workers.spare(scan.spared_bytes):
            self._spared_bytes += scan.spared_bytes
        else:
            self._drop()

    def joined(self) -> Scan:
        """The scan of the whole tensor."""
        return join_scans(self._scans)


def _bytes_of(piece: Piece) -> int:
    """Bytes of the output that are made from a piece."""
    tensor = piece.tensor
    return tensor.nbytes * piece.stop // tensor.rows - tensor.nbytes * piece.start // tensor.rows


def _scan_tensors(
    checkpoint: Checkpoint,
    tensors: list[OutputTensor],
    workers: Workers,
    progress: Progress,
    all_submitted: Callable[[], None],
) -> Iterator[Scanned]:
    pieces = (piece for tensor in tensors for piece in split(tensor))
    whole = _TensorScan(workers)

    def scan(piece: Piece) -> Scan | None:
        return None if piece.is_filling else piece.tensor.recipe.scan(checkpoint, piece)

    for piece, found in workers.map(scan, pieces, progress, all_submitted):
        progress(_bytes_of(piece))
        if found is not None:
            whole.add(found)
        if piece.is_last:
            yield piece.tensor, whole.joined()
            whole = _TensorScan(workers)


def _refuse(
    checkpoint: Checkpoint,
    shard: OutputShard,
    settings: Settings,
    inexact: list[Scanned],
    workers: Workers,
    progress: Progress,
) -> None:
    def describe(scanned: Scanned) -> str:
        tensor, scan = scanned
        return f"{tensor.name}: {tensor.recipe.describe_inexact(checkpoint, tensor, scan)}"

    described = [words for _, words in workers.map(describe, inexact[:NAMED], progress)]
    more = [f"and {len(inexact) - NAMED} more"] if len(inexact) > NAMED else []
    or_keep = "" if CONVERSIONS[settings.to].has_own_form else " --on-inexact keep leaves them as they are."
    raise InputError(
        f"{shard.file}: no exact form for {counted(len(inexact), 'tensor')}:",
        "--on-inexact round rounds these tensors and reports how many elements changed." + or_keep,
        [*described, *more],
    )


def bytes_to_scan(shard: OutputShard) -> int:
    """Bytes of a shard that are scanned before they are written."""
    return sum(tensor.nbytes for tensor in shard.tensors if tensor.scanned)


def scan_shard(
    checkpoint: Checkpoint,
    shard: OutputShard,
    settings: Settings,
    workers: Workers,
    progress: Progress,
    all_submitted: Callable[[], None],
) -> ScannedShard:
    """Scan a shard's casts and decide what is written. all_submitted: called when the last piece to scan is.

    progress: called with bytes of output whose weights are scanned; they add up to `bytes_to_scan`.

    Raises InputError naming the tensors of the shard without an exact form, if `on_inexact` is "error".
    """
    scans: dict[str, Scan] = {}
    inexact: list[Scanned] = []
    casts = [t for t in shard.tensors if t.scanned]
    for tensor, scan in _scan_tensors(checkpoint, casts, workers, progress, all_submitted):
        scans[tensor.weight.name] = scan
        if not scan.is_exact:
            inexact.append((tensor, scan))
    if inexact and settings.on_inexact == "error":
        _refuse(checkpoint, shard, settings, inexact, workers, progress)
    if inexact and settings.on_inexact == "keep":
        shard = shard.keeping({tensor.weight.name for tensor, _ in inexact}, settings.layout)
    return ScannedShard(shard, scans)
