"""The arithmetic of the recorded simulated drafts, as a row of the kernel table.

They were recorded on a CPU, and simulation is chaotic: one value that is rounded another way changes a draft by some
per cent. dsv4 differs from the recording in two things, neither of which is a rule of the model:

    dot products   dsv4 sums float32 in the fixed order of kernels/deterministic.py; the recording sums a block of a
                   quantized matrix, and the dot products of attention, in float64, and rounds to float32 once
    norm of heads  torch's rsqrt for bfloat16 on a CPU also rounds the square root, for those elements of a call that
                   fill no vector of 32; dsv4 rounds once, as a GPU does

`exp`, `sqrt` and sums over a dimension are torch's own in both the recording and here.
"""

from dataclasses import replace

import torch

from dsv4.model.kernels.deterministic import sqrt, tree_sum
from dsv4.model.kernels.reference import KEYS_PER_BLOCK
from dsv4.model.kernels.table import TORCH_DEVICE, KernelTable
from dsv4.model.weights import Matrix

VECTOR = 32  # elements of bfloat16
DRAFT = 5  # positions of a draft, which was one call


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See kernels/reference.py: each block of a quantized matrix in float64, the blocks added up in float32."""
    weight, block = matrix.decode(start, stop), matrix.block.columns
    if matrix.scale is None:
        return (x.to(torch.float32) @ weight.T).to(dtype)
    total = torch.zeros(len(x), len(weight))
    wide = weight.to(torch.float64)
    for part, columns in zip(x.to(torch.float64).split(block, 1), wide.split(block, 1), strict=True):
        total += (part @ columns.T).to(torch.float32)
    return total.to(dtype)


def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor,
    index: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See kernels/reference.py: dot products and sums over keys in float64."""
    keys = torch.cat((window, compressed)).to(torch.float64)[index.to(torch.int64).clamp(min=0)]
    scores = torch.einsum("thc,tjc->thj", q.to(torch.float64), keys).to(torch.float32) * scale
    scores = scores.masked_fill((index < 0).unsqueeze(1), -torch.inf)
    sums, total = torch.zeros(q.shape), torch.zeros(*q.shape[:2], 1)
    largest = torch.full_like(total, -torch.inf)
    for part, values in zip(scores.split(KEYS_PER_BLOCK, 2), keys.split(KEYS_PER_BLOCK, 1), strict=True):
        before, largest = largest, torch.maximum(largest, part.amax(-1, keepdim=True))
        weights, shrink = torch.exp(part - largest), torch.exp(before - largest)
        total = total * shrink + weights.sum(-1, keepdim=True)
        added = torch.einsum("thj,tjc->thc", weights.to(q.dtype).to(torch.float64), values)
        sums = sums * shrink + added.to(torch.float32)
    return (sums / (total + torch.exp(sink.unsqueeze(-1) - largest))).to(q.dtype)


def _rsqrt(x: torch.Tensor) -> torch.Tensor:
    """torch's rsqrt of bfloat16 for the elements of one call."""
    root = sqrt(x.to(torch.float32).flatten())
    whole = len(root) // VECTOR * VECTOR
    root[whole:] = root[whole:].to(x.dtype).to(torch.float32)
    return (1 / root).to(x.dtype).view(x.shape)


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """See kernels/reference_small.py. Here one call has many drafts; the recording had one draft, or main tokens."""
    mean = (tree_sum((q * q).to(torch.float32)) / q.shape[-1]).to(q.dtype)
    calls = mean.split(DRAFT) if len(mean) % DRAFT == 0 else [mean]
    return q * torch.cat([_rsqrt(call + eps) for call in calls]).unsqueeze(-1)


RECORDED: KernelTable = replace(
    TORCH_DEVICE, linear=linear, at_once=None, sparse_attention=sparse_attention, head_norm=head_norm
)
