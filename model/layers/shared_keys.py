"""V4.1's compressed keys and top-k lists, which a few source layers make and the layers after them read.

A KV source compresses groups of 1 or 2 tokens of its own input into one key each, without overlap: of 2 tokens the sum
weighted per dimension by the softmax of their gates. From the same vector, before its rotation, comes the group's index
key. An index source chooses for every query the groups that it and the layers up to the next index source attend to.
The candidate source also keeps some blocks of groups, and later index sources choose inside of these.
"""

from dataclasses import dataclass

import torch

from dsv4.model.cache import CompressorState, LayerCache
from dsv4.model.config import Config
from dsv4.model.kernels.reference_small import best
from dsv4.model.weight_store import WeightView
from dsv4.quant.activation import simulate_fp4, simulate_fp4_e4m3

from .indexer import SCORES_AT_ONCE, IndexQueries
from .numerics import Numerics
from .rotary import Rotary

FEW = 2  # from so many times the groups of all candidate blocks on, only these are scored


def simulate_index_fp4(x: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """A query or key of the indexer [..., d] as FP4; V4.1 does not rotate it before."""
    return simulate_fp4(x) if numerics.simulation else x


class KeySource:
    """The compressor of a KV source: the groups' keys and index keys."""

    def __init__(self, config: Config, weights: WeightView, ratio: int, rotary: Rotary, numerics: Numerics) -> None:
        self._config, self._weights, self._ratio = config, weights, ratio
        self._rotary, self._numerics = rotary, numerics

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> float32 [T, 2, c]: what each token gives to its group, and its gate (0 where it is alone)."""
        kv = self._numerics.linear(x, self._weights.matrix("compressor.wkv.weight"))
        alone = self._ratio == 1
        gate = self._numerics.linear(x, self._weights.matrix("compressor.wgate.weight")) if not alone else kv * 0
        return torch.stack((kv, gate), dim=1)

    def advance(self, cache: LayerCache, raw: torch.Tensor, position: int) -> None:
        """Add the raw tokens of one sequence, the first at `position`, and compress the groups they finish."""
        state, index = cache.compressor, cache.indexer
        assert state is not None and index is not None, "a KV source has both"
        state.raw.append(raw)
        first, last = state.entries.length, (position + len(raw)) // self._ratio
        if last > first:
            keys, index_keys = self._compress(_groups(state, first, last), first)
            state.entries.append(keys)
            index.entries.append(index_keys)

    def _compress(self, groups: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups float32 [n, 2, c, ratio], the first of which is number `first` -> keys [n, c], index keys [n, d]."""
        numerics, eps = self._numerics, self._config.rms_norm_eps
        norm, weights = numerics.kernels.rms_norm, self._weights
        pooled = numerics.kernels.pool(groups[:, 0], groups[:, 1]).to(numerics.dtype)
        z = norm(pooled, weights.vector("compressor.norm.weight"), eps)
        starts = torch.arange(first, first + len(z), device=z.device) * self._ratio
        index = numerics.linear(z, weights.matrix("indexer.wk.weight")).to(numerics.dtype)
        index = norm(index, weights.vector("indexer.k_norm.weight"), eps)
        keys = self._rotary.rotate(z, starts)
        if numerics.simulation:
            keys = simulate_fp4_e4m3(keys)
        return keys, simulate_index_fp4(self._rotary.rotate(index, starts), numerics)


def _groups(state: CompressorState, first: int, last: int) -> torch.Tensor:
    """The raw tokens of groups [first, last): float32 [groups, 2, c, ratio]."""
    ratio, raw, start = state.ratio, state.raw.rows(), state.raw.start
    own = torch.unflatten(raw[first * ratio - start : last * ratio - start], 0, (last - first, ratio))
    return own.permute(0, 2, 3, 1)


@dataclass
class Selection:
    """Of one sequence in one call: what the latest index source chose, and the blocks that later ones choose from.

    chosen: int32 [count, most], ascending, then -1. blocks: int32 [count, most], -1 where there are fewer; None before
    the candidate source.
    """

    chosen: torch.Tensor
    blocks: torch.Tensor | None = None


def nothing_chosen(count: int) -> Selection:
    """The selection of `count` queries before the first index source."""
    return Selection(torch.empty(count, 0, dtype=torch.int32))


def in_ascending_order(chosen: torch.Tensor) -> torch.Tensor:
    """int32 [T, k] with -1 where there is none -> the same numbers in ascending order, then -1."""
    last = torch.iinfo(torch.int32).max
    ordered = torch.where(chosen < 0, last, chosen).sort(dim=-1).values
    return torch.where(ordered == last, -1, ordered)


def candidate_blocks(scores: torch.Tensor, visible: torch.Tensor, blocks: int, size: int) -> torch.Tensor:
    """The best blocks of `size` groups: scores [T, N], -inf where out of reach -> int32 [T, most], then -1.

    A block counts as its best group; the block of the newest of a query's `visible` [T] groups is always kept.
    """
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % size), value=-torch.inf)
    by_block = torch.unflatten(padded, 1, (-1, size)).amax(-1)
    newest = torch.div(visible - 1, size, rounding_mode="floor")
    number = torch.arange(by_block.shape[1], device=scores.device)
    return best(by_block.masked_fill(number == newest[:, None], torch.inf), blocks)


