"""Reads parts of a commit's files by range requests, before any shard is on disk.

Planning needs headers only. The first bytes of all shards are fetched by parallel requests and kept in memory. Small
files are read whole, compared with the hub's listing, and kept too. Files in the library's cache are read from there.
"""

import time
from collections.abc import Sequence

from .client import BadFile, RemoteFile, Snapshot, check_bytes
from .open import HubOptions
from .transfers import Transfers

HEADS_AT_ONCE = 8
HEAD_BYTES = 192 * 1024  # one request gets the whole header of a shard of V4-Flash (167 to 175 kB)


class Ranges:
    """Ranges of the files of one commit. Use it from the thread that created it, but for `read_here`."""

    def __init__(self, snapshot: Snapshot, options: HubOptions) -> None:
        self._snapshot, self._options = snapshot, options
        self._transfers = Transfers(HEADS_AT_ONCE, snapshot.hub.abort)
        self._heads: dict[str, bytes] = {}
        self._small: dict[str, bytes] = {}
        self._head_seconds = 0.0

    def _fetch(self, file: RemoteFile, offset: int, length: int) -> bytes:
        snapshot = self._snapshot
        cached = snapshot.hub.cached(snapshot.source.repository, snapshot.commit, file.name, self._options.cache)
        if cached is not None:
            with cached.open("rb") as stream:
                stream.seek(offset)
                return stream.read(length)
        return snapshot.hub.read(snapshot.source.repository, snapshot.commit, file, offset, length)

    def read_here(self, name: str, offset: int, length: int) -> bytes:
        """The same as `read`, fetched by the calling thread, which may be any."""
        return self._fetch(self._snapshot.files[name], offset, length) if length else b""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a file, unchecked. Raises InputError if the file ends before."""
        if not length:
            return b""  # a range of HTTP has at least one byte
        arriving = self._transfers.start(self._fetch, self._snapshot.files[name], offset, length)
        return self._transfers.result(arriving, self._options.progress)

    def fetch_heads(self, names: Sequence[str]) -> None:
        """Fetch and keep the first HEAD_BYTES of some shards. Calls `headers` of the options as they arrive."""
        started = time.monotonic()
        files = [self._snapshot.files[name] for name in names if name not in self._heads]
        arriving = [self._transfers.start(self._fetch, file, 0, min(HEAD_BYTES, file.size)) for file in files]
        for number, (file, head) in enumerate(zip(files, arriving, strict=True), 1):
            self._heads[file.name] = self._transfers.result(head, self._options.progress)
            self._options.headers(number, len(files))
        self._head_seconds += time.monotonic() - started

    def head(self, name: str, length: int = 0) -> bytes:
        """The first bytes of a shard that are in memory, at least `length`; the missing ones are fetched."""
        head = self._heads.get(name, b"")
        if len(head) < length:
            head = self._heads[name] = head + self.read(name, len(head), length - len(head))
        return head

    def small_file(self, name: str) -> bytes:
        """A whole file, compared with the hub's listing; fetched a second time if it differs. Raises BadFile."""
        if name not in self._small:
            self._small[name] = self._checked(name)
        return self._small[name]

    def _checked(self, name: str) -> bytes:
        file = self._snapshot.files[name]
        try:
            data = self.read(name, 0, file.size)
            check_bytes(data, file, self._snapshot.label)
        except BadFile as error:
            self._options.warn(f"{error.message}. Fetching it once more.")
            data = self.read(name, 0, file.size)
            check_bytes(data, file, self._snapshot.label)
        return data

    def close(self) -> None:
        """Stop all transfers."""
        self._transfers.close()

    def seconds_for(self, count: int) -> float:
        """Estimated seconds to fetch `count` bytes at the rate at which the headers arrived."""
        came = sum(map(len, self._heads.values()))
        return count * self._head_seconds / came if came else 0.0
