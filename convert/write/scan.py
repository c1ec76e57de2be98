"""Before a shard is written: does every weight that it casts have an exact form in the target format?

The answer decides the header (with `--on-inexact keep`, a tensor without one stays as it is), so it must be known
before the first byte. The recipes look at the weights, a piece at a time; what they found is handed on to the pieces
that are then computed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.engines import Layout
from dsv4.convert.plan.plan import OutputShard, kept_instead_of, output_order
from dsv4.convert.plan.recipes.recipe import OutputTensor, Piece, Scan, join_scans, split
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError, printable

SPARED_BYTES = 64 * 2**20  # results of one shard's scan that are kept although they could be computed again

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """`map` on threads, or on none; results come in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterable[R]: ...


@dataclass(frozen=True)
class ScannedShard:
    """A shard as it will be written, and the scans of its weights by the weight's name in the source."""

    shard: OutputShard
    scans: dict[str, Scan]

    def scan_of(self, tensor: OutputTensor) -> Scan | None:
        """The scan of the weight that an output tensor is made from."""
        return self.scans.get(tensor.weight.name)


def _scan_tensors(
    checkpoint: Checkpoint, tensors: list[OutputTensor], map_in_order: Map
) -> Iterator[tuple[OutputTensor, Scan]]:
    pieces = (piece for tensor in tensors for piece in split(tensor))
    scanned: list[Scan] = []

    def scan(piece: Piece) -> tuple[Piece, Scan]:
        return piece, piece.tensor.recipe.scan(checkpoint, piece)

    for piece, found in map_in_order(scan, pieces):
        scanned.append(found)
        if piece.stop == piece.tensor.rows:
            yield piece.tensor, join_scans(scanned)
            scanned = []


def _refuse(
    checkpoint: Checkpoint, shard: OutputShard, bad: list[tuple[OutputTensor, Scan]], map_in_order: Map
) -> None:
    def describe(found: tuple[OutputTensor, Scan]) -> str:
        tensor, scan = found
        return f"  {printable(tensor.name)}: {tensor.recipe.describe_inexact(checkpoint, tensor, scan)}"

    shown = "\n".join(map_in_order(describe, bad))
    raise InputError(
        f"{len(bad)} tensors of {shard.file} have no exact form:\n{shown}",
        "--on-inexact keep leaves these tensors as they are; --on-inexact round rounds them and says so.",
    )


def _with_kept(shard: OutputShard, names: set[str], layout: Layout) -> OutputShard:
    """The shard with the weights in `names` and their scales as the source has them."""
    others = [t for t in shard.tensors if t.weight.name not in names]
    replaced = {t.weight.name: t for t in shard.tensors if t.weight.name in names}
    back = [kept for tensor in replaced.values() for kept in kept_instead_of(tensor, layout)]
    return replace(shard, tensors=tuple(sorted([*others, *back], key=output_order)))


def scan_shard(checkpoint: Checkpoint, shard: OutputShard, settings: Settings, map_in_order: Map) -> ScannedShard:
    """Scan a shard's casts and decide what is written. `map_in_order` runs the scans.

    Raises InputError naming every tensor of the shard without an exact form, if `on_inexact` is "error".
    """
    scans: dict[str, Scan] = {}
    bad: list[tuple[OutputTensor, Scan]] = []
    room = SPARED_BYTES
    for tensor, scan in _scan_tensors(checkpoint, [t for t in shard.tensors if t.scanned], map_in_order):
        room -= scan.spared_bytes
        scans[tensor.weight.name] = scan if room >= 0 else replace(scan, spared={})
        if not scan.is_exact:
            bad.append((tensor, scans[tensor.weight.name]))
    if bad and settings.on_inexact == "error":
        _refuse(checkpoint, shard, bad, map_in_order)
    kept = {tensor.weight.name for tensor, _ in bad} if settings.on_inexact == "keep" else set()
    return ScannedShard(_with_kept(shard, kept, settings.layout) if kept else shard, scans)
