"""Before a shard is written: does every weight that it casts have an exact form in the target format?

The answer decides the header (with `--on-inexact keep`, a tensor without one stays as it is), so it must be known
before the first byte. The recipes look at the weights, a piece at a time; what they found is handed on to the pieces
that are then computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import OutputTensor, Piece, Scan, join_scans, split
from dsv4.convert.plan.settings import Settings
from dsv4.convert.plan.shards import OutputShard
from dsv4.errors import InputError, printable
from dsv4.progress import Progress

from .resources import Workers

Scanned = tuple[OutputTensor, Scan]


@dataclass(frozen=True)
class ScannedShard:
    """A shard as it will be written, and the scans of its weights by the weight's name in the source."""

    shard: OutputShard
    scans: dict[str, Scan]

    def scan_of(self, tensor: OutputTensor) -> Scan | None:
        """The scan of the weight that an output tensor is made from."""
        return self.scans.get(tensor.weight.name)


def _scan_tensors(
    checkpoint: Checkpoint, tensors: list[OutputTensor], workers: Workers, progress: Progress
) -> Iterator[Scanned]:
    pieces = (piece for tensor in tensors for piece in split(tensor))
    scans: list[Scan] = []

    def scan(piece: Piece) -> Scan:
        return piece.tensor.recipe.scan(checkpoint, piece)

    for piece, found in workers.map(scan, pieces, progress):
        scans.append(found)
        if piece.stop == piece.tensor.rows:
            yield piece.tensor, join_scans(scans)
            scans = []


def _refuse(
    checkpoint: Checkpoint, shard: OutputShard, inexact: list[Scanned], workers: Workers, progress: Progress
) -> None:
    def describe(scanned: Scanned) -> str:
        tensor, scan = scanned
        return f"  {printable(tensor.name)}: {tensor.recipe.describe_inexact(checkpoint, tensor, scan)}"

    shown = "\n".join(words for _, words in workers.map(describe, inexact, progress))
    raise InputError(
        f"{len(inexact)} tensors of {shard.file} have no exact form:\n{shown}",
        "--on-inexact keep leaves these tensors as they are; --on-inexact round rounds them and says so.",
    )


def scan_shard(
    checkpoint: Checkpoint, shard: OutputShard, settings: Settings, workers: Workers, progress: Progress
) -> ScannedShard:
    """Scan a shard's casts and decide what is written.

    Raises InputError naming every tensor of the shard without an exact form, if `on_inexact` is "error".
    """
    scans: dict[str, Scan] = {}
    inexact: list[Scanned] = []
    room = workers.spared_bytes
    for tensor, scan in _scan_tensors(checkpoint, [t for t in shard.tensors if t.scanned], workers, progress):
        room -= scan.spared_bytes
        scans[tensor.weight.name] = scan if room >= 0 else replace(scan, spared={})
        if not scan.is_exact:
            inexact.append((tensor, scans[tensor.weight.name]))
    if inexact and settings.on_inexact == "error":
        _refuse(checkpoint, shard, inexact, workers, progress)
    if inexact and settings.on_inexact == "keep":
        shard = shard.keeping({tensor.weight.name for tensor, _ in inexact}, settings.layout)
    return ScannedShard(shard, scans)
