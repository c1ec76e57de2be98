"""V4.1: the same bits whatever is computed together, however tokens arrive, and wherever and however weights lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_values import dsv4
from kernel_threads import kernel_threads
from ranks import run_ranks
from safetensors.torch import load_file

from dsv4.convert import convert, verify
from dsv4.convert.synthetic.checkpoint import Geometry, V41Geometry, make_checkpoint
from dsv4.errors import MachineError, UsageError
from dsv4.model import load, loading, transformer
from dsv4.model.cache import cache_bytes
from dsv4.model.kernels.table import REFERENCE
from dsv4.model.layers import shared_keys
from dsv4.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(0, 305, (1, 61), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("v41") / "c", seed=2, geometry=V41Geometry())


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder)


def in_calls(model: Transformer, splits: list[int]) -> torch.Tensor:
    """Logits [n, V] of TOKENS given in consecutive calls of these sizes."""
    cache, start, parts = model.new_cache(1), 0, []
    for count in splits:
        logits = model.forward(TOKENS[:, start : start + count], cache).logits
        assert logits is not None
        parts.append(logits[0])
        start += count
    return torch.cat(parts)


@pytest.fixture(scope="module")
def whole(model: Transformer) -> torch.Tensor:
    return in_calls(model, [61])


# Before, at and after the ends of groups of two tokens, of the window of 16, and of a look-back of three tokens.
SPLITS = [[1] * 9 + [52], [2, 1, 1, 57], [15, 1, 1, 1, 43], [3, 14, 31, 13], [40] + [1] * 21]


@pytest.mark.parametrize("splits", SPLITS, ids=lambda s: "-".join(map(str, s[:6])))
@pytest.mark.fast_cases(1)
def test_calls(model: Transformer, whole: torch.Tensor, splits: list[int]) -> None:
    assert torch.equal(in_calls(model, splits), whole)


def test_calls_without_simulation(folder: Path) -> None:
    exact = load(folder, simulation=False)
    assert torch.equal(in_calls(exact, [17, 1, 1, 42]), in_calls(exact, [61]))


def test_a_long_prompt_in_pieces(model: Transformer, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "TOKENS_PER_PIECE", 13)
    assert torch.equal(in_calls(model, [61]), whole)


def test_batch_of_unequal_lengths(model: Transformer, whole: torch.Tensor) -> None:
    batch = torch.randint(0, 306, (3, 61), generator=torch.Generator().manual_seed(6))
    batch[1] = TOKENS[0]
    lengths, cache = [5, 38, 0], model.new_cache(3)
    first = model.forward(batch, cache, lengths=lengths).logits
    step = torch.stack([batch[row, n : n + 1] for row, n in enumerate(lengths)])
    second = model.forward(step, cache).logits
    assert first is not None and second is not None
    assert torch.equal(first[1, :38], whole[:38]) and torch.equal(second[1, 0], whole[38])
    for row, length in ((0, 6), (2, 1)):
        alone = model.forward(batch[row : row + 1, :length], model.new_cache(1)).logits
        assert alone is not None and torch.equal(second[row, 0], alone[0, -1])


@pytest.mark.parametrize("length", [2, 17, 40, 41])
@pytest.mark.fast_cases(1)
def test_taking_tokens_back(model: Transformer, whole: torch.Tensor, length: int) -> None:
    """A rejected draft: groups, index keys, windows and the classes of tokens are as if it had never been."""
    cache = model.new_cache(1)
    model.forward(TOKENS[:, : length - 1], cache)
    model.forward(torch.cat((TOKENS[:, length - 1 : length], torch.tensor([[9, 9, 9, 9]])), 1), cache)
    cache.truncate(0, length)
    rest = model.forward(TOKENS[:, length : length + 10], cache).logits
    assert rest is not None and torch.equal(rest[0], whole[length : length + 10])


def test_cache_is_as_small_as_the_architecture_allows(model: Transformer) -> None:
    """Only sources hold compressed keys, and nothing else grows with the context."""
    cache = model.new_cache(1)
    model.forward(TOKENS[:, :60], cache)
    model.forward(TOKENS[:, 60:], cache)
    layers, g = cache.sequences[0].layers, V41Geometry()
    assert [len(layer.window) for layer in layers] == [g.sliding_window] * g.num_hidden_layers
    sources = {i: (layer.compressor, layer.indexer) for i, layer in enumerate(layers) if layer.compressor}
    assert list(sources) == list(g.kv_source_layer_ids)
    for layer, states in sources.items():
        groups = 61 // g.compress_ratios[layer]
        assert all(state is not None and state.entries.length == groups for state in states)
        # The raw values of a group that is not finished, and of the token that may be taken back.
        assert states[0] is not None and len(states[0].raw) <= 2
    histories = {i: len(layer.history.classes) for i, layer in enumerate(layers) if layer.history}
    assert histories == dict.fromkeys(g.engram_layer_ids, 4)  # three to look back on, and one to take back


def test_the_estimate_of_the_cache_is_a_bound_that_counts_sources_only(model: Transformer) -> None:
    """Drafts keep keys too; 2 bytes a value. A layer that reads another's keys counts as a window."""
    cache, g = model.new_cache(1), V41Geometry()
    model.forward(TOKENS, cache)
    bound = cache_bytes(model.config, 61, 512, 2)
    assert cache.nbytes < bound
    grown = cache_bytes(model.config, 10061, 512, 2) - cache_bytes(model.config, 61 + 512, 512, 2)
    groups = sum((10061 - 573) / g.compress_ratios[i] for i in g.kv_source_layer_ids)
    # An eighth more than needed, and the largest layer twice.
    assert grown < 2 * groups * (g.head_dim + g.index_head_dim) * 2


