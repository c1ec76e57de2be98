"""A file of which some parts are on disk: a sparse file of the true size, and a record of the parts that it has.

The record is text, a line `begin end` for each part, and `checked` once all of it was compared with a hash. A line is
appended only after the bytes are durable, so that what it names is there after a crash or a power loss; a line that is
cut off is ignored. Several processes may add to one file at the same time: they write the same bytes.
"""

import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from dsv4.files import fsync

from .intervals import Intervals

CHECKED = "checked"
_LINE = re.compile(r"(\d{1,18}) (\d{1,18})")


class PartialFile:
    """The parts of a file of `size` bytes at `path`; the record is beside it. Nothing is created before a write.

    Any thread may call the methods.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._record = path.with_name(f"{path.name}.parts")
        self._there, self._unrecorded = Intervals(), list[tuple[int, int]]()
        self._descriptor: int | None = None
        self._closed = False
        self.checked = False  # whole, and compared with its hash
        self._lock = threading.Lock()
        if path.is_file() and path.stat().st_size == size and self._record.is_file():
            self._read_record()

    def _read_record(self) -> None:
        for line in self._record.read_text(encoding="ascii", errors="replace").splitlines():
            if (found := _LINE.fullmatch(line)) and int(found[2]) <= self.size:
                self._there.add(int(found[1]), int(found[2]))
            self.checked = self.checked or line == CHECKED

    def missing(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of [begin, end) that are not on disk."""
        with self._lock:
            return self._there.missing(begin, end)

    @property
    def is_whole(self) -> bool:
        """Whether every byte is on disk."""
        return not self.missing(0, self.size)

    def _open(self) -> int:
        """A descriptor for writing. A file of another size, or without a record, is begun anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not list(self._there):
            self._record.unlink(missing_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, self.size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write(self, begin: int, data: bytes) -> None:
        """Write a part, which can be read from now on. Raises OSError, such as for a full disk.

        Does nothing after `close` or `discard`: a transfer may end later than its run.
        """
        with self._lock:
            if self._closed:
                return
            try:
                if self._descriptor is None:
                    self._descriptor = self._open()
                done = 0
                while done < len(data):
                    done += os.pwrite(self._descriptor, data[done:], begin + done)
            except OSError as error:
                error.filename = str(self.path)
                raise
            self._there.add(begin, begin + len(data))
            self._unrecorded.append((begin, begin + len(data)))

    @property
    def unrecorded(self) -> int:
        """How many parts were written and are not in the record."""
        return len(self._unrecorded)

    def record(self, count: int | None = None) -> None:
        """Make the first `count` parts that were written durable, and name them in the record; None: all of them."""
        with self._lock:
            parts = self._unrecorded[:count]
            if self._descriptor is None or not parts:
                return
            fsync(self._descriptor, self.path)
            self._append(f"{begin} {end}" for begin, end in parts)
            del self._unrecorded[: len(parts)]

    def _append(self, lines: Iterable[str]) -> None:
        """A line break on both sides: whatever a crash left at the end of the record stays a line of its own."""
        with self._record.open("a", encoding="ascii") as record:
            record.write("".join(f"\n{line}\n" for line in lines))

    def note_checked(self) -> None:
        """Note that the whole file was compared with its hash."""
        with self._lock:
            self._append([CHECKED])
            self.checked = True

    def discard(self) -> None:
        """Close the file, and remove what is on disk, because it is not what the hub lists."""
        self.close()
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. May be called again."""
        with self._lock:
            self._closed = True
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
