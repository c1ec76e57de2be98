"""A stand-in for the engine: logits are a hash of all tokens before, so a slip in bookkeeping changes the answer."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from dsv4.model.drafting.drafter import Continuation
from dsv4.model.drafting.mtp import WIDTH, MtpDrafter
from dsv4.model.reading.meter import ReadStatistics
from dsv4.model.transformer import Output

VOCABULARY = 40
FORGET = 8  # how far back a cache may be truncated


@dataclass
class FakeCache:
    """The tokens of each sequence."""

    sequences: list[list[int]] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    def branch(self) -> "FakeCache":
        return FakeCache([list(sequence) for sequence in self.sequences])

    def truncate(self, row: int, length: int) -> None:
        assert len(self.sequences[row]) - FORGET <= length <= len(self.sequences[row])
        del self.sequences[row][length:]


def logits_after(tokens: list[int]) -> torch.Tensor:
    """The logits that follow `tokens`, float32 [V]."""
    digest = hashlib.sha256(repr(tokens).encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def draft_logits_after(tokens: list[int]) -> torch.Tensor:
    """Those of the draft stages, which are wrong about every third time."""
    logits = logits_after(tokens)
    return -logits if sum(tokens) % 3 == 0 else logits


class FakeDrafter:
    """Several tokens at a time, each after the one before; right only if it is fed rightly."""

    def __init__(self, states: list[list[int]], width: int, batch_size: int) -> None:
        self.width, self._states, self._known = width, states, [0] * batch_size

    def draft(self, continuations: list[Continuation]) -> list[list[int]]:
        return [self._draft(each) for each in continuations]

    def _draft(self, new: Continuation) -> list[int]:
        states = [self._states[int(row)] for row in new.hidden.flatten()]
        assert len(states) == len(new.following)
        for state, following, after in zip(states, new.following, [*states[1:], None], strict=True):
            self._known[new.row] += 1
            assert len(state) == self._known[new.row], "the draft stages skipped or repeated a position"
            assert after is None or after == [*state, following]
        text = [*states[-1], new.following[-1]]
        for ahead in range(min(new.count, self.width)):
            text.append(new.choose(draft_logits_after(text), ahead))
        return text[len(states[-1]) + 1 :]


class FakeModel:
    """Next tokens by hash; drafts of `width` tokens, up to 3 by an MTP block, right about two times of three."""

    def __init__(self, context: int = 100, width: int = 1) -> None:
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=context, num_hidden_layers=2)
        self.has_mtp = True
        self.store = SimpleNamespace(statistics=ReadStatistics())
        self.calls, self._width = 0, width
        self._states: list[list[int]] = []  # what a hidden state stands for: the tokens up to its position

    def new_cache(self, batch_size: int) -> FakeCache:
        return FakeCache([[] for _ in range(batch_size)])

    new_mtp_cache = new_cache

    def new_drafter(self, batch_size: int) -> FakeDrafter | MtpDrafter:
        if self._width <= WIDTH:
            return MtpDrafter(self, batch_size, self._width)  # type: ignore[arg-type]
        return FakeDrafter(self._states, self._width, batch_size)

    def _hidden(self, tokens: list[int]) -> float:
        self._states.append(list(tokens))
        return float(len(self._states) - 1)

    def forward(self, token_ids, cache, *, lengths=None, rows="all", trace=None) -> Output:
        self.calls += 1
        batch, width = token_ids.shape
        hidden = torch.zeros(batch, width, 1, 1)
        logits = torch.zeros(batch, width, VOCABULARY)
        for row, (count, sequence) in enumerate(zip(lengths or [width] * batch, cache.sequences, strict=True)):
            for i in range(count):
                sequence.append(int(token_ids[row, i]))
                assert len(sequence) <= self.config.max_position_embeddings
                hidden[row, i] = self._hidden(sequence)
                logits[row, i] = logits_after(sequence)
            if rows == "last":
                logits[row, 0] = logits[row, count - 1]
        if trace is not None:
            counted = torch.zeros(sum(lengths or [batch * width]))
            trace("layers.0", counted)
            trace("layers.0.attn", counted)
            trace("layers.1", counted)
            trace("logits", logits[0, :1] if rows == "last" else logits[0, : (lengths or [width])[0]])
        return Output(logits[:, :1] if rows == "last" else logits, hidden)

    def mtp_forward(self, hidden, next_token_ids, cache, *, lengths=None, rows="all", trace=None) -> Output:
        """The block's own state stands for the tokens up to the next one: a chain that loses one would be found."""
        batch, width = next_token_ids.shape
        logits, own = torch.zeros(batch, width, VOCABULARY), torch.zeros(batch, width, 1, 1)
        for row, (count, sequence) in enumerate(zip(lengths or [width] * batch, cache.sequences, strict=True)):
            for i in range(count):
                state = self._states[int(hidden[row, i])]
                assert len(state) == len(sequence) + 1, "the MTP block skipped or repeated a position"
                sequence.append(int(next_token_ids[row, i]))
                own[row, i] = self._hidden([*state, sequence[-1]])
                logits[row, i] = draft_logits_after([*state, sequence[-1]])
            if rows == "last" and count:
                logits[row, 0], own[row, 0] = logits[row, count - 1], own[row, count - 1]
        if rows == "none":
            return Output(None, own[:, :0])
        return Output(logits[:, :1], own[:, :1]) if rows == "last" else Output(logits, own)
