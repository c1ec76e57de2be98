"""Files that dsv4 writes: temporary names, fsync, and files that a user names: reports, logits, traces.

A file appears under its name only when it is complete. It is written under a temporary name in the same folder,
fsynced, and renamed: on an error an older file of that name stays. Paths that are not ordinary files, such as
/dev/stdout or a pipe, are written to directly. A link stays a link: its target is replaced. On a file system that
cannot fsync, the file is written and the caller is warned.

At the end: files that were read and are not what their names say, recognised by their first bytes.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dsv4.errors import InputError, UsageError

PREFIX = ".dsv4-"  # prefix of all files of dsv4 that are not results
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
NOT_DURABLE = "{folder}: its file system cannot fsync: after a power loss what is written there may be incomplete"

Warn = Callable[[str], None]


def fsync(descriptor: int, path: Path) -> bool:
    """Make a file or folder durable. False if its file system cannot fsync. Raises OSError for any other error."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        error.filename = str(path)
        raise
    return True


def fsync_folder(folder: Path) -> bool:
    """Make renames in a folder durable. False if its file system cannot."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        return fsync(descriptor, folder)
    finally:
        os.close(descriptor)


def _is_replaced(path: Path) -> bool:
    """Whether a new file takes the place of `path`: there is none yet, or an ordinary one."""
    return path.is_file() or not path.exists()


def _temporary(folder: Path) -> Path:
    """A unique name in `folder`."""
    return folder / f"{PREFIX}{uuid.uuid4().hex[:12]}.part"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """System errors name the file that the user knows, not the temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _written_beside(path: Path, warn: Warn) -> Iterator[BinaryIO]:
    """Write a temporary file beside `path` and rename it at the end; if anything fails, remove it."""
    temporary = _temporary(path.parent)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            durable = fsync(file.fileno(), path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not (fsync_folder(path.parent) and durable):
        warn(NOT_DURABLE.format(folder=path.parent))


@contextlib.contextmanager
def result_file(path: str | Path, warn: Warn) -> Iterator[BinaryIO]:
    """A file to write to, which has its name only when the with block ends without an error.

    warn: called with a sentence if the file system cannot make the file durable.
    Raises OSError with the name of the file: a full disk, a missing permission.
    """
    final = Path(os.path.realpath(path))
    with naming(Path(path)):
        if _is_replaced(final):
            yield from _written_beside(final, warn)
        else:
            with open(final, "wb", buffering=0) as file:
                yield file


def check_writable(path: str | Path) -> None:
    """Fail now, not after hours of work, if `result_file` cannot write there. Leaves nothing behind.

    Raises UsageError for a path that names no file in a folder that exists, OSError for what the system refuses.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise UsageError(f"{path} is a folder", "Name a file.")
    if not final.parent.is_dir():
        raise UsageError(f"{path}: the folder does not exist", "Create it first.")
    with naming(Path(path)):
        if not _is_replaced(final):
            os.close(os.open(final, os.O_WRONLY))
            return
        trial = _temporary(final.parent)
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        trial.unlink()


POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # by git-LFS's own specification
PULL = "Fetch the files themselves: git lfs pull"
AGAIN = "Download the file again."


class Kind(NamedTuple):
    """What begins with `prefix` (of text in lower case), and what to do about it."""

    prefix: bytes
    words: str
    hint: str

    def __str__(self) -> str:
        return f"{self.words}. {self.hint}"


KINDS = (
    Kind(POINTER, "a git-LFS pointer, not the file it stands for", PULL),
    Kind(b"<!doctype html", "a web page, such as a proxy or a login sends", AGAIN),
    Kind(b"<html", "a web page, such as a proxy or a login sends", AGAIN),
    Kind(b"gguf", "a GGUF file, not safetensors", "Name a .safetensors file, or a folder of GGUF files."),
    Kind(b"pk\x03\x04", "a zip archive, such as torch.save writes", "dsv4 reads safetensors: take the release."),
)
OTHER_WEIGHTS = (".bin", ".pt", ".pth")
PREFIX_BYTES = 64  # more than the longest, and some white space before it


def kind_of(start: bytes) -> Kind | None:
    """The row of KINDS that the first bytes of a file belong to."""
    found = start[:PREFIX_BYTES].lstrip().lower()
    return next((kind for kind in KINDS if found.startswith(kind.prefix)), None)


def refuse_other_kinds(start: bytes, where: str) -> None:
    """Raises InputError if the first bytes of a file, which `where` names, are those of another kind of file."""
    if kind := kind_of(start):
        raise InputError(f"{where}: {kind.words}", kind.hint)
