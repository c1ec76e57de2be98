"""The lightning indexer: chooses the compressed keys that a query attends to, on layers with ratio 4.

Separate small FP4 queries and keys score every block that lies fully in the past; the best `index_topk` are
attended to. Ties, which bfloat16 scores do have, go to the older block, so that the choice depends on nothing else.
"""

from collections.abc import Callable

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.weight_store import WeightView

from .compressor import Compressor, simulate_index
from .numerics import Numerics
from .rotary import Rotary


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """scores [T, N], -inf where out of reach -> the best blocks, int32 [T, min(count, N)], best first, then -1.

    Of equal scores the older block is first, whatever N is.
    """
    count = min(count, scores.shape[1])
    if count < scores.shape[1]:
        threshold = scores.topk(count, dim=-1).values[:, -1:]
        above, ties = scores > threshold, scores == threshold
        keep = above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
        columns = keep.nonzero()[:, 1].view(len(scores), count)
        order = scores.gather(1, columns).sort(dim=-1, descending=True, stable=True)
        rows, values = columns.gather(1, order.indices), order.values
    else:
        values, rows = torch.sort(scores, dim=-1, descending=True, stable=True)
    return torch.where(values > -torch.inf, rows, -1).to(torch.int32)


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
        out_of_reach = torch.arange(len(keys), device=q.device) >= past[:, None]
        scores = self._numerics.kernels.index_scores(q, weights, keys)
        return best(scores.masked_fill(out_of_reach, -torch.inf), self._config.index_topk)
