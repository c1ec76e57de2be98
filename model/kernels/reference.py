"""The three large operations, each in one plain reference form.

    linear            x @ W.T for a stored Matrix
    sparse_attention  attention of every query over its own list of keys, with a sink
    index_scores      the lightning indexer's score of every compressed block

The reference forms, here and in reference_small.py, define the result to the bit (deterministic.py defines the order
of sums); `cpu.py` has the same bits, faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dsv4 import compiled
from dsv4.model.weights import Matrix

from .deterministic import exp, lane_dot, lane_sum, tree_sum

# Elements of the largest temporary of the reference forms. Bounds memory and keeps the work in cache.
TILE_ELEMENTS = 1 << 18
KEYS_PER_BLOCK = compiled.constant("KEYS_PER_BLOCK")  # of the released attention kernel


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """x [M, in] (any float dtype) @ rows [start, stop) of the matrix -> [M, out]: float32, then rounded to `dtype`."""
    stop = matrix.shape[0] if stop is None else stop
    values = x.to(torch.float32)
    result = torch.empty(len(values), stop - start, dtype=torch.float32)
    columns = max(64, TILE_ELEMENTS // max(1, x.shape[-1]))
    for first in range(start, stop, columns):
        last = min(stop, first + columns)
        weight = matrix.decode(first, last)
        rows = max(1, TILE_ELEMENTS // (16 * len(weight)))
        for row in range(0, len(values), rows):
            result[row : row + rows, first - start : last - start] = lane_dot(values[row : row + rows], weight)
    return result.to(dtype)


class Product(NamedTuple):
    """x [M, in] times rows [start, stop) of a matrix; see `linear`."""

    x: torch.Tensor
    matrix: Matrix
    start: int = 0
    stop: int | None = None


class Expert(NamedTuple):
    """The three matrices of an expert, in the order of use: w1 and w3 [inner, D], w2 [D, inner]."""

    w1: Matrix
    w3: Matrix
    w2: Matrix


@dataclass(frozen=True)
class Experts:
    """Every routed expert of a layer, then the shared one, all in memory. `kept` is for kernels, as in `Matrix`."""

    matrices: Sequence[Expert]
    kept: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)


class QueryWeights(NamedTuple):
    """What queries and keys are made with, see layers/attention.py; norms float32."""

    wq_a: Matrix
    wkv: Matrix
    wq_b: Matrix
    q_norm: torch.Tensor
    kv_norm: torch.Tensor
    eps: float
    norm_heads: bool
    group: int  # of FP8 inputs, 0 without simulated quantization
    quantized: int  # the first numbers of a key, which are simulated as FP8
    key_group: int  # of these


def _attend(
    q: torch.Tensor, keys: torch.Tensor, masked: torch.Tensor, sink: torch.Tensor, scale: float, rounded: bool
) -> torch.Tensor:
    """q [t, H, c], keys [t, J, c] float32, masked [t, J] -> float32 [t, H, c].

    Online softmax over blocks of KEYS_PER_BLOCK, as the released kernel does it: the probabilities are rounded
    relative to the largest score SO FAR, which is why the block length is part of the result.
    """
    scores = (lane_dot(q, keys) * scale).masked_fill(masked.unsqueeze(1), -torch.inf)  # [t, H, J]
    sums, total = torch.zeros_like(q), torch.zeros_like(scores[..., :1])
    largest = torch.full_like(total, -torch.inf)
    for first in range(0, keys.shape[1], KEYS_PER_BLOCK):
        block = scores[..., first : first + KEYS_PER_BLOCK]
        before, largest = largest, torch.maximum(largest, block.amax(-1, keepdim=True))
        weights, shrink = exp(block - largest), exp(before - largest)
        total = total * shrink + lane_sum(weights).unsqueeze(-1)
        sums = sums * shrink
        if rounded:
            weights = weights.to(torch.bfloat16).to(torch.float32)
        for j in range(weights.shape[-1]):
            sums += weights[:, :, j, None] * keys[:, None, first + j]
    return sums / (total + exp(sink.unsqueeze(-1) - largest))


def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor,
    index: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Every query over the keys that `index` lists; a key is its own value.

    q [T, H, c]; window [n, c] and compressed [m, c] of q's dtype; index [T, J] int32: -1 masked, below n a row of the
    window, otherwise n + row of compressed; sink [H] float32. Returns [T, H, c] in q's dtype. With bfloat16 the
    probabilities are rounded to bfloat16 before they multiply the values; sums are float32 in both cases.
    """
    result = torch.empty_like(q)
    pool = torch.cat((window, compressed)).to(torch.float32)
    rounded = q.dtype == torch.bfloat16
    rows = max(1, TILE_ELEMENTS // (q.shape[1] * max(q.shape[2], 16 * index.shape[1])))
    for row in range(0, len(q), rows):
        listed = index[row : row + rows].to(torch.int64)
        keys = pool[listed.clamp(min=0)]
        attended = _attend(q[row : row + rows].to(torch.float32), keys, listed < 0, sink, scale, rounded)
        result[row : row + rows] = attended.to(q.dtype)
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """sum_h weights[t, h] * relu(q[t, h] . keys[b]) -> float32 [T, N].

    q [T, H, d], weights [T, H], keys [N, d], all of one dtype. With bfloat16 the dot products, the products with the
    weights and the sum are each rounded to bfloat16. Every NaN is 0x7fc00000.
    """
    dtype = q.dtype
    result = torch.empty(len(q), len(keys), dtype=torch.float32)
    wide = keys.to(torch.float32)
    rows = max(1, TILE_ELEMENTS // (16 * q.shape[1] * max(1, len(keys))))
    for row in range(0, len(q), rows):
        dots = lane_dot(q[row : row + rows].to(torch.float32), wide).clamp(min=0).to(dtype).to(torch.float32)
        products = (dots * weights[row : row + rows].to(torch.float32).unsqueeze(-1)).to(dtype).to(torch.float32)
        result[row : row + rows] = tree_sum(products.transpose(-1, -2)).to(dtype).to(torch.float32)
    return result.masked_fill_(result.isnan(), torch.nan)
