"""Intervals of bytes against a set of numbers."""

import random
from itertools import pairwise

from dsv4.convert.hub.parts.intervals import Intervals


def test_as_a_set_of_numbers() -> None:
    draw = random.Random(1)
    for _ in range(300):
        intervals, numbers = Intervals(), set[int]()
        for _ in range(draw.randrange(12)):
            begin, end = draw.randrange(40), draw.randrange(40)
            intervals.add(begin, end)
            numbers |= set(range(begin, end))
        held = list(intervals)
        assert {n for begin, end in held for n in range(begin, end)} == numbers
        assert all(one[1] < other[0] for one, other in pairwise(held))  # none touches the next
        first, last = sorted((draw.randrange(40), draw.randrange(40)))
        gaps = intervals.missing(first, last)
        assert [n for begin, end in gaps for n in range(begin, end)] == sorted(set(range(first, last)) - numbers)
        assert all(begin < end for begin, end in gaps)