@pytest.mark.slow
def test_reference_row_gives_the_same_bits(folder: Path, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "select_kernels", lambda device: REFERENCE)
    reference = load(folder)
    assert torch.equal(in_calls(reference, [30, 1, 30]), whole)


def test_threads(model: Transformer, whole: torch.Tensor) -> None:
    with kernel_threads(3):
        assert torch.equal(in_calls(model, [30, 1, 30]), whole)


def test_queries_a_few_at_a_time(model: Transformer, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long contexts are scored some queries at a time, which changes no choice."""
    monkeypatch.setattr(shared_keys, "SCORES_AT_ONCE", 200)
    assert torch.equal(in_calls(model, [61]), whole)


def test_candidate_blocks_are_the_same_choice_scored_alone_or_with_all(
    model: Transformer, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups outside are left out before they are scored, or masked afterwards; the latter at every length here."""
    scored_alone: list[int] = []
    right = shared_keys.IndexSource._among
    monkeypatch.setattr(shared_keys.IndexSource, "_among", lambda *a: (scored_alone.append(len(a[3])), right(*a))[1])
    assert torch.equal(in_calls(model, [61]), whole) and scored_alone == [61]
    monkeypatch.setattr(shared_keys, "FEW", 1000)
    assert torch.equal(in_calls(model, [61]), whole) and scored_alone == [61]


def test_little_memory(folder: Path, model: Transformer, whole: torch.Tensor) -> None:
    """The n-gram tables are in no account: they are read where they lie."""
    with pytest.raises(MachineError) as caught:
        load(folder, max_memory=1000)
    least = int(caught.value.hint.split()[3])
    unused = (".engram.embed.weight", ".engram.embed.scale", ".bias_vl")
    tensors = model.store.checkpoint.tensors.items()
    used = [info.nbytes for name, info in tensors if name.startswith(PARTS) and not name.endswith(unused)]
    assert model.store.need.whole == sum(used)
    small = load(folder, max_memory=least)
    assert torch.equal(in_calls(small, [30, 1, 30]), whole) and small.store.reads > 0


PARTS = ("layers.", "mtp.", "embed.", "head.", "norm.")
CONVERSIONS: dict[str, dict[str, Any]] = {
    "fp8": {"to": "fp8"},
    "fp8, float32 scales": {"to": "fp8", "scale_dtype": "f32"},
    "bf16": {"to": "bf16"},
    "mxfp8": {"to": "mxfp8"},
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.fast_cases(1)
def test_stored_forms(folder: Path, whole: torch.Tensor, name: str, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", **CONVERSIONS[name])
    assert torch.equal(in_calls(load(tmp_path / "out"), [30, 1, 30]), whole)


@pytest.mark.slow
def test_fp8_and_back(folder: Path, whole: torch.Tensor, tmp_path: Path) -> None:
    """The bytes may be others, the values and so the logits are not."""
    convert(folder, tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "fp4", to="fp4")
    assert verify(folder, tmp_path / "fp4").exit_code == 0
    assert torch.equal(in_calls(load(tmp_path / "fp4"), [61]), whole)


@pytest.mark.parametrize("option", ["", "--no-simulation"])
@pytest.mark.slow
def test_ranks(folder: Path, option: str, tmp_path: Path) -> None:
    ids = ",".join(map(str, TOKENS[0].tolist()))
    options = ["--tokens", ids, "--prefill", "57", "--logits", "out.safetensors", *filter(None, [option])]
    ended = run_ranks(2, tmp_path, "run", folder, *options)
    assert ended.codes == [0, 0], ended.err
    options[5] = str(tmp_path / "one.safetensors")
    assert dsv4("run", folder, *options)[0] == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("one", "out"))
    assert torch.equal(one.view(torch.int32), two.view(torch.int32))


@pytest.mark.slow
def test_released_index_keys(folder: Path, model: Transformer, whole: torch.Tensor) -> None:
    """A prefill is the same. A step differs where a group of two is not finished, and the choice matters."""
    released = load(folder, released_index_keys=True)
    assert torch.equal(in_calls(released, [61]), whole)
    steps = in_calls(released, [40] + [1] * 21)
    differs = [t for t in range(61) if not torch.equal(steps[t], whole[t])]
    assert differs and differs[0] == 40  # position 40 begins a group
    few = in_calls(released, [2] + [1] * 13 + [46])
    assert torch.equal(few[:15], whole[:15]), "every group is chosen where there are no more than index_topk"


def test_released_index_keys_of_v4(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", geometry=Geometry(compress_ratios=(0, 0)), tokenizer=False)
    with pytest.raises(UsageError, match="share no index keys"):
        load(folder, released_index_keys=True)
