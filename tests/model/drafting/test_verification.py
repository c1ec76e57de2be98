"""Drafted answers are the plain ones, token for token, and a rejected draft leaves no trace."""

from typing import Any

import pytest
import torch
from drafting import STAGES, agreeable_drafts, random_drafts

from dsv4.model import load
from dsv4.model.drafting.drafter import Continuation
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.generate import Limits, Statistics, generate
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer

GREEDY = Sampling(temperature=0)
LENGTHS = (1, 15, 17, 40)  # of prompts, about the window of 16


def prompt(length: int) -> list[int]:
    ids: list[int] = torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return ids


@pytest.fixture(scope="module")
def agreeable(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(agreeable_drafts(tmp_path_factory.mktemp("verification") / "agreeable"))


@pytest.fixture(scope="module")
def exact(agreeable: Transformer) -> Transformer:
    return load(agreeable.store.checkpoint, simulation=False)


@pytest.fixture(scope="module")
def stubborn(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(random_drafts(tmp_path_factory.mktemp("verification") / "random"))


def answers(
    model: Any, prompts: list[list[int]], count: int, sampling: Sampling, draft: bool
) -> tuple[list[list[int]], Statistics]:
    found, statistics, _ = generate(model, prompts, Limits(count), sampling, draft=draft)
    return [answer.tokens for answer in found], statistics


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["agreeable", "exact", "stubborn"])
def test_the_answer_is_the_plain_one(request: pytest.FixtureRequest, name: str, temperature: float) -> None:
    model, prompts = request.getfixturevalue(name), [prompt(length) for length in LENGTHS]
    sampling = Sampling(temperature, 0.95, seed=1)
    plain, _ = answers(model, prompts, 16, sampling, draft=False)
    drafted, statistics = answers(model, prompts, 16, sampling, draft=True)
    assert drafted == plain
    assert statistics.drafted > statistics.accepted
    assert statistics.decoded_tokens == statistics.steps + statistics.accepted
    if name != "stubborn":
        assert statistics.accepted > 0.2 * statistics.drafted


def test_accepted_drafts_save_calls(agreeable: Transformer) -> None:
    """Blocks are accepted at every length, so that every way through the loop was taken."""
    tokens, statistics = answers(agreeable, [prompt(20)], 50, GREEDY, draft=True)
    assert statistics.steps < 35
    text = prompt(20) + tokens[0]
    drafts = teacher_forced(agreeable, text).drafts
    assert drafts is not None
    right = [matching(drafts.tokens[p].tolist(), text[p + 2 :]) for p in range(20, len(text) - 6)]
    assert set(right) == set(range(STAGES.block_size + 1))


def matching(draft: list[int], text: list[int]) -> int:
    """How many tokens of a draft come true."""
    return next((i for i, pair in enumerate(zip(draft, text, strict=False)) if pair[0] != pair[1]), len(draft))


class Scripted:
    """A model whose drafts have `right` tokens that will be drawn, and then wrong ones."""

    def __init__(self, model: Transformer, text: list[int], right: int) -> None:
        self._model, self._text, self._right, self._known = model, text, right, 0
        self.width = STAGES.block_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_drafter(self, batch_size: int) -> "Scripted":
        return self

    def draft(self, continuations: list[Continuation]) -> list[list[int]]:
        [new] = continuations
        self._known += len(new.following)
        truth = self._text[self._known + 1 :][: new.count]
        wrong = [(token + 1) % 60 for token in truth[self._right :]]
        return [truth[: self._right] + wrong]


@pytest.fixture(scope="module")
def plain_answers(stubborn: Transformer) -> dict[int, list[int]]:
    return {length: answers(stubborn, [prompt(length)], 16, GREEDY, draft=False)[0][0] for length in (13, 122)}


# Answers that cross the ends of blocks of 4 and of 128 tokens, and the window of 16, at every remainder.
@pytest.mark.parametrize("right", range(STAGES.block_size + 1))
@pytest.mark.parametrize("length", [13, 122])
@pytest.mark.fast_cases(1)
def test_a_rejected_draft_leaves_no_trace(
    stubborn: Transformer, plain_answers: dict[int, list[int]], right: int, length: int
) -> None:
    """The cache afterwards is the one of a plain prefill, bit for bit, in every tensor that later tokens read."""
    start, plain = prompt(length), plain_answers[length]
    scripted = Scripted(stubborn, [*start, *plain], right)
    [answer], statistics, session = generate(scripted, [start], Limits(16), GREEDY, draft=True)  # type: ignore[arg-type]
    assert answer.tokens == plain and session is not None
    assert (statistics.accepted > 0) == (right > 0)
    assert (statistics.accepted < statistics.drafted) == (right < STAGES.block_size)
    following = torch.tensor([[7, 8, 9, 10, 11]])
    after = stubborn.forward(following, session.cache).logits
    fresh = stubborn.new_cache(1)
    stubborn.forward(torch.tensor([session.tokens]), fresh)
    expected = stubborn.forward(following, fresh).logits
    assert after is not None and expected is not None and torch.equal(after, expected)


def test_a_stop_token_within_a_draft_ends_the_answer(agreeable: Transformer) -> None:
    plain, _ = answers(agreeable, [prompt(20)], 12, GREEDY, draft=False)
    for stop in set(plain[0]):
        limits = Limits(12, frozenset([stop]))
        [answer], _, session = generate(agreeable, [prompt(20)], limits, GREEDY, draft=True)
        assert answer.tokens == plain[0][: plain[0].index(stop) + 1] and answer.finish == "stop"
        assert session is not None and session.cache.lengths == [20 + len(answer.tokens) - 1]


def test_a_session_goes_on_with_drafts(agreeable: Transformer) -> None:
    """The stages' keys are kept too: the second answer has the tokens and the drafts of one that starts afresh."""
    [first], _, session = generate(agreeable, [prompt(30)], Limits(10), GREEDY, draft=True)
    longer = [*prompt(30), *first.tokens, 5, 6]
    [again], resumed, _ = generate(agreeable, [longer], Limits(20), GREEDY, draft=True, session=session)
    [fresh], whole, _ = generate(agreeable, [longer], Limits(20), GREEDY, draft=True)
    assert again.tokens == fresh.tokens and resumed.prompt_tokens == 3
    assert (resumed.drafted, resumed.accepted) == (whole.drafted, whole.accepted)


@pytest.mark.slow
def test_batches_change_neither_answers_nor_drafts(agreeable: Transformer) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    together, statistics = answers(agreeable, prompts, 16, GREEDY, draft=True)
    alone = [answers(agreeable, [each], 16, GREEDY, draft=True) for each in prompts]
    assert together == [tokens[0] for tokens, _ in alone]
    assert statistics.drafted == sum(each.drafted for _, each in alone)
    assert statistics.accepted == sum(each.accepted for _, each in alone)
