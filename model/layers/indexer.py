"""The lightning indexer: chooses the compressed keys that a query attends to, on layers with ratio 4.

Separate small FP4 queries and keys score every block that lies fully in the past; the best `index_topk` are
attended to. Ties, which bfloat16 scores do have, go to the older block, so that the choice depends on nothing else.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.kernels.table import KernelTable
from dsv4.model.weight_store import WeightView

from .compressor import Compressor, simulate_index
from .numerics import Numerics
from .rotary import Rotary

SCORES_AT_ONCE = 1 << 18  # whose integers stay in the processor's cache
BYTES_PER_SCORE = 48  # while the best are chosen


def best_in_reach(
    kernels: KernelTable, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, reach: torch.Tensor, count: int
) -> torch.Tensor:
    """The best of the first `reach` [S] blocks for each query, as `best`; q [S, heads, d], keys [N, d].

    Some queries at a time, so that memory does not grow with the context.
    """
    together = max(1, SCORES_AT_ONCE // max(1, len(keys)))
    chosen = []
    for first in range(0, len(q), together):
        some = slice(first, first + together)
        chosen.append(kernels.best_in_reach(kernels.index_scores(q[some], weights[some], keys), reach[some], count))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


@lru_cache(maxsize=2)
def blocks_in_reach(position: int, count: int) -> torch.Tensor:
    """How many blocks lie in the past of queries `position` ...: int64 [count]. The layers of a call share it."""
    return (torch.arange(position, position + count) + 1) // OVERLAP_RATIO


class IndexQueries:
    """The queries of an indexer: `simulate` quantizes them as the release does."""

    def __init__(
        self,
        config: Config,
        weights: WeightView,
        rotary: Rotary,
        numerics: Numerics,
        simulate: Callable[[torch.Tensor, Numerics], torch.Tensor],
    ) -> None:
        self._config, self._weights, self._rotary, self._numerics = config, weights, rotary, numerics
        self._simulate = simulate
        self._scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5  # of the head weights

    def queries(self, x: torch.Tensor, qr: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] and the attention's low-rank query [T, q_lora_rank] -> q [T, heads, d], head weights [T, heads]."""
        config, dtype = self._config, self._numerics.dtype
        q = self._numerics.group.all_gather(self._numerics.quantized_linear(qr, self._weights.matrix("wq_b.weight")))
        q = self._rotary.rotate(torch.unflatten(q, -1, (config.index_n_heads, config.index_head_dim)), positions)
        weights = self._numerics.linear(x, self._weights.matrix("weights_proj.weight")).to(dtype)
        return self._simulate(q, self._numerics), (weights * self._scale).to(dtype)


class Indexer(IndexQueries):
    """The indexer of one layer of V4: scores every block, chooses the best."""

    def __init__(self, config: Config, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        super().__init__(config, weights, rotary, numerics, simulate_index)
        self.compressor = Compressor(config, weights.view("compressor."), rotary, numerics, index=True)

    def queries(self, x: torch.Tensor, qr: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `IndexQueries.queries`."""
        numerics, weights, at_once = self._numerics, self._weights, self._numerics.kernels.index_queries_at_once
        if at_once is not None and weights.keep_everything and numerics.group.count == 1:
            cos, sin, _ = self._rotary.both_ways(positions)
            wq_b, proj = weights.matrix("wq_b.weight"), weights.matrix("weights_proj.weight")
            found = at_once(x, qr, wq_b, proj, cos, sin, self._scale, numerics.input_group)
            if found is not None:
                return found
        return super().queries(x, qr, positions)

    def choose(self, cache: LayerCache, q: torch.Tensor, weights: torch.Tensor, position: int) -> torch.Tensor:
        """The blocks that each query of one sequence attends to, int32 [S, most], best first, then -1.

        The first query is at `position`; `cache` already holds the blocks that this call finished.
        """
        assert cache.indexer is not None
        keys = cache.indexer.entries.rows()
        past = blocks_in_reach(position, len(q)).to(q.device)
        return best_in_reach(self._numerics.kernels, q, weights, keys, past, self._config.index_topk)
