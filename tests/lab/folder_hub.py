"""A hub as an object, which has the files of a folder: for tests of what is built on the hubs' libraries."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.convert.hub.client import RemoteFile, Snapshot
from dsv4.convert.hub.open import HubOptions
from dsv4.convert.hub.parts.storage import PartStorage
from dsv4.convert.hub.source import HubSource

COMMIT = "c" * 40


class FolderHub:
    """A hub that has the files of a folder. `before` is called with the number of each range request."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.read_ranges: list[tuple[str, int, int]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.damage, self.given = False, 0
        self._lock = threading.Lock()

    def listing(self) -> dict[str, RemoteFile]:
        names = [p.relative_to(self.folder).as_posix() for p in sorted(self.folder.rglob("*")) if p.is_file()]
        whole = {name: (self.folder / name).read_bytes() for name in names}
        return {n: RemoteFile(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in whole.items()}

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        return list(self.listing().values())

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        with self._lock:
            self.read_ranges.append((file.name, offset, length))
            number = len(self.read_ranges)
        self.before(number)
        with (self.folder / file.name).open("rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
        with self._lock:
            self.given += length
        return data if not self.damage else bytes([data[0] ^ 1]) + data[1:]

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Any, again: bool
    ) -> Path:
        path = self.snapshot_folder(repository, commit, cache) / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((self.folder / file.name).read_bytes())
        return path

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        path = self.snapshot_folder(repository, commit, cache) / name
        return path if path.is_file() else None

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """Which commit a revision was: nobody asks for one by its name."""

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        return self.cache / "snapshots" / commit

    def abort(self) -> None:
        pass


def part_storage(hub: FolderHub, commit: str = COMMIT, **more: Any) -> PartStorage:
    """What `dsv4 run` opens."""
    snapshot = Snapshot(HubSource("hf", "acme/c"), hub, commit, hub.listing())  # type: ignore[arg-type]
    return PartStorage(snapshot, HubOptions(), **more)
