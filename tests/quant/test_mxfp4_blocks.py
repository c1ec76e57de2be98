"""MXFP4 blocks: every pair of bytes at every place, compiled and in NumPy, against ggml's own definition element by
element; values are compared with the `gguf` package in tests/convert/write/test_gguf.py."""

from pathlib import Path

import numpy as np
import pytest

from dsv4 import compiled
from dsv4.quant.gguf import mxfp4_blocks
from dsv4.quant.gguf.mxfp4_blocks import codes_of_blocks, to_blocks


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def form(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(mxfp4_blocks, "_library", mxfp4_blocks._library.__wrapped__)
        monkeypatch.setattr(compiled, "_loaded", lambda: compiled._load(tmp_path / "nothing.so"))


def elements_of_release(codes: np.ndarray) -> np.ndarray:
    """[n, 16] bytes -> [n, 32] codes: the low nibble first."""
    return np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), 32)


def elements_of_blocks(blocks: np.ndarray) -> np.ndarray:
    """[n, 17] bytes -> [n, 32] codes: the low nibbles are the first half."""
    return np.concatenate((blocks[:, 1:] & 15, blocks[:, 1:] >> 4), axis=1)


def every_pair() -> np.ndarray:
    """Each byte beside each other, in turns at all places of a group."""
    pairs = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    return np.concatenate([np.roll(pairs, shift) for shift in range(16)]).reshape(-1, 16)


def test_elements_stay_in_order_and_every_bit_comes_back() -> None:
    codes = every_pair()
    scales = np.arange(len(codes)).astype(np.uint8)
    blocks = to_blocks(codes, scales)
    assert blocks.shape == (len(codes), 17) and np.array_equal(blocks[:, 0], scales)
    assert np.array_equal(elements_of_blocks(blocks), elements_of_release(codes))
    assert np.array_equal(codes_of_blocks(blocks), codes)


def test_parts_of_larger_arrays_and_none_at_all() -> None:
    """Rows and columns of other arrays, which are not one run of memory."""
    wide = np.random.default_rng(1).integers(0, 256, (64, 40), dtype=np.uint8)
    codes, scales = wide[::3, 5:21], wide[::3, 2]
    blocks = to_blocks(codes, scales)
    assert np.array_equal(elements_of_blocks(blocks), elements_of_release(codes))
    padded = np.concatenate((np.zeros_like(blocks), blocks), axis=1)
    assert np.array_equal(codes_of_blocks(padded[:, 17:]), codes)
    assert to_blocks(codes[:0], scales[:0]).shape == (0, 17) and codes_of_blocks(blocks[:0]).shape == (0, 16)
