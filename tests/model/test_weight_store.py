"""Weights in memory or in the files: the same bits, within the limit, and only the chosen experts are read."""

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError, MachineError
from dsv4.model import load, weight_store
from dsv4.model.reading import matrices
from dsv4.model.reading.meter import ReadStatistics
from dsv4.model.transformer import Transformer
from dsv4.model.weight_store import MemoryNeed, WeightStore

pytestmark = pytest.mark.usefixtures("one_thread")
GEOMETRY = Geometry(
    compress_ratios=(0, 4, 0), vocab_size=64, hidden_size=128, n_routed_experts=16, num_experts_per_tok=2
)
TOKENS = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("residency") / "c", geometry=GEOMETRY, tokenizer=False)


def steps(model: Transformer) -> torch.Tensor:
    """Logits of TOKENS, one prefill and two steps."""
    cache = model.new_cache(1)
    calls = (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:])
    return torch.cat([model.forward(part, cache).logits for part in calls], 1)


@pytest.fixture(scope="module")
def resident(folder: Path) -> tuple[torch.Tensor, int]:
    model = load(folder)
    logits = steps(model)
    assert model.store.reads == 0
    return logits, model.store.resident_bytes


def smallest(folder: Path) -> int:
    """The limit that the error message asks for."""
    with pytest.raises(MachineError, match=r"max_memory is 1000 bytes, but norms and tables take \d+") as caught:
        load(folder, max_memory="1kB")
    return int(caught.value.hint.split()[3])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.1])
@pytest.mark.fast_cases(1)
def test_any_limit_gives_the_same_bits(folder: Path, resident: tuple[torch.Tensor, int], share: float) -> None:
    logits, everything = resident
    least = smallest(folder)
    limit = int(least + share * (everything - least))
    model = load(folder, max_memory=limit)
    assert torch.equal(steps(model), logits)
    assert model.store.resident_bytes <= limit
    assert (model.store.reads > 0) == (share < 1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.68, 0.72])
