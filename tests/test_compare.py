"""Fingerprints find the module where two runs part; comparisons see every bit and judge it rightly."""

import math
from typing import Any

import pytest
import torch
from tiny import TINY

from dsv4.convert.synthetic import make_checkpoint
from dsv4.errors import InputError
from dsv4.model import load
from dsv4.model.compare import Run, compare
from dsv4.model.evaluate import Evaluation, check_tokens, teacher_forced
from dsv4.model.trace import Fingerprints
from dsv4.model.transformer import Transformer

TOKENS = [0, 5, 9, 100, 300, 17, 4, 8, 99, 250, 12]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(make_checkpoint(tmp_path_factory.mktemp("compare"), geometry=TINY))


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
