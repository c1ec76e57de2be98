"""The verdict: noise agrees, damage does not, and known patterns are named."""

import math
import random
from collections.abc import Callable

import pytest

from dsv4.referee.agreement import Agreement, Ours, Scores, compare_prompt, judge, kl_lower_bound, percentile

LENGTH, VOCABULARY = 64, 1000
RANDOM = random.Random(4)
BASE = [-1.0 - 3 * RANDOM.random() for _ in range(LENGTH)]
NOISE = [0.02 * RANDOM.random() for _ in range(LENGTH)]
Change = Callable[[int, float], float]


def verdict(change: Change) -> Agreement:
    ours = Ours(BASE, [{1: value, 2: -5.0} for value in BASE], [1] * LENGTH)
    theirs = [change(position, value) for position, value in enumerate(BASE)]
    scores = Scores(theirs, [{1: value, 2: -5.0} for value in theirs])
    return judge([ours], [scores], NOISE[:10], NOISE, VOCABULARY)


def noisy(position: int, value: float) -> float:
    return value + 0.02 * math.sin(99 * position)


def test_within_the_floors() -> None:
    found = verdict(noisy)
    assert found.agrees and found.cause == "" and found.first_off is None
    assert found.mean_limit == pytest.approx(2 * sum(NOISE) / LENGTH + 1e-3)
    assert found.worst_limit == pytest.approx(3 * max(NOISE) + 1e-3)


def test_one_position_is_enough() -> None:
    found = verdict(lambda position, value: value - 0.5 * (position == 17))
    assert not found.agrees and found.first_off == (0, 17) and found.cause == ""


def test_a_small_difference_everywhere_is_too_much() -> None:
    found = verdict(lambda position, value: value + 0.05)
    assert not found.agrees and found.first_off is None


@pytest.mark.parametrize(("change", "words"), [
    (lambda p, v: -math.log(VOCABULARY) - 2.0 + 0.1 * math.sin(p), "chance level from the first token"),
    (lambda p, v: noisy(p, BASE[p - 1]) if p else -9.0, "1 position(s) later"),
    (lambda p, v: noisy(p, BASE[p + 2]) if p < LENGTH - 2 else -9.0, "2 position(s) earlier"),
    (lambda p, v: noisy(p, v) - 2.0 * (p / LENGTH) ** 3, "grows with the position"),
    (lambda p, v: noisy(p, v) - 2.0 * math.exp(-p / 4), "only the beginning differs"),
])  # fmt: skip
def test_known_patterns_are_named(change: Change, words: str) -> None:
    found = verdict(change)
    assert not found.agrees and words in found.cause


@pytest.mark.parametrize(("scores", "words"), [
    (Scores(BASE, [{}] * LENGTH, other_tokens=5), "from position 5 of prompt 0"),
    (Scores([math.nan, *BASE[1:]], [{}] * LENGTH), "no number at position 0"),
])  # fmt: skip
def test_a_broken_answer_differs_although_the_numbers_agree(scores: Scores, words: str) -> None:
    found = judge([Ours(BASE, [{}] * LENGTH, [1] * LENGTH)], [scores], [], NOISE, VOCABULARY)
    assert not found.agrees and words in found.cause


def test_what_is_not_listed_is_left_out() -> None:
    ours = Ours([-1.0, -2.0], [{7: -0.5}, {7: -0.5}], [7, 8])
    found = compare_prompt(ours, Scores([-1.5, -math.inf], [{7: -0.5}, {7: -0.5}]))
    assert found.difference[0] == 0.5 and math.isnan(found.difference[1]) and found.top1 == [True, False]


def test_kl_is_that_of_the_coarser_distributions() -> None:
    """With every token listed it is the divergence itself; with some of them never more."""
    p, q = [0.5, 0.2, 0.2, 0.1], [0.4, 0.4, 0.1, 0.1]
    ours, theirs = ({token: math.log(v) for token, v in enumerate(side)} for side in (p, q))
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_lower_bound(ours, theirs) == pytest.approx(whole)
    for count in range(1, 4):
        assert 0 <= kl_lower_bound(ours, {token: theirs[token] for token in range(count)}) <= whole + 1e-12
    assert math.isnan(kl_lower_bound(ours, {}))


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (50, 95, 99, 100)] == [50, 95, 99, 100] and percentile(
        [7.0], 50
    ) == 7


def test_json_has_no_nan() -> None:
    ours = Ours([-1.0, -2.0], [{}, {}], [1, 1])
    found = judge([ours], [Scores([-1.0, -math.inf], [{}, {}])], [], [], VOCABULARY).as_json()
    assert found["prompts"][0]["difference"] == [0.0, None] and found["top1_agreement"] is None
