"""The lightning indexer: which compressed keys a query looks at, on layers with ratio 4.

Small FP4 queries and keys of their own score every block that lies fully in the past; the best `index_topk` are
attended to. Ties, which bfloat16 scores do have, go to the older block, so that the choice depends on nothing else.
"""

import torch

from .cache import LayerCache
from .compressor import Compressor, simulate_index
from .config import OVERLAP_RATIO, Config
from .layers import Arithmetic, Rotary
from .residency import Scope


def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """scores [T, N], -inf where a block is out of reach -> the best `count` blocks of each row, bool [T, N]."""
    reachable = scores > -torch.inf
    if scores.shape[1] <= count:
        return reachable
    threshold = scores.topk(count, dim=-1).values[:, -1:]
    above, ties = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    return (above | (ties & (ties.cumsum(-1) <= room))) & reachable


def as_rows(selected: torch.Tensor) -> torch.Tensor:
    """bool [T, N] -> int32 [T, most]: the selected columns of each row in ascending order, then -1."""
    counts = selected.sum(-1)
    most = int(counts.max()) if len(counts) else 0
    rows = torch.full((len(selected), most), -1, dtype=torch.int32, device=selected.device)
    row, column = selected.nonzero(as_tuple=True)
    rows[row, (selected.cumsum(-1) - 1)[row, column]] = column.to(torch.int32)
    return rows


class Indexer:
    """Scores and choice for one layer."""

    def __init__(self, config: Config, weights: Scope, rotary: Rotary, arithmetic: Arithmetic) -> None:
        self._config, self._weights, self._rotary, self._arithmetic = config, weights, rotary, arithmetic
        self.compressor = Compressor(config, weights.scope("compressor."), rotary, arithmetic, index=True)

    def queries(self, x: torch.Tensor, qr: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] and the attention's low-rank query [T, q_lora_rank] -> q [T, heads, d], head weights [T, heads]."""
        config, dtype = self._config, self._arithmetic.dtype
        q = self._arithmetic.quantized_linear(qr, self._weights.matrix("wq_b.weight"))
        q = self._rotary.rotate(q.unflatten(-1, (config.index_n_heads, config.index_head_dim)), positions)
        scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        weights = self._arithmetic.linear(x, self._weights.matrix("weights_proj.weight")).to(dtype)
        return simulate_index(q, self._arithmetic), (weights * scale).to(dtype)

    def choose(self, cache: LayerCache, q: torch.Tensor, weights: torch.Tensor, position: int) -> torch.Tensor:
        """The blocks that each query of one sequence attends to, int32 [S, most], ascending, then -1.

        The first query is at `position`; `cache` already holds the blocks that this call finished.
        """
        assert cache.indexer is not None
        keys = cache.indexer.entries.rows()
        past = (torch.arange(position, position + len(q), device=q.device) + 1) // OVERLAP_RATIO
        reachable = torch.arange(len(keys), device=q.device) < past[:, None]
        if len(keys) <= self._config.index_topk:
            return as_rows(reachable)
        scores = self._arithmetic.operations.index_scores(q, weights, keys)
        return as_rows(select(scores.masked_fill(~reachable, -torch.inf), self._config.index_topk))
