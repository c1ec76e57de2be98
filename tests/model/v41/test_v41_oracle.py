"""V4.1 without simulation against a second implementation in float64, written from the formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_v41 import Oracle

from dsv4.convert.synthetic.checkpoint import V41Geometry, make_checkpoint
from dsv4.model import load

TOKENS = torch.randint(0, 306, (1, 75), generator=torch.Generator().manual_seed(8))
LIMIT = 1e-5  # relative; float32 differs from float64 by 1e-6 here, a wrong detail by 1e-2 and more


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    return float((np.linalg.norm(found.numpy() - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


# The released pattern; no candidate blocks; a KV source in the middle of a ratio, one engram table, more groups.
GEOMETRIES = {
    "released": V41Geometry(),
    "no candidates": V41Geometry(candidate_source_layer_id=-1),
    "tight": V41Geometry(
        compress_ratios=(0, 1, 1, 1, 2, 2, 0, 0, 0), kv_source_layer_ids=(1, 4), index_source_layer_ids=(1, 2, 4, 5),
        candidate_source_layer_id=4, candidate_topk_blocks=3, candidate_block_size=2, index_topk=4, sliding_window=5,
        engram_layer_ids=(3,), engram_num_embeddings=(1362,), dspark_target_layer_ids=(0, 3), hc_mult=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_and_hidden_states(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", seed=5, geometry=GEOMETRIES[name])
    model = load(folder, simulation=False)
    output = model.forward(TOKENS, model.new_cache(1))
    logits, hidden = Oracle(folder).forward(TOKENS[0].tolist())
    assert output.logits is not None
    assert difference(output.logits[0], logits) < LIMIT
    assert difference(output.hidden[0], hidden) < LIMIT
