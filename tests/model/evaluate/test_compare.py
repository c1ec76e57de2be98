"""Fingerprints find the module where two runs part; comparisons see every bit and judge it rightly."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, flipped

from dsv4.commands.run.compare import Room, advance_together, compare_checkpoints
from dsv4.commands.run.source import Loading, open_source
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.distributed import Ranks
from dsv4.errors import InputError
from dsv4.model import load
from dsv4.model.evaluate.compare import Run, compare, run_side_by_side
from dsv4.model.evaluate.logits import Evaluation, check_tokens, teacher_forced
from dsv4.model.evaluate.trace import Fingerprints
from dsv4.model.transformer import Transformer
from dsv4.model.weight_store import Demand
from dsv4.output import configure

TOKENS = [0, 5, 9, 100, 300, 17, 4, 8, 99, 250, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compare") / "c", geometry=TINY)


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load(folder)


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Transformer:
    """The same with one other bit, in the expert that most of TOKENS choose in the second layer."""
    return load(flipped(folder, folder.parent / "damaged", "layers.1.ffn.experts.0.w1.weight"))


def run(model: Transformer, tokens: list[int] = TOKENS, prefill: int | None = None) -> Run:
    fingerprints = Fingerprints()
    return Run(teacher_forced(model, tokens, prefill, trace=fingerprints), fingerprints)


@pytest.mark.parametrize("prefill", [1, 3, 10])
def test_the_split_changes_no_bit_of_any_module(model: Transformer, prefill: int) -> None:
    found = compare(run(model), run(model, prefill=prefill))
    assert found.bit_equal and found.first_module is None and found.within(0)
    assert found.max_difference == found.max_kl == 0 and found.top1_agreement == 1


def test_another_token_is_seen_at_its_position(model: Transformer) -> None:
    found = compare(run(model), run(model, [*TOKENS[:6], 5, *TOKENS[7:]]))
    assert (found.first_module, found.first_position) == ("embed", 6)
    assert found.difference[:6] == [0] * 6 and all(d > 0 for d in found.difference[6:])


@pytest.mark.parametrize(
    ("weight", "module"),
    [
        ("layers.0.attn.kv_norm.weight", "layers.0.attn"),
        ("layers.1.attn.attn_sink", "layers.1.attn"),
        ("layers.1.ffn_norm.weight", "layers.1.ffn"),
        ("norm.weight", "logits"),
        ("mtp.0.enorm.weight", "mtp.0.attn"),
        ("mtp.0.norm.weight", "mtp.0.logits"),
    ],
)
def test_the_first_module_is_the_one_whose_weight_differs(model: Transformer, weight: str, module: str) -> None:
    before = run(model)
    vector = model.store.vector(weight)
    saved = vector.clone()
    vector.mul_(1.5)
    try:
        found = compare(before, run(model))
    finally:
        vector.copy_(saved)
    assert not found.bit_equal
    assert found.first_module is not None and found.first_module.removesuffix(".gate.experts") == module
    assert (found.max_difference == 0) == module.startswith("mtp.")
    assert (found.mtp_max_difference is not None and found.mtp_max_difference > 0) or module == "logits"
    assert not found.within(1e-9)


def same_run(one: Run, other: Run) -> bool:
    """Bit for bit, and every module reported for the same positions in the same order."""
    a, b = one.evaluation, other.evaluation
    found, expected = one.fingerprints.digests, other.fingerprints.digests
    assert a.mtp_logits is not None and b.mtp_logits is not None
    return (
        (a.token_ids, a.prefill_tokens) == (b.token_ids, b.prefill_tokens)
        and torch.equal(a.logits.view(torch.int32), b.logits.view(torch.int32))
        and torch.equal(a.mtp_logits.view(torch.int32), b.mtp_logits.view(torch.int32))
        and [(name, list(rows.items())) for name, rows in found.items()]
        == [(name, list(rows.items())) for name, rows in expected.items()]
    )


def told(parted: list[tuple[str, int]]) -> Callable[[str, int], None]:
    """Keeps what it is told."""
    return lambda module, position: parted.append((module, position))


@pytest.mark.parametrize("prefill", [None, 1, 6])
def test_side_by_side_is_the_same_as_one_by_one(model: Transformer, damaged: Transformer, prefill: int | None) -> None:
    alone = run(model, prefill=prefill), run(damaged, prefill=prefill)
    assert not compare(*alone).bit_equal
    for pair, expected in (((model, damaged), alone), ((damaged, model), alone[::-1]), ((model, model), alone[:1] * 2)):
        parted: list[tuple[str, int]] = []
        progress: list[float] = []
        found = run_side_by_side(pair, TOKENS, prefill, True, told(parted), progress.append)
        assert all(map(same_run, found, expected)) and compare(*found) == compare(*expected)
        assert len(parted) == (pair[0] is not pair[1])
        assert sum(progress) == pytest.approx(2 * len(TOKENS))
    assert [r.evaluation.mtp_logits for r in run_side_by_side((model, damaged), TOKENS, mtp=False)] == [None, None]


class Stop(Exception):
    """Raised where a difference is told, to see what was computed by then."""


def test_each_module_is_computed_by_both_and_compared_at_once(
    model: Transformer, damaged: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[Fingerprints, str]] = []
    keep, modes = Fingerprints.__call__, []

    def spy(self: Fingerprints, name: str, position: int, output: torch.Tensor) -> None:
        computed.append((self, name))
        keep(self, name, position, output)

    def stop(module: str, position: int) -> None:
        modes.append(torch.is_inference_mode_enabled())
        raise Stop(module, position)

    monkeypatch.setattr(Fingerprints, "__call__", spy)
    with pytest.raises(Stop) as stopped:
        run_side_by_side((model, damaged), TOKENS, on_difference=stop)
    assert modes == [True] and not torch.is_inference_mode_enabled()
    assert stopped.value.args[0] == "layers.1.ffn"
    names = [name for _, name in computed]
    assert names[::2] == names[1::2] == [
        "embed", *(f"layers.0.{m}" for m in ("attn", "ffn.gate.experts", "ffn")), "layers.0",
        *(f"layers.1.{m}" for m in ("attn", "ffn.gate.experts", "ffn")),
    ]  # fmt: skip
    assert len({id(side) for side, _ in computed[::2]}) == len({id(side) for side, _ in computed[1::2]}) == 1


def test_what_is_met_first_may_not_be_what_is_first(model: Transformer, tmp_path: Path, folder: Path) -> None:
    """In single steps: the last token's embedding is another one, but the head differs from the first token on."""
    other = load(flipped(folder, tmp_path / "c", "norm.weight"))
    embedding = other.store.matrix("embed.weight").values
    embedding[TOKENS[-1]] += 1
    parted: list[tuple[str, int]] = []
    runs = run_side_by_side((model, other), TOKENS, 1, on_difference=told(parted))
    found = compare(*runs)
    assert parted == [("logits", 0)]
    assert (found.first_module, found.first_position) == ("embed", len(TOKENS) - 1)


