"""A checkpoint whose files are fetched as they are read: the same bits, and no expert that no token chose."""

from pathlib import Path

import pytest
import torch
from folder_hub import FolderHub, part_storage

from dsv4.convert.checkpoint.names import block_of, expert_of, is_expert_matrix
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.hub.parts import storage as parts
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.v41 import V41Geometry
from dsv4.model import load
from dsv4.model.loading import check_loadable
from dsv4.model.reading.matrices import spans_of
from dsv4.model.reading.needed import bytes_of, needed_of
from dsv4.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = Geometry(compress_ratios=(0, 4, 0), vocab_size=64, hidden_size=128, n_routed_experts=16, num_experts_per_tok=2)
TOKENS = torch.randint(0, 64, (1, 5), generator=torch.Generator().manual_seed(2))


def logits(model: Transformer, chosen: set[str]) -> torch.Tensor:
    """Logits of TOKENS, and the names of the experts that they chose."""

    def trace(name: str, output: torch.Tensor) -> None:
        if name.endswith(".ffn.gate.experts"):
            chosen.update(
                f"{name.removesuffix('gate.experts')}experts.{expert}." for expert in output.unique().tolist()
            )

    cache = model.new_cache(1)
    return torch.cat([model.forward(part, cache, trace=trace).logits for part in (TOKENS[:, :3], TOKENS[:, 3:])], 1)


@pytest.mark.parametrize("geometry", [SPARSE, V41Geometry()], ids=["v4", "v41"])
@pytest.mark.parametrize("memory", [None, "least"])
@pytest.mark.fast_cases(1)
def test_only_what_is_needed_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: Geometry | V41Geometry, memory: str | None
) -> None:
    monkeypatch.setattr(parts, "HEAD_BYTES", 8)  # nothing of the weights comes with the headers
    folder = make_checkpoint(tmp_path / "c", geometry=geometry)
    expected = logits(load(folder), set())
    hub = FolderHub(folder, tmp_path / "cache")
    storage = part_storage(hub)
    checkpoint = Checkpoint.open(storage)
    headers = storage.fetched_bytes
    found = check_loadable(checkpoint, draft=False)
    needed = needed_of(found.weights, found.config)
    if memory == "least":
        memory = str(load(folder, draft=False).store.need.least)
    model = load(checkpoint, max_memory=memory, draft=False, on_demand=True)
    dense = storage.fetched_bytes - headers
    assert dense == bytes_of(needed.always) if memory is None else dense <= bytes_of(needed.always)
    chosen = set[str]()
    assert torch.equal(logits(model, chosen), expected)
    for name, weight in found.weights.items():
        there = not storage.missing_bytes(checkpoint.extents(spans_of(weight)))
        if is_expert_matrix(name):
            expert, block = expert_of(name), block_of(name)
            assert expert is not None and block is not None
            assert there == any(name.startswith(prefix) for prefix in chosen), name
    experts = storage.fetched_bytes - headers - bytes_of(needed.always)
    tokens = TOKENS.shape[1]
    assert needed.experts_least() <= experts <= needed.experts_most(tokens) + tokens * needed.row_bytes
    assert experts < bytes_of(needed.experts)
    before = len(hub.read_ranges)
    again = load(Checkpoint.open(part_storage(hub)), draft=False, on_demand=True)
    assert torch.equal(logits(again, set()), expected) and len(hub.read_ranges) == before
    storage.close()
