"""Measures reads of weights from the files: matrices used and read, bytes, and the time with a read running."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadStatistics:
    """Statistics of weights that do not stay in memory.

    read: matrices whose read began. unneeded: those of them that were only foreseen, and not used then. bytes_read: of
    finished reads. seconds: wall-clock time with at least one read running.
    """

    used: int = 0
    read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    unneeded: int = 0

    @property
    def hit_rate(self) -> float | None:
        """The share of uses that found the matrix in memory; None if none was used."""
        return 1 - (self.read - self.unneeded) / self.used if self.used else None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes per second while reads were running; None without reads."""
        return self.bytes_read / self.seconds if self.seconds else None


class ReadMeter:
    """Counts reads of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work, self._since = 0, 0.0
        self._used, self._read, self._bytes, self._seconds = 0, 0, 0, 0.0

    def use(self) -> None:
        """Count a use of a matrix, read or in memory."""
        with self._lock:
            self._used += 1

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """While a matrix of so many bytes is read."""
        with self._lock:
            self._at_work, self._read = self._at_work + 1, self._read + 1
            if self._at_work == 1:
                self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._at_work, self._bytes = self._at_work - 1, self._bytes + nbytes
                if not self._at_work:
                    self._seconds += time.perf_counter() - self._since

    def statistics(self) -> ReadStatistics:
        """The statistics so far."""
        with self._lock:
            return ReadStatistics(self._used, self._read, self._bytes, self._seconds)
