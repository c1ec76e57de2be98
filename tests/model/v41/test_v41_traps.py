"""Would the comparison with the second implementation notice? Each test puts one mistake into the engine.

Each moves logits by more than a hundred times what the comparison allows.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle_v41 import Oracle

from dsv4.convert.synthetic.checkpoint import V41Geometry, make_checkpoint
from dsv4.model import load, loading
from dsv4.model.architectures import v41
from dsv4.model.kernels.table import KernelTable
from dsv4.model.layers import attention, shared_attention, shared_keys
from dsv4.model.layers.engram import layer as engram
from dsv4.model.layers.shared_keys import Selection
from dsv4.model.weight_store import WeightStore

TOKENS = torch.randint(0, 305, (1, 75), generator=torch.Generator().manual_seed(8))
LIMIT, NOTICED = 1e-5, 1e-3
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("traps") / "c", seed=5, geometry=V41Geometry())


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return Oracle(folder).forward(TOKENS[0].tolist())[0]


def difference(folder: Path, expected: np.ndarray) -> float:
    """The largest of all rows."""
    model = load(folder, simulation=False, draft=False)
    logits = model.forward(TOKENS, model.new_cache(1)).logits
    assert logits is not None
    return float((np.linalg.norm(logits[0].numpy() - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def with_kernels(patch: Patch, **wrong: Callable[..., torch.Tensor]) -> None:
    right = loading.select_kernels

    def select(device: torch.device) -> KernelTable:
        return replace(right(device), **wrong)

    patch.setattr(loading, "select_kernels", select)


def no_lag(patch: Patch) -> None:
    """Each sublayer reads the streams through its own weights, as in V4."""
    right = v41.Block._input

    def wrong(self: v41.Block, pre: torch.Tensor, h: torch.Tensor, norm: str) -> torch.Tensor:
        around = self._around_attention if norm.startswith("attn") else self._around_experts
        return right(self, around.mixes(h)[0], h, norm)

    patch.setattr(v41.Block, "_input", wrong)


def no_engram(patch: Patch) -> None:
    patch.setattr(engram.Engram, "__call__", lambda self, h, *rest: h)


def engram_gate_without_root(patch: Patch) -> None:
    def wrong(h: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        unit = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (h, keys)]
        return torch.sigmoid((unit[0] * weight * unit[1]).sum(-1) * h.shape[-1] ** -0.5)

    with_kernels(patch, engram_gate=wrong)


def another_pad_class(patch: Patch) -> None:
    right = engram.look_back
    patch.setattr(engram, "look_back", lambda known, own, length, pad: right(known, own, length, pad + 1))


def mean_pooling(patch: Patch) -> None:
    with_kernels(patch, pool=lambda kv, gate: kv.mean(-1))


def no_candidate_blocks(patch: Patch) -> None:
    right = shared_keys.IndexSource.choose

    def wrong(self: Any, q: Any, weights: Any, keys: Any, position: int, before: Selection) -> Selection:
        return right(self, q, weights, keys, position, Selection(before.chosen))

    patch.setattr(shared_keys.IndexSource, "choose", wrong)


def newest_block_not_kept(patch: Patch) -> None:
    right = shared_keys.candidate_blocks
    patch.setattr(shared_keys, "candidate_blocks", lambda scores, visible, *rest: right(scores, visible * 0, *rest))


def gate_bias_ignored(patch: Patch) -> None:
    right = WeightStore.vector

    def wrong(self: WeightStore, name: str) -> torch.Tensor:
        return right(self, name) * (not name.endswith("gate.bias"))

    patch.setattr(WeightStore, "vector", wrong)


def yarn_everywhere(patch: Patch) -> None:
    right = v41.rotary_frequencies
    patch.setattr(v41, "rotary_frequencies", lambda config, compressed: right(config, True))


def window_one_wider(patch: Patch) -> None:
    right = attention.window_rows
    patch.setattr(
        attention, "window_rows", lambda position, count, first, window: right(position, count, first, window + 1)
    )


def heads_normed(patch: Patch) -> None:
    patch.setattr(shared_attention.SharedKeyAttention, "norm_heads", True)


MISTAKES = [
    no_lag,
    no_engram,
    engram_gate_without_root,
    another_pad_class,
    mean_pooling,
    no_candidate_blocks,
    newest_block_not_kept,
    gate_bias_ignored,
    yarn_everywhere,
    window_one_wider,
    heads_normed,
]


def test_without_a_mistake(folder: Path, expected: np.ndarray) -> None:
    assert difference(folder, expected) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_noticed(
    mistake: Callable[[Patch], None], folder: Path, expected: np.ndarray, monkeypatch: Patch
) -> None:
    mistake(monkeypatch)
    assert difference(folder, expected) > NOTICED
