"""Experts that are read from the files when the router chooses them, while others are computed; some stay in memory.

The layer says which experts it will use (`expect`), as soon as the router has chosen. Those that are not in memory are
read by a few threads, as many ahead as the limit allows, and each `get` waits for its own matrix. It is best to use the
experts in the order in which they come, so `expect` returns that order. Used matrices stay until their memory is needed
(rates.py). Bytes that are being read count as bytes in memory.

While a layer's attention is computed the disk would have nothing to read. So the layer also says what it will probably
use (`foresee`), the surest first. When the router has chosen, reads of other experts that did not begin are cancelled.

One thread calls these methods. A matrix that no `expect` announced is read on the spot, into memory of its own that the
limit does not count, as is one for which there is no room.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import NamedTuple

from dsv4.model.weights import Matrix

from .arena import Arena
from .matrices import Memory, fresh, into
from .rates import Rates

READERS = 4  # threads: enough to keep a disk busy

Read = Callable[[str, Memory | None], Matrix]
"""Reads a matrix by name into the memory given, or into memory for a matrix that does not stay."""


class Reading(NamedTuple):
    """A read that was ordered. memory: where to; empty when the read was cancelled, so that it can be used again."""

    matrix: Future[Matrix]
    memory: list[Memory]

    def cancel(self) -> bool:
        """Whether the read had not begun, and will not."""
        if not self.matrix.cancel():
            return False
        self.memory.clear()
        return True


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
        self._reading: dict[str, Reading] = {}  # in the order in which reading begins
        self._expected: deque[str] = deque()  # no read was ordered yet
        self._foreseen: deque[str] = deque()  # the same, for what is probably used
        self._kept: set[str] = set()  # expected, and not used yet
        self._probable: set[str] = set()  # foreseen, before the next `expect`
        self._on_a_guess: set[str] = set()  # those of them that were not in memory
        self._bytes = 0  # in memory or being read
        self.unneeded = 0  # matrices that were read because they were foreseen, and not expected then

    @property
    def nbytes(self) -> int:
        """Bytes that are in memory or being read."""
        return self._bytes

    def foresee(self, names: Iterable[str]) -> None:
        """Read matrices that are probably used next, the surest first, as far as they fit into half of the limit."""
        self._let_go(self._probable - self._kept)
        self._probable.clear()
        self._foreseen.clear()
        room = self._limit // 2
        for name in names:
            room -= self._sizes[name]
            if room < 0:
                break
            self._probable.add(name)
            self._foreseen.append(name)
            self._rates.keep(name)
        self._on_a_guess = {name for name in self._foreseen if name not in self._held}
        self._begin_reads()

    def expect(self, experts: Sequence[Sequence[str]]) -> list[int]:
        """Start to read the matrices of the experts that are used next. Returns the order in which they will be there.

        Earlier ones that were not used, and those that were only foreseen, are dropped.
        """
        names = list(chain.from_iterable(experts))
        before, self._kept = self._kept | self._probable, set(names)
        self._rates.choose(names)
        self._let_go(before - self._kept)
        self._probable.clear()
        self._foreseen.clear()
        self._on_a_guess.clear()
        places = {name: place for place, name in enumerate(self._reading)}
        order = sorted(range(len(experts)), key=lambda number: self._turn(experts[number], places))
        self._expected = deque(name for number in order for name in experts[number])
        self._begin_reads()
        return order

    def _turn(self, names: Sequence[str], places: dict[str, int]) -> tuple[int, int]:
        """How many of an expert's matrices are not even being read, and the place of the one that is read last."""
        unordered = sum(name not in self._held and name not in places for name in names)
        return unordered, max((places[name] for name in names if name in places), default=-1)

    def _let_go(self, names: Iterable[str]) -> None:
        """These are not used next. What is being read is finished, and may be dropped then."""
        for name in names:
            if name in self._reading and self._reading[name].cancel():
                del self._reading[name]
                self._bytes -= self._sizes[name]
                continue
            if name in self._held:
                self._rates.release(name)
            if name in self._on_a_guess and (name in self._held or name in self._reading):
                self.unneeded += 1

    def get(self, name: str) -> Matrix:
        """A matrix, valid until the next but one call. Raises the error of reading it."""
        if name in self._kept and name not in self._held and name not in self._reading:
            wait([self._reading[other].matrix for other in self._not_needed()])  # their memory becomes free
            self._begin_reads()
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
            self._held[name] = self._reading.pop(name).matrix.result()
        except BaseException:
            self._bytes -= self._sizes[name]
            raise

    def _not_needed(self) -> list[str]:
        """Matrices that are being read, and of which it is known now that they are not used."""
        return [name for name in self._reading if name not in self._kept and name not in self._probable]

    def _drop_one(self) -> bool:
        """Drop the matrix that is used most rarely; False if there is none to drop."""
        for name in self._not_needed():
            if self._reading[name].matrix.done():
                with contextlib.suppress(Exception):  # which is raised when the matrix is used
                    self._finish(name)
                    self._rates.release(name)
        dropped = self._rates.take_lowest()
        if dropped is None:
            return False
        del self._held[dropped]
        self._bytes -= self._sizes[dropped]
        return True

    def _begin_reads(self) -> None:
        """Start to read expected matrices, then foreseen ones, as far as the limit allows."""
        for names, wanted in ((self._expected, self._kept), (self._foreseen, self._probable)):
            while names:
                name = names[0]
                needed = name in wanted and name not in self._held and name not in self._reading
                if needed and not self._begin(name):
                    return
                names.popleft()

    def _begin(self, name: str) -> bool:
        """Begin to read a matrix into memory that is free, or becomes free when others are dropped; False without."""
        size = self._sizes[name]
        if size > self._limit:
            return False
        while (memory := self._memory(size)) is None:
            if not self._drop_one():
                return False
        self._bytes += size
        held = [memory]
        self._reading[name] = Reading(self._pool.submit(self._read_into, name, held), held)
        return True

    def _read_into(self, name: str, memory: list[Memory]) -> Matrix:
        return self._read(name, memory.pop())

    def _memory(self, size: int) -> Memory | None:
        """Where to read so many bytes to; None if there is no room."""
        if self._bytes + size > self._limit:
            return None
        if self._arena is None:
            return fresh
        part = self._arena.take(size)
        return None if part is None else into(part)