def groups_outside(blocks: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """Blocks int32 [T, k], -1 where there is none -> the groups in none of them, bool [T, groups]."""
    count = -(-groups // size)
    outside = torch.ones(len(blocks), count + 1, dtype=torch.bool, device=blocks.device)
    outside.scatter_(1, torch.where(blocks < 0, count, blocks).to(torch.int64), False)
    return outside[:, :count].repeat_interleave(size, 1)[:, :groups]


class IndexSource(IndexQueries):
    """The indexer of an index source."""

    def __init__(
        self,
        config: Config,
        weights: WeightView,
        ratio: int,
        rotary: Rotary,
        numerics: Numerics,
        block_size: int,
        blocks_to_keep: int | None,
    ) -> None:
        """block_size: groups in a block. blocks_to_keep: of the candidate source, None for the others."""
        super().__init__(config, weights, rotary, numerics, simulate_index_fp4)
        self._ratio, self._block_size, self._blocks_to_keep = ratio, block_size, blocks_to_keep

    def choose(
        self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, position: int, before: Selection
    ) -> Selection:
        """The groups for the queries [S, heads, d] of one sequence, the first at `position`, over index keys [N, d].

        before: of the index source before this one.
        """
        visible = (torch.arange(position, position + len(q), device=q.device) + 1) // self._ratio
        if before.blocks is not None and len(keys) >= FEW * before.blocks.shape[1] * self._block_size:
            return Selection(self._among(q, weights, keys, visible, before.blocks), before.blocks)
        together, chosen, blocks = max(1, SCORES_AT_ONCE // max(1, len(keys))), [], []
        for first in range(0, len(q), together):
            some = slice(first, first + together)
            scores = self._scores(q[some], weights[some], keys, visible[some])
            if self._blocks_to_keep is not None:
                blocks.append(candidate_blocks(scores, visible[some], self._blocks_to_keep, self._block_size))
            elif before.blocks is not None:
                outside = groups_outside(before.blocks[some], len(keys), self._block_size)
                scores = scores.masked_fill(outside, -torch.inf)
            chosen.append(in_ascending_order(best(scores, self._config.index_topk)))
        return Selection(torch.cat(chosen), torch.cat(blocks) if blocks else before.blocks)

    def _among(
        self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, blocks: torch.Tensor
    ) -> torch.Tensor:
        """What `choose` takes from the candidate blocks, where these are few: other groups are not scored at all."""
        chosen = torch.full((len(q), self._config.index_topk), -1, dtype=torch.int32, device=q.device)
        inside = torch.arange(self._block_size, device=q.device)
        for row, kept in enumerate(blocks):
            groups = (kept[kept >= 0].sort().values[:, None] * self._block_size + inside).flatten()
            groups = groups[groups < visible[row]]
            scores = self._numerics.kernels.index_scores(q[row : row + 1], weights[row : row + 1], keys[groups])
            found = in_ascending_order(best(scores, self._config.index_topk))[0]
            chosen[row, : len(found)] = groups[found].to(torch.int32)
        return chosen

    def _scores(
        self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """The score of every group, float32 [S, N], -inf for those that a query does not see."""
        out_of_reach = torch.arange(len(keys), device=q.device) >= visible[:, None]
        return self._numerics.kernels.index_scores(q, weights, keys).masked_fill(out_of_reach, -torch.inf)
