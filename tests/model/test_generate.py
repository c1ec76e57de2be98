"""Generation: against a plain loop without cache, in batches, with drafts, with stops, and drawing as it should."""

from typing import Any

import numpy as np
import pytest
import torch
from fake_model import VOCABULARY, FakeModel, logits_after
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import UsageError
from dsv4.model import generate as generate_module
from dsv4.model.cache import MAX_UNDO
from dsv4.model.drafting.drafter import Continuation
from dsv4.model.drafting.mtp import MtpDrafter
from dsv4.model.generate import Limits, _padded, generate
from dsv4.model.loading import load
from dsv4.model.sampling import Sampler, Sampling
from dsv4.model.transformer import Output, Transformer

GREEDY = Sampling(temperature=0)
WIDTHS = [0, 1, 3, 5]  # tokens of a draft, 0 for none
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8]]


def tokens_of(model: Any, prompts: Any, limits: Limits, sampling: Sampling, **how: Any) -> list[list[int]]:
    return [answer.tokens for answer in generate(model, prompts, limits, sampling, **how)[0]]


def plain_loop(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def drafting(width: int, context: int = 100) -> tuple[FakeModel, bool]:
    """A model with drafts of `width` tokens, and whether to use them."""
    return FakeModel(context, width or 1), width > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_greedy_is_the_plain_loop(width: int) -> None:
    expected, (model, draft) = [plain_loop(prompt, 12) for prompt in PROMPTS], drafting(width)
    assert tokens_of(model, PROMPTS, Limits(12), GREEDY, draft=draft) == expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 512])
@pytest.mark.parametrize("width", WIDTHS)
def test_long_prompts_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int, width: int) -> None:
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", chunk)
    progress: list[float] = []
    model, draft = drafting(width)
    found = tokens_of(model, PROMPTS, Limits(5), GREEDY, draft=draft, on_progress=progress.append)
    assert found == [plain_loop(prompt, 5) for prompt in PROMPTS]
    assert sum(progress) == sum(map(len, PROMPTS))


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    stop=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6),
    count=st.integers(1, 10),
    seed=st.integers(0, 5),
)
@pytest.mark.slow
def test_drafts_and_batches_change_nothing(
    prompts: list[list[int]], temperature: float, stop: frozenset[int], count: int, seed: int
) -> None:
    limits, sampling = Limits(count, stop), Sampling(temperature, 0.9, seed)
    alone = [tokens_of(FakeModel(), [prompt], limits, sampling, first_row=i)[0] for i, prompt in enumerate(prompts)]
    for width in WIDTHS:
        model, draft = drafting(width)
        answers, statistics, _ = generate(model, prompts, limits, sampling, draft=draft)
        assert [answer.tokens for answer in answers] == alone
        for answer in answers:
            ended = answer.tokens[-1] in stop
            assert answer.finish == ("stop" if ended else "length")
            assert ended or len(answer.tokens) == count
            assert not stop.intersection(answer.tokens[:-1])
        assert statistics.new_tokens == sum(map(len, alone))


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_save_calls(width: int, temperature: float) -> None:
    """Every accepted token is a call less. A draft is chosen with the random number of its place, so it agrees."""
    plain, (model, _) = FakeModel(), drafting(width)
    generate(plain, [[1, 2]], Limits(40), Sampling(temperature))
    _, statistics, _ = generate(model, [[1, 2]], Limits(40), Sampling(temperature), draft=True)
    assert plain.calls == 40
    assert 0 < statistics.accepted < statistics.drafted
    assert model.calls == 40 - statistics.accepted == statistics.steps + 1
    assert statistics.accepted > 10


def test_the_caller_can_stop_a_row() -> None:
    tokens: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        tokens.append((row, token))
        return row == 1 and len([r for r, _ in tokens if r == 1]) == 3

    answers, _, _ = generate(FakeModel(), PROMPTS, Limits(6), GREEDY, draft=True, on_token=on_token)
    assert [(len(answer.tokens), answer.finish) for answer in answers] == [(6, "length"), (3, "stop"), (6, "length")]
    assert sorted(tokens) == sorted((row, token) for row, answer in enumerate(answers) for token in answer.tokens)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_context_ends_an_answer(width: int) -> None:
    model, draft = drafting(width, context=10)
    answers, _, _ = generate(model, [[1, 2, 3], [1] * 10], Limits(50), GREEDY, draft=draft)
    assert [len(answer.tokens) for answer in answers] == [7, 1]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_session_goes_on_where_it_stands(width: int) -> None:
    model, draft = drafting(width)
    answers, _, session = generate(model, [[1, 2, 3]], Limits(4), GREEDY, draft=draft)
    assert session is not None and session.tokens == [1, 2, 3, *answers[0].tokens[:-1]]
    longer = [1, 2, 3, *answers[0].tokens, 7, 8]
    progress: list[float] = []
    answers, statistics, _ = generate(
        model, [longer], Limits(4), GREEDY, draft=draft, session=session, on_progress=progress.append
    )
    assert answers[0].tokens == plain_loop(longer, 4)
    assert sum(progress) == statistics.prompt_tokens == 3  # the last token of the answer, and two new ones


