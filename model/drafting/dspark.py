"""DSpark: stages that propose a whole block of tokens in one pass.

The stages get the main model's hidden states at some layers, for every position; `main_proj` joins them to one vector.
From it each stage makes one key per position, as the keys of a sliding window. A draft after positions 0 .. p goes

    ids         the anchor (the token at p + 1, which the main model has chosen), then the noise token, B in all
    stages      one block of the architecture after the other. All B positions see the same keys: those of the last W
                positions up to p, and those of all B positions, before and after
    base        logits of each position, by the main model's head
    Markov      logits i = base i + W2 W1[the token before], one after the other: position 0 follows the anchor,
                position i + 1 the token chosen from logits i
    confidence  one number per position, trained so that its sigmoid is the chance that the token is accepted; nothing
                here depends on it

The stages keep nothing of the block: their keys are a function of the main model's hidden states, so a rejected draft
leaves no trace. The keys of a position do not depend on the call that it came with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from dsv4.model.config import Config, DSparkConfig
from dsv4.model.layers.numerics import Numerics
from dsv4.model.weight_store import WeightStore

from .drafter import Continuation

Trace = Callable[[str, torch.Tensor], None]
Keys = list[torch.Tensor]
"""Keys of consecutive positions, [n, c] for each stage."""
ChooseOf = Callable[[int, int, torch.Tensor], int]
"""Called with the number of a draft, the place in it, and logits float32 [V]; returns a token."""

DRAFTS_PER_PASS = 32  # bounds the memory of logits where every position is drafted from


@dataclass(frozen=True)
class Start:
    """Where a draft begins: the keys of the positions before `position`, and the anchor, the token there."""

    keys: Keys
    position: int
    anchor: int


class Drafts(NamedTuple):
    """Some drafts: tokens int64 [k, b], logits float32 [k, b, V], confidence float32 [k, b]."""

    tokens: torch.Tensor
    logits: torch.Tensor
    confidence: torch.Tensor


class Stages(Protocol):
    """The draft stages of one architecture. `count`: how many."""

    count: int

    def reserve(self, positions: int) -> None:
        """Make the rotary tables reach positions [0, positions)."""
        ...

    def keys(self, main_x: torch.Tensor, positions: torch.Tensor) -> Keys:
        """main_x [T, D] of positions int64 [T] -> the keys of each stage, [T, c]."""
        ...

    def block(self, ids: torch.Tensor, positions: torch.Tensor, starts: Sequence[Start], trace: Trace) -> torch.Tensor:
        """ids and positions int64 [k * B], the blocks of k drafts -> [k * B, D], the vectors before the last norm."""
        ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] as `block` gives it -> float32 [T, V]."""
        ...


@dataclass
class Context:
    """The stages' keys of one sequence, up to position `length` - 1; they reach back as far as drafts need them."""

    keys: Keys
    length: int = 0

    def start(self, position: int, anchor: int, window: int) -> Start:
        """A draft whose anchor is at `position`, which is at most `length`. It sees the last `window` positions."""
        end = len(self.keys[0]) - (self.length - position)
        return Start([keys[max(0, end - window) : end] for keys in self.keys], position, anchor)

    def trim(self, window: int) -> None:
        """Drop the keys that no later draft sees."""
        self.keys = [keys[-window:].clone() for keys in self.keys]


class MarkovHead:
    """What the token before adds to the logits of a position, and the confidence in it."""

    def __init__(self, prefix: str, tables: tuple[str, str], store: WeightStore, numerics: Numerics) -> None:
        self._store, self._numerics = store, numerics
        self._embedding, self._head = (f"{prefix}markov_head.{name}.weight" for name in tables)
        self._confidence = f"{prefix}confidence_head.proj.weight"

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [k] -> their rows of W1, [k, R]."""
        return self._store.table_rows(self._embedding, tokens).to(self._numerics.dtype)

    def bias(self, embedded: torch.Tensor) -> torch.Tensor:
        """Rows of W1 [k, R] -> float32 [k, V], to be added to the logits."""
        return self._numerics.linear(embedded, self._store.matrix(self._head))

    def confidence(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Vectors before the last norm [k, D] and rows of W1 of the tokens before [k, R] -> float32 [k]."""
        joined = torch.cat((x, embedded), dim=-1)
        return self._numerics.linear(joined, self._store.matrix(self._confidence)).squeeze(-1)


def by_draft(trace: Trace | None, count: int) -> Trace:
    """A trace of flat outputs [count * B, ...] that passes them on with one row for each draft."""

    def report(name: str, output: torch.Tensor) -> None:
        if trace is not None:
            trace(name, torch.unflatten(output, 0, (count, -1)))

    return report


