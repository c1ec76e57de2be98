"""`dsv4 download`: the files of one commit, whole and checked, into a folder or the hub library's own cache.

Files that are on disk already are checked and kept, so an interrupted download continues with the rest. No state file
is needed for that: the bytes are compared with the listing. A small record beside the files names the commit.
"""

import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from dsv4.errors import Dsv4Error, InputError, MachineError, UsageError
from dsv4.progress import Progress
from dsv4.text import human_bytes

from .client import RECORD, STAGING, BadFile, NetworkError, RemoteFile, Snapshot
from .fetch import Destination, fetch_checked, is_checked, remove_partials, sync
from .open import open_hub, open_snapshot, other_hub
from .source import HubSource
from .transfers import FileMeter, Transfers

_SPARE_BYTES = 64 << 20  # left free for other programs


def choose(files: dict[str, RemoteFile], include: Sequence[str], exclude: Sequence[str]) -> list[RemoteFile]:
    """The files that match a pattern of `include` (all if there is none) and none of `exclude`, in the hub's order.

    Patterns are shell patterns, and `folder/` means everything in it, as in `hf download`. Raises UsageError for a
    pattern of `include` that matches no file.
    """

    def matches(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern + "*" if pattern.endswith("/") else pattern)

    for pattern in include:
        if not any(matches(name, pattern) for name in files):
            shown = ", ".join(list(files)[:5])
            raise UsageError(f"--include '{pattern}' matches no file", f"The repository holds {shown}, …")
    return [
        file
        for name, file in files.items()
        if (not include or any(matches(name, p) for p in include)) and not any(matches(name, p) for p in exclude)
    ]


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds, or will hold, `folder`."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class DownloadPlan:
    """The files of a download. `missing` is decided by size alone; hashes are compared when it runs."""

    snapshot: Snapshot
    destination: Destination
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    free: int

    @property
    def bytes(self) -> int:
        """Bytes of all chosen files."""
        return sum(f.size for f in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes still to fetch."""
        return sum(f.size for f in self.missing)

    @property
    def root(self) -> Path:
        """Where the files will be."""
        return self.destination.root(self.snapshot)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        absent = {f.name for f in self.missing}
        return {
            "source": str(self.snapshot.source),
            "commit": self.snapshot.commit,
            "folder": str(self.root),
            "bytes": self.bytes,
            "missing_bytes": self.missing_bytes,
            "free_bytes": self.free,
            "files": [
                {"name": f.name, "size": f.size, "sha256": f.sha256, "present": f.name not in absent}
                for f in self.files
            ],
        }


def plan_download(
    snapshot: Snapshot, destination: Destination, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> DownloadPlan:
    """Decide which files are on disk already and which are missing. Writes nothing."""
    files = choose(snapshot.files, include, exclude)

    def absent(file: RemoteFile) -> bool:
        path = destination.path(snapshot, file.name)
        return not path.is_file() or path.stat().st_size != file.size

    missing = tuple(f for f in files if absent(f))
    return DownloadPlan(snapshot, destination, tuple(files), missing, free_bytes(destination.root(snapshot)))


def read_record(folder: Path) -> dict[str, Any] | None:
    """Repository, commit and hashes of a folder that `dsv4 download` filled; None for other folders."""
    try:
        value = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else None


def check_folder(plan: DownloadPlan) -> None:
    """Refuse a folder that holds another repository: its files would be replaced. Raises UsageError."""
    record = read_record(plan.destination.folder) if plan.destination.folder else None
    source = plan.snapshot.source
    if record is not None and str(record.get("source")).partition(":")[2] != source.repository:
        text = f"{plan.destination.folder} holds files of {record.get('source')}"
        raise UsageError(text, "Choose another folder.")


def check_space(plan: DownloadPlan) -> None:
    """Raises MachineError, with both numbers, if the disk is too small."""
    need = plan.missing_bytes + _SPARE_BYTES if plan.missing else 0
    if need > plan.free:
        missing, free = human_bytes(plan.missing_bytes), human_bytes(plan.free)
        raise MachineError(
            f"{plan.root}: {missing} are missing, {free} are free on that disk",
            "Free some space, choose another disk, or fetch less with --include.",
        )


@dataclass
class Fallback:
    """The same repository on the other hub, opened at the first use."""

    source: HubSource
    token: str | None = None
    _snapshot: Snapshot | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, source: HubSource, token: str | None = None) -> "Fallback":
        """The repository's default branch on the other hub: the hubs number commits differently."""
        return cls(HubSource(other_hub(source.hub), source.repository), token)

    def snapshot(self) -> Snapshot:
        """The other hub's listing."""
        with self._lock:
            if self._snapshot is None:
                self._snapshot = open_snapshot(self.source, self.token)
            return self._snapshot

    def same_file(self, file: RemoteFile) -> RemoteFile:
        """The other hub's entry for the same file. Raises InputError if size or hash differ."""
        other = self.snapshot().files.get(file.name)
        if other is None:
            raise InputError(f"{self.source}: does not have {file.name}")
        same = other.size == file.size and (not other.sha256 or not file.sha256 or other.sha256 == file.sha256)
        if not same:
            raise InputError(f"{self.source}: lists another {file.name} (size or SHA-256 differ)")
        return other


@dataclass
class DownloadResult:
    """Names of files that were fetched, that were on disk already, and that came from the other hub."""

    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    from_fallback: list[str] = field(default_factory=list)


class _Download:
    """One running download. `warn` is called with a line for the user."""

    def __init__(
        self, plan: DownloadPlan, fallback: Fallback | None, transfers: Transfers, warn: Callable[[str], None]
    ) -> None:
        self.plan, self.fallback, self.transfers, self.warn = plan, fallback, transfers, warn
        self.result = DownloadResult()
        self._first_hub_is_down = threading.Event()

    def obtain(self, file: RemoteFile) -> None:
        """Fetch one file, unless a checked copy is on disk."""
        snapshot, destination = self.plan.snapshot, self.plan.destination
        meter = FileMeter(file.size, self.transfers)
        if is_checked(destination.path(snapshot, file.name), file, snapshot.label):
            meter.finish()
            self.result.kept.append(file.name)
            return
        try:
            if self._first_hub_is_down.is_set():
                raise NetworkError(f"{snapshot.source}: gave up on it")
            fetch_checked(snapshot, file, destination, meter, self.warn)
        except (NetworkError, BadFile) as error:
            self._from_other_hub(file, meter, error)
        self.result.fetched.append(file.name)

    def _from_other_hub(self, file: RemoteFile, meter: FileMeter, error: Dsv4Error) -> None:
        if self.fallback is None:
            raise error
        if isinstance(error, NetworkError) and not self._first_hub_is_down.is_set():
            self._first_hub_is_down.set()
            self.warn(f"{error.message}. Going on with {self.fallback.source}.")
        meter.restart()
        self.fallback.same_file(file)
        # Checked against the first hub's listing, whatever the other one says.
        fetch_checked(self.fallback.snapshot(), file, self.plan.destination, meter, self.warn)
        self.result.from_fallback.append(file.name)


def _recorded(source: HubSource, token: str | None, folder: Path) -> Snapshot | None:
    """The listing that an earlier run of the same download recorded in the folder."""
    record = read_record(folder)
    wanted = (f"{source.hub}:{source.repository}", source.revision)
    if record is None or (record.get("source"), record.get("revision")) != wanted:
        return None
    files = {name: RemoteFile(name, **value) for name, value in record["files"].items()}
    return Snapshot(source, open_hub(source.hub, token), str(record["commit"]), files)


def open_with_fallback(
    source: HubSource, token: str | None, destination: Destination, fallback: bool, warn: Callable[[str], None]
) -> tuple[Snapshot, Fallback | None]:
    """The snapshot to download, and the other hub if `fallback` asks for it.

    If the first hub does not list its files, the listing that an earlier run recorded in the folder is used. Without
    one, everything comes from the other hub and is compared with that hub's listing only. `token` is for the first hub.
    """
    other = Fallback.of(source) if fallback else None
    try:
        return open_snapshot(source, token, destination.cache), other
    except NetworkError as error:
        if other is None:
            raise
        known = _recorded(source, token, destination.folder) if destination.folder else None
        if known is not None:
            return known, other
        warn(f"{error.message}. Taking everything from {other.source}: hashes are compared with its own listing only.")
        return other.snapshot(), None


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock the staging folder for this process, and remove it at the end. Raises MachineError if it is locked."""
    staging = folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(staging / "lock", blocking=False).acquire()
    except filelock.Timeout:
        text = f"{folder}: another dsv4 download is writing there"
        raise MachineError(text, "Wait for it, or choose another folder.") from None
    with lock:
        remove_partials(folder)
        yield
        shutil.rmtree(staging, ignore_errors=True)


def _write_record(plan: DownloadPlan) -> None:
    """Write repository, commit and hashes into the folder; a folder may hold several downloads of one commit."""
    folder = plan.root
    value = {
        "source": f"{plan.snapshot.source.hub}:{plan.snapshot.source.repository}",
        "revision": plan.snapshot.source.revision,
        "commit": plan.snapshot.commit,
        "files": {
            f.name: {"size": f.size, "sha256": f.sha256, "git_sha1": f.git_sha1} for f in plan.snapshot.files.values()
        },
    }
    temporary = folder / f"{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / RECORD)


def _raise_bad_files(futures: list[Future[None]]) -> None:
    """Raise one error that names all files that failed the check."""
    faults = [error for f in futures if isinstance(error := f.exception(), BadFile)]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise BadFile(f"{len(faults)} files are not what the hub lists:", faults[0].hint, list(map(str, faults)))


def _run_all(download: _Download, progress: Progress) -> None:
    """Obtain every file. The first error ends the run, except that files that fail the check are named at the end."""
    # Large files first: the last one to finish decides how long it takes.
    ordered = sorted(download.plan.files, key=lambda f: -f.size)
    futures = [download.transfers.start(download.obtain, file) for file in ordered]
    for future in download.transfers.completed(futures, progress):
        if not isinstance(future.exception(), BadFile):
            future.result()
    _raise_bad_files(futures)


def download(
    plan: DownloadPlan,
    *,
    workers: int,
    fallback: Fallback | None = None,
    progress: Progress,
    warn: Callable[[str], None],
) -> DownloadResult:
    """Carry out a plan. `progress` is called with bytes in the calling thread, `warn` with a line of text.

    Raises BadFile naming every file that failed the check twice, NetworkError, MachineError, OSError. Finished
    files stay, and the same call continues with the rest.
    """
    check_folder(plan)
    check_space(plan)
    snapshot, destination = plan.snapshot, plan.destination
    with ExitStack() as stack:
        if destination.folder is not None:
            stack.enter_context(_only_one(destination.folder))
            _write_record(plan)  # first: if the hub fails later, this listing still has the hashes
        transfers = stack.enter_context(closing(Transfers(workers, snapshot.hub.abort)))
        running = _Download(plan, fallback, transfers, warn)
        _run_all(running, progress)
    if destination.folder is None:
        snapshot.hub.remember(snapshot.source.repository, snapshot.source.revision, snapshot.commit, destination.cache)
    return running.result
