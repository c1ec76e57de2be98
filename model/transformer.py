"""The whole model: embedding, blocks, head, and the MTP block that drafts one token further.

`Transformer.forward` takes the tokens of a batch of sequences, of unequal length if need be, and appends them to a
cache. Inside, the tokens of all sequences are one flat list without padding, and a token's numbers depend only on its
own sequence: on the CPU its logits are the same bits alone or in a batch, in one prefill or in single steps, for any
number of threads. That also means that a long prompt may be computed in pieces (`TOKENS_PER_PIECE`) to bound memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from dsv4.errors import UsageError
from dsv4.model.layers.attention import Attention, Segment
from dsv4.model.layers.head import Head
from dsv4.model.layers.hyper_connection import HyperConnection
from dsv4.model.layers.moe import MixtureOfExperts
from dsv4.model.layers.numerics import Numerics
from dsv4.model.layers.rotary import Rotary, rotary_frequencies

from .cache import Cache, LayerCache, new_cache
from .config import Config
from .weight_store import WeightStore, WeightView

TOKENS_PER_PIECE = 512

Trace = Callable[[str, torch.Tensor], None]
"""Called with each module's name and output, [T, ...] for the T tokens of a piece, as soon as it is computed."""

Rows = Literal["all", "last", "none"]


@dataclass(frozen=True)
class Output:
    """Result of a call for a batch [B, S]. Rows beyond a sequence's length are zero.

    logits: float32 [B, S, V], or [B, 1, V] of each sequence's last token, or None, as asked for.
    hidden: [B, S, n, D], the streams before the head, which `mtp_logits` needs.
    """

    logits: torch.Tensor | None
    hidden: torch.Tensor


