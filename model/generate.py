"""Generates answers token by token: prefill, then decode, for a batch of prompts of unequal length.

With `draft`, the checkpoint's draft stages propose tokens, and one call of the main model computes the last certain
token and all proposals after it. Then tokens are sampled from its logits one by one, as they would have been without
drafts. A proposal that is the token sampled makes the next row of logits count; the first other one ends the step and
is removed from the cache with all that follow. So the answer is the one without drafts, at any temperature; drafts only
reduce the number of calls.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from dsv4.model.drafting.drafter import Continuation, Drafter
from dsv4.model.evaluate.trace import PositionedTrace, counting, positioned, together

from .cache import Cache, select
from .sampling import Sampler, Sampling
from .transformer import Rows, Transformer

Finish = Literal["stop", "length"]
OnToken = Callable[[int, int], bool]
"""Called with (row, token) for every new token; returning True ends that row's answer."""

PREFILL_CHUNK = 512  # tokens per sequence and call: enough to use every matrix well, little enough to report progress


@dataclass(frozen=True)
class Limits:
    """When an answer ends: after `max_new_tokens`, or with a token of `stop_ids`."""

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()


@dataclass
class Statistics:
    """Statistics of a call of `generate`. Seconds of wall-clock time; `first_token` is from the start to the first.

    steps: rows of decoding calls; in each the main model computes one certain token and the proposals after it.
    """

    prompt_tokens: int = 0  # computed, so without those that a session had
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    decoded_tokens: int = 0  # new tokens without each row's first, which prefill computes

    def add(self, other: "Statistics") -> None:
        """Sum up, keeping the first time to a first token."""
        first = self.first_token_seconds or other.first_token_seconds
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_token_seconds = first


@dataclass
class Answer:
    """The new tokens of one prompt (its stop token included) and why they end."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class Session:
    """Tokens that are computed, and their cache. A longer prompt that starts with `tokens` continues from there.

    drafter: the draft stages with what they know of these tokens; None without drafts.
    """

    cache: Cache
    tokens: list[int]
    drafter: Drafter | None


class _Row:
    """One sequence while it is generated."""

    def __init__(self, prompt: Sequence[int], sampler: Sampler, index: int) -> None:
        self.prompt, self.sampler, self.index = list(prompt), sampler, index
        self.answer = Answer()
        self.draft: list[int] = []


def _padded(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(list(tokens)) for tokens in lists], batch_first=True)


class Generator:
    """The state of one batch. Use `generate`."""

    def __init__(
        self,
        model: Transformer,
        rows: list[_Row],
        limits: Limits,
        draft: bool,
        on_token: OnToken | None,
        trace: PositionedTrace | None,
    ) -> None:
        self.model, self.rows, self.limits, self.on_token, self.trace = model, rows, limits, on_token, trace
        self.cache = model.new_cache(len(rows))
        self.drafter = model.new_drafter(len(rows)) if draft else None
        self.progress: Callable[[str, torch.Tensor], None] | None = None
        self.statistics = Statistics(prompt_tokens=sum(len(row.prompt) for row in rows))
        self._started = time.perf_counter()

    def _forward(
        self, rows: list[_Row], tokens: list[list[int]], which: Rows
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (of all tokens, or [1, V] of the last) and hidden states of more tokens of some rows."""
        lengths = [len(t) for t in tokens]
        cache = select(self.cache, [row.index for row in rows])
        report = together(positioned(self.trace, cache.lengths[0] + lengths[0]), self.progress)
        output = self.model.forward(_padded(tokens), cache, lengths=lengths, rows=which, trace=report)
        assert output.logits is not None
        return [(output.logits[i], output.hidden[i, :n]) for i, n in enumerate(lengths)]

    def _left(self, row: _Row) -> int:
        """How many more tokens the row may get: the limit, and what is left of the context (but always one)."""
        room = max(self.model.config.max_position_embeddings - len(row.prompt), 1)
        return min(self.limits.max_new_tokens, room) - len(row.answer.tokens)

    def _to_draft(self, row: _Row) -> int:
        """How many tokens to draft: none before the answer or after its end, and none that could not be used."""
        if self.drafter is None or not row.answer.tokens or row.answer.finish is not None:
            return 0
        return min(self.drafter.width, self._left(row) - 1)

    def _draft(self, rows: list[_Row], hidden: list[torch.Tensor], following: list[list[int]]) -> None:
        """Set each row's draft, given the hidden states of its newest positions and the tokens after them."""
        if self.drafter is None:
            return
        new = [
            Continuation(row.index, states, tokens, self._to_draft(row), row.sampler.foresee)
            for row, states, tokens in zip(rows, hidden, following, strict=True)
        ]
        for row, draft in zip(rows, self.drafter.draft(new), strict=True):
            row.draft = draft

    def _emit(self, row: _Row, logits: torch.Tensor) -> int:
        """Draw the next token of a row and note whether it is its last."""
        token = row.sampler.choose(logits)
        answer = row.answer
        answer.tokens.append(token)
        if not self.statistics.first_token_seconds:
            self.statistics.first_token_seconds = time.perf_counter() - self._started
        asked_to_stop = self.on_token is not None and self.on_token(row.index, token)
        if asked_to_stop or token in self.limits.stop_ids:
            answer.finish = "stop"
        elif self._left(row) <= 0:
            answer.finish = "length"
        return token

    def prefill(self, known: int, on_progress: Callable[[float], None] | None) -> None:
        """Compute all prompts, of which the first `known` tokens are in the cache, and draw each first token."""
        self.progress = counting(on_progress, self.model.config.num_hidden_layers)
        for begin in range(known, max(len(row.prompt) for row in self.rows), PREFILL_CHUNK):
            end = begin + PREFILL_CHUNK
            rows = [row for row in self.rows if len(row.prompt) > begin]
            results = self._forward(rows, [row.prompt[begin:end] for row in rows], "last")
            following = [row.prompt[begin + 1 : end + 1] for row in rows]
            for row, (logits, _), after in zip(rows, results, following, strict=True):
                if len(row.prompt) <= end:
                    after.append(self._emit(row, logits[-1]))
            self._draft(rows, [hidden for _, hidden in results], following)
        self.progress = None
        self.statistics.prefill_seconds = time.perf_counter() - self._started

    def _accept(self, row: _Row, fed: list[int], logits: torch.Tensor) -> list[int]:
        """Draw the token after the first fed one and after each draft that was right; take the others back."""
        drawn = [self._emit(row, logits[0])]
        for draft, following in zip(fed[1:], logits[1:], strict=False):
            if drawn[-1] != draft or row.answer.finish is not None:
                break
            drawn.append(self._emit(row, following))
        self.statistics.steps += 1
        self.statistics.drafted += len(fed) - 1
        self.statistics.accepted += len(drawn) - 1
        if len(drawn) < len(fed):
            self.cache.truncate(row.index, self.cache.lengths[row.index] - len(fed) + len(drawn))
        return drawn

    def step(self) -> bool:
        """One call of the main model for all unfinished rows; False if there are none."""
        rows = [row for row in self.rows if row.answer.finish is None]
        if not rows:
            return False
        fed = [[row.answer.tokens[-1], *row.draft] for row in rows]
        results = self._forward(rows, fed, "all")
        drawn = [self._accept(row, f, logits) for row, f, (logits, _) in zip(rows, fed, results, strict=True)]
        hidden = [states[: len(tokens)] for tokens, (_, states) in zip(drawn, results, strict=True)]
        self._draft(rows, hidden, drawn)
        return True


