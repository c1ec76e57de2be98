"""Attention: low-rank queries, one shared key that is also the value, window, compressed keys, sink, grouped output.

Queries of a layer see the last `sliding_window` keys and, on layers with a ratio, compressed keys of the blocks that
lie fully in the past: all of them with ratio 128 (HCA), those the indexer chose with ratio 4 (CSA).
A query's keys are always listed in the same order, the window first, oldest first, then compressed keys (HCA: oldest
first, CSA: best first), so sums over them have one order whatever else is computed in the same call.
Tensor parallelism splits o_groups with their heads (wq_b, sink, wo_a), indexer heads, and wo_b (see parallel.py).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.kernels.reference import Product, QueryWeights
from dsv4.model.weight_store import WeightView

from .compressor import KEY_GROUP, Compressor
from .indexer import Indexer
from .numerics import Numerics
from .rotary import Rotary


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in a call: rows [start, start + count) of the flat tensors, from `position` on."""

    sequence: int
    start: int
    count: int
    position: int

    @property
    def rows(self) -> slice:
        """Rows of the flat tensors."""
        return slice(self.start, self.start + self.count)


@lru_cache(maxsize=2)
def window_rows(position: int, count: int, first: int, window: int) -> torch.Tensor:
    """Rows of the window keys of queries `position` ... when the pool starts at position `first`: int32 [count, W].

    Oldest first, and -1 at the end where fewer than W tokens have been seen. The layers of a call share one result,
    which must not be written to.
    """
    query = torch.arange(position, position + count)[:, None]
    key = (query - window + 1).clamp(min=0) + torch.arange(window)
    return torch.where(key <= query, key - first, -1).to(torch.int32)


@lru_cache(maxsize=2)
def finished_blocks(position: int, count: int, blocks: int, ratio: int) -> torch.Tensor:
    """The compressed keys that queries `position` ... see without an indexer: int32 [count, blocks].

    Column b is b if the last token of block b is the query or before it, else -1. Shared as `window_rows`.
    """
    finished = (torch.arange(position, position + count) + 1) // ratio
    block = torch.arange(blocks, dtype=torch.int32)
    return torch.where(block < finished[:, None], block, -1).to(torch.int32)


def joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The outputs of all segments, [count, H, c] each, as one flat tensor; a single one is not copied."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class WindowAttention:
    """The parts of an attention sublayer that all architectures have.

    Their own are whether each head of a query is normed, and how many numbers of a key, the first ones, are quantized,
    in groups of how many.
    """

    norm_heads: ClassVar[bool]
    key_group: ClassVar[int]

    def __init__(self, config: Config, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._rotary, self._numerics = config, weights, rotary, numerics

    def _quantized_dims(self) -> int:
        """Numbers of a key, the first ones, that the cache holds quantized."""
        raise NotImplementedError

    def _quantized_key(self) -> tuple[int, int]:
        """The same where quantization is simulated, else 0, and the FP8 group of these numbers."""
        return self._quantized_dims() if self._numerics.simulation else 0, self.key_group

    def queries_and_keys(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D] -> low-rank query [T, q_lora_rank], rotated queries [T, H, c], rotated keys [T, c].

        Keys are as the cache holds them.
        """
        at_once = self._numerics.kernels.queries_at_once
        if at_once is not None and self._weights.keep_everything:
            cos, sin, _ = self._rotary.both_ways(positions)
            found = at_once(x, self._query_weights, cos, sin)
            if found is not None:
                return found
        x = self._numerics.quantize(x)
        products = [Product(x, self._weights.matrix(name)) for name in ("wq_a.weight", "wkv.weight")]
        low, kv = (x.new_empty(len(x), product.matrix.shape[0]) for product in products)
        self._numerics.kernels.linears_into(products, [low, kv])
        return *self._queries(low, positions), self._keys(kv, positions)

    @cached_property
    def _query_weights(self) -> QueryWeights:
        """Where all of them stay in memory."""
        matrix, vector, (quantized, key_group) = self._weights.matrix, self._weights.vector, self._quantized_key()
        return QueryWeights(
            matrix("wq_a.weight"), matrix("wkv.weight"), matrix("wq_b.weight"), vector("q_norm.weight"),
            vector("kv_norm.weight"), self._config.rms_norm_eps, self.norm_heads, self._numerics.input_group,
            quantized, key_group,
        )  # fmt: skip

    def keys(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> rotated keys [T, c], as the cache holds them."""
        return self._keys(self._numerics.quantized_linear(x, self._weights.matrix("wkv.weight")), positions)

    def _queries(self, low: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product with wq_a [T, q_lora_rank] -> the same normed, and the rotated queries [T, H, c]."""
        config, numerics = self._config, self._numerics
        qr = numerics.kernels.rms_norm(low, self._weights.vector("q_norm.weight"), config.rms_norm_eps)
        q = numerics.quantized_linear(qr, self._weights.matrix("wq_b.weight"))
        q = torch.unflatten(q, -1, (-1, config.head_dim))
        q = numerics.kernels.head_norm(q, config.rms_norm_eps) if self.norm_heads else q
        return qr, self._rotary.rotate(q, positions)

    def _keys(self, kv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The product with wkv [T, c] -> rotated keys [T, c]."""
        kernels, (quantized, group) = self._numerics.kernels, self._quantized_key()
        kv = kernels.rms_norm(kv, self._weights.vector("kv_norm.weight"), self._config.rms_norm_eps)
        kv = self._rotary.rotate(kv, positions)
        return kernels.simulate_key(kv, quantized, group) if quantized else kv

    def _attend_cached(
        self, q: torch.Tensor, segment: Segment, cache: LayerCache, compressed: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """q [count, H, c] over the window of `cache` and the rows `chosen` int32 [count, most] of compressed keys."""
        index = window_rows(segment.position, segment.count, cache.window.start, self._config.sliding_window).to(
            q.device
        )
        if chosen.shape[1]:
            index = self._numerics.kernels.list_keys(index, chosen.to(q.device), len(cache.window))
        return self.attend(q, cache.window.rows(), compressed, index)

    def attend(
        self, q: torch.Tensor, window: torch.Tensor, compressed: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Queries [S, H, c] over the keys that `index` lists, see the kernel `sparse_attention`; [S, H, c]."""
        sink, scale = self._weights.vector("attn_sink"), self._config.head_dim**-0.5
        return self._numerics.kernels.sparse_attention(q, window, compressed, index, sink, scale)

    def project(self, output: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, H, c] -> [T, D]: rotated back; each group of heads through its rows of wo_a, all groups through wo_b."""
        numerics, weights, at_once = self._numerics, self._weights, self._numerics.kernels.project_at_once
        if at_once is not None and weights.keep_everything and numerics.group.count == 1:
            cos, _, back = self._rotary.both_ways(positions)
            wo_a, wo_b = weights.matrix("wo_a.weight"), weights.matrix("wo_b.weight")
            found = at_once(output, cos, back, wo_a, wo_b, self._config.o_groups, numerics.input_group)
            if found is not None:
                return found
        low = self._low_rank(self._rotary.rotate(output, positions, inverse=True))
        return numerics.group.all_gather(numerics.quantized_linear(low, weights.matrix("wo_b.weight")))

    def _low_rank(self, output: torch.Tensor) -> torch.Tensor:
        """[T, H, c] -> [T, o_groups * o_lora_rank]. Lets go of wo_a before wo_b is asked for: one may be in memory."""
        numerics, rank, ranks = self._numerics, self._config.o_lora_rank, self._numerics.group
        matrix, count = self._weights.matrix("wo_a.weight"), self._config.o_groups // ranks.count
        groups = torch.unflatten(output, 1, (count, -1)).flatten(2)
        products = [Product(groups[:, g], matrix, g * rank, (g + 1) * rank) for g in range(count)]
        low = groups.new_empty(len(groups), count * rank)
        numerics.kernels.linears_into(products, torch.split(low, rank, dim=-1))
        return ranks.all_gather(low)


class Attention(WindowAttention):
    """One attention sublayer of V4: heads are normed, and the rotary dims of a key are not quantized."""

    norm_heads, key_group = True, KEY_GROUP

    def __init__(self, config: Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        super().__init__(config, weights, rotary, numerics)
        self._ratio = config.ratio(layer)
        self._compressor = self._indexer = None
        if self._ratio:
            self._compressor = Compressor(config, weights.view("compressor."), rotary, numerics)
        if self._ratio == OVERLAP_RATIO:
            self._indexer = Indexer(config, weights.view("indexer."), rotary, numerics)

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor, segments: list[Segment], caches: list[LayerCache]
    ) -> torch.Tensor:
        """x [T, D] with absolute positions int64 [T]; caches one per segment, advanced here. -> [T, D]."""
        qr, q, kv = self.queries_and_keys(x, positions)
        raw = None if self._compressor is None else self._compressor.raw(x, positions)
        index = None
        if self._indexer is not None:
            index = (*self._indexer.queries(x, qr, positions), self._indexer.compressor.raw(x, positions))
        outputs = []
        for segment, cache in zip(segments, caches, strict=True):
            cache.window.append(kv[segment.rows])
            if self._compressor is not None and raw is not None and cache.compressor is not None:
                self._compressor.advance(cache.compressor, raw[segment.rows], segment.position)
            chosen = self._compressed_rows(segment, cache, index)
            compressed = cache.window.rows()[:0] if cache.compressor is None else cache.compressor.entries.rows()
            outputs.append(self._attend_cached(q[segment.rows], segment, cache, compressed, chosen))
        return self.project(joined(outputs), positions)

    def _quantized_dims(self) -> int:
        return self._config.head_dim - self._config.qk_rope_head_dim

    def _compressed_rows(
        self,
        segment: Segment,
        cache: LayerCache,
        index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The compressed keys of each query, int32 [count, most], -1 where there are fewer."""
        if index is not None and self._indexer is not None and cache.indexer is not None:
            q, weights, raw = (part[segment.rows] for part in index)
            self._indexer.compressor.advance(cache.indexer, raw, segment.position)
            return self._indexer.choose(cache, q, weights, segment.position)
        if cache.compressor is None:
            return torch.empty(segment.count, 0, dtype=torch.int32)
        return finished_blocks(segment.position, segment.count, cache.compressor.entries.length, self._ratio)
