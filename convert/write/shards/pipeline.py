"""From pieces to a file and its hash: in order, hashed in some threads and written in another.

O_DIRECT writes whole pages of a file from whole pages of memory (atomic_file.py). A long piece that lies in pages of
memory as it does in those of the file (`placed` in plan/recipes/rows.py) is hashed and written where it is, but for a
part of a page at either end. Everything else is copied into a few blocks of whole pages. A full block, or a piece with
the block before it, is hashed and written while the next ones fill; a block is used again when both are done. So memory
is bounded, and neither disk nor hash waits for the other. Every file has its own thread that writes, and all of them
share those that hash (hashing.py).
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.progress import Progress, result_of

from .hashing import FileHash, Part

BLOCK_BYTES = 2 * 2**20
BLOCKS = 4  # one that fills, and three that wait, each perhaps with a piece
TAKEN_BYTES = 2**20  # pieces from this size on are not copied
NOTHING = memoryview(b"")
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

    def parts(self) -> Iterator[Part]:
        """The content, cut where tensors end."""
        done = 0
        for end, tensor in self.marks:
            yield self.content[done:end], tensor
            done = end
        yield self.content[done:], None

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


@dataclass(frozen=True)
class _Part:
    """Bytes of the file that are hashed and written together: a block, and whole pages of a piece after it."""

    block: _Block
    piece: memoryview
    hashing: Future[None]
    writing: Future[None]

    @property
    def size(self) -> int:
        return self.block.used + len(self.piece)


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
    """Hash and write a file in background threads. `finish` waits for them, `stop` discards the rest.

    progress: called with the number of bytes written, in the caller's thread; the header does not count.
    hash_is_late: called in the caller's thread when a block is written and must still wait for its hash.
    """

    def __init__(
        self,
        file: AtomicFile,
        file_hash: FileHash,
        blocks: Blocks,
        progress: Progress,
        hash_is_late: Callable[[], None],
    ) -> None:
        self._file, self._hash, self._blocks = file, file_hash, blocks
        self._progress, self._hash_is_late = progress, hash_is_late
        self._writer = ThreadPoolExecutor(1, "dsv4-write")
        self._filling = blocks.take()
        self._taken = [self._filling]  # of `blocks`, to be given back
        self._submitted: deque[_Part] = deque()
        self._submitted_bytes = 0  # since the file began
        self._header_left = 0
        self._stopped = False

    def _give_back_blocks(self) -> None:
        while self._taken:
            self._blocks.give_back(self._taken.pop())

    def _write(self, *parts: memoryview) -> None:
        try:
            for data in parts:
                if data and not self._stopped:
                    self._file.write(data)
        except BaseException:
            self._stopped = True  # blocks that are queued must not follow
            raise

    def _wait_oldest(self) -> _Block:
        """Wait until the oldest part is hashed and written; its block can be filled again."""
        part = self._submitted.popleft()
        result_of(part.writing, self._progress)
        if not part.hashing.done():
            self._hash_is_late()
        result_of(part.hashing, self._progress)
        header = min(self._header_left, part.size)
        self._header_left -= header
        self._progress(part.size - header)
        part.block.clear()
        return part.block

    def _submit(self, piece: memoryview = NOTHING) -> None:
        """Submit the block to be hashed and written, a piece after it, and take another block."""
        block = self._filling
        hashing = self._hash.submit([*block.parts(), (piece, None)])
        part = _Part(block, piece, hashing, self._writer.submit(self._write, block.content, piece))
        self._submitted.append(part)
        self._submitted_bytes += part.size
        if len(self._taken) < BLOCKS:
            self._filling = self._blocks.take()
            self._taken.append(self._filling)
        else:
            self._filling = self._wait_oldest()

    def _pages_of(self, data: memoryview) -> tuple[int, int]:
        """(begin, end) of the whole pages of a long piece that lies as in the file; (0, 0) if it is to be copied."""
        if len(data) < TAKEN_BYTES:
            return 0, 0
        place = self._submitted_bytes + self._filling.used
        if (np.frombuffer(data, np.uint8).ctypes.data - place) % mmap.PAGESIZE:
            return 0, 0
        begin = -place % mmap.PAGESIZE
        return begin, begin + (len(data) - begin) // mmap.PAGESIZE * mmap.PAGESIZE

    def _copy(self, data: memoryview) -> None:
        while data:
            data = self._filling.fill(data)
            if self._filling.is_full:
                self._submit()

    def put(self, data: memoryview) -> None:
        """The next bytes of the file, which do not change any more."""
        begin, end = self._pages_of(data)
        self._copy(data[:begin])
        if begin < end:
            self._submit(data[begin:end])
        self._copy(data[end:])

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
            self._wait_oldest()
        self._give_back_blocks()
        self._writer.shutdown()
        return self._hash.hexdigest()

    @property
    def prefix_sha256(self) -> dict[str, str]:
        """By tensor, SHA-256 of the file up to its last byte; complete after `finish`."""
        return self._hash.prefixes

    def stop(self) -> None:
        """Write no more; when this returns, no thread uses the file or its bytes any longer."""
        self._stopped = True
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._hash.stop()
        self._submitted.clear()
        self._give_back_blocks()
