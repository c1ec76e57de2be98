"""Every classic mistake in an implementation of this architecture, made on purpose.

The comparison with transformers is worth what it notices. Each test here puts one mistake into the engine and demands
that logits move by far more than the tolerance of that comparison. Mistakes that float32 cannot show, because they
only change roundings, are in test_model_simulation.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle_transformers import BASE, random_model, release_tensors, write_checkpoint

from dsv4.model import load, loading
from dsv4.model.architectures import v4
from dsv4.model.kernels import reference_small
from dsv4.model.kernels.table import REFERENCE
from dsv4.model.layers import attention, compressor, hyper_connection, indexer, moe, rotary
from dsv4.model.weight_store import WeightStore

CONFIG = {**BASE, "swiglu_limit": 0.3}
TOKENS = torch.randint(0, BASE["vocab_size"], (1, 140), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.slow  # transformers alone takes seconds to import
NOTICED = 1e-3  # a hundred times the tolerance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = release_tensors(random_model(CONFIG, seed=21).state_dict())
    return write_checkpoint(tmp_path_factory.mktemp("traps") / "checkpoint", CONFIG, tensors)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return random_model(CONFIG, seed=21)(TOKENS, use_cache=False).logits


def difference(folder: Path, expected: torch.Tensor, splits: tuple[int, ...] = (140,)) -> float:
    """Largest relative difference of the engine's logits, the tokens given in calls of these sizes."""
    engine = load(folder, simulation=False)
    cache, start, parts = engine.new_cache(1), 0, []
    for count in splits:
        parts.append(engine.forward(TOKENS[:, start : start + count], cache).logits)
        start += count
    return float((torch.cat(parts, 1) - expected).abs().max() / expected.abs().max())


def rotary_halves(patch: pytest.MonkeyPatch) -> None:
    """Pairs (i, i + r/2) instead of (2i, 2i + 1)."""
    right = rotary.Rotary.rotate

    def wrong(self: rotary.Rotary, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        r = CONFIG["qk_rope_head_dim"]
        pairs = torch.cat((x[..., :-r], x[..., -r:].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)), -1)
        turned = right(self, pairs, positions, inverse)
        return torch.cat((x[..., :-r], turned[..., -r:].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)), -1)

    patch.setattr(rotary.Rotary, "rotate", wrong)


def yarn_everywhere(patch: pytest.MonkeyPatch) -> None:
    """YaRN on layers without a ratio, with their own theta."""
    right = rotary.rotary_frequencies

    def wrong(config: rotary.Config, compressed: bool) -> torch.Tensor:
        from dataclasses import replace

        return right(config if compressed else replace(config, compress_rope_theta=config.rope_theta), True)

    patch.setattr(v4, "rotary_frequencies", wrong)


def yarn_nowhere(patch: pytest.MonkeyPatch) -> None:
    """The plain theta on every layer."""
    right = rotary.rotary_frequencies
    patch.setattr(v4, "rotary_frequencies", lambda config, compressed: right(config, False))


def output_not_rotated_back(patch: pytest.MonkeyPatch) -> None:
    right = rotary.Rotary.rotate
    patch.setattr(rotary.Rotary, "rotate", lambda self, x, p, inverse=False: x if inverse else right(self, x, p))


def blocks_do_not_overlap(patch: pytest.MonkeyPatch) -> None:
    """The previous block's half is always empty."""
    right = compressor._slots

    def wrong(state: compressor.CompressorState, first: int, last: int) -> torch.Tensor:
        slots = right(state, first, last).clone()
        if state.overlap:
            slots[:, 1, :, : state.ratio] = -torch.inf
        return slots

    patch.setattr(compressor, "_slots", wrong)


