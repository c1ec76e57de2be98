"""A checkpoint that stays on the hub: headers by range requests, weights through a scratch area of whole shards.

Planning needs headers only, a few MB. The weights come shard by shard: fetched whole (a part cannot be checked: the
hub lists one hash per file), checked, read, dropped. At most `--scratch` shards are on disk at once, and while one
is converted the next arrives. Small files are read whole and checked in memory.

With `keep`, shards go into the hub library's own cache and stay there. A shard that is in that cache already is
checked and used where it is, and never removed.
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from dsv4.convert.checkpoint.reader import Progress, no_progress
from dsv4.convert.checkpoint.source import HubSource, parse_source
from dsv4.convert.checkpoint.storage import Folder, Storage
from dsv4.errors import InputError, MachineError, UsageError, printable
from dsv4.progress import ignore, result_of

from .client import BadFile, Snapshot, check_bytes
from .fetch import FileMeter, Place, Stopped, fetch_checked, is_checked, remove_partials
from .open import open_snapshot

HEAD_BYTES = 192 * 1024  # one request gets the whole header of a shard of V4-Flash (167 to 175 kB)
DEFAULT_SCRATCH = 2
_HEAD_WORKERS = 8
_STALEMATE_SECONDS = 5.0


@dataclass(frozen=True)
class HubOptions:
    """How a command reaches a hub. `scratch`: shards on disk at once. `keep`: leave them in the library's cache.

    `headers` is called with the number of shards whose headers have been fetched, and of all. `wait` is called with 0
    while a shard is waited for.
    """

    token: str | None = None
    cache: Path | None = None
    scratch: int = DEFAULT_SCRATCH
    keep: bool = False
    warn: Callable[[str], None] = field(default=lambda line: None)
    detail: Callable[[str], None] = field(default=lambda line: None)
    headers: Progress = no_progress
    wait: Callable[[int], None] = ignore


class _Nothing:
    """A counter that nobody looks at."""

    def advance(self, count: int) -> None:
        pass


class HubStorage:
    """See storage.Storage. `scratch` is the folder for shards; it is made when the first one is fetched."""

    def __init__(self, snapshot: Snapshot, scratch: Path, options: HubOptions) -> None:
        self.label = snapshot.label
        self.snapshot, self.options = snapshot, options
        self._scratch = scratch
        self._heads: dict[str, bytes] = {}
        self._small: dict[str, bytes] = {}
        self._held: dict[str, Future[Path]] = {}
        self._folders: dict[str, Folder] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._last_read = time.monotonic()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2, "fetch")
        self._cleaned = False
        self.head_seconds = 0.0

    def sizes(self) -> dict[str, int]:
        """Files of the commit as the hub lists them; hidden ones left out, as in a folder."""
        names = [n for n in self.snapshot.files if not any(part.startswith(".") for part in n.split("/"))]
        return {name: self.snapshot.files[name].size for name in names}

    def identity(self) -> dict[str, Any]:
        """See Storage."""
        source = self.snapshot.source
        return {"hub": source.hub, "repository": source.repository, "commit": self.snapshot.commit}

    def changed_ns(self, name: str) -> int:
        """See Storage. A commit does not change."""
        return 0

    # Headers and small files

    def _range(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""  # no range request can ask for nothing
        snapshot = self.snapshot
        cached = snapshot.hub.cached(snapshot.source.repository, snapshot.commit, name, self.options.cache)
        if cached is not None:
            with cached.open("rb") as stream:
                stream.seek(offset)
                return stream.read(length)
        return snapshot.hub.read(snapshot.source.repository, snapshot.commit, name, offset, length)

    def _fetch_heads(self) -> None:
        """The first bytes of every shard, several requests at once."""
        names = [n for n in self.sizes() if n.endswith(".safetensors") and "/" not in n and n not in self._heads]
        started = time.monotonic()
        with ThreadPoolExecutor(_HEAD_WORKERS, "heads") as pool:
            for number, (name, head) in enumerate(zip(names, pool.map(self._first_bytes, names), strict=True), 1):
                self._heads[name] = head
                self.options.headers(number, len(names))
        self.head_seconds += time.monotonic() - started

    def _first_bytes(self, name: str) -> bytes:
        return self._range(name, 0, min(HEAD_BYTES, self.snapshot.files[name].size))

    def _head(self, name: str, length: int) -> bytes:
        """At least `length` first bytes of a shard, kept for the next question."""
        with self._lock:
            if name not in self._heads:
                self._fetch_heads()
            head = self._heads.get(name, b"")
            if len(head) < length:
                head += self._range(name, len(head), length - len(head))
                self._heads[name] = head
            return head

    def _small_file(self, name: str) -> bytes:
        with self._lock:
            if name not in self._small:
                self._small[name] = self._keep(name).read_bytes() if self.options.keep else self._read_checked(name)
            return self._small[name]

    def _cached(self, name: str) -> Path | None:
        """A checked copy in the library's cache, if it has one."""
        snapshot = self.snapshot
        path = snapshot.hub.cached(snapshot.source.repository, snapshot.commit, name, self.options.cache)
        return path if path is not None and is_checked(path, snapshot.files[name], self.label) else None

    def _bring(self, name: str, place: Place) -> Path:
        file = self.snapshot.files[name]
        meter = FileMeter(file.size, _Nothing(), threading.Lock(), self._stop)
        return fetch_checked(self.snapshot, file, place, meter, self.options.warn)

    def _keep(self, name: str) -> Path:
        """A checked copy in the library's cache."""
        return self._cached(name) or self._bring(name, Place(cache=self.options.cache))

    def _read_checked(self, name: str) -> bytes:
        file = self.snapshot.files[name]
        for attempt in range(2):
            data = self._range(name, 0, file.size)
            try:
                check_bytes(data, file, self.label)
                break
            except BadFile as error:
                if attempt:
                    raise
                self.options.warn(f"{error}. Fetching it once more.")
        return data

    def read(self, name: str, offset: int, length: int) -> bytes:
        """See Storage."""
        if name not in self.snapshot.files:
            raise InputError(f"{self.label}: {printable(name)} is missing")
        size = self.snapshot.files[name].size
        if offset + length > size:
            raise InputError(f"{self.label}: {printable(name)} ends at byte {size}")
        if name in self._folders:
            return self._folders[name].read(name, offset, length)
        if not name.endswith(".safetensors"):
            return self._small_file(name)[offset : offset + length]
        if offset + length <= LENGTH_BYTES + MAX_HEADER_BYTES and offset <= len(self._head(name, 0)):
            return self._head(name, offset + length)[offset : offset + length]
        return self._range(name, offset, length)

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """See Storage. Bytes of a shard that was not prepared come by range request, unchecked: for a look only."""
        self._last_read = time.monotonic()
        folder = self._folders.get(name)
        if folder is not None:
            folder.read_into(name, buffer, offset)
        else:
            buffer.cast("B")[:] = self.read(name, offset, len(buffer))

    # Shards

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """See Storage. Raises UsageError if `now` is more than the scratch area may hold."""
        self.check_needs([now])
        after = [name for name in upcoming if name not in now]
        self._let_go({*now, *after})
        for name in now:
            self._start(name)
        for name in after:
            if self.options.keep or len(self._held) < self.options.scratch:
                self._start(name)
        for name in now:
            if name not in self._folders:
                self._folders[name] = Folder(result_of(self._held[name], self.options.wait).parent)
        if not now and not after:
            self._finish()

    def _finish(self) -> None:
        """Every shard was read."""
        if self._scratch.is_dir():
            shutil.rmtree(self._scratch)
        if self.options.keep:
            source = self.snapshot.source
            self.snapshot.hub.remember(source.repository, source.revision, self.snapshot.commit, self.options.cache)

    def _start(self, name: str) -> None:
        if name not in self._held:
            self._held[name] = self._pool.submit(self._fetch, name)

    def _fetch(self, name: str) -> Path:
        """A checked copy of a shard on disk."""
        path = self._cached(name)
        if path is None:
            self.options.detail(f"fetching {printable(name)}, {self.snapshot.files[name].size} bytes")
            path = self._keep(name) if self.options.keep else self._to_scratch(name)
        self._compare_head(name, path)
        return path

    def _to_scratch(self, name: str) -> Path:
        path = self._scratch / name
        if is_checked(path, self.snapshot.files[name], self.label):
            return path
        self._clean()
        return self._bring(name, Place(self._scratch, self.options.cache))

    def _clean(self) -> None:
        with self._lock:
            if not self._cleaned:
                remove_partials(self._scratch)
            self._cleaned = True

    def _compare_head(self, name: str, path: Path) -> None:
        """The plan was made from bytes that came without a hash; now there is one."""
        head = self._heads.get(name, b"")
        with path.open("rb") as stream:
            if stream.read(len(head)) != head:
                raise MachineError(f"{self.label}/{printable(name)}: the header arrived damaged", "Run it again.")

    def _let_go(self, wanted: set[str]) -> None:
        for name in [n for n in self._held if n not in wanted]:
            future = self._held.pop(name)
            folder = self._folders.pop(name, None)
            if folder is not None:
                folder.close()
            if not future.cancel():
                future.exception()  # wait: a file that is still arriving cannot be removed
        if self._scratch.is_dir():
            for path in self._scratch.iterdir():
                if path.is_file() and path.name not in wanted:
                    path.unlink()

    # One shard at a time, for a reader with several threads

    def _everybody_waits(self) -> bool:
        """Nothing was read for a while and nothing is arriving: two readers wait for each other's shards."""
        return time.monotonic() - self._last_read > _STALEMATE_SECONDS and all(f.done() for f in self._held.values())

    def acquire(self, name: str) -> None:
        """Make a shard readable; wait while the scratch area is full of shards that others still read."""
        with self._changed:
            while name not in self._held and not self.options.keep and len(self._held) >= self.options.scratch:
                if self._stop.is_set():
                    raise Stopped
                if self._everybody_waits():
                    break  # one shard more than asked for is better than waiting for ever
                self._changed.wait(0.2)
            self._start(name)
            arriving = self._held[name]
        path = arriving.result()
        with self._lock:
            self._last_read = time.monotonic()
            if name not in self._folders:
                self._folders[name] = Folder(path.parent)

    def release(self, name: str) -> None:
        """Let go of a shard that nobody reads any more."""
        with self._changed:
            self._let_go(set(self._held) - {name})
            self._changed.notify_all()

    def abandon(self) -> None:
        """Give up what is being fetched."""
        self._stop.set()
        if not all(future.done() for future in list(self._held.values())):
            self.snapshot.hub.abort()

    # What a command must know before it starts

    def check_needs(self, groups: Iterable[Collection[str]]) -> None:
        """Refuse work that needs more shards at once than `--scratch` allows. Raises UsageError."""
        most = max((len(group) for group in groups), default=0)
        if not self.options.keep and most > self.options.scratch:
            raise UsageError(
                f"{most} source shards are needed at once, --scratch allows {self.options.scratch}",
                f"Give --scratch {most} if the disk has room for them, a smaller --max-shard-size, or --keep-source.",
            )

    @property
    def _shard_sizes(self) -> list[int]:
        return sorted((s for n, s in self.sizes().items() if n.endswith(".safetensors")), reverse=True)

    def disk_bytes(self) -> int:
        """See Storage."""
        return 0 if self.options.keep else sum(self._shard_sizes[: self.options.scratch])

    def seconds_to_fetch(self) -> float:
        """A rough guess of the time to fetch all shards, from how fast their headers came."""
        came = sum(map(len, self._heads.values()))
        return sum(self._shard_sizes) * self.head_seconds / came if came else 0.0

    def close(self) -> None:
        """See Storage. Shards in the scratch area stay for the next run, unless `prepare` has let go of all."""
        self.abandon()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for folder in self._folders.values():
            folder.close()
        self._folders.clear()


def open_hub_storage(source: HubSource, scratch: Path, options: HubOptions) -> HubStorage:
    """The Storage of a repository, resolved to a commit. Raises InputError, NetworkError, MachineError."""
    return HubStorage(open_snapshot(source, options.token, options.cache), scratch, options)


def open_storage(text: str, revision: str | None, scratch: Path, options: HubOptions) -> Storage:
    """The Storage of a SOURCE as the command line writes it: a folder, or a repository. Raises UsageError too."""
    source = parse_source(text, revision)
    return open_hub_storage(source, scratch, options) if isinstance(source, HubSource) else Folder(source)
