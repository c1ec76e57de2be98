"""The whole model: embedding, the stack of its architecture, head, and the MTP block that drafts.

`Transformer.forward` takes the tokens of a batch of sequences, of unequal length if need be, and appends them to a
cache. Inside, the tokens of all sequences are one flat list without padding, and a token's numbers depend only on its
own sequence: on the CPU its logits are the same bits alone or in a batch, in one prefill or in single steps, for any
number of threads. So a long prompt is computed in pieces (`TOKENS_PER_PIECE`) to bound memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from dsv4.errors import UsageError
from dsv4.model.architectures.stack import Call, Stack, Trace
from dsv4.model.drafting.drafter import NO_DRAFTS, Drafter
from dsv4.model.drafting.dspark import DSpark, DSparkDrafter
from dsv4.model.drafting.mtp import MtpDrafter
from dsv4.model.layers.numerics import Numerics

from .cache import MAX_UNDO, Cache
from .config import Config
from .weight_store import WeightStore

TOKENS_PER_PIECE = 512

Rows = Literal["all", "last", "none"]


@dataclass(frozen=True)
class Output:
    """Result of a call for a batch [B, S]. Rows beyond a sequence's length are zero.

    logits: float32 [B, S, V], or [B, 1, V] of each sequence's last token, or None, as asked for.
    hidden: [B, S, *hidden_shape], the input of draft stages; for V4 the streams before the head, [B, S, n, D].
    """

    logits: torch.Tensor | None
    hidden: torch.Tensor


class Transformer:
    """A loaded model. Made by `dsv4.model.load`."""

    def __init__(self, config: Config, stack: Stack, store: WeightStore, numerics: Numerics) -> None:
        self.config, self.store, self.numerics, self.device = config, store, numerics, store.device
        self.stack = stack

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has an MTP block that `mtp_logits` can run."""
        return bool(self.stack.mtp)

    @property
    def dspark(self) -> DSpark | None:
        """The draft stages of DSpark, if the checkpoint has them."""
        return self.stack.dspark

    def new_drafter(self, batch_size: int) -> Drafter:
        """The draft stages at work on a new batch. Raises UsageError if there are none."""
        if self.dspark is not None:
            return DSparkDrafter(self.dspark, batch_size, MAX_UNDO)
        if not self.has_mtp:
            raise UsageError(NO_DRAFTS, "Run without --draft.")
        return MtpDrafter(self, batch_size, MAX_UNDO)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for the main stack."""
        return self.stack.new_cache(batch_size)

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block, which has its own keys."""
        return self.stack.new_mtp_cache(batch_size)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        cache: Cache,
        *,
        lengths: list[int] | None = None,
        rows: Rows = "all",
        trace: Trace | None = None,
    ) -> Output:
        """Append tokens int64 [B, S] to the sequences of `cache` and compute them.

        lengths: how many of the S tokens of each sequence count, for prompts of unequal length; None means all.
        rows: which logits to compute. trace: called with each module's name and output (flat, [T, ...]).
        Raises UsageError for token ids out of range, a context that is too long, or shapes that do not fit.
        """
        counts = self._check(token_ids, cache, lengths)
        self._reserve(cache, counts)
        token_ids = token_ids.to(self.device)
        if token_ids.numel() and min(counts) == token_ids.shape[1] <= TOKENS_PER_PIECE:
            return self._in_one_piece(token_ids, cache, counts, rows, trace)
        hidden = self._new_hidden(token_ids)
        logits = self._new_logits(token_ids, rows)
        for starts, parts in _pieces(counts):
            call = Call(cache, starts, parts, self.device, trace)
            ids = token_ids[call.sequence, call.column]
            streams = self.stack(self._embed(ids), ids, call)
            call.finish()
            hidden[call.sequence, call.column] = streams.hidden
            if logits is not None:
                _add_logits(logits, self.stack.head, streams.last, call, counts, rows)
        return Output(logits, hidden)

    __call__ = forward

    def _in_one_piece(
        self, token_ids: torch.Tensor, cache: Cache, counts: list[int], rows: Rows, trace: Trace | None
    ) -> Output:
        """`forward` of tokens that all count, such as a step's: their results are the output, nothing is copied."""
        call, ids = Call(cache, [0] * len(counts), counts, self.device, trace), token_ids.flatten()
        streams = self.stack(self._embed(ids), ids, call)
        call.finish()
        hidden = torch.unflatten(streams.hidden, 0, token_ids.shape)
        if rows == "none":
            return Output(None, hidden)
        logits = self.stack.head(streams.last if rows == "all" else streams.last[counts[0] - 1 :: counts[0]])
        call.trace("logits", logits)
        return Output(torch.unflatten(logits, 0, (len(counts), -1)), hidden)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.store.embedding(ids).to(self.numerics.dtype)

    @torch.inference_mode()
    def mtp_forward(
        self,
        hidden: torch.Tensor,
        next_token_ids: torch.Tensor,
        mtp_cache: Cache,
        *,
        lengths: list[int] | None = None,
        rows: Rows = "all",
        trace: Trace | None = None,
    ) -> Output:
        """Append positions to the sequences of an MTP cache and compute the token after the next one of each.

        hidden [B, S, n, D] from `forward`; next_token_ids int64 [B, S]: the token that follows each position.
        Returns logits, and the block's own streams where logits are asked for: [B, S, n, D], [B, 1, n, D], or
        [B, 0, n, D]. Raises UsageError if the checkpoint has no MTP block of the kind that Flash and Pro have.
        """
        if not self.has_mtp:
            raise UsageError("this checkpoint has no MTP block that can draft tokens", "Run without --draft.")
        counts = self._check(next_token_ids, mtp_cache, lengths)
        self._reserve(mtp_cache, counts)
        token_ids = next_token_ids.to(self.device)
        logits, block = self._new_logits(token_ids, rows), self.stack.mtp[0]
        own = self._new_hidden(token_ids[:, : 0 if logits is None else logits.shape[1]])
        for starts, parts in _pieces(counts):
            call = Call(mtp_cache, starts, parts, self.device, trace)
            ids = token_ids[call.sequence, call.column]
            h = block(hidden[call.sequence, call.column], self._embed(ids), ids, call)
            call.finish()
            if logits is not None:
                tokens, *places = _asked(call, counts, rows)
                own[tuple(places)] = h[tokens]
                _add_logits(logits, block.head, h, call, counts, rows, "mtp.0.logits")
        return Output(logits, own)

    def mtp_logits(
        self,
        hidden: torch.Tensor,
        next_token_ids: torch.Tensor,
        mtp_cache: Cache,
        *,
        rows: Rows = "all",
        trace: Trace | None = None,
    ) -> torch.Tensor | None:
        """The logits of `mtp_forward`."""
        return self.mtp_forward(hidden, next_token_ids, mtp_cache, rows=rows, trace=trace).logits

    def _new_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        shape = (*ids.shape, *self.stack.hidden_shape)
        return torch.zeros(shape, dtype=self.numerics.dtype, device=self.device)

    def _new_logits(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        if rows == "none":
            return None
        shape = (ids.shape[0], ids.shape[1] if rows == "all" else 1, self.config.vocab_size)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _check(self, token_ids: torch.Tensor, cache: Cache, lengths: list[int] | None) -> list[int]:
        _check_kinds(token_ids, cache)
        if token_ids.dim() != 2 or token_ids.shape[0] != len(cache.sequences):
            raise UsageError(
                f"token ids have shape {list(token_ids.shape)}, [{len(cache.sequences)}, tokens] is expected"
            )
        counts = [token_ids.shape[1]] * token_ids.shape[0] if lengths is None else list(lengths)
        if len(counts) != token_ids.shape[0] or not all(0 <= n <= token_ids.shape[1] for n in counts):
            raise UsageError(f"lengths {counts} do not fit token ids of shape {list(token_ids.shape)}")
        for row, count in enumerate(counts):
            self._check_tokens(token_ids[row, :count], cache.sequences[row].length + count)
        return counts

    def _reserve(self, cache: Cache, counts: list[int]) -> None:
        """Prepare the stack for the last position of a call."""
        ends = [sequence.length + count for sequence, count in zip(cache.sequences, counts, strict=True)]
        self.stack.reserve(max(ends, default=0))

    def _check_tokens(self, ids: torch.Tensor, length: int) -> None:
        wrong = [token for token in ids.tolist() if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise UsageError(f"token id {wrong[0]} is not in 0..{self.config.vocab_size - 1}")
        if length > self.config.max_position_embeddings:
            raise UsageError(
                f"the context would have {length} tokens, this model has room for {self.config.max_position_embeddings}"
            )


def _check_kinds(token_ids: object, cache: object) -> None:
    """Raises UsageError for what no type checker has seen, such as a list of ids."""
    if not isinstance(token_ids, torch.Tensor) or not isinstance(cache, Cache):
        found = f"{type(token_ids).__name__} and {type(cache).__name__}"
        raise UsageError(f"forward takes a tensor and a cache, not {found}", "Make a cache: model.new_cache(1).")


def _pieces(counts: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split a call into pieces of at most TOKENS_PER_PIECE tokens per sequence: columns to start at, and how many."""
    starts = range(0, max(counts, default=0), TOKENS_PER_PIECE)
    return [([s] * len(counts), [min(max(n - s, 0), TOKENS_PER_PIECE) for n in counts]) for s in starts]


def _asked(call: Call, counts: list[int], rows: Rows) -> tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]:
    """The tokens of a piece whose results are asked for: their places in it, and rows and columns of the results."""
    if rows == "all":
        return slice(None), call.sequence, call.column
    lengths = torch.tensor(counts, device=call.column.device)
    last = (call.column == lengths[call.sequence] - 1).nonzero().squeeze(-1)
    return last, call.sequence[last], torch.zeros_like(last)


def _add_logits(
    logits: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    h: torch.Tensor,
    call: Call,
    counts: list[int],
    rows: Rows,
    name: str = "logits",
) -> None:
    """Compute the logits of a piece's tokens, all or each sequence's last, into their places in `logits`."""
    tokens, row, column = _asked(call, counts, rows)
    if len(row):
        computed = head(h[tokens])
        logits[row, column] = computed
        call.trace(name, computed)
