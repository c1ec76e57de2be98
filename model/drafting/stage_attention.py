"""Attention of a DSpark stage: a block of queries that all see the same keys, those of the block itself included.

A stage has the weights of an attention sublayer with a sliding window. Its keys of earlier positions come from the main
model's hidden states; those of the block from the block's own input, by the same matrix. No query is masked: the first
one sees the last one's key.
"""

from collections.abc import Sequence

import torch

from dsv4.model.layers.attention import WindowAttention


class StageAttention:
    """The attention of one stage, made of the parts of a sublayer without a compressor."""

    def __init__(self, parts: WindowAttention) -> None:
        self._parts = parts

    def keys(self, main_x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """main_x [T, D] of positions int64 [T] -> [T, c], what drafts see of these positions."""
        return self._parts.keys(main_x, positions)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """x [k * B, D], the blocks of k drafts, and the earlier keys [n, c] of each -> [k * B, D]."""
        _, q, own = self._parts.queries_and_keys(x, positions)
        blocks = zip(before, q.chunk(len(before)), own.chunk(len(before)), strict=True)
        return self._parts.project(torch.cat([self._block(*each) for each in blocks]), positions)

    def _block(self, before: torch.Tensor, q: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, c] over all of the keys before [n, c] and of the block [B, c] -> [B, H, c]."""
        every = torch.arange(len(before) + len(own), dtype=torch.int32, device=q.device).expand(len(q), -1)
        return self._parts.attend(q, before, own, every)