class Block:
    """Attention, then experts, each inside a hyper-connection."""

    def __init__(self, config: Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self._attention = Attention(config, layer, weights.view("attn."), rotary, numerics)
        self._experts = MixtureOfExperts(config, layer, weights.view("ffn."), numerics)
        self._around_attention = HyperConnection(config, weights, "attn", numerics)
        self._around_experts = HyperConnection(config, weights, "ffn", numerics)

    def __call__(self, h: torch.Tensor, token_ids: torch.Tensor, call: "Call", name: str) -> torch.Tensor:
        """h [T, n, D] -> [T, n, D]; `name` is the layer's name in the caches and for the trace."""
        eps = self._config.rms_norm_eps
        x, post, comb = self._around_attention.pre(h)
        x = self._numerics.kernels.rms_norm(x, self._weights.vector("attn_norm.weight"), eps)
        output = self._attention(x, call.positions, call.segments, call.layer_caches(name))
        h = self._around_attention.post(output, h, post, comb)
        call.trace(f"{name}.attn", output)
        x, post, comb = self._around_experts.pre(h)
        x = self._numerics.kernels.rms_norm(x, self._weights.vector("ffn_norm.weight"), eps)
        output, experts = self._experts(x, token_ids)
        h = self._around_experts.post(output, h, post, comb)
        call.trace(f"{name}.ffn.gate.experts", experts)
        call.trace(f"{name}.ffn", output)
        call.trace(name, h)
        return h


def _no_trace(name: str, output: torch.Tensor) -> None:
    pass


class Call:
    """The tokens of one call as one flat list, the caches they belong to, and the trace of their modules."""

    def __init__(
        self, cache: Cache, starts: list[int], counts: list[int], device: torch.device, trace: Trace | None = None
    ) -> None:
        self.cache, self.trace = cache, trace or _no_trace
        self.segments: list[Segment] = []
        total = 0
        for sequence, count in enumerate(counts):
            if count:
                self.segments.append(Segment(sequence, total, count, cache.sequences[sequence].length))
            total += count
        parts = [torch.arange(s.position, s.position + s.count) for s in self.segments]
        self.positions = torch.cat(parts).to(device) if parts else torch.empty(0, dtype=torch.int64, device=device)
        rows = [torch.arange(starts[s.sequence], starts[s.sequence] + s.count) for s in self.segments]
        self.sequence = torch.cat([torch.full((s.count,), s.sequence) for s in self.segments]).to(device)
        self.column = torch.cat(rows).to(device)

    def layer_caches(self, name: str) -> list[LayerCache]:
        """The cache of the layer called `layers.L` or `mtp.M`, for each segment."""
        layer = int(name.rpartition(".")[2]) if name.startswith("layers.") else 0
        return [self.cache.sequences[s.sequence].layers[layer] for s in self.segments]

    def finish(self) -> None:
        """Advance the caches by the tokens of the call."""
        for segment in self.segments:
            self.cache.advance(segment.sequence, segment.count)


class MtpBlock:
    """Predicts token t + 2 from the main model's streams at t and token t + 1."""

    def __init__(self, config: Config, stage: int, store: WeightStore, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._numerics = config, numerics
        self._weights = store.view(f"mtp.{stage}.")
        self._name = f"mtp.{stage}"
        self._block = Block(config, config.num_hidden_layers + stage, self._weights, rotary, numerics)
        self.head = Head(config, self._weights, store.view(""), numerics)

    def __call__(self, h: torch.Tensor, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> torch.Tensor:
        """h [T, n, D], embeddings [T, D] of the next tokens and their ids [T] -> streams [T, n, D]."""
        eps, linear, weights = self._config.rms_norm_eps, self._numerics.quantized_linear, self._weights
        norm = self._numerics.kernels.rms_norm
        token = linear(norm(embedded, weights.vector("enorm.weight"), eps), weights.matrix("e_proj.weight"))
        normed = norm(h, weights.vector("hnorm.weight"), eps)
        streams = linear(normed.flatten(0, 1), weights.matrix("h_proj.weight")).view(h.shape)
        return self._block(token.unsqueeze(1) + streams, token_ids, call, self._name)


class Transformer:
    """A loaded model. Made by `dsv4.model.load`."""

    def __init__(self, config: Config, stages: int, store: WeightStore, numerics: Numerics) -> None:
        self.config, self.store, self.numerics, self.device = config, store, numerics, store.device
        self._rotaries = rotaries = {
            kind: Rotary(rotary_frequencies(config, kind), self.device, numerics.kernels) for kind in (False, True)
        }
        self._layers = [
            Block(config, i, store.view(f"layers.{i}."), rotaries[config.ratio(i) > 0], numerics)
            for i in range(config.num_hidden_layers)
        ]
        self._head = Head(config, store.view(""), store.view(""), numerics)
        self._mtp = [
            MtpBlock(config, i, store, rotaries[config.ratio(config.num_hidden_layers + i) > 0], numerics)
            for i in range(stages)
        ]

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has an MTP block that `mtp_logits` can run."""
        return bool(self._mtp)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for the main stack."""
        layers = range(self.config.num_hidden_layers)
        return new_cache(self.config, layers, batch_size, self.numerics.dtype, self.device)

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block, which has its own keys."""
        first = self.config.num_hidden_layers
        return new_cache(self.config, range(first, first + 1), batch_size, self.numerics.dtype, self.device)

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
        hidden = self._new_hidden(token_ids)
        logits = self._new_logits(token_ids, rows)
        for starts, parts in _pieces(counts):
            call = Call(cache, starts, parts, self.device, trace)
            ids = token_ids[call.sequence, call.column]
            h = self._stack(ids, call)
            call.finish()
            hidden[call.sequence, call.column] = h
            if logits is not None:
                _add_logits(logits, self._head, h, call, counts, rows)
        return Output(logits, hidden)

    __call__ = forward

    def _stack(self, ids: torch.Tensor, call: Call) -> torch.Tensor:
        embedded = self.store.embedding(ids).to(self.numerics.dtype)
        h = embedded.unsqueeze(1).expand(-1, self.config.hc_mult, -1).contiguous()
        call.trace("embed", h)
        for number, layer in enumerate(self._layers):
            h = layer(h, ids, call, f"layers.{number}")
        return h

    @torch.inference_mode()
    def mtp_logits(
        self,
        hidden: torch.Tensor,
        next_token_ids: torch.Tensor,
        mtp_cache: Cache,
        *,
        lengths: list[int] | None = None,
        rows: Rows = "all",
        trace: Trace | None = None,
    ) -> torch.Tensor | None:
        """Logits of the token after the next one, float32 [B, S, V] (or [B, 1, V], or None, as `rows` asks).

        hidden [B, S, n, D] from `forward`; next_token_ids int64 [B, S]: the token that follows each position.
        Raises UsageError if the checkpoint has no MTP block of the kind that Flash and Pro have.
        """
        if not self._mtp:
            raise UsageError("this checkpoint has no MTP block that can draft tokens", "Run without --mtp.")
        counts = self._check(next_token_ids, mtp_cache, lengths)
        self._reserve(mtp_cache, counts)
        token_ids = next_token_ids.to(self.device)
        logits, block = self._new_logits(token_ids, rows), self._mtp[0]
        for starts, parts in _pieces(counts):
            call = Call(mtp_cache, starts, parts, self.device, trace)
            ids = token_ids[call.sequence, call.column]
            embedded = self.store.embedding(ids).to(self.numerics.dtype)
            h = block(hidden[call.sequence, call.column], embedded, ids, call)
            call.finish()
            if logits is not None:
                _add_logits(logits, block.head, h, call, counts, rows, "mtp.0.logits")
        return logits

    def _new_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        shape = (*ids.shape, self.config.hc_mult, self.config.hidden_size)
        return torch.zeros(shape, dtype=self.numerics.dtype, device=self.device)

    def _new_logits(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        if rows == "none":
            return None
        shape = (ids.shape[0], ids.shape[1] if rows == "all" else 1, self.config.vocab_size)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _check(self, token_ids: torch.Tensor, cache: Cache, lengths: list[int] | None) -> list[int]:
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
        """Make the rotary tables reach the last position of a call."""
        ends = [sequence.length + count for sequence, count in zip(cache.sequences, counts, strict=True)]
        for rotary in self._rotaries.values():
            rotary.reserve(max(ends, default=0))

    def _check_tokens(self, ids: torch.Tensor, length: int) -> None:
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise UsageError(f"token id {int(wrong[0])} is not in 0..{self.config.vocab_size - 1}")
        if length > self.config.max_position_embeddings:
            raise UsageError(
                f"the context would have {length} tokens, this model has room for {self.config.max_position_embeddings}"
            )


def _pieces(counts: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split a call into pieces of at most TOKENS_PER_PIECE tokens per sequence: columns to start at, and how many."""
    starts = range(0, max(counts, default=0), TOKENS_PER_PIECE)
    return [([s] * len(counts), [min(max(n - s, 0), TOKENS_PER_PIECE) for n in counts]) for s in starts]


def _add_logits(
    logits: torch.Tensor,
    head: Head,
    h: torch.Tensor,
    call: Call,
    counts: list[int],
    rows: Rows,
    name: str = "logits",
) -> None:
    """Compute the logits of a piece's tokens, all or each sequence's last, into their places in `logits`."""
    if rows == "all":
        computed = head(h)
        logits[call.sequence, call.column] = computed
        call.trace(name, computed)
        return
    lengths = torch.tensor(counts, device=h.device)
    last = (call.column == lengths[call.sequence] - 1).nonzero().squeeze(-1)
    if len(last):
        computed = head(h[last])
        logits[call.sequence[last], 0] = computed
        call.trace(name, computed)
