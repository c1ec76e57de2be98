"""The compiled row of the kernel table: the C files in `c/`, built at installation (setup.py), called by ctypes.

It gives the same bits as the reference forms, because both follow the order of summation of deterministic.py; the tests
compare them. Weights stay packed in memory and are decoded in registers, so a token moves half a byte per FP4 weight
and one byte per FP8 weight. What several of these functions do in one call is in cpu_layers.py.
"""

import struct
from collections.abc import Sequence

import torch

from dsv4.model.weights import BFLOAT16, FLOAT32, Matrix
from dsv4.quant.activation import FP4_GROUP

from . import reference
from . import reference_small as small
from .binding import (
    WORK_PER_ELEMENT,
    describe,
    is_bfloat16,
    loaded_library,
    row_scratch,
    scratch_of,
    threads_for,
    threads_of,
)
from .deterministic import ELEMENTS_PER_STEP
from .reference import Product

# struct product of products.h: w, x and y; m_count, strides of x and y, start, stop; x is bfloat16, y is, exact.
_PRODUCT = struct.Struct("@PPPqqqqqiii4x")


def _rows_together(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def linears_into(products: Sequence[Product], results: Sequence[torch.Tensor]) -> None:
    """Several of `linear` in one call, whose threads share out the rows of all; see KernelTable.linears_into."""
    described = [describe(product.matrix) for product in products]
    if not all(one.whole_steps for one in described):
        for product, y in zip(products, results, strict=True):
            y.copy_(reference.linear(*product, y.dtype))
        return
    inputs, listed, work = [_rows_together(product.x) for product in products], [], 0
    for x, one, product, y in zip(inputs, described, products, results, strict=True):
        (rows, columns), is_bf16, start = x.shape, x.dtype == torch.bfloat16, product.start
        listed.append(
            _PRODUCT.pack(
                one.address, x.data_ptr(), y.data_ptr(), rows, x.stride(0), y.stride(0), start, start + y.shape[1],
                is_bf16, y.dtype == torch.bfloat16, is_bf16 and one.exact,
            )
        )  # fmt: skip
        work += rows * columns * y.shape[1]
    loaded, threads, together, count = loaded_library(), threads_of(work), b"".join(listed), len(listed)
    loaded.dsv4_linears(together, count, scratch_of(loaded.dsv4_linears_scratch(together, count, threads)), threads)


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See reference.linear."""
    result = torch.empty(x.shape[0], (matrix.shape[0] if stop is None else stop) - start, dtype=dtype)
    linears_into([Product(x, matrix, start, stop)], [result])
    return result


def sparse_attention(
    q: torch.Tensor,
    window: torch.Tensor,
    compressed: torch.Tensor,
    index: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See reference.sparse_attention."""
    queries, heads, width = q.shape
    if width % ELEMENTS_PER_STEP:
        return reference.sparse_attention(q, window, compressed, index, sink, scale)
    q, window, compressed, index = q.contiguous(), window.contiguous(), compressed.contiguous(), index.contiguous()
    listed, result = index.shape[1], torch.empty_like(q)
    threads = threads_of(2 * q.numel() * listed)
    scratch = scratch_of(loaded_library().dsv4_sparse_attention_scratch(width, listed, threads))
    loaded_library().dsv4_sparse_attention(
        q.data_ptr(), window.data_ptr(), compressed.data_ptr(), index.data_ptr(), sink.data_ptr(), scale,
        queries, heads, width, listed, len(window), is_bfloat16(q), result.data_ptr(), scratch, threads,
    )  # fmt: skip
    return result


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """See reference.index_scores."""
    queries, heads, width = q.shape
    if width % ELEMENTS_PER_STEP:
        return reference.index_scores(q, weights, keys)
    is_bf16, q, keys = is_bfloat16(q), q.contiguous(), keys.contiguous()
    matrix = Matrix("index keys", BFLOAT16 if is_bf16 else FLOAT32, (len(keys), width), keys)
    wide_weights = weights.to(torch.float32).contiguous()
    scores = torch.empty(queries, len(keys), dtype=torch.float32)
    threads = threads_of(scores.numel() * heads * width)
    scratch = scratch_of(loaded_library().dsv4_index_scores_scratch(heads, width, threads))
    loaded_library().dsv4_index_scores(
        describe(matrix).matrix, q.data_ptr(), wide_weights.data_ptr(), queries, heads, is_bf16,
        scores.data_ptr(), scratch, threads,
    )  # fmt: skip
    return scores


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """See dsv4.quant.activation.simulate_fp8."""
    return simulate_key(x, x.shape[-1], group)


def simulate_key(x: torch.Tensor, quantized: int, group: int) -> torch.Tensor:
    """See reference_small.simulate_key."""
    x = x.contiguous()
    result, columns = torch.empty_like(x), x.shape[-1]
    loaded_library().dsv4_simulate_fp8(
        x.data_ptr(), result.data_ptr(), x.numel() // max(columns, 1), columns, quantized, group, is_bfloat16(x),
        threads_for(x),
    )  # fmt: skip
    return result


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.inverse_rms."""
    x, columns, threads = x.contiguous(), x.shape[-1], threads_for(x)
    result, scratch = torch.empty(x.shape[:-1], dtype=torch.float32), row_scratch(columns, threads)
    loaded_library().dsv4_inverse_rms(
        x.data_ptr(), eps, result.data_ptr(), scratch, result.numel(), columns, is_bfloat16(x), threads
    )
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.rms_norm."""
    x, columns, threads = x.contiguous(), x.shape[-1], threads_for(x)
    result, scratch, rows = torch.empty_like(x), row_scratch(columns, threads), x.numel() // columns
    loaded_library().dsv4_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, result.data_ptr(), scratch, rows, columns, is_bfloat16(x),
        threads,
    )  # fmt: skip
    return result


