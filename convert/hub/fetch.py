"""Fetch one file from a hub and check it before it gets its final name.

In a folder of the user's, a file arrives in a hidden sub-folder and is renamed when size, hash and header are right.
In a library's own cache the library decides the names; a file that fails the check is removed there.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import STAGING, BadFile, RemoteFile, Snapshot, check_file
from .transfers import FileMeter


@dataclass(frozen=True)
class Destination:
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
    """Whether the file is on disk with the size and hash that the hub lists."""
    if not path.is_file():
        return False
    try:
        check_file(path, file, label)
    except BadFile:
        return False
    return True


def remove_partials(folder: Path) -> None:
    """Remove partial files of a killed run: huggingface_hub never resumes them."""
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


def _stage(snapshot: Snapshot, file: RemoteFile, destination: Destination, meter: FileMeter, again: bool) -> Path:
    """Put the file into the hidden sub-folder: copied from the library's cache if it is there, else fetched."""
    assert destination.folder is not None
    staging = destination.folder / STAGING
    cached = (
        None
        if again
        else snapshot.hub.cached(snapshot.source.repository, snapshot.commit, file.name, destination.cache)
    )
    if cached is None:
        return snapshot.hub.fetch_to_folder(snapshot.source.repository, snapshot.commit, file, staging, meter, again)
    staged = staging / file.name
    staged.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(cached, staged)
    return staged


def _arrive(snapshot: Snapshot, file: RemoteFile, destination: Destination, meter: FileMeter, again: bool) -> Path:
    """Fetch without a check: into the cache, or into the hidden sub-folder. Returns the path."""
    try:
        if destination.folder is not None:
            return _stage(snapshot, file, destination, meter, again)
        return snapshot.hub.fetch_to_cache(
            snapshot.source.repository, snapshot.commit, file, destination.cache, meter, again
        )
    except OSError as error:
        if error.filename is None:  # the libraries do not name the file when the disk is full
            error.filename = str(destination.root(snapshot) / file.name)
        raise


def _attempt(snapshot: Snapshot, file: RemoteFile, destination: Destination, meter: FileMeter, again: bool) -> Path:
    path = _arrive(snapshot, file, destination, meter, again)
    try:
        check_file(path, file, snapshot.label)
    except BadFile:
        discard(path)
        raise
    return path if destination.folder is None else _publish(path, destination.folder / file.name)


def fetch_checked(
    snapshot: Snapshot, file: RemoteFile, destination: Destination, meter: FileMeter, warn: Callable[[str], None]
) -> Path:
    """Fetch a file, check it, and fetch it a second time if the check fails. Returns its path.

    Raises BadFile if the second copy fails too (no file gets the final name), NetworkError, MachineError.
    """
    try:
        path = _attempt(snapshot, file, destination, meter, again=False)
    except BadFile as error:
        warn(f"{error.message}. Fetching it once more.")
        meter.restart()
        path = _attempt(snapshot, file, destination, meter, again=True)
    meter.finish()
    return path