def test_a_session_that_holds_all_of_the_prompt_is_computed_again() -> None:
    model = FakeModel()
    _, _, session = generate(model, [[1, 2, 3]], Limits(4), GREEDY)
    assert session is not None
    for prompt in (session.tokens, session.tokens[:-1]):
        answers, statistics, _ = generate(model, [prompt], Limits(4), GREEDY, session=session)
        assert answers[0].tokens == plain_loop(prompt, 4) and statistics.prompt_tokens == len(prompt)


def test_a_session_without_drafts_is_not_continued_with_drafts() -> None:
    model, _ = drafting(3)
    answers, _, session = generate(model, [[1, 2, 3]], Limits(4), GREEDY)
    longer = [1, 2, 3, *answers[0].tokens, 7]
    answers, statistics, _ = generate(model, [longer], Limits(4), GREEDY, draft=True, session=session)
    assert answers[0].tokens == plain_loop(longer, 4) and statistics.prompt_tokens == len(longer)


def test_another_prompt_does_not_use_the_session() -> None:
    model = FakeModel()
    _, _, session = generate(model, [[1, 2, 3]], Limits(4), GREEDY)
    assert tokens_of(model, [[1, 2, 4, 4]], Limits(4), GREEDY, session=session) == [plain_loop([1, 2, 4, 4], 4)]


def test_the_trace_says_which_position() -> None:
    seen: list[tuple[str, int]] = []
    generate(
        FakeModel(), [[1, 2, 3]], Limits(3), GREEDY, trace=lambda name, position, output: seen.append((name, position))
    )
    assert [at for at in seen if at[0] == "logits"] == [("logits", 2), ("logits", 3), ("logits", 4)]
    assert [at for at in seen if at[0] == "layers.1"] == [("layers.1", 0), ("layers.1", 3), ("layers.1", 4)]


def test_statistics() -> None:
    _, statistics, _ = generate(FakeModel(), PROMPTS, Limits(5), GREEDY)
    assert (statistics.prompt_tokens, statistics.new_tokens, statistics.decoded_tokens) == (12, 15, 12)
    assert 0 < statistics.first_token_seconds <= statistics.prefill_seconds


class Oracle:
    """The real engine with an MTP block that is right but for every n-th token of the answer."""

    def __init__(self, model: Transformer, answer: list[int], prompt: int, wrong: int) -> None:
        self._model, self._answer, self._prompt, self._wrong = model, answer, prompt, wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_drafter(self, batch_size: int) -> MtpDrafter:
        return MtpDrafter(self, batch_size, MAX_UNDO)  # type: ignore[arg-type]

    def mtp_forward(self, hidden: Any, ids: Any, cache: Any, **how: Any) -> Output:
        output = self._model.mtp_forward(hidden, ids, cache, **how)
        if output.logits is not None:
            drafted = cache.lengths[0] + 1 - self._prompt  # the place in the answer of the token that is drafted
            right = self._answer[min(drafted, len(self._answer) - 1)]
            output.logits[0, -1, right if drafted % self._wrong else (right + 1) % 512] = 1e9
        return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(make_checkpoint(tmp_path_factory.mktemp("generate") / "small", geometry=TINY))


LONG = [(i * 37) % 300 + 3 for i in range(123)]  # past the window, and over blocks of 4


@pytest.mark.parametrize("wrong", [2, 3, 5])
def test_right_and_wrong_drafts_on_the_real_engine(small: Transformer, wrong: int) -> None:
    plain = tokens_of(small, [LONG], Limits(14), GREEDY)[0]
    answers, statistics, _ = generate(Oracle(small, plain, len(LONG), wrong), [LONG], Limits(14), GREEDY, draft=True)
    assert answers[0].tokens == plain
    assert 0 < statistics.accepted < statistics.drafted


