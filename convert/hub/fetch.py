"""One file from a hub to its place on disk, checked before anybody sees it under its final name.

In a folder of the user's, a file arrives in a hidden sub-folder and is renamed when size, hash and header are right.
In a library's own cache the library decides the names; there a file that turns out bad is removed.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import STAGING, BadFile, RemoteFile, Snapshot, check_file
from .transfers import FileMeter


@dataclass(frozen=True)
class Place:
    """Where files go: `folder`, or the library's own cache (at `cache`, None for where the library keeps it)."""

    folder: Path | None = None
    cache: Path | None = None

    def root(self, snapshot: Snapshot) -> Path:
        """The folder that will hold the files."""
        if self.folder is not None:
            return self.folder
        return snapshot.hub.snapshot_folder(snapshot.source.repository, snapshot.commit, self.cache)

    def path(self, snapshot: Snapshot, name: str) -> Path:
        """The final name of a file."""
        if self.folder is None:
            cached = snapshot.hub.cached(snapshot.source.repository, snapshot.commit, name, self.cache)
            return cached or self.root(snapshot) / name
        return self.folder / name


def is_checked(path: Path, file: RemoteFile, label: str) -> bool:
    """The file is on disk and is what the hub lists."""
    if not path.is_file():
        return False
    try:
        check_file(path, file, label)
    except BadFile:
        return False
    return True


def remove_partials(folder: Path) -> None:
    """Remove what a killed run of huggingface_hub left half-fetched: it never continues such files."""
    for partial in (folder / STAGING / ".cache" / "huggingface").rglob("*.incomplete"):
        partial.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a bad file, and in a cache the blob that its link points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, final: Path) -> Path:
    sync(staged)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, final)
    sync(final.parent)
    return final


def _stage(snapshot: Snapshot, file: RemoteFile, place: Place, meter: FileMeter, again: bool) -> Path:
    """The file in the hidden sub-folder: copied from the library's cache if it is there, else fetched."""
    assert place.folder is not None
    staging = place.folder / STAGING
    cached = None if again else snapshot.hub.cached(snapshot.source.repository, snapshot.commit, file.name, place.cache)
    if cached is None:
        return snapshot.hub.fetch_to_folder(snapshot.source.repository, snapshot.commit, file, staging, meter, again)
    staged = staging / file.name
    staged.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(cached, staged)
    return staged


def _arrive(snapshot: Snapshot, file: RemoteFile, place: Place, meter: FileMeter, again: bool) -> Path:
    """The file on disk, unchecked: in the cache, or in the hidden sub-folder."""
    try:
        if place.folder is not None:
            return _stage(snapshot, file, place, meter, again)
        return snapshot.hub.fetch_to_cache(snapshot.source.repository, snapshot.commit, file, place.cache, meter, again)
    except OSError as error:
        if error.filename is None:  # a full disk, met in the middle of a library
            error.filename = str(place.root(snapshot) / file.name)
        raise


def _attempt(snapshot: Snapshot, file: RemoteFile, place: Place, meter: FileMeter, again: bool) -> Path:
    path = _arrive(snapshot, file, place, meter, again)
    try:
        check_file(path, file, snapshot.label)
    except BadFile:
        discard(path)
        raise
    return path if place.folder is None else _publish(path, place.folder / file.name)


def fetch_checked(
    snapshot: Snapshot, file: RemoteFile, place: Place, meter: FileMeter, warn: Callable[[str], None]
) -> Path:
    """Fetch a file to its place, check it, and fetch it once more if it is bad. Returns its path.

    Raises BadFile if the second copy is bad too (nothing stays under the final name), NetworkError, MachineError.
    """
    try:
        path = _attempt(snapshot, file, place, meter, again=False)
    except BadFile as error:
        warn(f"{error}. Fetching it once more.")
        meter.restart()
        path = _attempt(snapshot, file, place, meter, again=True)
    meter.finish()
    return path
