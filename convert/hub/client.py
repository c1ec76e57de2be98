"""The two hubs behind one small interface: resolve a revision, list files, read a range, fetch a file.

The client libraries do the network work (`huggingface.py`, `modelscope.py`), so their caches, tokens, mirrors, proxies
and retries are what a user already knows. This
module holds what both share: the entry of a listed file, which names are acceptable, and how bytes on disk are compared
with the listing.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from dsv4.convert.checkpoint.header import LENGTH_BYTES, header_length, parse_header
from dsv4.errors import InputError, MachineError
from dsv4.progress import Progress

from .source import HubName, HubSource

STAGING = ".dsv4-incoming"  # inside the target folder; checked files move out of it
RECORD = ".dsv4-source.json"  # which repository and commit the files of a folder are
WEIGHTS = (".safetensors", ".gguf")  # large files, of which parts are read; others are read whole
_CHUNK_BYTES = 4 << 20
_BAD = "It was fetched twice. Try again later."
AGAIN = "Run the same command again later: finished files are kept."
_ATTEMPTS = 3
LONGEST_WAIT = 60.0

Result = TypeVar("Result")


class NetworkError(MachineError):
    """The hub did not answer, or refused. Another hub or a later run may succeed."""


class Busy(NetworkError):
    """The hub is overloaded (429, 5xx): worth another try, after `retry_after` seconds if the hub says so."""

    def __init__(self, message: str, hint: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class Dropped(NetworkError):
    """The connection was lost in the middle of an answer: worth another try within seconds."""


class BadFile(InputError):
    """The size or hash of a fetched file is not what the hub lists. A second fetch may help."""


class NoRepository(InputError):
    """The repository does not exist, or this token may not see it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. Large files have a SHA-256; small ones at Hugging Face only git's SHA-1."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class Hub(Protocol):
    """One hub, with one token. Methods raise NoRepository, InputError, NetworkError or MachineError.

    The progress of a transfer is called in the fetching thread with the number of bytes received, negative when the
    library restarts a file. An exception that it raises ends the transfer.
    """

    prefix: HubName
    title: str

    def offline(self) -> bool:
        """Whether the library is set not to use the network."""
        ...

    def cached_files(self, repository: str, revision: str | None, cache: Path | None) -> tuple[str, list[RemoteFile]]:
        """Commit and files of a snapshot in the library's own cache, found without a network."""
        ...

    def resolve(self, repository: str, revision: str | None) -> str:
        """The commit that a branch or tag (None: the default branch) points to now."""
        ...

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """Every file of a commit."""
        ...

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        """Exactly `length` bytes by a range request."""
        ...

    def fetch_to_folder(
        self, repository: str, commit: str, file: RemoteFile, folder: Path, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file to `folder`/name. `again` ignores every copy that is already on disk."""
        ...

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file into the library's own cache and return its path there."""
        ...

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        """The file in the library's own cache, if it is there."""
        ...

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        """Where the library's own cache keeps the files of a commit."""
        ...

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """Record in the library's own cache which commit the revision points to, for later use without a network."""
        ...

    def abort(self) -> None:
        """End transfers that do not call their progress."""
        ...

    def similar(self, repository: str) -> list[str]:
        """Repositories with names like this one, best first; [] if the hub does not answer."""
        ...


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name as words if that is Chinese."""
    line = next(iter(str(error).splitlines()), "")
    if line and line.isascii():
        return line
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.lstrip("_").removesuffix("Error"))
    return words.lower()


def with_patience(action: Callable[[], Result], passing: tuple[type[NetworkError], ...] = (Busy, Dropped)) -> Result:
    """Call `action`, and again after 1 and 2 seconds for errors that pass: the libraries retry whole files only.

    If the hub says how long to wait, at least that long, up to LONGEST_WAIT seconds.
    """
    for attempt in range(_ATTEMPTS - 1):
        try:
            return action()
        except passing as error:
            asked = error.retry_after if isinstance(error, Busy) else 0.0
            time.sleep(max(2**attempt, min(asked, LONGEST_WAIT)))
    return action()


def check_remote_name(name: str, label: str) -> None:
    """Refuse a listed name that leads out of the folder or is not valid on every file system. Raises InputError."""
    parts = name.split("/")
    bad = (
        not name.isprintable()
        or any(c in name for c in '\\:*?"<>|')
        or any(part in ("", ".", "..") or part.endswith((" ", ".")) or len(part.encode()) > 255 for part in parts)
        or parts[0] in (STAGING, RECORD)
    )
    if bad:
        hint = "The repository lists a file whose name is not safe. Do not use it before its owner explains that."
        raise InputError(f"{label}: refusing the file name '{name[:120]}'", hint)


def _digest(stream: BinaryIO, kind: str, prefix: bytes = b"") -> str:
    digest = hashlib.new(kind, prefix, usedforsecurity=False)
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _check_hash(stream: BinaryIO, size: int, file: RemoteFile, where: str) -> None:
    """git's SHA-1 (of "blob", the size and the bytes) is what Hugging Face lists for small files."""
    if size != file.size:
        raise BadFile(f"{where}: {size} bytes arrived, the hub lists {file.size}", _BAD)
    if file.sha256 is not None:
        kind, expected, found = "SHA-256", file.sha256, _digest(stream, "sha256")
    elif file.git_sha1 is not None:
        kind, expected, found = "git SHA-1", file.git_sha1, _digest(stream, "sha1", b"blob %d\0" % size)
    else:
        return
    if found != expected.lower():
        raise BadFile(f"{where}: the bytes are not those that the hub lists: {kind} {expected}, found {found}", _BAD)


def _check_header(stream: BinaryIO, size: int, where: str) -> None:
    prefix = stream.read(LENGTH_BYTES)
    try:
        parse_header(stream.read(header_length(prefix, size, where)), size, where)
    except InputError as error:
        raise BadFile(error.message, _BAD) from None


def check_bytes(data: bytes, file: RemoteFile, label: str) -> None:
    """Compare a file in memory with the hub's listing: size and hash. Raises BadFile."""
    _check_hash(io.BytesIO(data), len(data), file, f"{label}/{file.name}")


def check_file(path: Path, file: RemoteFile, label: str) -> None:
    """Compare a file on disk with the hub's listing: size, hash, and the header of a shard. Raises BadFile."""
    where, size = f"{label}/{file.name}", path.stat().st_size
    with path.open("rb") as stream:
        _check_hash(stream, size, file, where)
        if file.name.endswith(".safetensors"):
            stream.seek(0)
            _check_header(stream, size, where)


@dataclass(frozen=True)
class Snapshot:
    """One commit of one repository and its files by name."""

    source: HubSource
    hub: Hub
    commit: str
    files: dict[str, RemoteFile]

    @property
    def is_commit(self) -> bool:
        """Whether the revision was resolved to a commit, whose files cannot change."""
        return re.fullmatch(r"[0-9a-f]{40}", self.commit) is not None

    @property
    def label(self) -> str:
        """How messages call it: the source with the commit it was resolved to."""
        return f"{self.source.hub}:{self.source.repository}@{self.commit[:12]}"

    def sizes(self) -> dict[str, int]:
        """Files of the commit as the hub lists them; hidden ones left out, as in a folder."""
        names = [n for n in self.files if not any(part.startswith(".") for part in n.split("/"))]
        return {name: self.files[name].size for name in names}

    def identity(self) -> dict[str, Any]:
        """Hub, repository and commit."""
        return {"hub": self.source.hub, "repository": self.source.repository, "commit": self.commit}
