"""A token's logits are the same bits however the tokens are split into calls and batches."""

from pathlib import Path

import pytest
import torch

from dsv4.convert.synthetic import Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.transformer import Transformer

GEOMETRY = Geometry(compress_ratios=(0, 4, 128, 0), sliding_window=16, vocab_size=64, hidden_size=128, index_topk=3)
TOKENS = torch.randint(0, 64, (1, 140), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path: Path = tmp_path_factory.mktemp("invariance") / "checkpoint"
    return load(make_checkpoint(path, seed=1, geometry=GEOMETRY, tokenizer=False))


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


@pytest.mark.parametrize("splits", [[3, 1, 1, 135], [126, 1, 1, 1, 1, 10], [17, 111, 12], [127, 2, 11]])
def test_prefill_split(model: Transformer, whole: torch.Tensor, splits: list[int]) -> None:
    assert torch.equal(in_calls(model, splits), whole)
