"""Access to the files of a checkpoint: the Protocol, and its implementation for a local folder.

Those for a hub are in convert/hub/: storage.py, and parts/storage.py for `dsv4 run`. Files are read with `pread` into
memory that the caller allocates, and not mapped: a mapped file that shrinks raises SIGBUS, and mapped pages hide how
much memory a run needs.
"""

import os
import re
import stat
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol, Self

from dsv4.errors import InputError

from .forms.tensor import Extent

SMALL_BYTES = 1 << 20  # at most so many are requested ahead: of a block scale, of a row
_SAFE_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,250}")


def check_component(name: str, what: str) -> None:
    """Refuse a file name that is not one plain component: no separators, drives, dots only, controls or NUL."""
    if not _SAFE_COMPONENT.fullmatch(name) or name.endswith("."):
        raise InputError(
            f"{what}: '{name[:80]}' is not a plain file name", "A shard lies beside its index, in no folder."
        )


class Storage(Protocol):
    """Read access to the files of one checkpoint. Safe to use from several threads."""

    label: str  # its name in messages: a path or a repository

    def sizes(self) -> dict[str, int]:
        """Name and size of each file, names relative with `/` for sub-folders."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises InputError if the file ends before."""
        ...

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` of the file. Raises InputError if the file ends before."""
        ...

    def identity(self) -> dict[str, Any]:
        """What identifies this source permanently, such as repository and commit; {} for a folder, which may move."""
        ...

    def changed_ns(self, name: str) -> int:
        """When a file last changed, ns since 1970; 0 if it cannot change."""
        ...

    def choose_shards(self, names: Collection[str]) -> None:
        """Name the shards of the checkpoint, before any is read: others are not fetched. For remote sources."""
        ...

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """Make the shards in `now` readable, start to fetch `upcoming`, release all others: for remote sources."""
        ...

    def expect(self, extents: Iterable[Extent]) -> None:
        """These bytes are read next. Where reading one by one would be slow, they are fetched here, several at once."""
        ...

    def is_ready(self, names: Collection[str]) -> bool:
        """Whether `prepare` would make these shards readable without waiting, and has room for so many."""
        ...

    def disk_bytes(self) -> int:
        """Bytes of disk that reading needs besides the output."""
        ...

    def close(self) -> None:
        """Close open files and stop transfers."""
        ...


class Folder:
    """A checkpoint in a local folder. Symlinks to regular files are followed (the hub caches are made of them)."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            kind = "is not a folder" if path.exists() else "does not exist"
            hint = "Name the folder that holds config.json and the shards."
            raise InputError(f"{path}: {kind}", hint)
        self.path = path
        self.label = str(path)
        self._descriptors: dict[str, int] = {}
        self._scattered: set[str] = set()  # files of which small parts are read
        self._lock = threading.Lock()

    def sizes(self) -> dict[str, int]:
        """Regular files of the folder and its sub-folders, by relative name; hidden files and folders left out."""
        found: dict[str, int] = {}
        for folder, folders, files in os.walk(self.path, followlinks=False):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in sorted(files):
                full = Path(folder, file)
                if not file.startswith(".") and full.is_file():
                    found[full.relative_to(self.path).as_posix()] = full.stat().st_size
        return found

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = self._open(name)
            return self._descriptors[name]

    def _open(self, name: str) -> int:
        path = self.path / name
        try:
            # Opening a FIFO would block; with O_NONBLOCK it returns, and the file is refused by its type.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise InputError(f"{self.label}: {name} is missing", "Download it again.") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{self.label}: {name} is not a regular file")
        return descriptor

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; threads may share the descriptor. Raises InputError if the file ends before."""
        descriptor, done = self._descriptor(name), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                error.filename = str(self.path / name)  # the system knows a number only
                raise
            if count == 0:
                raise InputError(f"{self.label}: {name} ends at byte {offset + done}", "Download it again.")
            done += count

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises InputError if the file ends before."""
        buffer = bytearray(length)
        self.read_into(name, memoryview(buffer), offset)
        return bytes(buffer)

    def identity(self) -> dict[str, Any]:
        """Nothing: the folder may move, and its shards are named by their headers and sizes."""
        return {}

    def changed_ns(self, name: str) -> int:
        """The inode's change time, ns: unlike the modification time, it cannot be set back."""
        return os.fstat(self._descriptor(name)).st_ctime_ns

    def choose_shards(self, names: Collection[str]) -> None:
        """Nothing to do: no file is fetched."""

    def prepare(self, now: Collection[str], upcoming: Iterable[str] = ()) -> None:
        """Nothing to do: local files are readable at any time."""

    def expect(self, extents: Iterable[Extent]) -> None:
        """The system reads ahead by itself: in a file of which most is read, not in one of which small parts are.

        If all of them are small they are requested from the disk now, so that reading them waits once.
        """
        announced: dict[str, list[Extent]] = {}
        for extent in extents:
            announced.setdefault(extent.shard, []).append(extent)
        for name, parts in announced.items():
            most = 2 * sum(part.nbytes for part in parts) >= os.fstat(self._descriptor(name)).st_size
            self._read_ahead(name, most)
            if not most and hasattr(os, "posix_fadvise") and max(part.nbytes for part in parts) <= SMALL_BYTES:
                for part in filter(lambda part: part.nbytes, parts):  # no bytes would mean all to the end
                    os.posix_fadvise(self._descriptor(name), part.offset, part.nbytes, os.POSIX_FADV_WILLNEED)

    def _read_ahead(self, name: str, wanted: bool) -> None:
        """Linux takes matrices that lie one behind the other for the beginning of more, and reads up to 8 MB more."""
        if wanted == (name not in self._scattered) or not hasattr(os, "posix_fadvise"):
            return
        os.posix_fadvise(self._descriptor(name), 0, 0, os.POSIX_FADV_NORMAL if wanted else os.POSIX_FADV_RANDOM)
        (self._scattered.discard if wanted else self._scattered.add)(name)

    def is_ready(self, names: Collection[str]) -> bool:
        """True: local files are readable at any time."""
        return True

    def disk_bytes(self) -> int:
        """0: nothing is fetched."""
        return 0

    def close(self) -> None:
        """Close the descriptors."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._scattered.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
