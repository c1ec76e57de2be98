"""The only module that opens output files for writing, fsyncs and renames (lock.py takes the locks).

A file appears under its final name in one step and complete: written under a temporary name in the same folder,
length checked, fsynced, renamed, and the folder fsynced too. A run that ends before the rename leaves at most a
temporary file, which the next run into the folder removes. A failed fsync is fatal and not repeated: the kernel may
have dropped the pages, and a second call would report success for lost data.

Operations that a system or file system lacks are left out: preallocation, O_DIRECT, fsync. Without fsync a file may be
lost in a power cut, so `commit` returns whether the file is durable.

Large files are written with O_DIRECT where the file system supports it. Writing then takes a tenth of the processor
time, which hashing needs, and keeps other programs' pages in the page cache. The last fsync has almost nothing left to
write, so an interrupt takes effect at once for shards of any size. Elsewhere writes go through the page cache.
"""

import ctypes
import errno
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from dsv4.errors import InputError, Interrupted, MachineError, UsageError
from dsv4.files import PREFIX, UNSUPPORTED, fsync, fsync_folder, naming

fcntl = import_module("fcntl") if find_spec("fcntl") else None  # not on Windows

SCRATCH_NAME = PREFIX + "scratch"  # fetched source shards; each part of a conversion has its own
_PART_SUFFIX = ".part"
WRITE_BYTES = 8 * 2**20  # largest write call: an interrupt takes effect between two of them
DIRECT_BYTES = 2 * WRITE_BYTES  # files from this size on are written with O_DIRECT, if given in whole pages
SLOW_TO_DELETE_BYTES = 6 * 2**30  # file systems need up to a tenth of a second for each GB
FLUSH_BYTES = (
    64 * 2**20
)  # with the page cache, write-back starts after this many bytes: little is left for the last fsync


