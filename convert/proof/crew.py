"""The threads: pieces of work out of one list, what they found into one queue.

Threads, not processes: reading and every array operation release the interpreter's lock, and tallies need no copying
between processes.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from .compare_tensor import Piece, PieceWork
from .files import Files
from .plan import Unit
from .tally import Tally

# What a thread tells: elements of a unit that are done, a finished tally of it, an error, or that it has ended.
Found = tuple[int, int | Tally] | BaseException | None


class Crew:
    """Threads that take pieces from one list and put tallies into one queue."""

    def __init__(self, units: list[Unit], pieces: list[Piece], make: Callable[[Unit], PieceWork], held: "Held") -> None:
        self.units, self.pieces, self.make, self.held = units, pieces, make, held
        self.found: queue.Queue[Found] = queue.Queue(maxsize=1024)
        self.stopped = threading.Event()
        self._next = iter(range(len(pieces)))
        self._lock = threading.Lock()

    def _take(self) -> Piece | None:
        with self._lock:
            number = next(self._next, None)
        return None if number is None or self.stopped.is_set() else self.pieces[number]

    def _put(self, value: Found) -> None:
        while not self.stopped.is_set():
            try:
                return self.found.put(value, timeout=0.2)
            except queue.Full:
                continue

    def _piece(self, piece: Piece) -> None:
        unit, tally = self.units[piece.unit], Tally()
        self.held.fetch(unit)
        work = self.make(unit)
        for elements in (work.bytes if piece.row_bytes else work.values)(piece, tally, self.stopped):
            self._put((piece.unit, elements))
        self._put((piece.unit, tally))
        self.held.done(unit)

    def _work(self) -> None:
        try:
            while piece := self._take():
                self._piece(piece)
            self._put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._put(error)

    def run(self, workers: int) -> Iterator[tuple[int, int | Tally]]:
        """Elements done and tallies as they come. Threads are stopped and joined however this ends."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            running = workers
            while running:
                found = self.found.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            self.stopped.set()
            self.held.abandon()
            for thread in threads:
                thread.join()


class Held:
    """Fetches a shard before its first read and drops it after its last."""

    def __init__(self, files: dict[str, Files], units: list[Unit], pieces: list[Piece]) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._left: Counter[tuple[str, str]] = Counter()
        for piece in pieces:
            self._left.update(self._shards(units[piece.unit]))

    @staticmethod
    def _shards(unit: Unit) -> set[tuple[str, str]]:
        return {(side, shard) for side, tensor in unit.tensors() for shard in tensor.shards}

    def fetch(self, unit: Unit) -> None:
        """Every shard of the unit is readable afterwards."""
        for side, shard in sorted(self._shards(unit)):
            self._files[side].fetch(shard)

    def abandon(self) -> None:
        """The run is over: nobody may go on waiting for a shard."""
        for files in self._files.values():
            files.abandon()

    def done(self, unit: Unit) -> None:
        """One piece of the unit is done."""
        for side, shard in self._shards(unit):
            with self._lock:
                self._left[side, shard] -= 1
                last = self._left[side, shard] == 0
            if last:
                self._files[side].drop(shard)