@pytest.mark.parametrize("swapped", [False, True])
def test_models_of_other_depth_take_turns_too(model: Transformer, tmp_path: Path, swapped: bool) -> None:
    deeper = load(make_checkpoint(tmp_path, geometry=replace(TINY, compress_ratios=(0, 4, 4, 0))))
    pair = (deeper, model) if swapped else (model, deeper)
    parted: list[tuple[str, int]] = []
    found = run_side_by_side(pair, TOKENS, 6, on_difference=told(parted))
    assert all(map(same_run, found, (run(pair[0], prefill=6), run(pair[1], prefill=6))))
    assert len(parted) == 1


def test_the_mode_of_the_caller_is_left_alone(model: Transformer) -> None:
    run_side_by_side((model, model), TOKENS[:2])
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


SMALL, LARGE = Demand(whole=60, least=10), Demand(whole=150, least=45)


@pytest.mark.parametrize(
    ("limits", "demands", "together"),
    [
        ([None], (LARGE, LARGE), False),  # nothing limits
        ([150], (LARGE, LARGE), False),  # each fits, one at a time
        ([149], (LARGE, LARGE), True),
        ([149], (SMALL, LARGE), True),  # one is enough
        ([149], (LARGE, SMALL), True),
        ([149], (SMALL, SMALL), False),
        ([90], (LARGE, LARGE), True),
        ([89], (LARGE, LARGE), False),  # half is less than the least
        ([89], (SMALL, LARGE), False),
        ([59], (SMALL, SMALL), True),
        ([0], (SMALL, SMALL), False),
        ([149, 200], (LARGE, LARGE), True),  # short in one process
        ([200, 149], (LARGE, LARGE), True),
        ([None, 149], (LARGE, LARGE), True),
        ([89, 149], (LARGE, LARGE), False),  # not enough in one process
        ([200, 200], (LARGE, LARGE), False),
    ],
)
def test_when_two_models_advance_together(
    limits: list[int | None], demands: tuple[Demand, Demand], together: bool
) -> None:
    assert advance_together([Room(limit, demands) for limit in limits]) == together


