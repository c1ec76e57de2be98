"""A checkpoint that stays on the hub: headers by range requests, weights through a scratch area of whole shards.

Planning needs headers only, a few MB (ranges.py). The weights come shard by shard (shards.py). Small files are read
whole and checked in memory.
"""

import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.forms.tensor import Extent
from dsv4.convert.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from dsv4.convert.checkpoint.storage import Folder, Storage
from dsv4.errors import InputError, MachineError, UsageError

from .client import WEIGHTS, NoRepository, Snapshot
from .open import HubOptions, check_unchanged, open_snapshot
from .ranges import Ranges
from .shards import Shards
from .source import HubSource, existing_source


class HubStorage:
    """The files of one commit, as a Storage. `scratch` is the folder for shards, created at the first fetch.

    Several threads may read shards at once, prepared or not; reads of headers and of small files wait for each other.
    """

    def __init__(self, snapshot: Snapshot, scratch: Path, options: HubOptions) -> None:
        self.label = snapshot.label
        self._snapshot, self._options = snapshot, options
        self._ranges = Ranges(snapshot, options)
        self._shards = Shards(snapshot, scratch, options, self._compare_head)
        self._lock = threading.Lock()
        self._names: list[str] | None = None  # of the shards; None until they are chosen

    def sizes(self) -> dict[str, int]:
        """Files of the commit as the hub lists them; hidden ones left out, as in a folder."""
        return self._snapshot.sizes()

    def identity(self) -> dict[str, Any]:
        """Hub, repository and commit."""
        return self._snapshot.identity()

    def listed(self, name: str) -> list[int | str]:
        """What the listing says of a file: where it is, its size and its hash."""
        file = self._snapshot.files[name]
        return [*self.identity().values(), file.size, file.sha256 or file.git_sha1 or ""]

    def listed_sha256(self, name: str) -> str | None:
        """The hash that the hub lists for a file; Hugging Face lists none for small files."""
        return self._snapshot.files[name].sha256

    def check_unchanged(self) -> None:
        """Raises InputError if the files are not those that were listed first. A commit is not asked for again."""
        check_unchanged(self._snapshot)

    def changed_ns(self, name: str) -> int:
        """0: a commit does not change."""
        return 0

    def choose_shards(self, names: Collection[str]) -> None:
        """Name the shards whose headers are fetched; without a call all of the top folder."""
        self._names = list(names)

    @property
    def _shard_names(self) -> list[str]:
        if self._names is not None:
            return self._names
        top = [name for name in self.sizes() if "/" not in name]
        return [n for n in top if n.endswith(".safetensors")] or [n for n in top if n.endswith(WEIGHTS)]

    def _fetch_heads(self) -> None:
        self._ranges.fetch_heads(self._shard_names)

    def _read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file that is not on disk. The first read of a shard fetches the headers of all shards."""
        stop = offset + length
        if not name.endswith(WEIGHTS):
            keep = self._options.keep
            whole = self._shards.keep(name).read_bytes() if keep else self._ranges.small_file(name)
            return whole[offset:stop]
        if not self._ranges.head(name):
            self._fetch_heads()
        if stop <= LENGTH_BYTES + MAX_HEADER_BYTES and offset <= len(self._ranges.head(name)):
            return self._ranges.head(name, stop)[offset:stop]
        return self._ranges.read(name, offset, length)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, from disk or by range request. Raises InputError if the file ends before."""
        if name not in self._snapshot.files:
            raise InputError(f"{self.label}: {name} is missing")
        size = self._snapshot.files[name].size
        if offset + length > size:
            raise InputError(f"{self.label}: {name} ends at byte {size}")
        folder = self._shards.folder_of(name)
        if folder is not None:
            return folder.read(name, offset, length)
        head = self._ranges.head(name)
        if head and offset > len(head):  # behind the header
            return self._ranges.read_here(name, offset, length)
        with self._lock:
            return self._read(name, offset, length)

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`. Bytes of a shard that is not prepared come by range request, without a hash."""
        folder = self._shards.folder_of(name)
        if folder is not None:
            folder.read_into(name, buffer, offset)
        else:
            buffer.cast("B")[:] = self.read(name, offset, len(buffer))

    def _compare_head(self, name: str, path: Path) -> None:
        """Compare the checked shard with the header that planning read without a hash. Raises MachineError."""
        head = self._ranges.head(name)
        with path.open("rb") as stream:
            if stream.read(len(head)) != head:
                raise MachineError(f"{self.label}/{name}: the header arrived damaged", "Run it again.")

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """Wait for the shards in `now`, start to fetch `upcoming`, remove all others.

        Raises UsageError if `now` exceeds the scratch area.
        """
        self.check_needs([now])
        self._shards.prepare(now, upcoming)

    def expect(self, extents: Iterable[Extent]) -> None:
        """Nothing to do: whole shards are fetched, and ranges are read by the threads that need them."""

    def is_ready(self, names: Collection[str]) -> bool:
        """Whether all of these shards have arrived."""
        return self._shards.are_ready(names)

    def check_needs(self, groups: Iterable[Collection[str]]) -> None:
        """Refuse work that needs more shards at once than `--scratch` allows. Raises UsageError."""
        self._shards.check_needs(groups)

    @property
    def _shard_sizes(self) -> list[int]:
        return sorted((self._snapshot.files[name].size for name in self._shard_names), reverse=True)

    def disk_bytes(self) -> int:
        """Bytes of the largest shards that the scratch area holds at once; 0 if they go to the library's cache."""
        return 0 if self._options.keep else sum(self._shard_sizes[: self._options.scratch])

    def slots(self) -> int:
        """Shards that may be on disk at once; all of them if they go to the library's cache."""
        return len(self._shard_names) if self._options.keep else self._options.scratch

    def bytes_to_fetch(self, name: str) -> int:
        """Bytes of a file that cross the network; 0 if the library's cache has it, whose hash is checked later."""
        return 0 if self._shards.may_be_cached(name) else self._snapshot.files[name].size

    def seconds_for(self, count: int) -> float:
        """Estimated seconds to fetch `count` bytes, from the rate at which the headers arrived."""
        return self._ranges.seconds_for(count)

    def close(self) -> None:
        """Stop transfers and close files. Shards in the scratch area stay for the next run."""
        self._ranges.close()
        self._shards.close()


class HubFiles:
    """A HubStorage with the methods of proof.files.RemoteFiles: bytes only, because `verify` parses them by itself."""

    def __init__(self, storage: HubStorage) -> None:
        self._storage = storage
        self.label = storage.label

    def sizes(self) -> dict[str, int]:
        """Files of the commit."""
        return self._storage.sizes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the shard on disk if it was fetched, else by a range request."""
        self._storage.read_into(name, buffer, offset)

    def stamp(self, name: str) -> list[int | str]:
        """The commit, and the hash that the hub lists: a branch that could not be resolved to a commit may move."""
        return self._storage.listed(name)

    def slots(self) -> int:
        """What --scratch says."""
        return self._storage.slots()

    def bytes_to_fetch(self, name: str) -> int:
        """0 for a shard that the library's cache holds."""
        return self._storage.bytes_to_fetch(name)

    def seconds_for(self, count: int) -> float:
        """From the rate at which the headers arrived."""
        return self._storage.seconds_for(count)

    def listed_sha256(self, name: str) -> str | None:
        """From the listing."""
        return self._storage.listed_sha256(name)

    def check_unchanged(self) -> None:
        """Raises InputError if a branch moved that could not be resolved to a commit."""
        self._storage.check_unchanged()

    def check_needs(self, groups: Sequence[Collection[str]]) -> None:
        """Raises UsageError if --scratch is too small for one of the groups."""
        try:
            self._storage.check_needs(groups)
        except UsageError as error:
            raise UsageError(error.message, "Give a larger --scratch if the disk has room for it.") from None

    def prepare(self, now: Collection[str], upcoming: Collection[str] = ()) -> None:
        """Wait for the shards in `now`, start to fetch `upcoming`, and remove all others from the disk."""
        self._storage.prepare(now, upcoming)


def open_hub_storage(source: HubSource, scratch: Path, options: HubOptions) -> HubStorage:
    """The Storage of a repository, resolved to a commit. Raises InputError, NetworkError, MachineError."""
    return HubStorage(open_snapshot(source, options.token, options.cache), scratch, options)


def open_storage(text: str, revision: str | None, scratch: Path, options: HubOptions) -> Storage:
    """The Storage of a SOURCE as the command line writes it: a folder, or a repository. Raises UsageError too."""
    source = existing_source(text, revision)
    if isinstance(source, HubSource):
        try:
            return open_hub_storage(source, scratch, options)
        except NoRepository as error:
            if ":" not in text:  # org/name alone: a folder may have been meant
                error.hint = f"There is no folder {text} either. {error.hint}"
            raise
    return Folder(source)
