"""The rotary tables: made once, longer when a context asks for it."""

import torch

from dsv4.model.kernels.table import REFERENCE
from dsv4.model.layers.rotary import POSITIONS_PER_CHUNK, Rotary


def test_tables_are_copied_only_when_they_grow() -> None:
    """A single step of a long context would otherwise copy megabytes."""
    rotary = Rotary(torch.tensor([1.0, 0.1]), torch.device("cpu"), REFERENCE)
    rotary.reserve(5)
    first, places = rotary.table(torch.arange(5)), (rotary._cos.data_ptr(), rotary._sin.data_ptr())
    rotary.reserve(POSITIONS_PER_CHUNK)
    assert (rotary._cos.data_ptr(), rotary._sin.data_ptr()) == places
    rotary.reserve(POSITIONS_PER_CHUNK + 1)
    assert len(rotary._cos) == 2 * POSITIONS_PER_CHUNK
    assert all(map(torch.equal, rotary.table(torch.arange(5)), first))
