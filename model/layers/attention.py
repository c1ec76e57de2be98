"""Attention: low-rank queries, one shared key that is also the value, window, compressed keys, sink, grouped output.

Queries of a layer see the last `sliding_window` keys and, on layers with a ratio, compressed keys of the blocks that
lie fully in the past: all of them with ratio 128 (HCA), those the indexer chose with ratio 4 (CSA).
A query's keys are always listed in the same order, the window first, oldest first, then compressed keys (HCA: oldest
first, CSA: best first), so sums over them have one order whatever else is computed in the same call.
Tensor parallelism splits o_groups with their heads (wq_b, sink, wo_a), indexer heads, and wo_b (see parallel.py).
"""

from dataclasses import dataclass

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.weight_store import WeightView

from .compressor import Compressor, simulate_key
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


def window_rows(position: int, count: int, first: int, window: int) -> torch.Tensor:
    """Rows of the window keys of queries `position` ... when the pool starts at position `first`: int32 [count, W].

    Oldest first, and -1 at the end where fewer than W tokens have been seen.
    """
    query = torch.arange(position, position + count)[:, None]
    key = (query - window + 1).clamp(min=0) + torch.arange(window)
    return torch.where(key <= query, key - first, -1).to(torch.int32)


def finished_blocks(position: int, count: int, blocks: int, ratio: int) -> torch.Tensor:
    """The compressed keys that queries `position` ... see without an indexer: int32 [count, blocks].

    Column b is b if the last token of block b is the query or before it, else -1.
    """
    finished = (torch.arange(position, position + count) + 1) // ratio
    block = torch.arange(blocks, dtype=torch.int32)
    return torch.where(block < finished[:, None], block, -1).to(torch.int32)


class Attention:
    """One attention sublayer."""

    def __init__(self, config: Config, layer: int, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._rotary, self._numerics = config, weights, rotary, numerics
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
        quantized = self._numerics.quantize(x)
        qr, q = self._queries(quantized, positions)
        kv = self._keys(quantized, positions)
        raw = None if self._compressor is None else self._compressor.raw(x, positions)
        index = None
        if self._indexer is not None:
            index = (*self._indexer.queries(x, qr, positions), self._indexer.compressor.raw(x, positions))
        output = torch.empty_like(q)
        for segment, cache in zip(segments, caches, strict=True):
            cache.window = torch.cat((cache.window, kv[segment.rows]))
            if self._compressor is not None and raw is not None and cache.compressor is not None:
                self._compressor.advance(cache.compressor, raw[segment.rows], segment.position)
            chosen = self._compressed_rows(segment, cache, index)
            output[segment.rows] = self._attend(q[segment.rows], segment, cache, chosen)
        return self._project(self._rotary.rotate(output, positions, inverse=True))

    def _queries(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, numerics, kernels = self._config, self._numerics, self._numerics.kernels
        qr = numerics.product(x, self._weights.matrix("wq_a.weight"))
        qr = kernels.rms_norm(qr, self._weights.vector("q_norm.weight"), config.rms_norm_eps)
        q = numerics.quantized_linear(qr, self._weights.matrix("wq_b.weight"))
        normed = kernels.head_norm(torch.unflatten(q, -1, (-1, config.head_dim)), config.rms_norm_eps)
        return qr, self._rotary.rotate(normed, positions)

    def _keys(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        config = self._config
        kv = self._numerics.product(x, self._weights.matrix("wkv.weight"))
        kv = self._numerics.kernels.rms_norm(kv, self._weights.vector("kv_norm.weight"), config.rms_norm_eps)
        return simulate_key(self._rotary.rotate(kv, positions), config.qk_rope_head_dim, self._numerics)

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

    def _attend(self, q: torch.Tensor, segment: Segment, cache: LayerCache, chosen: torch.Tensor) -> torch.Tensor:
        config = self._config
        window = window_rows(segment.position, segment.count, cache.window_start, config.sliding_window)
        chosen = torch.where(chosen < 0, -1, chosen + len(cache.window)).to(torch.int32)
        compressed = cache.window[:0] if cache.compressor is None else cache.compressor.entries.rows()
        index = torch.cat((window.to(q.device), chosen.to(q.device)), dim=1)
        sink, scale = self._weights.vector("attn_sink"), config.head_dim**-0.5
        return self._numerics.kernels.sparse_attention(q, cache.window, compressed, index, sink, scale)

    def _project(self, output: torch.Tensor) -> torch.Tensor:
        """[T, H, c] -> [T, D]: each group of heads through its rows of wo_a, all groups through wo_b."""
        numerics, rank = self._numerics, self._config.o_lora_rank
        matrix, ranks = self._weights.matrix("wo_a.weight"), self._numerics.group
        count = self._config.o_groups // ranks.count
        groups = torch.unflatten(output, 1, (count, -1)).flatten(2)
        linear, dtype = numerics.kernels.linear, numerics.dtype
        parts = [linear(groups[:, g], matrix, g * rank, (g + 1) * rank, dtype) for g in range(count)]
        low = ranks.all_gather(torch.cat(parts, dim=-1))
        return ranks.all_gather(numerics.quantized_linear(low, self._weights.matrix("wo_b.weight")))
