"""The lock of an output folder: a second run into the same folder stops and names the process that holds it."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from dsv4.errors import MachineError
from dsv4.files import PREFIX, naming

fcntl = import_module("fcntl") if find_spec("fcntl") else None  # not on Windows

LOCK_NAME = PREFIX + "lock"


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(owner['pid'])} on {owner['host']}"
    return "another process"


def _take_lock(descriptor: int, folder: Path, shared: bool) -> None:
    if fcntl is None:
        return  # unique temporary names still keep two runs apart
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise MachineError(
                f"{folder} is in use by {_holder(descriptor)}", "Wait until it is done, or stop it."
            ) from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without locks is treated like a system without them.


def _open_lock(path: Path, shared: bool) -> int:
    """Descriptor of the locked file. A file that its holder removed while we opened it is no lock: try again."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _take_lock(descriptor, path.parent, shared)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _hold(path: Path, shared: bool = False) -> Iterator[None]:
    descriptor = _open_lock(path, shared)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        try:
            yield
        finally:
            if not shared:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, part: str = "") -> Iterator[None]:
    """Hold the folder's lock: alone, or as one part of a conversion together with its other parts.

    Raises MachineError naming the process and host that has it. The kernel releases a lock when its process ends,
    so a stale lock file does not matter; a run that holds the folder alone removes those of killed parts.
    """
    path = folder / LOCK_NAME
    if part:
        with _hold(path, shared=True), _hold(Path(f"{path}.{part}")):
            yield
        return
    with _hold(path):
        for stale in folder.glob(f"{LOCK_NAME}.*"):
            stale.unlink(missing_ok=True)
        yield


def remove_stale_lock(folder: Path) -> None:
    """Delete the lock file of a run that was killed at its end, unless it is held or locks do not work here."""
    if (folder / LOCK_NAME).exists():
        with contextlib.suppress(MachineError, OSError), locked(folder):
            pass
