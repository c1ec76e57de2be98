"""From pieces to a file and its hash: in order, hashed in one thread and written in another.

Pieces of any length are copied into a few blocks of whole pages, which can be written with O_DIRECT (atomic_file.py). A
full block is hashed and written while the next ones fill, and is used again when both are done: memory is bounded, the
memory of a piece is free at once, and neither disk nor hash waits for the other. Every file has its own two threads:
with several files in flight, several cores hash.
"""

import hashlib
import mmap
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from dsv4.convert.write.atomic_file import WRITE_BYTES, AtomicFile
from dsv4.progress import Progress, result_of

BLOCK_BYTES = WRITE_BYTES
BLOCKS = 4  # one that fills, and three that wait
COPIED_AT_ONCE = 2**16  # takes less time than to let other threads run


class _Block:
    """Pages of memory, filled from data that lies anywhere."""

    def __init__(self) -> None:
        self._pages = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self.used = 0
        self.marks: list[tuple[int, str]] = []  # where tensors end, and their names

    @property
    def is_full(self) -> bool:
        return self.used == len(self._pages)

    @property
    def content(self) -> memoryview:
        return self._pages[: self.used]

    def clear(self) -> None:
        """Nobody needs the content any longer."""
        self.used = 0
        self.marks = []

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


class Blocks:
    """Blocks that no file uses at the moment: the next file need not have the system clear fresh pages."""

    def __init__(self) -> None:
        self._free: list[_Block] = []

    def take(self) -> _Block:
        """An empty block."""
        try:
            return self._free.pop()
        except IndexError:
            return _Block()

    def give_back(self, block: _Block) -> None:
        """Nobody reads or fills the block any longer."""
        block.clear()
        self._free.append(block)


class ShardPipeline:
    """Hash and write a file in two background threads. `finish` waits for them, `stop` discards the rest.

    progress: called with the number of bytes written, in the caller's thread; the header does not count.
    hash_is_late: called in the caller's thread when a block is written and must still wait for its hash.
    """

    def __init__(self, file: AtomicFile, blocks: Blocks, progress: Progress, hash_is_late: Callable[[], None]) -> None:
        self._file, self._blocks, self._progress, self._hash_is_late = file, blocks, progress, hash_is_late
        self._hasher, self._writer = ThreadPoolExecutor(1, "dsv4-hash"), ThreadPoolExecutor(1, "dsv4-write")
        self._sha256 = hashlib.sha256()
        self._filling, self._used = blocks.take(), 1
        self._submitted: deque[tuple[Future[Any], Future[Any], _Block]] = deque()
        self.prefix_sha256: dict[str, str] = {}  # by tensor, of the file up to its last byte; complete after `finish`
        self._header_left = 0
        self._stopped = False

    def _hash(self, block: _Block) -> None:
        done = 0
        for end, tensor in block.marks:
            self._sha256.update(block.content[done:end])
            self.prefix_sha256[tensor] = self._sha256.copy().hexdigest()
            done = end
        self._sha256.update(block.content[done:])

    def _write(self, content: memoryview) -> None:
        if self._stopped:
            return
        try:
            self._file.write(content)
        except BaseException:
            self._stopped = True  # blocks that are queued must not follow
            raise

    def _wait_oldest(self) -> _Block:
        """Wait until the oldest block is hashed and written; it can be filled again."""
        hashing, writing, block = self._submitted.popleft()
        result_of(writing, self._progress)
        if not hashing.done():
            self._hash_is_late()
        result_of(hashing, self._progress)
        header = min(self._header_left, block.used)
        self._header_left -= header
        self._progress(block.used - header)
        block.clear()
        return block

    def _submit(self) -> None:
        """Submit the full block to be hashed and written, and take another one."""
        block = self._filling
        hashing = self._hasher.submit(self._hash, block)
        self._submitted.append((hashing, self._writer.submit(self._write, block.content), block))
        if self._used < BLOCKS:
            self._filling, self._used = self._blocks.take(), self._used + 1
        else:
            self._filling = self._wait_oldest()

    def put(self, data: memoryview) -> None:
        """The next bytes of the file."""
        while data:
            data = self._filling.fill(data)
            if self._filling.is_full:
                self._submit()

    def mark(self, tensor: str) -> None:
        """A tensor ends here."""
        self._filling.marks.append((self._filling.used, tensor))

    def begin(self, header: bytes) -> None:
        """The bytes in front of the data."""
        self._header_left = len(header)
        self.put(memoryview(header))

    def finish(self) -> str:
        """Wait until all is written. Returns the SHA-256 of the file."""
        if self._filling.used or self._filling.marks:
            self._submit()
        while self._submitted:
            self._blocks.give_back(self._wait_oldest())
        self._blocks.give_back(self._filling)
        self._end_threads()
        return self._sha256.hexdigest()

    def _end_threads(self) -> None:
        for thread in (self._hasher, self._writer):
            thread.shutdown(wait=True, cancel_futures=True)

    def stop(self) -> None:
        """Write no more; when this returns, the writing thread no longer uses the file."""
        self._stopped = True
        self._end_threads()
        for block in (*(block for *_, block in self._submitted), self._filling):
            self._blocks.give_back(block)
