"""One checkpoint alone, with a manifest: each file is read once, for its SHA-256 and for the codes of its tensors.

A hash has to be taken from front to back, so the pieces of a file are looked at in the order of their bytes, by one
thread for each file; all files are on all cores. What the pieces have no need of is read in between, for the hash.
Only the block scales, which lie in front of the codes that they belong to, are read a second time. Tensors that ranks
share lie in several files: they are looked at afterwards, as where there is no manifest.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.progress import Progress

from .compare_tensor import Piece, PieceComparison, Reader
from .files import Files
from .plan import ComparedTensor
from .tally import Tally

CHUNK = 1 << 20


@dataclass(frozen=True)
class WholeFile:
    """A file to hash, and the pieces of its tensors to check meanwhile, in the order of their bytes."""

    name: str
    size: int
    pieces: tuple[Piece, ...] = ()


@dataclass
class FileFindings:
    """The SHA-256 of a file, and the tallies of its pieces."""

    sha256: str
    tallies: list[tuple[Piece, Tally]]


class Counter:
    """Counts the bytes that several threads read, for the thread that reports them."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self, count: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._count += count

    def taken(self) -> int:
        """Bytes since the last call."""
        with self._lock:
            count, self._count = self._count, 0
        return count


class HashedFile:
    """`Files` that hash one file while it is read: from front to back, in whichever order it is read."""

    def __init__(self, files: Files, file: WholeFile, count: Progress, stopped: threading.Event) -> None:
        self.label, self._files, self._file, self._count, self._stopped = files.label, files, file, count, stopped
        self._sha256, self._position = hashlib.sha256(), 0
        self._chunk = bytearray(min(CHUNK, file.size))

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file."""
        return self._files.sizes()

    def stamp(self, name: str) -> list[int | str]:
        """The stamp of a file."""
        return self._files.stamp(name)

    def _read(self, name: str, offset: int, buffer: memoryview) -> None:
        self._files.read_into(name, offset, buffer)
        self._count(len(buffer))

    def _hash_up_to(self, stop: int) -> None:
        while self._position < stop and not self._stopped.is_set():
            view = memoryview(self._chunk)[: min(CHUNK, stop - self._position)]
            self._read(self._file.name, self._position, view)
            self._sha256.update(view)
            self._position += len(view)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Of the hashed file, all bytes up to the end of `buffer` are hashed, in order."""
        if name == self._file.name:
            self._hash_up_to(offset)
        self._read(name, offset, buffer)
        if name == self._file.name and offset <= self._position < offset + len(buffer):
            self._sha256.update(buffer[self._position - offset :])
            self._position = offset + len(buffer)

    def finish(self) -> str:
        """Read what is left. Returns the SHA-256 of the file, in hex."""
        self._hash_up_to(self._file.size)
        return self._sha256.hexdigest()


def file_of(compared: ComparedTensor) -> str | None:
    """The file in whose order a tensor can be looked at; None if it lies in several, or in none."""
    weight = compared.output_weight
    if (
        compared.kind != "scan"
        or weight is None
        or len(weight.tensor.slices) != 1
        or weight.tensor.copies
        or weight.tensor.filling
    ):
        return None
    return weight.tensor.slices[0].shard


def plan_files(sizes: dict[str, int], pieces: list[Piece], compared: list[ComparedTensor]) -> list[WholeFile]:
    """The files with those of the pieces that lie in them. sizes: bytes of each file, by name."""
    inside: dict[str, list[Piece]] = {name: [] for name in sizes}
    for piece in pieces:
        name = file_of(compared[piece.tensor])
        if name in inside:
            inside[name].append(piece)

    def place(piece: Piece) -> tuple[int, int]:
        weight = compared[piece.tensor].output_weight
        assert weight is not None
        return weight.tensor.slices[0].offset, piece.start

    return [WholeFile(name, size, tuple(sorted(inside[name], key=place))) for name, size in sizes.items()]


def bytes_to_read(file: WholeFile, compared: list[ComparedTensor]) -> int:
    """The file's, and those of scales that are read once more."""
    scales = {piece.tensor: compared[piece.tensor].output_scale for piece in file.pieces}
    return file.size + sum(scale.size * (1 + len(scale.copies)) for scale in scales.values() if scale is not None)


def look_at(
    file: WholeFile,
    files: Files,
    tensors: Callable[[Piece], ComparedTensor],
    band: int,
    count: Progress,
    stopped: threading.Event,
) -> FileFindings:
    """Read a file once. count: called in this thread with the bytes of each read. band: bytes of rows at a time."""
    hashed = HashedFile(files, file, count, stopped)
    reader = Reader(None, hashed)
    tallies = [
        (piece, PieceComparison(tensors(piece), piece, reader, band, False, stopped).run()) for piece in file.pieces
    ]
    return FileFindings(hashed.finish(), tallies)
