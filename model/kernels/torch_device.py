"""The large operations on devices other than the CPU: torch's own matrix products.

Weights decode to the same exact values, and everything is rounded where the reference rounds, but the order of sums is
the device's: results agree with the CPU's within the noise of float32, not to the bit.
"""

import torch

from dsv4.model.weights import Matrix

from .reference import KEYS_PER_BLOCK

DECODED_ELEMENTS = 1 << 26  # of a weight decoded at a time


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See reference.linear."""
    stop = matrix.shape[0] if stop is None else stop
    values, rows = x.to(torch.float32), max(1, DECODED_ELEMENTS // matrix.shape[1])
    parts = [values @ matrix.decode(first, min(stop, first + rows)).T for first in range(start, stop, rows)]
    return torch.cat(parts, dim=-1).to(dtype)


def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor,
    index: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See reference.sparse_attention."""
    rounded, listed = q.dtype == torch.bfloat16, index.to(torch.int64)
    keys = torch.cat((window, compressed))[listed.clamp(min=0)].to(torch.float32)  # [T, J, c]
    wide = q.to(torch.float32)
    scores = (wide @ keys.transpose(-1, -2) * scale).masked_fill((listed < 0).unsqueeze(1), -torch.inf)
    sums, total = torch.zeros_like(wide), torch.zeros_like(scores[..., :1])
    largest = torch.full_like(total, -torch.inf)
    for first in range(0, keys.shape[1], KEYS_PER_BLOCK):
        block = scores[..., first : first + KEYS_PER_BLOCK]
        before, largest = largest, torch.maximum(largest, block.amax(-1, keepdim=True))
        weights, shrink = torch.exp(block - largest), torch.exp(before - largest)
        total = total * shrink + weights.sum(-1, keepdim=True)
        weights = weights.to(q.dtype).to(torch.float32) if rounded else weights
        sums = sums * shrink + weights @ keys[:, first : first + KEYS_PER_BLOCK]
    return (sums / (total + torch.exp(sink.unsqueeze(-1) - largest))).to(q.dtype)


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See reference.index_scores."""
    dtype = q.dtype
    dots = (q.to(torch.float32) @ keys.to(torch.float32).T).to(dtype).to(torch.float32).clamp(min=0)
    products = (dots * weights.to(torch.float32).unsqueeze(-1)).to(dtype).to(torch.float32)
    return products.sum(1).to(dtype).to(torch.float32)