def overlap_halves_swapped(patch: pytest.MonkeyPatch) -> None:
    """The previous block through the second half of the dimensions."""
    right = compressor._slots

    def wrong(state: compressor.CompressorState, first: int, last: int) -> torch.Tensor:
        rows = state.raw.rows()
        raw, half = rows.clone(), rows.shape[-1] // 2
        if state.overlap:
            rows.copy_(torch.cat((raw[..., half:], raw[..., :half]), -1))
        slots = right(state, first, last).clone()
        rows.copy_(raw)
        return slots

    patch.setattr(compressor, "_slots", wrong)


def overlap_forgotten_between_calls(patch: pytest.MonkeyPatch) -> None:
    """The block before is not kept for the next call."""
    right = compressor._slots

    def wrong(state: compressor.CompressorState, first: int, last: int) -> torch.Tensor:
        slots = right(state, first, last).clone()
        if state.overlap and first:
            slots[0, 1, :, : state.ratio] = -torch.inf
        return slots

    patch.setattr(compressor, "_slots", wrong)


def block_at_its_last_position(patch: pytest.MonkeyPatch) -> None:
    right = compressor.Compressor._compress

    def wrong(self: compressor.Compressor, slots: torch.Tensor, first: int, last: int, ratio: int) -> torch.Tensor:
        right_rotary = self._rotary
        self._rotary = type("", (), {"rotate": lambda _, x, p: right_rotary.rotate(x, p + ratio - 1)})()
        key = right(self, slots, first, last, ratio)
        self._rotary = right_rotary
        return key

    patch.setattr(compressor.Compressor, "_compress", wrong)


def unfinished_blocks_visible(patch: pytest.MonkeyPatch) -> None:
    """A query sees the block that it is part of, before the block's last token."""
    right = indexer.Indexer.choose
    patch.setattr(indexer.Indexer, "choose", lambda self, cache, q, w, position: right(self, cache, q, w, position + 3))


def unfinished_hca_blocks_visible(patch: pytest.MonkeyPatch) -> None:
    """The same on a layer with ratio 128, one token before the block's last."""
    right = attention.finished_blocks
    patch.setattr(attention, "finished_blocks", lambda position, *rest: right(position + 1, *rest))


def no_sink(patch: pytest.MonkeyPatch) -> None:
    right = WeightStore.vector

    def wrong(self: WeightStore, name: str) -> torch.Tensor:
        vector = right(self, name)
        return torch.full_like(vector, -torch.inf) if name.endswith("attn_sink") else vector

    patch.setattr(WeightStore, "vector", wrong)


def comb_transposed(patch: pytest.MonkeyPatch) -> None:
    right = hyper_connection.HyperConnection.post
    patch.setattr(
        hyper_connection.HyperConnection,
        "post",
        lambda self, o, h, post, comb: right(self, o, h, post, comb.transpose(1, 2)),
    )


def sinkhorn_rows_first(patch: pytest.MonkeyPatch) -> None:
    """Twenty iterations nearly converge, so the order shows only with few: three here."""
    patch.setattr(reference_small, "sinkhorn", _sinkhorn_rows_first)


def _sinkhorn_rows_first(logits: torch.Tensor, iterations: int, eps: float, *functions: object) -> torch.Tensor:
    comb = torch.softmax(logits, -1) + eps
    for _ in range(iterations):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb / (comb.sum(-1, keepdim=True) + eps)


def _expert_without_limit(patch: pytest.MonkeyPatch, concerns: Callable[[torch.Tensor | None], bool]) -> None:
    from dataclasses import replace

    right = moe.MixtureOfExperts._expert

    def wrong(self: moe.MixtureOfExperts, x: torch.Tensor, weights: object, share: torch.Tensor | None) -> torch.Tensor:
        config = self._config
        if concerns(share):
            self._config = replace(config, swiglu_limit=1e9)
        output = right(self, x, weights, share)
        self._config = config
        return output

    patch.setattr(moe.MixtureOfExperts, "_expert", wrong)


def shared_expert_not_clamped(patch: pytest.MonkeyPatch) -> None:
    _expert_without_limit(patch, lambda share: share is None)


