"""What a verification fetches from hubs, before it does: bytes, shards or ranges, and how long that may take."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsv4.convert.proof.compare_tensor import Piece, rows_per_piece
from dsv4.convert.proof.files import RemoteFiles
from dsv4.convert.proof.whole_files import WholeFile

from .order import Run
from .prepare import Work


@dataclass(frozen=True)
class Fetch:
    """What one side fetches. `shards` are counted as often as they are fetched; of a sample there are `ranges` only."""

    side: str
    label: str
    size: int
    seconds: float
    shards: int = 0
    again: int = 0  # of `shards`: those that were fetched before
    ranges: int = 0
    disk_bytes: int = 0  # of the largest shards that are on disk at once

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def _by_ranges(work: Work, side: str, files: RemoteFiles, pieces: Sequence[Piece]) -> Fetch:
    size = ranges = 0
    for piece in pieces:
        compared = work.findings.compared[piece.tensor]
        rows = rows_per_piece(compared)[0]
        for where, tensor in compared.tensors():
            if where == side:
                size += tensor.size * piece.stop // rows - tensor.size * piece.start // rows
                ranges += len(tensor.slices) + len(tensor.copies)
    return Fetch(side, files.label, size, files.seconds_for(size), ranges=ranges)


def _whole(side: str, files: RemoteFiles, names: Sequence[str]) -> Fetch:
    """names: shards in the order in which they are fetched, those again that are fetched again."""
    sizes = {name: files.bytes_to_fetch(name) for name in set(names)}
    counts = Counter(name for name in names if sizes[name])
    size = sum(sizes[name] * count for name, count in counts.items())
    disk = sum(sorted((sizes[name] for name in counts), reverse=True)[: files.slots()])
    return Fetch(
        side, files.label, size, files.seconds_for(size), shards=counts.total(), again=counts.total() - len(counts),
        disk_bytes=disk,
    )  # fmt: skip


def fetches(
    work: Work, of_files: Sequence[Run[WholeFile]], runs: Sequence[Run[Piece]], pieces: Sequence[Piece]
) -> list[Fetch]:
    """What each remote side fetches for files that are read whole and for the `pieces`, which are those of `runs`."""
    if work.settings.sample is not None:
        remote = {side: files for side, files in work.files.items() if isinstance(files, RemoteFiles)}
        return [_by_ranges(work, side, files, pieces) for side, files in remote.items()]
    fetched = [*(run.fetched for run in of_files), *(run.fetched for run in runs)]
    return [
        _whole(side, files, [name for shards in fetched for name in sorted(shards[number])])
        for number, (side, files) in enumerate(work.streamed.items())
    ]