def head_norm(q: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.head_norm."""
    q, (tokens, heads, columns), threads = q.contiguous(), q.shape, threads_for(q)
    result, scratch = torch.empty_like(q), row_scratch(columns, threads)
    loaded_library().dsv4_head_norm(
        q.data_ptr(), eps, result.data_ptr(), scratch, tokens * heads, columns, is_bfloat16(q), threads,
    )  # fmt: skip
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See reference_small.rotate."""
    x, cos, sin, (rows, heads, columns) = x.contiguous(), cos.contiguous(), sin.contiguous(), x.shape
    loaded_library().dsv4_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, columns, cos.shape[1], is_bfloat16(x),
        threads_of(2 * rows * heads * cos.shape[1] * WORK_PER_ELEMENT),
    )  # fmt: skip
    return x


def hc_split_sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, n: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference_small.hc_split_sinkhorn."""
    if n > loaded_library().dsv4_most_streams():
        return small.hc_split_sinkhorn(mixes, scale, base, n, iterations, eps)
    mixes, rows = mixes.contiguous(), len(mixes)
    pre, post = torch.empty(rows, n, dtype=torch.float32), torch.empty(rows, n, dtype=torch.float32)
    comb = torch.empty(rows, n, n, dtype=torch.float32)
    loaded_library().dsv4_hc_split_sinkhorn(
        mixes.data_ptr(), scale.data_ptr(), base.data_ptr(), pre.data_ptr(), post.data_ptr(), comb.data_ptr(),
        rows, n, iterations, eps,
    )  # fmt: skip
    return pre, post, comb


def hc_pre(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_pre."""
    weights, h, (rows, n, columns) = weights.contiguous(), h.contiguous(), h.shape
    result = torch.empty(rows, columns, dtype=h.dtype)
    loaded_library().dsv4_hc_pre(
        weights.data_ptr(), h.data_ptr(), result.data_ptr(), rows, n, columns, is_bfloat16(h), threads_for(h)
    )
    return result


def hc_input(weights: torch.Tensor, h: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.hc_input."""
    weights, h, (rows, n, columns), threads = weights.contiguous(), h.contiguous(), h.shape, threads_for(h)
    result = torch.empty(rows, columns, dtype=h.dtype)
    loaded_library().dsv4_hc_input(
        weights.data_ptr(), h.data_ptr(), norm.data_ptr(), eps, result.data_ptr(), row_scratch(columns, threads),
        rows, n, columns, is_bfloat16(h), threads,
    )  # fmt: skip
    return result


def hc_post(output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_post."""
    output, h, post, comb = output.contiguous(), h.contiguous(), post.contiguous(), comb.contiguous()
    result, (rows, n, columns) = torch.empty_like(h), h.shape
    loaded_library().dsv4_hc_post(
        output.data_ptr(), h.data_ptr(), post.data_ptr(), comb.data_ptr(), result.data_ptr(), rows, n, columns,
        is_bfloat16(h), threads_for(h),
    )  # fmt: skip
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, share: torch.Tensor | None) -> torch.Tensor:
    """See reference_small.swiglu."""
    gate, up, share = gate.contiguous(), up.contiguous(), None if share is None else share.contiguous()
    result, (rows, columns) = torch.empty_like(gate), gate.shape
    loaded_library().dsv4_swiglu(
        gate.data_ptr(), up.data_ptr(), None if share is None else share.data_ptr(), result.data_ptr(),
        rows, columns, limit, is_bfloat16(gate), threads_for(gate),
    )  # fmt: skip
    return result


