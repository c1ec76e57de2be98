"""Operations of a layer that are one call of C each: fewer calls than cpu.py has for them, and the same bits.

A step of decoding reads weights through all caches, so Python between two calls runs cold and slowly. Each function
returns None where C has no form for its matrices; the caller then computes it by the single operations.
"""

import ctypes
from typing import NamedTuple

import torch

from dsv4.model.weights import Matrix
from dsv4.quant.activation import FP4_GROUP

from .binding import describe, is_bfloat16, loaded_library, scratch_of, threads_of
from .reference import Experts, QueryWeights


def gate(
    x: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor | None,
    experts: torch.Tensor | None,
    count: int,
    eps: float,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`KernelTable.gate` in one call; None for a matrix whose rows are no whole steps."""
    one, loaded = describe(matrix), loaded_library()
    if not one.whole_steps:
        return None
    x, rows, is_bf16 = x.contiguous(), len(x), is_bfloat16(x)
    threads = threads_of(rows * matrix.shape[0] * matrix.shape[1])
    experts = torch.empty(rows, count, dtype=torch.int64) if experts is None else experts.contiguous()
    weights = torch.empty(rows, count, dtype=torch.float32)
    loaded.dsv4_gate(
        one.address, x.data_ptr(), is_bf16, None if bias is None else bias.data_ptr(), experts.data_ptr(),
        weights.data_ptr(), rows, count, eps, factor,
        scratch_of(loaded.dsv4_gate_scratch(one.address, is_bf16, rows, count, threads)), threads,
    )  # fmt: skip
    return experts, weights


def hc_mixes(
    h: torch.Tensor,
    fn: Matrix,
    scale: torch.Tensor,
    base: torch.Tensor,
    iterations: int,
    rms_eps: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`KernelTable.hc_mixes` in one call; None where C has no form for it."""
    one, loaded, h, (rows, n, _) = describe(fn), loaded_library(), h.contiguous(), h.shape
    if not one.whole_steps or n > loaded.dsv4_most_streams():
        return None
    is_bf16, threads = is_bfloat16(h), threads_of(rows * fn.shape[0] * fn.shape[1])
    pre, post = torch.empty(2, rows, n, dtype=torch.float32)
    comb = torch.empty(rows, n, n, dtype=torch.float32)
    loaded.dsv4_hc_mixes(
        one.address, h.data_ptr(), is_bf16, scale.data_ptr(), base.data_ptr(), pre.data_ptr(), post.data_ptr(),
        comb.data_ptr(), rows, n, iterations, rms_eps, eps,
        scratch_of(loaded.dsv4_hc_mixes_scratch(one.address, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return pre, post, comb


def head_vector(
    h: torch.Tensor, fn: Matrix, scale: torch.Tensor, base: torch.Tensor, rms_eps: float, eps: float
) -> torch.Tensor | None:
    """`KernelTable.head_vector` in one call; None where C has no form for it."""
    one, loaded, h, (rows, n, columns) = describe(fn), loaded_library(), h.contiguous(), h.shape
    if not one.whole_steps or fn.shape[0] != n or scale.numel() != 1:
        return None
    is_bf16, threads = is_bfloat16(h), threads_of(rows * fn.shape[0] * fn.shape[1])
    result = h.new_empty(rows, columns)
    loaded.dsv4_head_vector(
        one.address, h.data_ptr(), is_bf16, scale.data_ptr(), base.data_ptr(), result.data_ptr(), rows, rms_eps, eps,
        scratch_of(loaded.dsv4_head_vector_scratch(one.address, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return result


def raw_keys(
    x: torch.Tensor, wkv: Matrix, wgate: Matrix, ape: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | None:
    """`KernelTable.raw_keys` in one call; None for matrices whose rows are no whole steps."""
    kv, gate, loaded = describe(wkv), describe(wgate), loaded_library()
    if not (kv.whole_steps and gate.whole_steps):
        return None
    x, ape, positions, is_bf16, (rows, width) = (
        x.contiguous(), ape.contiguous(), positions.contiguous(), is_bfloat16(x), x.shape,
    )  # fmt: skip
    raw = torch.empty(rows, 2, wkv.shape[0], dtype=torch.float32)
    threads = threads_of(2 * rows * width * wkv.shape[0])
    loaded.dsv4_raw_keys(
        x.data_ptr(), kv.address, gate.address, ape.data_ptr(), positions.data_ptr(), raw.data_ptr(), rows, len(ape),
        is_bf16, scratch_of(loaded.dsv4_raw_keys_scratch(kv.address, gate.address, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return raw


def index_queries(
    x: torch.Tensor,
    qr: torch.Tensor,
    wq_b: Matrix,
    proj: Matrix,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`Indexer.queries` in one call; None where C has no form for it.

    x [T, D], qr [T, q_lora_rank]; cos, sin float32 [T, r / 2]; scale of the head weights; group of FP8 inputs, 0
    without simulated quantization -> [T, heads, d], [T, heads].
    """
    wide, narrow, loaded, (rows, heads) = describe(wq_b), describe(proj), loaded_library(), (len(x), proj.shape[0])
    d = wq_b.shape[0] // heads
    if not (wide.whole_steps and narrow.whole_steps) or d & (d - 1):
        return None
    x, qr, cos, sin, is_bf16 = x.contiguous(), qr.contiguous(), cos.contiguous(), sin.contiguous(), is_bfloat16(x)
    q, weights = x.new_empty(rows, heads, d), x.new_empty(rows, heads)
    threads = threads_of(rows * wq_b.shape[0] * wq_b.shape[1])
    loaded.dsv4_index_queries(
        x.data_ptr(), qr.data_ptr(), wide.address, narrow.address, cos.data_ptr(), sin.data_ptr(), q.data_ptr(),
        weights.data_ptr(), rows, cos.shape[1], group, FP4_GROUP, scale, is_bf16,
        scratch_of(loaded.dsv4_index_queries_scratch(wide.address, narrow.address, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return q, weights


class _DescribedExperts(NamedTuple):
    """All experts of a layer as C sees them, made once."""

    addresses: ctypes.Array[ctypes.c_void_p]  # of the matrices, three for each expert
    work: int  # products of one expert
    whole_steps: bool


def _describe_experts(experts: Experts) -> _DescribedExperts:
    found: _DescribedExperts | None = experts.kept.get("c")
    if found is None:
        described = [describe(matrix) for expert in experts.matrices for matrix in expert]
        addresses = (ctypes.c_void_p * len(described))(*(one.address for one in described))
        width, inner = experts.matrices[0].w2.shape
        found = _DescribedExperts(addresses, 3 * width * inner, all(one.whole_steps for one in described))
        experts.kept["c"] = found
    return found


def token_experts(
    x: torch.Tensor, experts: Experts, chosen: torch.Tensor, shares: torch.Tensor, limit: float, group: int
) -> torch.Tensor | None:
    """`KernelTable.token_experts` in one call; None for matrices whose rows are no whole steps."""
    described, loaded = _describe_experts(experts), loaded_library()
    if not described.whole_steps:
        return None
    x, chosen, shares, count, is_bf16 = (
        x.contiguous(), chosen.contiguous(), shares.contiguous(), chosen.shape[1], is_bfloat16(x),
    )  # fmt: skip
    result, threads, addresses = torch.empty_like(x), threads_of((count + 1) * described.work), described.addresses
    loaded.dsv4_token_experts(
        x.data_ptr(), addresses, chosen.data_ptr(), shares.data_ptr(), result.data_ptr(), count,
        len(experts.matrices) - 1, group, limit, is_bf16,
        scratch_of(loaded.dsv4_token_experts_scratch(addresses, count, is_bf16, threads)), threads,
    )  # fmt: skip
    return result


def queries_and_keys(
    x: torch.Tensor, weights: QueryWeights, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`WindowAttention.queries_and_keys` in one call; None for matrices whose rows are no whole steps.

    x [T, D]; cos, sin float32 [T, r / 2] -> [T, q_lora_rank], [T, H, c], [T, c].
    """
    matrices, loaded = [describe(matrix) for matrix in (weights.wq_a, weights.wkv, weights.wq_b)], loaded_library()
    if not all(one.whole_steps for one in matrices):
        return None
    x, cos, sin, is_bf16, rows = x.contiguous(), cos.contiguous(), sin.contiguous(), is_bfloat16(x), len(x)
    (rank, _), (c, _), (wide, _) = (matrix.shape for matrix in (weights.wq_a, weights.wkv, weights.wq_b))
    qr, q, kv = x.new_empty(rows, rank), x.new_empty(rows, wide // c, c), x.new_empty(rows, c)
    threads, addresses = threads_of(rows * wide * rank), [one.address for one in matrices]
    loaded.dsv4_queries(
        x.data_ptr(), *addresses, weights.q_norm.data_ptr(), weights.kv_norm.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        qr.data_ptr(), q.data_ptr(), kv.data_ptr(), rows, cos.shape[1], weights.group, weights.quantized,
        weights.key_group, weights.eps, weights.norm_heads, is_bf16,
        scratch_of(loaded.dsv4_queries_scratch(*addresses, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return qr, q, kv


def project(
    output: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, wo_a: Matrix, wo_b: Matrix, groups: int, group: int
) -> torch.Tensor | None:
    """`WindowAttention.project` in one call; None for matrices whose rows are no whole steps.

    output [T, H, c], overwritten; cos, sin float32 [T, r / 2] of the rotation back -> [T, D].
    """
    first, last, loaded = describe(wo_a), describe(wo_b), loaded_library()
    if not (first.whole_steps and last.whole_steps):
        return None
    output, cos, sin, is_bf16, (rows, heads, c) = (
        output.contiguous(), cos.contiguous(), sin.contiguous(), is_bfloat16(output), output.shape,
    )  # fmt: skip
    result, threads = output.new_empty(rows, wo_b.shape[0]), threads_of(rows * wo_b.shape[0] * wo_b.shape[1])
    loaded.dsv4_project(
        output.data_ptr(), cos.data_ptr(), sin.data_ptr(), first.address, last.address, result.data_ptr(), rows, heads,
        c, cos.shape[1], groups, group, is_bf16,
        scratch_of(loaded.dsv4_project_scratch(first.address, last.address, groups, is_bf16, rows, threads)), threads,
    )  # fmt: skip
    return result
