"""A set of bytes of one file, as intervals [begin, end) in order, none touching the next."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Intervals:
    """Starts empty. Adding and asking take logarithmic time, and the time of the intervals that are touched."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._begins, self._ends, strict=True)))

    def add(self, begin: int, end: int) -> None:
        """Add bytes [begin, end). Intervals that overlap or touch them become one with them."""
        if begin >= end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def missing(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The intervals of [begin, end) that are not in the set."""
        gaps, at = [], begin
        for number in range(bisect_right(self._ends, begin), len(self._begins)):
            if self._begins[number] >= end:
                break
            if at < self._begins[number]:
                gaps.append((at, self._begins[number]))
            at = self._ends[number]
        if at < end:
            gaps.append((at, end))
        return gaps
