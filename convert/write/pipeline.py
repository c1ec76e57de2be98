"""A shard's bytes on their way into its file and its hash: in order, each in a thread of its own.

Pieces of any length are copied together into a few blocks of pages, which is what a file can be written from past the
page cache (see files.py). A full block is hashed and written while the next ones fill, and is used again when both are
done with it: memory is bounded, a piece is let go of at once, and neither disk nor hash waits for the other.
"""

import hashlib
import mmap
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from .atomic_file import WRITE_BYTES, AtomicFile

BLOCK_BYTES = WRITE_BYTES
BLOCKS = 4  # one that fills, and three that wait
COPIED_AT_ONCE = 2**16  # takes less time than to let other threads run


class _Block:
    """Pages of memory, filled from data that lies anywhere."""

    def __init__(self) -> None:
        self._pages = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self.used = 0

    @property
    def is_full(self) -> bool:
        return self.used == len(self._pages)

    @property
    def content(self) -> memoryview:
        return self._pages[: self.used]

    def fill(self, data: memoryview) -> memoryview:
        """Copy what fits; returns what did not."""
        count = min(len(self._pages) - self.used, len(data))
        to, part = self._pages[self.used : self.used + count], data[:count]
        if count < COPIED_AT_ONCE:
            to[:] = part
        else:
            np.copyto(np.frombuffer(to, np.uint8), np.frombuffer(part, np.uint8))  # other threads run meanwhile
        self.used += count
        return data[count:]


class Outflow:
    """Hash and write in two background threads what is `put`. `finish` waits for them, `stop` discards what is left.

    hasher, writer: one thread each, so that blocks are taken in order. advance: called with the number of bytes of data
    written; the header does not count.
    """

    def __init__(self, file: AtomicFile, hasher: Executor, writer: Executor, advance: Callable[[int], None]) -> None:
        self._file, self._hasher, self._writer, self._advance = file, hasher, writer, advance
        self._sha256 = hashlib.sha256()
        self._filling, self._blocks = _Block(), 1
        self._behind: deque[tuple[Future[Any], Future[Any], _Block]] = deque()
        self._uncounted = 0
        self._stopped = False

    def _write(self, content: memoryview) -> None:
        if self._stopped:
            return
        try:
            self._file.write(content)
        except BaseException:
            self._stopped = True  # what is queued behind must not follow
            raise

    def _settle(self) -> _Block:
        """Wait for the oldest block; it is free again."""
        hashing, writing, block = self._behind.popleft()
        hashing.result()
        writing.result()
        header = min(self._uncounted, block.used)
        self._uncounted -= header
        self._advance(block.used - header)
        block.used = 0
        return block

    def _send(self) -> None:
        """Have the block that fills hashed and written, and go on with another."""
        block = self._filling
        hashing = self._hasher.submit(self._sha256.update, block.content)
        self._behind.append((hashing, self._writer.submit(self._write, block.content), block))
        if self._blocks < BLOCKS:
            self._filling, self._blocks = _Block(), self._blocks + 1
        else:
            self._filling = self._settle()

    def put(self, data: memoryview) -> None:
        """The next bytes, as bytes."""
        while data:
            data = self._filling.fill(data)
            if self._filling.is_full:
                self._send()

    def begin(self, header: bytes) -> None:
        """The bytes in front of the data."""
        self._uncounted = len(header)
        self.put(memoryview(header))

    def finish(self) -> str:
        """Wait until all is written. Returns the SHA-256 of the file."""
        if self._filling.used:
            self._send()
        while self._behind:
            self._settle()
        return self._sha256.hexdigest()

    def stop(self) -> None:
        """Write nothing more; when this returns, the writing thread has let go of the file."""
        self._stopped = True
        self._writer.submit(lambda: None).result()