def _resume(generator: Generator, session: Session | None) -> int:
    """Take over a session's cache if the only prompt goes on where it stands. Returns how many tokens that saves."""
    if session is None or len(generator.rows) != 1 or (session.drafter is None) != (generator.drafter is None):
        return 0
    known = len(session.tokens)
    if known >= len(generator.rows[0].prompt) or generator.rows[0].prompt[:known] != session.tokens:
        return 0
    generator.cache, generator.drafter = session.cache, session.drafter
    return known


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    *,
    draft: bool = False,
    first_row: int = 0,
    session: Session | None = None,
    on_token: OnToken | None = None,
    on_progress: Callable[[float], None] | None = None,
    trace: PositionedTrace | None = None,
) -> tuple[list[Answer], Statistics, Session | None]:
    """Answer every prompt (lists of token ids, none empty); answers, statistics, and the session after a single prompt.

    `first_row` is the place of the first prompt among all that share a seed: prompt i draws the same tokens whatever
    the batches are. `session` is what an earlier call returned, with `draft` or without as this one, and cannot be used
    again.
    `on_progress` is called with the number of prompt tokens computed, a share of them after every layer, and with 0
    after every module of a decoding step; `trace`, for a single prompt, with the outputs of the main model's modules.
    """
    rows = [_Row(prompt, Sampler(sampling, first_row + i), i) for i, prompt in enumerate(prompts)]
    generator = Generator(model, rows, limits, draft, on_token, trace)
    known = _resume(generator, session)
    generator.statistics.prompt_tokens -= known
    generator.prefill(known, on_progress)
    generator.progress = None if on_progress is None else lambda name, output: on_progress(0)
    began = time.perf_counter()
    while generator.step():
        pass
    statistics = generator.statistics
    statistics.decode_seconds = time.perf_counter() - began
    statistics.new_tokens = sum(len(row.answer.tokens) for row in rows)
    statistics.decoded_tokens = statistics.new_tokens - len(rows)
    after = None
    if len(rows) == 1:
        after = Session(generator.cache, [*rows[0].prompt, *rows[0].answer.tokens[:-1]], generator.drafter)
    return [row.answer for row in rows], statistics, after
