"""Whole shards on disk while they are needed: fetched, checked, read, removed.

A part of a shard cannot be checked, because the hub lists one hash per file; so a shard is fetched whole. At most
`scratch` shards are in the scratch folder at once, and while one is converted the next arrives. With `keep` they go
into the hub library's own cache and stay there. A shard that is in that cache already is checked and used where it is,
and never removed.
"""

import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from pathlib import Path

from dsv4.convert.checkpoint.storage import Folder
from dsv4.errors import UsageError

from .client import Snapshot
from .fetch import Destination, fetch_checked, is_checked, remove_partials
from .open import HubOptions
from .transfers import FileMeter, Transfers

SHARDS_AT_ONCE = 2


class Shards:
    """The shards of one commit. `scratch` is created at the first fetch.

    check: called with name and path of each shard that arrived, in the thread that fetched it.
    """

    def __init__(
        self, snapshot: Snapshot, scratch: Path, options: HubOptions, check: Callable[[str, Path], None]
    ) -> None:
        self._snapshot, self._scratch, self._options, self._check = snapshot, scratch, options, check
        self._transfers = Transfers(SHARDS_AT_ONCE, snapshot.hub.abort)
        self._held: dict[str, Future[Path]] = {}
        self._folders: dict[str, Folder] = {}
        self._may_have_partials = True

    def folder_of(self, name: str) -> Folder | None:
        """The folder that holds a prepared shard."""
        return self._folders.get(name)

    def _in_cache(self, name: str) -> Path | None:
        """The file in the library's cache, unchecked."""
        snapshot = self._snapshot
        return snapshot.hub.cached(snapshot.source.repository, snapshot.commit, name, self._options.cache)

    def may_be_cached(self, name: str) -> bool:
        """Whether the library's cache has a file of this name; its hash is checked when it is used."""
        return self._in_cache(name) is not None

    def _cached(self, name: str) -> Path | None:
        """A checked copy in the library's cache, if it has one."""
        snapshot, path = self._snapshot, self._in_cache(name)
        return path if path is not None and is_checked(path, snapshot.files[name], snapshot.label) else None

    def _fetch(self, name: str, destination: Destination) -> Path:
        file = self._snapshot.files[name]
        self._options.detail(f"fetching {name}, {file.size} bytes")
        return fetch_checked(
            self._snapshot, file, destination, FileMeter(file.size, self._transfers), self._options.warn
        )

    def _to_scratch(self, name: str) -> Path:
        path = self._scratch / name
        if is_checked(path, self._snapshot.files[name], self._snapshot.label):
            return path
        return self._fetch(name, Destination(self._scratch, self._options.cache))

    def _obtain(self, name: str) -> Path:
        """The path of a checked copy: in the library's cache, else fetched there or to the scratch area."""
        path = self._cached(name)
        if path is None:
            to_cache = self._options.keep
            path = self._fetch(name, Destination(cache=self._options.cache)) if to_cache else self._to_scratch(name)
        self._check(name, path)
        return path

    def _start(self, name: str) -> None:
        if self._may_have_partials:
            remove_partials(self._scratch)
            self._may_have_partials = False
        if name not in self._held:
            self._held[name] = self._transfers.start(self._obtain, name)

    def _result(self, name: str) -> Path:
        return self._transfers.result(self._held[name], self._options.progress)

    def keep(self, name: str) -> Path:
        """A checked copy of a small file in the library's cache."""
        return self._transfers.result(self._transfers.start(self._obtain, name), self._options.progress)

    def _release(self, wanted: set[str]) -> None:
        for name in [n for n in self._held if n not in wanted]:
            future = self._held.pop(name)
            folder = self._folders.pop(name, None)
            if folder is not None:
                folder.close()
            if not future.cancel():
                self._transfers.finish(
                    future, self._options.progress
                )  # a file that is still being written cannot be removed
        if self._scratch.is_dir():
            for path in self._scratch.iterdir():
                if path.is_file() and path.name not in wanted:
                    path.unlink()

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """Wait for the shards in `now`, start to fetch `upcoming` as the scratch area allows, remove all others."""
        after = [name for name in upcoming if name not in now]
        self._release({*now, *after})
        for name in now:
            self._start(name)
        for name in after:
            if self._options.keep or len(self._held) < self._options.scratch:
                self._start(name)
        for name in now:
            if name not in self._folders:
                self._folders[name] = Folder(self._result(name).parent)
        if not now and not after:
            self._finish()

    def are_ready(self, names: Collection[str]) -> bool:
        """Whether all of these shards have arrived. False for more shards than the scratch area holds."""
        return all(name in self._held and self._held[name].done() for name in names)

    def _finish(self) -> None:
        """After the last shard: remove the scratch area, or record the commit in the library's cache."""
        if self._scratch.is_dir():
            shutil.rmtree(self._scratch)
        if self._options.keep:
            source = self._snapshot.source
            self._snapshot.hub.remember(source.repository, source.revision, self._snapshot.commit, self._options.cache)

    def check_needs(self, groups: Iterable[Collection[str]]) -> None:
        """Refuse work that needs more shards at once than `--scratch` allows. Raises UsageError."""
        most = max((len(group) for group in groups), default=0)
        if not self._options.keep and most > self._options.scratch:
            raise UsageError(
                f"{most} source shards are needed at once, --scratch allows {self._options.scratch}",
                f"Give --scratch {most} if the disk has room for them, a smaller --max-shard-size, or --keep-source.",
            )

    def close(self) -> None:
        """Stop transfers and close files. Shards in the scratch folder stay for the next run."""
        self._transfers.close()
        for folder in self._folders.values():
            folder.close()
        self._folders.clear()
