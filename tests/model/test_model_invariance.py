"""A token's logits are the same bits whatever else is computed with it, and however the tokens arrive."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import UsageError
from dsv4.model import load, loading, transformer
from dsv4.model.cache import MAX_UNDO, RECENT_GROWTH
from dsv4.model.kernels.table import REFERENCE
from dsv4.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
GEOMETRY = Geometry(compress_ratios=(0, 4, 128, 4), sliding_window=16, vocab_size=64, hidden_size=128, index_topk=3)
TOKENS = torch.randint(0, 64, (1, 140), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("invariance") / "checkpoint"
    return make_checkpoint(path, seed=1, geometry=GEOMETRY, tokenizer=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder)


def in_calls(model: Transformer, splits: list[int]) -> torch.Tensor:
    """Logits [n, V] of TOKENS given in consecutive calls of these sizes."""
    cache, start, parts = model.new_cache(1), 0, []
    for count in splits:
        parts.append(model.forward(TOKENS[:, start : start + count], cache).logits[0])
        start += count
    return torch.cat(parts)


@pytest.fixture(scope="module")
def whole(model: Transformer) -> torch.Tensor:
    return in_calls(model, [140])


# Splits before, at and after the edges of blocks of 4 and 128, and of the window of 16.
SPLITS = [[3, 1, 1, 135], [126, 1, 1, 1, 1, 10], [17, 111, 12], [127, 2, 11], [15, 1, 1, 123], [1] * 20 + [120]]


@pytest.mark.parametrize("splits", SPLITS, ids=lambda s: "-".join(map(str, s[:6])))
@pytest.mark.fast_cases(2)
def test_calls(model: Transformer, whole: torch.Tensor, splits: list[int]) -> None:
    assert torch.equal(in_calls(model, splits), whole)


def test_calls_without_simulation(folder: Path) -> None:
    exact = load(folder, simulation=False)
    assert torch.equal(in_calls(exact, [17, 1, 112, 10]), in_calls(exact, [140]))


def test_a_long_prompt_in_pieces(model: Transformer, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "TOKENS_PER_PIECE", 33)
    assert torch.equal(in_calls(model, [140]), whole)


def test_batch_of_unequal_lengths(model: Transformer, whole: torch.Tensor) -> None:
    """Three prompts together, then a step each, against each alone."""
    generator = torch.Generator().manual_seed(6)
    batch = torch.randint(0, 64, (3, 140), generator=generator)
    batch[1] = TOKENS[0]
    lengths, cache = [5, 131, 0], model.new_cache(3)
    first = model.forward(batch, cache, lengths=lengths)
    assert torch.equal(first.logits[1, :131], whole[:131])
    assert not first.logits[0, 5:].any() and not first.logits[2].any()
    step = torch.stack([batch[row, n : n + 1] for row, n in enumerate(lengths)])
    second = model.forward(step, cache)
    assert torch.equal(second.logits[1, 0], whole[131])
    for row, length in ((0, 6), (2, 1)):
        alone = model.forward(batch[row : row + 1, :length], model.new_cache(1)).logits[0, -1]
        assert torch.equal(second.logits[row, 0], alone)
    assert cache.lengths == [6, 132, 1]


def test_only_the_last_row_of_logits(model: Transformer, whole: torch.Tensor) -> None:
    batch = TOKENS.expand(2, -1)
    last = model.forward(batch, model.new_cache(2), lengths=[7, 140], rows="last").logits
    assert torch.equal(last[:, 0], whole[[6, 139]])
    assert model.forward(batch, model.new_cache(2), rows="none").logits is None


def test_reference_row_gives_the_same_bits(folder: Path, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "select_kernels", lambda device: REFERENCE)
    reference = load(folder)
    assert torch.equal(reference.forward(TOKENS[:, :40], reference.new_cache(1)).logits[0], whole[:40])


THREADS = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from dsv4.model import load
from dsv4.model.kernels import binding
binding.SMALLEST_SHARED_WORK = 0
tokens = torch.tensor([[int(t) for t in sys.argv[3].split(",")]])
model = load(sys.argv[1])
cache = model.new_cache(1)
parts = [model.forward(tokens[:, :30], cache), *(model.forward(tokens[:, i : i + 1], cache) for i in range(30, 34))]
sys.stdout.write(torch.cat([part.logits for part in parts], 1).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_threads(folder: Path, whole: torch.Tensor) -> None:
    ids = ",".join(map(str, TOKENS[0, :34].tolist()))
    expected = whole[:34].numpy().tobytes().hex()
    for threads in ("1", "2", "3"):
        run = [sys.executable, "-c", THREADS, str(folder), threads, ids]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == expected


@pytest.mark.parametrize("length", [121, 127, 128, 130])
def test_taking_tokens_back(model: Transformer, whole: torch.Tensor, length: int) -> None:
    """A rejected draft: after the tokens are taken back, the cache is as if they had never been."""
    cache = model.new_cache(1)
    model.forward(TOKENS[:, : length - 1], cache)
    model.forward(torch.cat((TOKENS[:, length - 1 : length], torch.tensor([[9, 9, 9]])), 1), cache)
    cache.truncate(0, length)
    rest = model.forward(TOKENS[:, length : length + 10], cache).logits[0]
    assert torch.equal(rest, whole[length : length + 10])


def test_taking_back_too_much(model: Transformer) -> None:
    cache = model.new_cache(1)
    model.forward(TOKENS[:, :100], cache)
    model.forward(TOKENS[:, :2], cache)
    with pytest.raises(UsageError, match="from 102 back to 99 tokens, at most to 100"):
        cache.truncate(0, 99)


def test_cache_is_as_small_as_the_architecture_allows(model: Transformer) -> None:
    """After single steps: 16 window keys a layer, one key per block, raw tokens of one or two blocks."""
    cache, length = model.new_cache(1), 140
    model.forward(TOKENS[:, :139], cache)
    model.forward(TOKENS[:, 139:], cache)
    plain, overlapping, heavy = cache.sequences[0].layers
    assert [len(layer.window) for layer in (plain, overlapping, heavy)] == [16] * 3
    assert plain.states() == []
    assert [(state.entries.length, len(state.raw)) for state in overlapping.states()] == [(35, 8)] * 2
    assert [(state.entries.length, len(state.raw)) for state in heavy.states()] == [(1, length - 128)]
    g = GEOMETRY
    keys = 2 * (3 * 16 * g.head_dim + (35 + 1) * g.head_dim + 35 * g.index_head_dim)
    raw = 4 * 2 * (8 * 2 * (g.head_dim + g.index_head_dim) + 12 * g.head_dim)
    spare = 64 * 2 * (2 * g.head_dim + g.index_head_dim)  # a buffer is at most 64 entries ahead here
    one_row = 2 * 3 * g.head_dim + 4 * 2 * (2 * (g.head_dim + g.index_head_dim) + g.head_dim)
    spare += (RECENT_GROWTH + MAX_UNDO) * one_row  # and so many rows of recent tokens
    assert keys + raw <= cache.nbytes <= keys + raw + spare


def test_mtp_logits_in_calls_and_after_taking_back(model: Transformer) -> None:
    output = model.forward(TOKENS, model.new_cache(1))
    hidden, following = output.hidden[:, :-1], TOKENS[:, 1:]
    expected = model.mtp_logits(hidden, following, model.new_mtp_cache(1))
    cache, parts = model.new_mtp_cache(1), []
    for start, stop in ((0, 126), (126, 127), (127, 139)):
        parts.append(model.mtp_logits(hidden[:, start:stop], following[:, start:stop], cache))
        if stop == 127:
            model.mtp_logits(hidden[:, :2], torch.tensor([[1, 2]]), cache)
            cache.truncate(0, 127)
    assert torch.equal(torch.cat(parts, 1), expected)