@pytest.mark.fast_cases(1)
def test_the_limit_holds_at_every_module(
    folder: Path, resident: tuple[torch.Tensor, int], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Also where the tokens choose more experts than fit."""
    least = smallest(folder)
    limit, read, right = int(least + share * (resident[1] - least)), set(), WeightStore._read
    monkeypatch.setattr(WeightStore, "_read", lambda self, name, memory: read.add(name) or right(self, name, memory))
    model, held = load(folder, max_memory=limit), []
    cache = model.new_cache(1)
    for token in range(40):
        model.forward(torch.tensor([[token]]), cache, trace=lambda *_: held.append(model.store.resident_bytes))
    experts = sum(model.store.sizes[name] for name in read if ".experts." in name)
    assert max(held) <= limit < experts + min(held)


def test_one_byte_less_than_needed_is_refused(folder: Path) -> None:
    least = smallest(folder)
    load(folder, max_memory=least)
    with pytest.raises(MachineError, match="takes"):
        load(folder, max_memory=least - 1)


def test_the_memory_that_a_model_needs(folder: Path, resident: tuple[torch.Tensor, int]) -> None:
    whole = sum(tensor.nbytes for tensor in Checkpoint.open(folder).tensors.values())
    assert load(folder).store.need == MemoryNeed(whole, least=smallest(folder))
    assert load(folder, max_memory=whole).store.resident_bytes == resident[1]
    assert load(folder, max_memory=whole - 1).store.resident_bytes < resident[1]


def test_only_chosen_experts_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, max_memory=smallest(folder))
    read: list[str] = []
    right = WeightStore._read
    monkeypatch.setattr(WeightStore, "_read", lambda self, name, memory: read.append(name) or right(self, name, memory))
    chosen: dict[str, set[int]] = {}

    def trace(name: str, tensor: torch.Tensor) -> None:
        if name.endswith(".experts"):
            chosen[name] = set(tensor.flatten().tolist())

    model.forward(TOKENS[:, :1], model.new_cache(1), trace=trace)
    for layer in (0, 1):
        expected = {f"layers.{layer}.ffn.experts.{e}" for e in chosen[f"layers.{layer}.ffn.gate.experts"]}
        found = {n.split(".w")[0] for n in read if n.startswith(f"layers.{layer}.ffn.experts.")}
        assert len(expected) == 2 and found == expected


def test_experts_are_foreseen_before_attention(
    folder: Path, resident: tuple[torch.Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only experts are in the files: the surer half of each layer's, certain ones where a table says which."""
    events: list[tuple[str, list[str]]] = []
    foresee, expect = WeightStore.foresee, WeightStore.expect

    def record_foresee(self: WeightStore, names: Iterable[str]) -> None:
        events.append(("foreseen", list(names)))
        foresee(self, events[-1][1])

    def record_expect(self: WeightStore, experts: Sequence[Sequence[str]]) -> list[int]:
        events.append(("expected", [name for names in experts for name in names]))
        return expect(self, experts)

    monkeypatch.setattr(WeightStore, "foresee", record_foresee)
    monkeypatch.setattr(WeightStore, "expect", record_expect)
    model = load(folder, max_memory=resident[1] * 9 // 10)
    cache = model.new_cache(1)
    for token in range(8):
        events.clear()
        model.forward(TOKENS[:, :1] + token, cache, trace=lambda name, _: events.append((name, [])))
        order = [event for event, _ in events if event in ("foreseen", "expected") or event.endswith(".attn")]
        assert order == [event for n in range(2) for event in ("foreseen", f"layers.{n}.attn", "expected")]
        named = {kind: [names for event, names in events if event == kind] for kind in ("foreseen", "expected")}
        assert [len(names) for names in named["foreseen"]] == [3, 3]  # one of the two experts
        assert set(named["foreseen"][0]) < set(named["expected"][0])
    assert model.store.statistics.unneeded <= model.store.statistics.read


def test_nothing_is_foreseen_where_the_disk_has_other_reads(folder: Path, resident: tuple[torch.Tensor, int]) -> None:
    """Dense matrices do not fit and are read then, or files are fetched: of these only what a token needs."""
    assert load(folder, max_memory=resident[1] * 9 // 10).store.foresees
    assert not load(folder, max_memory=smallest(folder)).store.foresees
    assert not load(folder, on_demand=True).store.foresees and not load(folder).store.foresees


def test_hot_experts_are_read_once(folder: Path, resident: tuple[torch.Tensor, int]) -> None:
    """The same token again finds its experts in memory; the least recently used make room."""
    least, everything = smallest(folder), resident[1]
    model = load(folder, max_memory=least + (everything - least) // 2)
    again = [TOKENS[:, :1]] * 2
    reads = []
    for part in again:
        model.forward(part, model.new_cache(1))
        reads.append(model.store.reads)
    assert reads[1] - reads[0] < reads[0]


def test_a_prompt_reads_each_chosen_expert_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = load(folder, max_memory=smallest(folder)), []
    right = WeightStore._read
    monkeypatch.setattr(WeightStore, "_read", lambda self, name, memory: read.append(name) or right(self, name, memory))
    model.forward(TOKENS, model.new_cache(1))
    experts = [name for name in read if ".experts." in name]
    assert len(experts) > 3 * 2 * 2 and len(experts) == len(set(experts))


def test_a_weight_is_checked_when_it_is_read_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again, however often it is read."""
    checked, right = [], matrices.are_scales
    monkeypatch.setattr(matrices, "are_scales", lambda scale: checked.append(scale.shape) or right(scale))
    model = load(folder, max_memory=smallest(folder))
    steps(model)
    first, reads = len(checked), model.store.reads
    steps(model)
    assert first and len(checked) == first and model.store.reads > reads


def test_what_passes_through_has_room_within_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no dense matrix stays in memory, none is asked for while another fills the room that is left for one."""
    outside: list[int] = []
    monkeypatch.setattr(weight_store, "fresh", lambda nbytes: outside.append(nbytes) or matrices.fresh(nbytes))
    model = load(folder, max_memory=smallest(folder))
    steps(model)
    assert model.store.reads > 50 and not outside


def test_statistics(folder: Path) -> None:
    model = load(folder, max_memory=smallest(folder))
    assert model.store.statistics == ReadStatistics() and model.store.statistics.hit_rate is None
    steps(model)
    found = model.store.statistics
    assert 0 < found.read <= found.used and found.bytes_read > 0 and found.bytes_per_second
    assert found.hit_rate == 1 - found.read / found.used and not found.unneeded  # too little memory to foresee
    whole = load(folder)
    steps(whole)
    assert whole.store.statistics == ReadStatistics()


def shard_of(folder: Path, name: str) -> Path:
    return folder / Checkpoint.open(folder).tensors[name].shard


EXPERT = "layers.1.ffn.experts.3.w1.weight"


def test_a_file_that_shrinks_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = load(copy, max_memory=smallest(copy))
    shard = shard_of(copy, EXPERT)
    os.truncate(shard, 5000)
    with pytest.raises(InputError, match=rf"{shard.name} ends at byte \d+"):
        steps(model)


def test_a_file_that_is_gone_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    """One that is open stays readable, on a system that has open files without a name."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = load(copy, max_memory=smallest(copy))
    logits = steps(model)
    for path in copy.glob("*.safetensors"):
        path.unlink()
    assert torch.equal(steps(model), logits)
    model.store.checkpoint.close()
    with pytest.raises(InputError, match=r"model-\d+-of-\d+\.safetensors is missing"):
        steps(model)


def test_an_error_of_the_disk_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the command line reports with exit code 4 (tests/cli)."""
    model = load(folder, max_memory=smallest(folder))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*model-\d+-of-\d+\.safetensors'"):
        steps(model)


def test_progress_ends_at_its_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1