class Two(Ranks):
    """This rank, and another one whose machine has less to give."""

    def gather(self, value: Room) -> list[Room]:
        return [value, Room(500_000, value.demands)]


@pytest.mark.parametrize("ranks", [None, Two(0, 1)])
def test_ranks_decide_together(folder: Path, ranks: Ranks | None, capsys: pytest.CaptureFixture[str]) -> None:
    out = configure()
    source, loading = open_source(str(folder), out), Loading(max_memory=10**9, ranks=ranks)
    assert compare_checkpoints((source, source), loading, TOKENS, None, 0.0, None, out) == 0
    printed = capsys.readouterr()
    assert ("side by side" in printed.err) == (ranks is not None) and printed.out.startswith("BIT-EQUAL")


def evaluation(logits: Any, mtp: Any = None) -> Run:
    drafted = None if mtp is None else torch.tensor(mtp)
    return Run(Evaluation([0, 1], torch.tensor(logits), drafted, 2, 0.0, 0.0), Fingerprints())


def test_the_sign_of_zero_is_a_bit() -> None:
    found = compare(evaluation([[0.0, 1.0]]), evaluation([[-0.0, 1.0]]))
    assert not found.bit_equal and found.max_difference == 0 and found.within(0)


def test_a_nan_on_one_side_is_infinitely_far() -> None:
    found = compare(evaluation([[math.nan, 1.0]]), evaluation([[0.0, 1.0]]))
    assert not found.bit_equal and found.max_difference == math.inf and not found.within(1e30)
    assert compare(evaluation([[math.nan, 1.0]]), evaluation([[math.nan, 1.0]])).bit_equal


def test_the_mtp_block_counts() -> None:
    found = compare(evaluation([[0.0, 1.0]], [[1.0, 2.0]]), evaluation([[0.0, 1.0]], [[1.0, 2.5]]))
    assert not found.bit_equal and found.mtp_max_difference == 0.5
    assert found.within(0.5) and not found.within(0.4)


def test_numbers_against_arithmetic_by_hand() -> None:
    # p = (1/2, 1/2) and q = (1/4, 3/4): KL(p || q) = ln(2)/2 + ln(2/3)/2
    found = compare(evaluation([[0.0, 0.0]]), evaluation([[0.0, math.log(3)]]))
    assert found.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)  # float32 of log(3)
    assert found.difference == pytest.approx([math.log(3)], rel=1e-6)
    assert found.top1 == [False] and found.top1_agreement == 0


def test_vocabularies_must_agree() -> None:
    with pytest.raises(InputError, match="vocabularies have 2 and 3 tokens"):
        compare(evaluation([[0.0, 1.0]]), evaluation([[0.0, 1.0, 2.0]]))


@pytest.mark.parametrize(
    ("tokens", "problem"), [([], "empty"), ([0, -1], "token 1 is -1"), ([9], "ids 0 to 8"), ([0] * 5, "context 4")]
)
def test_prompts_that_a_model_cannot_read(tokens: list[int], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_tokens(tokens, vocabulary=9, context=4)
