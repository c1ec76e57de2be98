"""In which order shards are fetched: each once where that is possible, never more on disk than allowed."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.convert.proof.work.order import Run, plan_runs
from dsv4.errors import UsageError


class Hub:
    """A side on a hub with shards of a hundred bytes, or of the sizes given."""

    label = "a hub"

    def __init__(self, slots: int, sizes: dict[str, int] | None = None) -> None:
        self._slots, self._sizes = slots, sizes or {}

    def slots(self) -> int:
        return self._slots

    def bytes_to_fetch(self, name: str) -> int:
        return self._sizes.get(name, 100)

    def check_needs(self, groups: Sequence[Collection[str]]) -> None:
        if max(map(len, groups), default=0) > self._slots:
            raise UsageError("too many at once")


def planned(items: list[tuple[str, str]], *slots: int) -> list[Run[Any]]:
    return plan_runs(items, lambda item: tuple(frozenset({name}) for name in item), [Hub(n) for n in slots])  # type: ignore[misc]


def fetched(runs: list[Run[Any]], side: int) -> Counter[str]:
    return Counter(name for run in runs for name in run.fetched[side])


def check(runs: list[Run[Any]], items: Sequence[Any], slots: Sequence[int]) -> None:
    """Replays the fetches: what a run needs is on disk, and no more than allowed."""
    assert sorted(item for run in runs for item in run.items) == sorted(items)
    disk: list[set[str]] = [set() for _ in slots]
    for run in runs:
        for side, most in enumerate(slots):
            assert run.kept[side] <= disk[side] and not run.fetched[side] & disk[side]
            disk[side] = (disk[side] & (run.kept[side] | run.shards[side])) | run.fetched[side]
            assert run.shards[side] <= disk[side] and len(disk[side]) <= most


cuts = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(cuts, cuts, st.integers(1, 3), st.integers(1, 3))
def test_two_cuts_of_the_same_order_fetch_each_shard_once(a: list[int], b: list[int], one: int, other: int) -> None:
    sides = [[f"{side}{n}" for n, size in enumerate(cut) for _ in range(size)] for side, cut in (("a", a), ("b", b))]
    items = list(zip(*sides, strict=False))
    runs = planned(items, one, other)
    check(runs, items, (one, other))
    for side in (0, 1):
        assert set(fetched(runs, side).values()) <= {1}


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1, max_size=60),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_any_two_orders(items: list[tuple[str, str]], one: int, other: int) -> None:
    runs = planned(items, one, other)
    check(runs, items, (one, other))
    assert len(runs) == len(set(items))
    if one == other == 6:  # all fit: each once
        assert {*fetched(runs, 0).values(), *fetched(runs, 1).values()} == {1}
    for before, after in pairwise(runs):  # one side moves at a time, as long as the shards have anything in common
        left = runs[runs.index(after) :]
        touching = any(run.shards[side] & before.shards[side] for run in left for side in (0, 1))
        assert not touching or any(not after.fetched[side] for side in (0, 1))


def test_one_side_keeps_its_order() -> None:
    items = [(name, "") for name in "aabbbacc"]
    runs = plan_runs(items, lambda item: (frozenset({item[0]}),), [Hub(2)])  # type: ignore[list-item]
    assert ["".join(sorted(run.shards[0])) for run in runs] == ["a", "b", "c"]
    check(runs, items, (2,))


def test_the_small_shard_is_fetched_again() -> None:
    """A square of four shards, with room for one of each side: one of them has to be fetched twice."""
    items = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    hubs = [Hub(1, {"a": 500, "b": 500}), Hub(1, {"x": 5, "y": 6})]
    runs = plan_runs(items, lambda item: (frozenset({item[0]}), frozenset({item[1]})), hubs)  # type: ignore[arg-type]
    check(runs, items, (1, 1))
    assert set(fetched(runs, 0).values()) == {1} and fetched(runs, 1).total() == 3


def test_too_many_at_once_is_refused() -> None:
    with pytest.raises(UsageError):
        plan_runs(["ab"], lambda item: (frozenset(item),), [Hub(1)])  # type: ignore[list-item]
    assert plan_runs([], lambda item: (frozenset(item),), [Hub(1)]) == []  # type: ignore[list-item]


def test_folders_are_one_run() -> None:
    (run,) = plan_runs([3, 1, 2], lambda item: (), [])
    assert run.items == (3, 1, 2)
