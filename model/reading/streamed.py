"""Experts that are read from the files when the router chooses them, while others are computed; some stay in memory.

The layer says which matrices it will use, in order (`expect`), as soon as the router has chosen. Those that are not in
memory are read by a few threads, as many ahead as the limit allows, and each `get` waits for its own. Used matrices
stay until their memory is needed (rates.py). Bytes that are being read count as bytes in memory.

One thread calls `expect` and `get`. A matrix that no `expect` announced is read on the spot, into memory of its own
that the limit does not count, as is one for which there is no room.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dsv4.model.weights import Matrix

from .arena import Arena
from .matrices import Memory, fresh, into
from .rates import Rates

READERS = 4  # threads: enough to keep a disk busy

Read = Callable[[str, Memory | None], Matrix]
"""Reads a matrix by name into the memory given, or into memory for a matrix that does not stay."""


class Streamed:
    """Matrices in the files by name, with at most `limit` bytes of them in memory.

    sizes: bytes of memory that `read` asks for. on_cpu: they lie in one arena of `limit` bytes; on another device they
    go through memory that is free again once they are there.
    """

    def __init__(self, read: Read, sizes: dict[str, int], limit: int, on_cpu: bool) -> None:
        self._read, self._sizes, self._limit = read, sizes, limit
        self._arena = Arena(limit) if on_cpu else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._rates = Rates()
        self._held: dict[str, Matrix] = {}
        self._reading: dict[str, Future[Matrix]] = {}
        self._expected: deque[str] = deque()  # reading has not begun
        self._kept: set[str] = set()  # expected, and not used yet
        self._bytes = 0  # in memory or being read

    @property
    def nbytes(self) -> int:
        """Bytes that are in memory or being read."""
        return self._bytes

    def expect(self, names: Sequence[str]) -> None:
        """Start to read the matrices that are used next, in this order. Earlier ones that were not used are dropped."""
        for name in self._kept:
            if name in self._reading:
                with contextlib.suppress(Exception):  # which is raised when the matrix is used
                    self._finish(name)
            if name in self._held:
                self._rates.release(name)
        self._expected, self._kept = deque(names), set(names)
        self._rates.choose(list(names))
        self._begin_reads()

    def get(self, name: str) -> Matrix:
        """A matrix, valid until the next but one call. Raises the error of reading it."""
        if name in self._reading:
            self._finish(name)
        matrix = self._held.get(name)
        if name in self._kept:
            self._kept.remove(name)
            if matrix is not None:
                self._rates.release(name)
            self._begin_reads()
        return self._read(name, None) if matrix is None else matrix

    def _finish(self, name: str) -> None:
        """Wait until a matrix is read. Raises the error of reading it."""
        try:
            self._held[name] = self._reading.pop(name).result()
        except BaseException:
            self._bytes -= self._sizes[name]
            raise

    def _begin_reads(self) -> None:
        """Start to read expected matrices, as far as the limit allows."""
        while self._expected:
            name = self._expected[0]
            needed = name in self._kept and name not in self._held
            if needed and not self._begin(name):
                return
            self._expected.popleft()

    def _begin(self, name: str) -> bool:
        """Begin to read a matrix into memory that is free, or becomes free when others are dropped; False without."""
        size = self._sizes[name]
        if size > self._limit:
            return False
        while (memory := self._memory(size)) is None:
            dropped = self._rates.take_lowest()
            if dropped is None:
                return False
            del self._held[dropped]
            self._bytes -= self._sizes[dropped]
        self._bytes += size
        self._reading[name] = self._pool.submit(self._read, name, memory)
        return True

    def _memory(self, size: int) -> Memory | None:
        """Where to read so many bytes to; None if there is no room."""
        if self._bytes + size > self._limit:
            return None
        if self._arena is None:
            return fresh
        part = self._arena.take(size)
        return None if part is None else into(part)
