"""Experts from the files: read ahead, once per call of a layer, within the limit, the frequent ones kept."""

import threading
from concurrent.futures import wait

import pytest
import torch
from patience import LONG

from dsv4.errors import InputError
from dsv4.model.reading.matrices import Memory, fresh
from dsv4.model.reading.meter import ReadMeter
from dsv4.model.reading.streamed import READERS, Streamed
from dsv4.model.weights import Matrix

SIZE = 128


def name(expert: int, layer: int = 0) -> str:
    return f"layers.{layer}.ffn.experts.{expert}.w1.weight"


class Files:
    """Reads that are counted, and that wait while `open` is not set."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.alone: list[str] = []  # read to memory that does not stay
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Semaphore(0)
        self.broken: set[str] = set()

    def __call__(self, name: str, memory: Memory | None) -> Matrix:
        self.read.append(name)
        self.begun.release()
        if memory is None:
            self.alone.append(name)
        else:
            assert self.open.wait(LONG)
        if name in self.broken:
            raise InputError(f"{name} ends at byte 3")
        values = (memory or fresh)(SIZE).fill_(int(name.split(".")[4]))
        return Matrix(name, "float8_e4m3fn", (1, SIZE), values)


def streamed(files: Files, matrices: int, on_cpu: bool = True) -> Streamed:
    names = [name(expert, layer) for expert in range(64) for layer in range(4)]
    return Streamed(files, dict.fromkeys(names, SIZE), matrices * SIZE, on_cpu)


def alone(names: list[str]) -> list[list[str]]:
    """Each matrix an expert of its own."""
    return [[name] for name in names]


def check(matrix: Matrix) -> None:
    assert (matrix.values == int(matrix.name.split(".")[4])).all()


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("matrices", [0, 1, 2, 3, 5, 9, 64])
def test_each_is_read_once_a_call_and_holds_its_own_values(matrices: int, on_cpu: bool) -> None:
    files = Files()
    cache = streamed(files, matrices, on_cpu)
    for call in range(3):
        files.read.clear()
        names = [name(expert) for expert in range(call, call + 9)]
        cache.expect(alone(names))
        for each in names:
            check(cache.get(each))
            assert cache.nbytes <= matrices * SIZE
        assert len(set(files.read)) == len(files.read) and set(files.read) <= set(names)


def test_reading_begins_before_the_matrix_is_asked_for() -> None:
    files = Files()
    files.open.clear()
    cache = streamed(files, 8)
    cache.expect(alone([name(expert) for expert in range(8)]))
    assert all(files.begun.acquire(timeout=LONG) for _ in range(READERS))
    files.open.set()
    check(cache.get(name(0)))


def test_reading_goes_on_as_room_appears() -> None:
    files = Files()
    cache = streamed(files, 2)
    cache.expect(alone([name(expert) for expert in range(6)]))
    for expert in range(6):
        check(cache.get(name(expert)))
    assert not files.alone and sorted(files.read) == [name(expert) for expert in range(6)]


def test_a_long_prompt_finds_what_fits() -> None:
    """Four layers of eight experts, each used in every call, with room for half of them: half are found."""
    files = Files()
    cache = streamed(files, 16)
    for _ in range(2):
        files.read.clear()
        for layer in range(4):
            names = [name(expert, layer) for expert in range(8)]
            cache.expect(alone(names))
            for each in names:
                check(cache.get(each))
    assert 16 <= len(files.read) <= 20  # all but those that fit; a few places go to matrices on their way


def test_what_was_expected_and_not_used_is_let_go() -> None:
    files = Files()
    cache = streamed(files, 3)
    cache.expect(alone([name(expert) for expert in range(3)]))
    cache.expect(alone([name(expert) for expert in range(3, 6)]))
    for expert in range(3, 6):
        check(cache.get(name(expert)))
    assert not files.alone


def test_an_error_is_raised_where_the_matrix_is_used_and_only_there() -> None:
    files = Files()
    files.broken = {name(1)}
    cache = streamed(files, 4)
    for _ in range(3):  # nothing of the failed read stays
        cache.expect(alone([name(0), name(1), name(2)]))
        check(cache.get(name(0)))
        with pytest.raises(InputError, match="ends at byte 3"):
            cache.get(name(1))
        check(cache.get(name(2)))
        assert cache.nbytes == 2 * SIZE
    cache.expect(alone([name(1)]))
    cache.expect(alone([name(0)]))  # the failed read was not used: no error
    check(cache.get(name(0)))


def names_of(experts: range | list[int]) -> list[str]:
    return [name(expert) for expert in experts]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_foreseen_and_right_is_read_once_and_before(on_cpu: bool) -> None:
    files = Files()
    cache = streamed(files, 16, on_cpu)
    cache.foresee(names_of([5, 3, 4]))
    assert all(files.begun.acquire(timeout=LONG) for _ in range(3))
    cache.expect(alone(names_of(range(2, 6))))
    for expert in range(2, 6):
        check(cache.get(name(expert)))
    assert sorted(files.read) == names_of(range(2, 6)) and not files.alone and not cache.unneeded


def test_what_is_foreseen_and_wrong_is_cancelled() -> None:
    """All but what is being read already, which is then in memory and the first to be dropped."""
    files = Files()
    files.open.clear()
    cache = streamed(files, 16)
    cache.foresee(names_of(range(20, 30)))
    assert all(files.begun.acquire(timeout=LONG) for _ in range(READERS))
    assert cache.nbytes == 8 * SIZE  # half of the limit
    cache.expect(alone(names_of(range(12))))
    assert cache.unneeded == READERS and cache.nbytes == 16 * SIZE
    files.open.set()
    for expert in range(12):
        check(cache.get(name(expert)))
    assert sorted(files.read) == sorted(names_of([*range(12), *range(20, 20 + READERS)])) and not files.alone
    wait([reading.matrix for reading in cache._reading.values()])  # the wrong ones, which no `get` waits for
    cache.expect(alone(names_of(range(30, 34))))
    for expert in range(30, 34):
        check(cache.get(name(expert)))
    files.read.clear()
    cache.expect(alone(names_of(range(12))))
    for expert in range(12):
        check(cache.get(name(expert)))
    assert not files.read


def test_a_read_counts_from_its_beginning() -> None:
    """As does one that turns out unneeded: otherwise more than all would have been found in memory meanwhile."""
    meter = ReadMeter()
    with meter.reading(7):
        assert (meter.statistics().read, meter.statistics().bytes_read) == (1, 0)
    assert (meter.statistics().read, meter.statistics().bytes_read) == (1, 7)


def test_wrong_ones_that_fill_the_memory_make_room() -> None:
    files = Files()
    files.open.clear()
    cache = streamed(files, 2)
    cache.foresee(names_of([9]))
    assert files.begun.acquire(timeout=LONG)
    cache.expect([names_of([0, 1, 2])])
    files.open.set()
    for expert in range(3):
        check(cache.get(name(expert)))
    assert not files.alone and sorted(files.read) == names_of([0, 1, 2, 9])


def test_an_error_of_a_foreseen_matrix_counts_where_it_is_used() -> None:
    files = Files()
    files.broken = {name(1), name(2)}
    cache = streamed(files, 4)
    cache.foresee(names_of([1, 2]))
    cache.expect(alone(names_of([1, 3])))
    with pytest.raises(InputError, match="ends at byte 3"):
        cache.get(name(1))
    check(cache.get(name(3)))
    for _ in range(2):  # the memory of both is free
        cache.expect(alone(names_of(range(4, 8))))
        for expert in range(4, 8):
            check(cache.get(name(expert)))
    assert not files.alone


def test_experts_come_in_the_order_in_which_they_are_there() -> None:
    """Those in memory, those whose reads were ordered in that order, those with the fewest matrices to read."""
    files = Files()
    cache = streamed(files, 8)
    cache.expect(alone(names_of([1, 2])))
    for expert in (1, 2):
        check(cache.get(name(expert)))
    files.open.clear()
    cache.foresee(names_of([6, 5]))
    experts = [names_of([7, 8]), names_of([5]), names_of([1]), names_of([3, 2]), names_of([6])]
    assert cache.expect(experts) == [2, 4, 1, 3, 0]
    files.open.set()
    for each in [1, 6, 5, 3, 2, 7, 8]:
        check(cache.get(name(each)))
    assert files.read.index(name(3)) < files.read.index(name(8))


def test_a_matrix_in_use_is_not_overwritten() -> None:
    files = Files()
    cache = streamed(files, 2)
    held = []
    for expert in range(6):
        cache.expect(alone([name(expert)]))
        held.append(cache.get(name(expert)))
    for matrix in held:
        check(matrix)
    assert torch.equal(held[0].values, torch.zeros(SIZE, dtype=torch.uint8))