def sqrtsoftplus(x: torch.Tensor) -> torch.Tensor:
    """See reference_small.sqrtsoftplus."""
    x = x.contiguous()
    result = torch.empty_like(x)
    loaded_library().dsv4_sqrtsoftplus(x.data_ptr(), result.data_ptr(), x.numel(), threads_for(x))
    return result


def simulate_index(x: torch.Tensor) -> torch.Tensor:
    """See reference_small.simulate_index."""
    x, columns, threads = x.contiguous(), x.shape[-1], threads_for(x)
    if columns < 1 or columns & (columns - 1):
        return small.simulate_index(x)
    result, scratch = torch.empty_like(x), row_scratch(columns, threads)
    loaded_library().dsv4_simulate_index(
        x.data_ptr(), result.data_ptr(), scratch, x.numel() // columns, columns, FP4_GROUP, is_bfloat16(x), threads
    )
    return result


def pool(kv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See reference_small.pool."""
    kv, gate, threads = kv.contiguous(), gate.contiguous(), threads_for(kv)
    result, tokens = torch.empty(kv.shape[:-1], dtype=torch.float32), kv.shape[-1]
    loaded_library().dsv4_pool(
        kv.data_ptr(), gate.data_ptr(), result.data_ptr(),
        scratch_of(loaded_library().dsv4_pool_scratch(tokens, threads)), result.numel(), tokens, threads,
    )  # fmt: skip
    return result


def best_in_reach(scores: torch.Tensor, reach: torch.Tensor, count: int) -> torch.Tensor:
    """See reference_small.best_in_reach."""
    scores, reach, (rows, blocks) = scores.contiguous(), reach.contiguous(), scores.shape
    result, threads = torch.empty(rows, min(count, blocks), dtype=torch.int32), threads_for(scores)
    if result.numel():
        loaded_library().dsv4_best_in_reach(
            scores.data_ptr(), reach.data_ptr(), result.data_ptr(), rows, blocks, result.shape[1],
            scratch_of(loaded_library().dsv4_best_in_reach_scratch(scores.shape[1], result.shape[1], threads)), threads,
        )  # fmt: skip
    return result


def list_keys(window: torch.Tensor, chosen: torch.Tensor, kept: int) -> torch.Tensor:
    """See reference_small.list_keys."""
    window, chosen, (rows, recent), count = window.contiguous(), chosen.contiguous(), window.shape, chosen.shape[1]
    result = torch.empty(rows, recent + count, dtype=torch.int32)
    loaded_library().dsv4_list_keys(window.data_ptr(), chosen.data_ptr(), result.data_ptr(), rows, recent, count, kept)
    return result


def choose_experts(scores: torch.Tensor, bias: torch.Tensor, count: int) -> torch.Tensor:
    """See reference_small.choose_experts."""
    scores, (rows, experts) = scores.contiguous(), scores.shape
    result = torch.empty(rows, count, dtype=torch.int64)
    biased = scratch_of(experts * torch.float32.itemsize)
    loaded_library().dsv4_choose_experts(
        scores.data_ptr(), bias.data_ptr(), result.data_ptr(), biased, rows, experts, count
    )
    return result


def expert_weights(scores: torch.Tensor, experts: torch.Tensor, eps: float, factor: float) -> torch.Tensor:
    """See reference_small.expert_weights."""
    scores, experts, (rows, count) = scores.contiguous(), experts.contiguous(), experts.shape
    result = torch.empty(rows, count, dtype=torch.float32)
    loaded_library().dsv4_expert_weights(
        scores.data_ptr(), experts.data_ptr(), result.data_ptr(), scratch_of(count * torch.float32.itemsize),
        rows, scores.shape[1], count, eps, factor,
    )  # fmt: skip
    return result


def add_experts(outputs: torch.Tensor, experts: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """See reference_small.add_experts."""
    outputs, experts, shared, (rows, count, columns) = (
        outputs.contiguous(), experts.contiguous(), shared.contiguous(), outputs.shape,
    )  # fmt: skip
    result, threads = torch.empty_like(shared), threads_for(outputs)
    loaded_library().dsv4_add_experts(
        outputs.data_ptr(), shared.data_ptr(), experts.data_ptr(), result.data_ptr(), row_scratch(columns, threads),
        rows, count, columns, is_bfloat16(outputs), threads,
    )  # fmt: skip
    return result
