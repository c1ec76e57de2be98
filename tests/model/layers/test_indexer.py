"""The choice of blocks: against Python's sort, ties included, and the same for any number of queries at a time."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_threads import kernel_threads

from dsv4 import compiled
from dsv4.model.kernels import binding
from dsv4.model.kernels.table import CPU, REFERENCE
from dsv4.model.layers import indexer
from dsv4.model.layers.numerics import Numerics
from dsv4.model.layers.rotary import Rotary
from dsv4.model.weights import Matrix

CPU_DEVICE = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(8)
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 2.0**-126, -(2.0**-126)]


def by_sorting(row: list[float], count: int) -> list[int]:
    """The largest first, of equals the one that comes first; -1 in the place of minus infinity."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    return [i if row[i] > -math.inf else -1 for i in order]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("blocks", [1, 7, 64, 300])
def test_best(blocks: int, count: int) -> None:
    scores = torch.randn(6, blocks, generator=GENERATOR).to(torch.bfloat16).to(torch.float32)
    scores[1] = scores[1].round()  # many ties
    scores[2] = torch.tensor(EDGES)[torch.randint(len(EDGES), (blocks,), generator=GENERATOR)]
    scores[3] = 0.0
    scores[4, blocks // 2 :] = -torch.inf
    scores[5] = -torch.inf
    reach = torch.tensor([blocks, blocks, blocks, blocks // 3, blocks, blocks])
    limited = scores.masked_fill(torch.arange(blocks) >= reach[:, None], -math.inf)
    for choose in (REFERENCE.best_in_reach, CPU.best_in_reach):
        found = choose(scores, reach, count)
        assert found.dtype == torch.int32
        assert found.tolist() == [by_sorting(row, min(count, blocks)) for row in limited.tolist()]


@pytest.mark.parametrize("threads", [1, 3])
def test_best_of_long_rows_and_of_nan(threads: int) -> None:
    """Against the form in torch: float32 and bfloat16 scores, as many above the last chosen as wanted and fewer."""
    scores = torch.randn(6, 5000, generator=GENERATOR)
    scores[1], scores[2] = scores[1].to(torch.bfloat16).to(torch.float32), (scores[2] * 2).round()
    scores[3, ::7], scores[4, ::50] = math.nan, -math.nan
    reach = torch.tensor([5000, 5000, 4999, 5000, 5000, 0])
    with kernel_threads(threads):
        for count in (1, 512, 4999, 5000, 6000):
            assert torch.equal(CPU.best_in_reach(scores, reach, count), REFERENCE.best_in_reach(scores, reach, count))


@pytest.mark.parametrize("at_once", [1, 100, 1000, 10**6])
def test_queries_at_a_time_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "SCORES_AT_ONCE", at_once)
    q = torch.randn(9, 4, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weights, keys = torch.ones(9, 4, dtype=torch.bfloat16), q[:, 0].repeat(12, 1)
    reach = torch.arange(0, 108, 12)
    found = indexer.best_in_reach(CPU, q, weights, keys, reach, 16)
    scores = CPU.index_scores(q, weights, keys)
    for row, limit in enumerate(reach.tolist()):
        mine = [score if block < limit else -math.inf for block, score in enumerate(scores[row].tolist())]
        assert found[row].tolist() == by_sorting(mine, 16)


def test_before_the_first_block() -> None:
    q = torch.ones(2, 4, 32)
    found = indexer.best_in_reach(CPU, q, torch.ones(2, 4), torch.empty(0, 32), torch.zeros(2), 16)
    assert found.shape == (2, 0)


def bfloat16(rows: int, columns: int) -> Matrix:
    values = torch.randn(rows, columns, generator=GENERATOR).to(torch.bfloat16)
    return Matrix("bf16", "bfloat16", (rows, columns), values)


@pytest.mark.parametrize("form", binding.forms())
def test_queries_in_one_call_have_the_bits_of_single_operations(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = binding.bind(compiled.library(), form)
    monkeypatch.setattr(binding, "library", lambda: bound)
    config = SimpleNamespace(index_n_heads=4, index_head_dim=64)
    matrices = {"wq_b.weight": bfloat16(256, 96), "weights_proj.weight": bfloat16(4, 128)}
    weights = SimpleNamespace(matrix=matrices.get, view=lambda _: None, keep_everything=True)
    for simulation in (False, True):
        for tokens, threads in ((1, 1), (1, 3), (7, 3)):
            found, positions = [], torch.arange(20, 20 + tokens)
            x, qr = (torch.randn(tokens, n, generator=GENERATOR) for n in (128, 96))
            for kernels in (CPU, replace(CPU, index_queries_at_once=None)):
                rotary, numerics = Rotary(torch.linspace(1, 0.1, 8), CPU_DEVICE, kernels), Numerics(simulation, kernels)
                rotary.reserve(40)
                made = indexer.Indexer(config, weights, rotary, numerics)
                with kernel_threads(threads):
                    found.append(made.queries(x.to(numerics.dtype), qr.to(numerics.dtype), positions))
            for a, b in zip(*found, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) and a.any()
