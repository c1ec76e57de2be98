"""Fingerprints find the module where two runs differ first; comparisons see every bit and judge it rightly."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, flipped

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError
from dsv4.model import load
from dsv4.model.evaluate.compare import Run, compare
from dsv4.model.evaluate.logits import Evaluation, check_tokens, teacher_forced
from dsv4.model.evaluate.trace import Fingerprints
from dsv4.model.transformer import Transformer

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


def run_after(
    earlier: Run, model: Transformer, prefill: int | None = None, report: Callable[[str, int], None] | None = None
) -> tuple[Run, list[tuple[str, int]]]:
    """The second of two runs, and the differences reported while it ran."""
    reported: list[tuple[str, int]] = []
    fingerprints = Fingerprints(earlier.fingerprints, report or (lambda *difference: reported.append(difference)))
    return Run(teacher_forced(model, TOKENS, prefill, trace=fingerprints), fingerprints), reported


@pytest.mark.parametrize("prefill", [None, 1, 6])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.fast_cases(1)
def test_the_second_run_reports_the_first_difference(
    model: Transformer, damaged: Transformer, prefill: int | None, swapped: bool
) -> None:
    one, other = (damaged, model) if swapped else (model, damaged)
    first = run(one, prefill=prefill)
    second, reported = run_after(first, other, prefill)
    found = compare(first, second)
    assert not found.bit_equal and len(reported) == 1 and reported[0][0].startswith("layers.1.ffn")
    assert found == compare(first, run(other, prefill=prefill))
    if prefill is None:
        assert reported == [(found.first_module, found.first_position)]
    again, nothing = run_after(first, one, prefill)
    assert nothing == [] and compare(first, again).bit_equal


class Stop(Exception):
    """Raised where a difference is reported, to see what was computed by then."""


def test_the_difference_is_reported_before_more_is_computed(
    model: Transformer, damaged: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, computed, keep = run(model), [], Fingerprints.__call__

    def spy(self: Fingerprints, name: str, position: int, output: torch.Tensor) -> None:
        computed.append(name)
        keep(self, name, position, output)

    def stop(module: str, position: int) -> None:
        raise Stop(module, position)

    monkeypatch.setattr(Fingerprints, "__call__", spy)
    with pytest.raises(Stop) as stopped:
        run_after(first, damaged, report=stop)
    assert stopped.value.args[0] == "layers.1.ffn"
    assert computed == [
        "embed", *(f"layers.0.{m}" for m in ("attn", "ffn.gate.experts", "ffn")), "layers.0",
        *(f"layers.1.{m}" for m in ("attn", "ffn.gate.experts", "ffn")),
    ]  # fmt: skip


def test_the_difference_reported_first_may_not_be_the_first_module(
    model: Transformer, tmp_path: Path, folder: Path
) -> None:
    """In single steps: the last token's embedding differs, but the head differs from the first token on."""
    other = load(flipped(folder, tmp_path / "c", "norm.weight"))
    embedding = other.store.matrix("embed.weight").values
    embedding[TOKENS[-1]] += 1
    first = run(model, prefill=1)
    second, reported = run_after(first, other, 1)
    found = compare(first, second)
    assert reported == [("logits", 0)]
    assert (found.first_module, found.first_position) == ("embed", len(TOKENS) - 1)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.fast_cases(1)
def test_models_of_other_depth(model: Transformer, tmp_path: Path, swapped: bool) -> None:
    deeper = load(make_checkpoint(tmp_path, geometry=replace(TINY, compress_ratios=(0, 4, 4, 0))))
    one, other = (deeper, model) if swapped else (model, deeper)
    first = run(one, prefill=6)
    second, reported = run_after(first, other, 6)
    assert len(reported) == 1 and compare(first, second).first_module is not None


def test_a_module_of_the_second_run_alone_is_a_difference() -> None:
    reported: list[tuple[str, int]] = []
    second = Fingerprints(Fingerprints(), lambda *difference: reported.append(difference))
    second("layers.9", 4, torch.zeros(2, 3))
    second("layers.9", 6, torch.zeros(2, 3))
    assert reported == [("layers.9", 4)]


def test_the_mode_of_the_caller_is_left_alone(model: Transformer) -> None:
    run(model, TOKENS[:2])
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_progress_counts_every_token_once(model: Transformer) -> None:
    progress: list[float] = []
    teacher_forced(model, TOKENS, 6, on_progress=progress.append)
    assert sum(progress) == pytest.approx(len(TOKENS))
    assert teacher_forced(model, TOKENS, draft=False).mtp_logits is None


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