class DSpark:
    """The draft stages of a checkpoint, whatever its architecture."""

    def __init__(
        self, config: Config, stages: Stages, markov: MarkovHead, store: WeightStore, numerics: Numerics
    ) -> None:
        assert config.dspark is not None
        self.config, self._own = config, config.dspark
        self._stages, self._markov = stages, markov
        self._weights, self._numerics, self._device = store.view("mtp.0."), numerics, store.device

    @property
    def own(self) -> DSparkConfig:
        """What config.json says about the drafts."""
        return self._own

    def new_context(self) -> Context:
        """Of a sequence without tokens."""
        empty = torch.empty(0, self.config.head_dim, dtype=self._numerics.dtype, device=self._device)
        return Context([empty] * self._stages.count)

    def extend(self, contexts: Sequence[Context], hidden: Sequence[torch.Tensor]) -> None:
        """Append the keys of new positions to some contexts, from the main model's hidden states [n, targets * D]."""
        starts = [torch.arange(c.length, c.length + len(h)) for c, h in zip(contexts, hidden, strict=True)]
        norm, eps = self._weights.vector("main_norm.weight"), self.config.rms_norm_eps
        projected = self._numerics.quantized_linear(torch.cat(list(hidden)), self._weights.matrix("main_proj.weight"))
        main_x = self._numerics.kernels.rms_norm(projected, norm, eps)
        counts = [len(h) for h in hidden]
        self._stages.reserve(max(c.length + n for c, n in zip(contexts, counts, strict=True)))
        stages = self._stages.keys(main_x, torch.cat(starts).to(self._device))
        parts = zip(*(torch.split(keys, counts) for keys in stages), strict=True)
        for context, count, new in zip(contexts, counts, parts, strict=True):
            context.keys = [torch.cat((old, keys)) for old, keys in zip(context.keys, new, strict=True)]
            context.length += count

    def draft(
        self, starts: Sequence[Start], width: int, choose: ChooseOf | None = None, trace: Trace | None = None
    ) -> Drafts:
        """The first `width` tokens of the block after each start; the likeliest ones if there is no `choose`."""
        count, size = len(starts), self._own.block_size
        anchors = torch.tensor([start.anchor for start in starts], device=self._device)
        ids = torch.full((count, size), self._own.noise_token_id, device=self._device)
        ids[:, 0] = anchors
        first = torch.tensor([start.position for start in starts], device=self._device)
        positions = first.unsqueeze(1) + torch.arange(size, device=self._device)
        self._stages.reserve(max(start.position for start in starts) + size)
        found = self._stages.block(ids.flatten(), positions.flatten(), starts, by_draft(trace, count))
        x = torch.unflatten(found, 0, (count, size))[:, :width]
        base = torch.unflatten(self._stages.logits(x.flatten(0, 1)), 0, (count, width))
        drafts = self._chain(x, base, anchors, choose)
        if trace is not None:
            trace("mtp.logits", drafts.logits)
            trace("mtp.confidence", drafts.confidence)
        return drafts

    def _chain(self, x: torch.Tensor, base: torch.Tensor, before: torch.Tensor, choose: ChooseOf | None) -> Drafts:
        """Tokens one after the other, from x [k, b, D] and base logits [k, b, V], which become the logits."""
        tokens, confidence = [], []
        for place in range(base.shape[1]):
            embedded, logits = self._markov.embed(before), base[:, place]
            logits += self._markov.bias(embedded)
            confidence.append(self._markov.confidence(x[:, place], embedded))
            before = logits.argmax(-1)
            if choose is not None:
                chosen = [choose(number, place, row) for number, row in enumerate(logits)]
                before = torch.tensor(chosen, device=self._device)
            tokens.append(before)
        return Drafts(torch.stack(tokens, 1), base, torch.stack(confidence, 1))

    def draft_everywhere(
        self, context: Context, hidden: torch.Tensor, anchors: Sequence[int], trace: Callable[[int], Trace | None]
    ) -> Iterator[tuple[int, Drafts]]:
        """Append new positions [n, targets * D] of a sequence, each with its anchor, and draft after every one of them.

        Yields the position of the first draft of a pass, and the drafts. `trace` makes the trace of a pass from the
        position after its last one.
        """
        position, window = context.length, self.config.sliding_window
        self.extend([context], [hidden])
        while position < context.length:
            some = anchors[len(anchors) - context.length + position :][:DRAFTS_PER_PASS]
            starts = [context.start(position + i + 1, anchor, window) for i, anchor in enumerate(some)]
            yield position, self.draft(starts, self._own.block_size, trace=trace(position + len(some)))
            position += len(some)
        context.trim(window)


class DSparkDrafter:
    """Drafts for one batch; see Drafter. As in the release, nothing is drafted after the first position of a text."""

    def __init__(self, dspark: DSpark, batch_size: int, most: int) -> None:
        """`most`: the largest number of tokens that the main model's cache can remove again."""
        self._dspark, self.width = dspark, min(dspark.own.block_size, most)
        self._contexts = [dspark.new_context() for _ in range(batch_size)]

    def draft(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Add the new positions of some rows, and draft up to `count` tokens after each."""
        contexts = [self._contexts[c.row] for c in continuations]
        self._dspark.extend(contexts, [c.hidden for c in continuations])
        for context in contexts:
            context.trim(self._dspark.config.sliding_window)
        wanted = [c for c in continuations if c.count and self._contexts[c.row].length > 1]
        found = dict(zip((c.row for c in wanted), self._tokens(wanted), strict=True))
        return [found.get(c.row, []) for c in continuations]

    def _tokens(self, wanted: Sequence[Continuation]) -> list[list[int]]:
        if not wanted:
            return []
        contexts, window = [self._contexts[c.row] for c in wanted], self._dspark.config.sliding_window
        starts = [
            context.start(context.length, c.following[-1], window) for context, c in zip(contexts, wanted, strict=True)
        ]
        width = max(min(c.count, self.width) for c in wanted)
        drafts = self._dspark.draft(starts, width, lambda number, place, logits: wanted[number].choose(logits, place))
        return [tokens[: c.count] for tokens, c in zip(drafts.tokens.tolist(), wanted, strict=True)]