def routed_experts_not_clamped(patch: pytest.MonkeyPatch) -> None:
    _expert_without_limit(patch, lambda share: share is not None)


def _gate(patch: pytest.MonkeyPatch, change: Callable[[moe.Gate, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    right = moe.Gate.__call__

    def wrong(self: moe.Gate, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, _ = right(self, x, ids)
        scores = torch.nn.functional.softplus(x @ self._weights.matrix("weight").decode().T).sqrt()
        experts, chosen = change(self, scores, experts)
        return experts, chosen / chosen.sum(-1, keepdim=True) * self._config.routed_scaling_factor

    patch.setattr(moe.Gate, "__call__", wrong)


def hash_layers_weigh_evenly(patch: pytest.MonkeyPatch) -> None:
    """The table chooses, but the gate must still weigh."""
    _gate(patch, lambda g, s, e: (e, torch.ones(e.shape) if g._hash else s.gather(1, e)))


def bias_in_the_weights(patch: pytest.MonkeyPatch) -> None:
    _gate(patch, lambda g, s, e: (e, (s if g._hash else s + g._weights.vector("bias")).gather(1, e)))


def bias_ignored_in_the_choice(patch: pytest.MonkeyPatch) -> None:
    def change(gate: moe.Gate, scores: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts = experts if gate._hash else scores.topk(experts.shape[1]).indices
        return experts, scores.gather(1, experts)

    _gate(patch, change)


def indexer_takes_every_block(patch: pytest.MonkeyPatch) -> None:
    right = indexer.best_in_reach
    patch.setattr(indexer, "best_in_reach", lambda kernels, q, w, keys, *rest: right(kernels, q, w, keys, rest[0], 999))


def indexer_takes_the_newest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        indexer,
        "best_in_reach",
        lambda kernels, q, w, keys, *rest: kernels.best_in_reach(
            torch.arange(float(len(keys))).repeat(len(q), 1), *rest
        ),
    )


def window_one_too_wide(patch: pytest.MonkeyPatch) -> None:
    right = attention.window_rows
    patch.setattr(attention, "window_rows", lambda p, n, first, window: right(p, n, first, window + 1))


MISTAKES = [
    rotary_halves, yarn_everywhere, yarn_nowhere, output_not_rotated_back, blocks_do_not_overlap,
    overlap_halves_swapped, block_at_its_last_position, unfinished_blocks_visible, unfinished_hca_blocks_visible,
    no_sink, comb_transposed,
    shared_expert_not_clamped, routed_experts_not_clamped, hash_layers_weigh_evenly, bias_in_the_weights,
    bias_ignored_in_the_choice, indexer_takes_every_block, indexer_takes_the_newest, window_one_too_wide,
]  # fmt: skip


@pytest.fixture(autouse=True)
def reference_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code cannot be patched; test_kernels.py shows that it gives the same bits."""
    monkeypatch.setattr(loading, "select_kernels", lambda device: REFERENCE)


def test_without_a_mistake_nothing_is_noticed(folder: Path, expected: torch.Tensor) -> None:
    assert difference(folder, expected) < 1e-5


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda function: function.__name__)
@pytest.mark.fast_cases(1)
def test_mistake_is_noticed(
    folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., None]
) -> None:
    mistake(monkeypatch)
    assert difference(folder, expected) > NOTICED


@pytest.mark.slow
def test_overlap_forgotten_between_calls_is_noticed(
    folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = (64, 60, *[1] * 16)
    assert difference(folder, expected, splits) < 1e-5
    overlap_forgotten_between_calls(monkeypatch)
    assert difference(folder, expected, splits) > NOTICED


def test_sinkhorn_order_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "hc_sinkhorn_iters": 3}
    model = random_model(config, seed=22)
    folder = write_checkpoint(tmp_path / "checkpoint", config, release_tensors(model.state_dict()))
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    assert difference(folder, expected) < 1e-5
    sinkhorn_rows_first(monkeypatch)
    assert difference(folder, expected) > NOTICED