def test_an_mtp_block_that_is_right_saves_three_calls_of_four(small: Transformer) -> None:
    plain = tokens_of(small, [LONG], Limits(14), GREEDY)[0]
    answers, statistics, _ = generate(Oracle(small, plain, len(LONG), 99), [LONG], Limits(14), GREEDY, draft=True)
    assert answers[0].tokens == plain
    assert (statistics.steps, statistics.accepted, statistics.drafted) == (4, 9, 9)  # the last step is of one token


def test_an_mtp_block_goes_on_from_itself(small: Transformer) -> None:
    """Its drafts are those of one pass over the main model's streams, its own streams and its tokens before.

    Two rows, and a second draft after the first one's tokens were rejected: nothing of them is left. The window ends.
    """
    prompts = [[*LONG, *range(9, 20)], LONG]
    output = small.forward(_padded(prompts), small.new_cache(2), lengths=[134, 123])
    following = [[*prompt[1:], 7] for prompt in prompts]
    drafter = MtpDrafter(small, 2, MAX_UNDO)
    for begin, end in ((0, 122), (122, 134)):
        rows = [row for row, prompt in enumerate(prompts) if begin < len(prompt)]
        new = [
            Continuation(row, output.hidden[row, begin:end][: len(following[row]) - begin], following[row][begin:end],
                         3 - row, lambda logits, ahead: int(logits.argmax()))
            for row in rows
        ]  # fmt: skip
        for row, draft in zip(rows, drafter.draft(new), strict=True):
            end_of_row = min(end, len(following[row]))
            streams, tokens = output.hidden[row : row + 1, :end_of_row], list(following[row][:end_of_row])
            for drafted in draft:
                made = small.mtp_forward(streams, torch.tensor([tokens]), small.new_mtp_cache(1))
                assert made.logits is not None and drafted == int(made.logits[0, -1].argmax())
                streams, tokens = torch.cat((streams, made.hidden[:, -1:]), 1), [*tokens, drafted]
            assert len(draft) == 3 - row


# --- drawing ---


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(logits) for _ in range(count)], minlength=len(logits)) / count


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(GREEDY).choose(torch.tensor([0.0, 2.0, 2.0, 1.0])) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.fast_cases(1)
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    expected = torch.softmax(logits.double() / temperature, -1).numpy()
    found = draws(logits, Sampling(temperature, seed=1), 20_000)
    # 20000 draws have a standard deviation of at most 0.0036; five of them
    assert np.abs(found - expected).max() < 0.018


@pytest.mark.slow
def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    assert draws(logits, Sampling(1.0, 0.5), 500).nonzero()[0].tolist() == [1]
    assert draws(logits, Sampling(1.0, 0.6), 2000).nonzero()[0].tolist() == [1, 3]
    found = draws(logits, Sampling(1.0, 0.9, seed=2), 20_000)
    assert found[0] == 0
    assert np.abs(found[[1, 2, 3]] - np.array([0.5, 0.15, 0.25]) / 0.9).max() < 0.018
    assert draws(logits, Sampling(1.0, 1e-9), 100)[1] == 1


def test_top_p_that_one_token_reaches_exactly_keeps_one() -> None:
    assert draws(torch.zeros(2), Sampling(1.0, 0.5), 200).tolist() == [1, 0]


def test_the_seed_and_the_row_decide() -> None:
    logits = torch.zeros(1000)
    first = [Sampler(Sampling(seed=3), row).choose(logits) for row in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert Sampler(Sampling(seed=4), 0).choose(logits) != first[0]


def test_what_is_foreseen_is_drawn_later() -> None:
    """A draft is chosen with the random number of its own place, and looking ahead draws nothing."""
    logits = torch.zeros(1000)
    looking, other = Sampler(Sampling(seed=3)), Sampler(Sampling(seed=3))
    foreseen = {ahead: looking.foresee(logits, ahead) for ahead in (2, 0, 3, 1)}
    drawn = [looking.choose(logits) for _ in range(5)]
    assert [foreseen[ahead] for ahead in range(4)] == drawn[:4]
    assert drawn == [other.choose(logits) for _ in range(5)]


def test_extreme_logits() -> None:
    logits = torch.tensor([float("-inf"), 3e38, -3e38])
    assert Sampler(Sampling(0.01)).choose(logits) == 1


@pytest.mark.parametrize(
    ("values", "name"),
    [({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top-p")],
)
def test_numbers_out_of_range(values: dict[str, float], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**values)