def allocate(descriptor: int, size: int) -> None:
    """Reserve space in the file system. Raises OSError if there is too little; does nothing where it cannot.

    Uses the system call and not posix_fallocate: on file systems without it, glibc writes a byte into each block, so
    the file would cross a network twice.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:  # not on Linux
        return
    while call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def create_folder(folder: Path) -> None:
    """Make a folder and its parents, durably. Raises UsageError if the name is taken by a file."""
    if folder.is_dir():
        return
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists and is not a folder", "Choose another output folder.")
    create_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def _are_pages(data: memoryview) -> bool:
    """Whether O_DIRECT can write the bytes: whole pages that begin where a page of memory does."""
    address = np.frombuffer(data, np.uint8).ctypes.data if data else 0
    return address % mmap.PAGESIZE == 0 and len(data) % mmap.PAGESIZE == 0


def set_direct(descriptor: int, on: bool) -> bool:
    """Switch O_DIRECT of an open file on or off. Returns whether the file system accepted it."""
    direct = getattr(os, "O_DIRECT", 0)
    if fcntl is None or not direct:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~direct
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags)
    except OSError:
        return False
    return True


class AtomicFile:
    """A file of known size that is written front to back and appears under its name only in `commit`.

    Use as a context manager: leaving it without `commit` removes the temporary file.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.written, self._flushed = path, size, 0, 0
        self._temporary = path.parent / f"{PREFIX}{path.name}.{uuid.uuid4().hex[:8]}{_PART_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o666)  # less the umask, as any new file
        self._committed = False
        try:
            self._allocate()
            self._direct = size >= DIRECT_BYTES and set_direct(self._descriptor, True)
        except BaseException:
            self.abort()
            raise

    def _allocate(self) -> None:
        """Reserve all of the space now, so that a full disk is reported before hours of work."""
        if not self.size:
            return
        with naming(self.path):
            allocate(self._descriptor, self.size)

    def _write_cached(self) -> None:
        """Switch O_DIRECT off: for the last bytes, which fill no page, or because the file system refuses the write."""
        if self._direct:
            set_direct(self._descriptor, False)
            self._direct = False

    def _put(self, data: memoryview) -> None:
        """Write bytes; short writes are continued."""
        while data:
            try:
                count = os.write(self._descriptor, data[:WRITE_BYTES])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._write_cached()  # a block size that does not divide ours, or the rest of a short write
                continue
            data = data[count:]

    def write(self, data: memoryview) -> None:
        """Append bytes. A large file is written with O_DIRECT while `data` is whole, aligned pages."""
        data = data.cast("B")
        self.written += len(data)
        if not _are_pages(data):
            self._write_cached()
        self._put(data)
        if not self._direct and self.written - self._flushed >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # Starts to write dirty pages back without waiting, and drops the written ones: a long run does not evict
            # other programs' pages.
            os.posix_fadvise(self._descriptor, 0, self.written, os.POSIX_FADV_DONTNEED)
            self._flushed = self.written

    def commit(self) -> bool:
        """Check the length, fsync, rename, fsync the folder. Returns whether the file is durable.

        Raises MachineError if not all bytes were written.
        """
        if self.written != self.size:
            raise MachineError(f"{self.path.name}: {self.written} bytes written, {self.size} planned")
        durable = fsync(self._descriptor, self.path)
        os.close(self._descriptor)
        self._descriptor = -1
        os.replace(self._temporary, self.path)
        self._committed = True
        return fsync_folder(self.path.parent) and durable

    def abort(self, leave: bool = False) -> None:
        """Remove the temporary file, unless it was committed, or `leave` leaves it to the next run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not self._committed and not leave:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.path)
        abort_all([self], error)


def abort_all(files: Iterable[AtomicFile], error: BaseException | None = None) -> None:
    """Remove the temporary file of each that was not committed.

    After an interrupt, files that would take longer than a second to delete are left to the next run.
    """
    slow = 0
    for file in files:
        slow += file.written
        file.abort(leave=isinstance(error, Interrupted) and slow >= SLOW_TO_DELETE_BYTES)


def write_file(path: Path, parts: Sequence[bytes]) -> bool:
    """Write a small file whole and atomically. Returns whether it is durable."""
    create_folder(path.parent)
    with AtomicFile(path, sum(map(len, parts))) as file:
        for part in parts:
            file.write(memoryview(part))
        return file.commit()


class AppendLog:
    """A text file to which whole lines are added durably. A torn last line from an earlier crash is cut off first."""

    def __init__(self, path: Path) -> None:
        new, self._path = not path.exists(), path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with naming(path):
            self._end = self._cut_torn_line()
        if new:
            fsync_folder(path.parent)

    def _cut_torn_line(self) -> int:
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0)
        end = content.rfind(b"\n") + 1
        if end != size:
            os.ftruncate(self._descriptor, end)
        return end

    def append(self, line: str) -> None:
        """Add one line and fsync."""
        data = memoryview(line.encode() + b"\n")
        with naming(self._path):
            while data:
                count = os.pwrite(self._descriptor, data, self._end)
                self._end += count
                data = data[count:]
        fsync(self._descriptor, self._path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def remove(path: Path) -> None:
    """Delete one of our own files, if it exists."""
    path.unlink(missing_ok=True)


def remove_empty_folder(path: Path) -> None:
    """Delete a folder if it exists and is empty."""
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR):
            raise


def leftovers(folder: Path, names: Iterable[str] = ("*",)) -> Iterator[Path]:
    """Temporary files of runs that were stopped, of files with the given names."""
    for name in names:
        yield from folder.rglob(f"{PREFIX}{name}.*{_PART_SUFFIX}")


def remove_leftovers(folder: Path, names: Iterable[str] = ("*",)) -> None:
    """Delete temporary files of runs that were stopped, of files with the given names. Only while holding the lock."""
    for path in leftovers(folder, names):
        path.unlink(missing_ok=True)


def remove_scratch_of_parts(folder: Path) -> None:
    """Delete source shards that killed parts had fetched. Call only while holding the lock alone."""
    for path in folder.glob(f"{SCRATCH_NAME}-*"):
        shutil.rmtree(path)


def check_separate(source: Path, output: Path) -> None:
    """Refuse an output that is the source, lies inside it or contains it, symlinks resolved."""
    real_source, real_output = source.resolve(), output.resolve()
    if real_output == real_source or real_source in real_output.parents:
        where = "is the source" if real_output == real_source else "lies inside the source"
        raise UsageError(f"the output {output} {where}", "Choose one elsewhere: the source stays as it is.")
    if real_output in real_source.parents:
        raise UsageError(f"the output {output} contains the source", "Choose another folder.")
    if real_source.is_dir() and real_output.is_dir() and os.path.samefile(real_source, real_output):
        raise UsageError(f"the output {output} is the source", "Choose another folder.")


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a file of ours, at most `limit`. Raises InputError if it is larger or no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path}: more than {limit} bytes")
    return data
