"""Memory for weights: parts do not overlap, come back when the last tensor is gone, and never exceed the arena."""

import gc

import pytest
import torch

from dsv4.errors import MachineError
from dsv4.model.reading.arena import ALIGNMENT, LARGE_PAGE, Arena, aligned


def test_parts_do_not_overlap() -> None:
    sizes = [1, 63, 64, 65, 1000, LARGE_PAGE]
    arena = Arena(sum(map(aligned, sizes)))
    parts = [arena.take(size) for size in sizes]
    for number, part in enumerate(parts):
        assert part is not None and part.data_ptr() % ALIGNMENT == 0 and len(part) == sizes[number]
        part.fill_(number)
    assert all(part is not None and (part == number).all() for number, part in enumerate(parts))
    assert arena.take(1) is None


@pytest.mark.slow
def test_a_part_comes_back_with_the_last_tensor_that_shares_it() -> None:
    arena = Arena(256)
    first, second = arena.take(128), arena.take(128)
    assert first is not None and second is not None
    place, view = first.data_ptr(), first.view(torch.bfloat16)[3:7].view(2, 2)
    del first
    gc.collect()
    assert arena.take(64) is None
    del view
    again = arena.take(100)
    assert again is not None and again.data_ptr() == place and arena.take(1) is None


def test_other_sizes_fit_once_everything_came_back() -> None:
    arena = Arena(256)
    parts = [arena.take(64) for _ in range(4)]
    del parts[1:]
    assert arena.take(128) is None
    del parts
    whole = arena.take(256)
    assert whole is not None and len(whole) == 256


def test_tensors_outlive_the_arena() -> None:
    arena = Arena(64)
    part = arena.take(64)
    assert part is not None
    part.fill_(7)
    del arena
    gc.collect()
    assert (part == 7).all()


def test_too_much_memory_is_an_error() -> None:
    with pytest.raises(MachineError, match=r"the system gives no .* of memory for weights") as caught:
        Arena(2**60)
    assert "--max-memory" in caught.value.hint
