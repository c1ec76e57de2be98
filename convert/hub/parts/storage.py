"""The Storage of `dsv4 run hf:…`: parts of shards are fetched when they are needed, once, and kept on disk.

A prompt needs the dense weights and the experts that it chooses, a small share of a large model. The engine announces
what it reads next (`expect`): the parts that are not on disk are fetched by several range requests at once and written
to sparse files (partial_file.py). Every read is from a file. A second run fetches nothing that the first one had.

    <the library's cache>/models--org--name/
        snapshots/<commit>/config.json, …      small files, whole and checked, where the library keeps them
        dsv4-parts/<hash of the shard>         parts of it, a sparse file
        dsv4-parts/<hash of the shard>.parts   which parts

The parts lie under the shard's hash, as the library's own files do: a new commit that leaves a shard as it is, costs
nothing. A part has no hash at the hub; a shard of which all parts have arrived is compared with its own. A shard that
the library's cache has whole is read there.
"""

import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.forms.tensor import Extent
from dsv4.convert.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.hub.client import AGAIN, WEIGHTS, BadFile, NetworkError, Snapshot
from dsv4.convert.hub.fetch import Destination, fetch_checked, is_checked
from dsv4.convert.hub.open import HubOptions, check_unchanged, open_snapshot
from dsv4.convert.hub.ranges import HEAD_BYTES
from dsv4.convert.hub.source import HubSource
from dsv4.convert.hub.transfers import FileMeter, Transfers
from dsv4.errors import InputError, MachineError
from dsv4.machine import free_bytes
from dsv4.progress import Reached, ignore
from dsv4.text import human_bytes, some_of

from . import listing
from .intervals import Intervals
from .partial_file import PartialFile

FOLDER = "dsv4-parts"
PARTS_AT_ONCE = 8
PART_BYTES = 4 << 20  # of one request: little enough that eight of them are no load for the memory
RECORD_BYTES = 64 << 20  # fetched between two records: what a crash may cost
SPARE_BYTES = 64 << 20  # of the disk, left free for other programs
BUFFER_BYTES = 2 * PARTS_AT_ONCE * PART_BYTES  # memory at most: what arrives, and a copy of it
KEPT = "What was fetched is kept: run the same command again."


@dataclass(frozen=True)
class Part:
    """Bytes [begin, end) of a shard that are not on disk."""

    name: str
    file: PartialFile
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.end - self.begin

    def pieces(self) -> Iterator["Part"]:
        """The same bytes in pieces of at most PART_BYTES."""
        for begin in range(self.begin, self.end, PART_BYTES):
            yield Part(self.name, self.file, begin, min(begin + PART_BYTES, self.end))


