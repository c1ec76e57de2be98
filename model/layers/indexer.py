"""The lightning indexer: chooses the compressed keys that a query attends to, on layers with ratio 4.

Separate small FP4 queries and keys score every block that lies fully in the past; the best `index_topk` are
attended to. Ties, which bfloat16 scores do have, go to the older block, so that the choice depends on nothing else.
"""

from collections.abc import Callable

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.kernels.table import KernelTable
from dsv4.model.weight_store import WeightView

from .compressor import Compressor, simulate_index
from .numerics import Numerics
from .rotary import Rotary

LAST_COLUMN = 2**32 - 1
ORDERED_MINUS_INFINITY = -0x7F800001
SCORES_AT_ONCE = 1 << 18  # whose integers stay in the processor's cache
BYTES_PER_SCORE = 48  # while the best are chosen


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """scores [T, N], -inf where out of reach -> the best blocks, int32 [T, min(count, N)], best first, then -1.

    Of equal scores the older block is first, whatever N is. Each score becomes an integer that no other block has: the
    bits of the float32, turned so that integers are in the order of the values, above the block's distance from the
    largest number. So a partial selection has one result.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(LAST_COLUMN, LAST_COLUMN - scores.shape[1], -1, device=scores.device)
    chosen = (ordered.to(torch.int64) * 2**32 + columns).topk(min(count, scores.shape[1])).values
    column, value = LAST_COLUMN - (chosen & LAST_COLUMN), chosen >> 32
    return torch.where(value > ORDERED_MINUS_INFINITY, column, -1).to(torch.int32)


def best_in_reach(
    kernels: KernelTable, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, reach: torch.Tensor, count: int
) -> torch.Tensor:
    """The best of the first `reach` [S] blocks for each query, as `best`; q [S, heads, d], keys [N, d].

    Some queries at a time, so that memory does not grow with the context.
    """
    together = max(1, SCORES_AT_ONCE // max(1, len(keys)))
    block, chosen = torch.arange(len(keys), device=q.device), []
    for first in range(0, len(q), together):
        some = slice(first, first + together)
        scores = kernels.index_scores(q[some], weights[some], keys)
        chosen.append(best(scores.masked_fill_(block >= reach[some, None], -torch.inf), count))
    return torch.cat(chosen)


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

    def queries(self, x: torch.Tensor, qr: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] and the attention's low-rank query [T, q_lora_rank] -> q [T, heads, d], head weights [T, heads]."""
        config, dtype = self._config, self._numerics.dtype
        q = self._numerics.group.all_gather(self._numerics.quantized_linear(qr, self._weights.matrix("wq_b.weight")))
        q = self._rotary.rotate(torch.unflatten(q, -1, (config.index_n_heads, config.index_head_dim)), positions)
        scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        weights = self._numerics.linear(x, self._weights.matrix("weights_proj.weight")).to(dtype)
        return self._simulate(q, self._numerics), (weights * scale).to(dtype)


class Indexer(IndexQueries):
    """The indexer of one layer of V4: scores every block, chooses the best."""

    def __init__(self, config: Config, weights: WeightView, rotary: Rotary, numerics: Numerics) -> None:
        super().__init__(config, weights, rotary, numerics, simulate_index)
        self.compressor = Compressor(config, weights.view("compressor."), rotary, numerics, index=True)

    def choose(self, cache: LayerCache, q: torch.Tensor, weights: torch.Tensor, position: int) -> torch.Tensor:
        """The blocks that each query of one sequence attends to, int32 [S, most], best first, then -1.

        The first query is at `position`; `cache` already holds the blocks that this call finished.
        """
        assert cache.indexer is not None
        keys = cache.indexer.entries.rows()
        past = (torch.arange(position, position + len(q), device=q.device) + 1) // OVERLAP_RATIO
        return best_in_reach(self._numerics.kernels, q, weights, keys, past, self._config.index_topk)