class PartStorage:
    """The files of one commit, as a Storage.

    reached: called with (bytes fetched, bytes to fetch) of what is fetched now, at least ten times a second, in the
    thread that waits for them; an exception that it raises ends the wait, and what has arrived is kept.
    """

    def __init__(self, snapshot: Snapshot, options: HubOptions, reached: Reached = ignore) -> None:
        self.label, self.commit = snapshot.label, snapshot.commit
        self._snapshot, self._options, self._reached = snapshot, options, reached
        self._files = Destination(cache=options.cache)  # the library's cache
        self.folder = self._files.root(snapshot).parents[1] / FOLDER
        self._transfers = Transfers(PARTS_AT_ONCE, snapshot.hub.abort)
        self._partial: dict[str, PartialFile | None] = {}  # None: the library's cache has the whole shard
        self._folders: dict[Path, Folder] = {}
        self._small: dict[str, Path] = {}
        self._lock = threading.RLock()  # of what is fetched, and of the tables above
        self.fetched_bytes = 0  # of weights

    def sizes(self) -> dict[str, int]:
        """Files of the commit as the hub lists them; hidden ones left out, as in a folder."""
        return self._snapshot.sizes()

    def identity(self) -> dict[str, Any]:
        """Hub, repository and commit."""
        return self._snapshot.identity()

    def changed_ns(self, name: str) -> int:
        """0: a commit does not change."""
        return 0

    def choose_shards(self, names: Collection[str]) -> None:
        """Fetch the headers of these shards, all at once."""
        chosen = [name for name in names if name in self._snapshot.files and name.endswith(WEIGHTS)]
        sizes = {name: self._snapshot.files[name].size for name in chosen}
        self.expect(Extent(name, 0, min(HEAD_BYTES, sizes[name])) for name in chosen)
        for name in chosen:
            length = int.from_bytes(self.read(name, 0, min(LENGTH_BYTES, sizes[name])), "little")
            if name.endswith(".safetensors") and length <= MAX_HEADER_BYTES:  # opening it reports others
                sizes[name] = min(sizes[name], LENGTH_BYTES + length)
        self.expect(Extent(name, 0, size) for name, size in sizes.items() if name.endswith(".safetensors"))

    def _whole(self, name: str) -> Path | None:
        """The shard in the library's cache, if that has a file of this size."""
        path = self._files.path(self._snapshot, name)
        return path if path.is_file() and path.stat().st_size == self._snapshot.files[name].size else None

    def _partial_file(self, name: str) -> PartialFile | None:
        """The parts of a shard that are on disk; None if the library's cache has all of it."""
        with self._lock:
            if name not in self._partial:
                file = self._snapshot.files[name]
                identity = file.sha256 or file.git_sha1 or f"{self.commit}-{name.replace('/', '-')}"
                whole = self._whole(name) is not None
                self._partial[name] = None if whole else self._good(name, self.folder / identity)
            return self._partial[name]

    def _good(self, name: str, path: Path) -> PartialFile:
        """The parts of a shard at `path`. All of them were compared with its hash, or are now: a crash came before."""
        size = self._snapshot.files[name].size
        file = PartialFile(path, size)
        return file if self._is_good(name, file) else PartialFile(path, size)

    def _missing(self, extents: Iterable[Extent]) -> list[Part]:
        """The parts of these bytes that are not on disk, each once, those that touch as one."""
        wanted: dict[str, Intervals] = {}
        for name, offset, nbytes in extents:
            if name.endswith(WEIGHTS):
                wanted.setdefault(name, Intervals()).add(offset, offset + nbytes)
        return [
            Part(name, file, *gap)
            for name, intervals in wanted.items()
            if (file := self._partial_file(name)) is not None
            for interval in intervals
            for gap in file.missing(*interval)
        ]

    def missing_bytes(self, extents: Iterable[Extent]) -> int:
        """How many of these bytes are not on disk, each counted once."""
        return sum(part.nbytes for part in self._missing(extents))

    def expect(self, extents: Iterable[Extent]) -> None:
        """Fetch those of these bytes that are not on disk. Raises InputError, NetworkError, MachineError, OSError."""
        with self._lock:
            missing = self._missing(extents)
            if missing:
                self._check_room(sum(part.nbytes for part in missing))
                self._fetch(missing)

    def _check_room(self, needed: int) -> None:
        free = free_bytes(self.folder)
        if needed + SPARE_BYTES > free:
            text = f"{human_bytes(needed)} must be fetched, {human_bytes(free)} are free on that disk"
            raise MachineError(f"{self.folder}: {text}", f"Free some space, or choose another --cache-dir. {KEPT}")

    def _fetch(self, missing: list[Part]) -> None:
        """Fetch these parts, record them, and compare shards that are whole now."""
        files = {part.name: part.file for part in missing}
        try:
            self._receive(missing, files)
        except NetworkError as error:
            error.hint = KEPT if error.hint in ("", AGAIN) else f"{error.hint} {KEPT}"
            raise
        finally:
            self._record_commit(files.values())
        self._record(files)
        bad = {name: file for name, file in files.items() if not self._is_good(name, file)}
        if bad:
            self._discard(bad)
            text = f"{self.label}: {some_of(list(bad), 3)}: the bytes are not those that the hub lists"
            raise BadFile(text, "They were removed: run the same command again.")

    def _receive(self, missing: list[Part], files: dict[str, PartialFile]) -> None:
        """Fetch these parts, several at once, and record them from time to time."""
        total, before, recorded = sum(part.nbytes for part in missing), self.fetched_bytes, self.fetched_bytes
        pieces = (piece for part in missing for piece in part.pieces())

        def progress(_: int = 0) -> None:
            self._reached(self.fetched_bytes - before, total)

        for nbytes in self._transfers.mapped(self._arrive, pieces, 2 * PARTS_AT_ONCE, progress):
            self.fetched_bytes += nbytes
            progress()
            if self.fetched_bytes - recorded >= RECORD_BYTES:
                self._record(files)
                recorded = self.fetched_bytes

    def _arrive(self, part: Part) -> int:
        """Fetch a part and write it; the number of bytes. Called in several threads."""
        snapshot = self._snapshot
        file = snapshot.files[part.name]
        data = snapshot.hub.read(snapshot.source.repository, snapshot.commit, file, part.begin, part.nbytes)
        part.file.write(part.begin, data)
        return len(data)

    def _record_commit(self, files: Iterable[PartialFile]) -> None:
        """Keep what has arrived for the next run, if it is certain that it is of the files that were listed."""
        if self._snapshot.is_commit:
            for file in files:
                file.record()

    def _record(self, files: dict[str, PartialFile]) -> None:
        """Keep what has arrived for the next run. Raises InputError, and forgets it, if a branch has moved."""
        arrived = [(file, file.unrecorded) for file in files.values()]
        try:
            check_unchanged(self._snapshot)
        except InputError:
            self._discard(files)
            raise
        for file, count in arrived:
            file.record(count)

    def _discard(self, files: dict[str, PartialFile]) -> None:
        for name, file in files.items():
            file.discard()
            self._partial.pop(name, None)
        self._folders.pop(self.folder, None)  # its descriptors are those of the files that were removed

    def _is_good(self, name: str, file: PartialFile) -> bool:
        """Whether a shard of which all parts are there has the hash that the hub lists. Removed if it has another."""
        if file.checked or not file.is_whole:
            return True
        if not is_checked(file.path, self._snapshot.files[name], self.label):
            file.discard()
            return False
        file.note_checked()
        return True

    def _small_file(self, name: str) -> Path:
        """A small file in the library's cache, fetched there if it is missing or not what the hub lists."""
        file, path = self._snapshot.files[name], self._files.path(self._snapshot, name)
        if is_checked(path, file, self.label):
            return path
        return fetch_checked(
            self._snapshot, file, self._files, FileMeter(file.size, self._transfers), self._options.warn
        )

    def small_file(self, name: str) -> Path:
        """The path of a whole, checked file. Raises BadFile, NetworkError, MachineError."""
        with self._lock:
            if name not in self._small:
                arriving = self._transfers.start(self._small_file, name)
                self._small[name] = self._transfers.result(arriving, self._options.progress)
            return self._small[name]

    def small_files(self, names: Iterable[str]) -> Path:
        """The folder that holds small files of the commit: these, where the repository has them."""
        for name in names:
            if name in self._snapshot.files:
                self.small_file(name)
        return self._files.root(self._snapshot)

    def _reader(self, path: Path) -> Folder:
        with self._lock:
            if path not in self._folders:
                self._folders[path] = Folder(path)
            return self._folders[path]

    def _on_disk(self, extent: Extent) -> Path:
        """The file that has these bytes, fetched if need be."""
        name = extent.shard
        if not name.endswith(WEIGHTS):
            return self.small_file(name)
        file = self._partial_file(name)
        if file is None:
            whole = self._whole(name)
            assert whole is not None, "the library's cache had it"
            return whole
        if file.missing(extent.offset, extent.offset + extent.nbytes):
            self.expect([extent])
        return file.path

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`, from disk; fetched if need be. Raises InputError if the file ends before."""
        if name not in self._snapshot.files:
            raise InputError(f"{self.label}: {name} is missing")
        size = self._snapshot.files[name].size
        if offset + len(buffer) > size:
            raise InputError(f"{self.label}: {name} ends at byte {size}")
        if len(buffer):
            path = self._on_disk(Extent(name, offset, len(buffer)))
            self._reader(path.parent).read_into(path.name, buffer, offset)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises InputError if the file ends before."""
        buffer = bytearray(length)
        self.read_into(name, memoryview(buffer), offset)
        return bytes(buffer)

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """Nothing to do: no shard is fetched whole."""

    def is_ready(self, names: Collection[str]) -> bool:
        """True: whatever is not on disk is fetched when it is read."""
        return True

    def disk_bytes(self) -> int:
        """0: how much is fetched depends on what is read; see `missing_bytes`."""
        return 0

    def close(self) -> None:
        """Stop transfers and close files."""
        self._transfers.close()
        files = list(filter(None, self._partial.values()))
        self._record_commit(files)
        for file in files:
            file.close()
        for folder in self._folders.values():
            folder.close()


def open_parts(source: HubSource, options: HubOptions, reached: Reached = ignore) -> PartStorage:
    """The PartStorage of a repository, resolved to a commit. Raises InputError, NetworkError, MachineError."""
    snapshot = open_snapshot(source, options.token, options.cache)
    storage = PartStorage(snapshot, options, reached)
    if snapshot.hub.offline():
        return PartStorage(listing.remembered(snapshot, storage.folder), options, reached)
    listing.remember(snapshot, storage.folder)
    snapshot.hub.remember(source.repository, source.revision, snapshot.commit, options.cache)
    return storage
