"""Kernels in Triton for the operations of a single step, each of which torch would need five to a hundred launches for.

A GPU computes a step's small operations faster than the host can queue them, so their number decides. `cuda.py` calls
these kernels; the forms in reference.py and reference_small.py say what each computes, and the tests compare the two
in Triton's interpreter, which needs no GPU. Sums take the order that Triton chooses.
"""

import triton
import triton.language as tl


@triton.jit
def e8m0(byte):
    """Scale bytes 1..254 as int32 -> powers of two, float32."""
    return (byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def e2m1(code):
    """Codes 0..15 as int32 -> float32: exponent and mantissa moved into place, 0 and 0.5 apart, then the sign."""
    magnitude = code & 7
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code < 8, value, -value)


@triton.jit
def e4m3(code):
    """Codes 0..255 without NaN as int32 -> float32; the multiples of 2**-9 below 2**-6 apart."""
    magnitude = code & 127
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where(code < 128, value, -value)


@triton.jit
def to_e4m3(x):
    """float32 -> the nearest value of E4M3, ties to even, saturating, sign of zero kept; float32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    held = magnitude.to(tl.int32, bitcast=True)
    normal = ((held + 0x7FFFF + ((held >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (magnitude + 24576.0) - 24576.0  # float32 has steps of 2**-9 there
    rounded = tl.where(magnitude < 0.015625, small, normal).to(tl.int32, bitcast=True)
    return (rounded | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def linear_fp4(
    x,
    packed,
    scale,
    y,
    rows_of_x,
    start,
    outputs,
    x_stride,
    columns: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """x [rows_of_x <= M, columns] @ rows [start, start + outputs) of packed E2M1 with a scale byte per 32 -> y.

    PRECISION "tf32" has eleven significant bits: bfloat16 and the weights pass unchanged. "ieee" is float32.
    """
    o, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    row, half = (start + o).to(tl.int64)[:, None], columns // 2
    total = tl.zeros((M, ROWS), dtype=tl.float32)
    for first in range(0, half, BYTES):
        at = first + tl.arange(0, BYTES)
        held = (o < outputs)[:, None] & (at < half)[None, :]
        byte = tl.load(packed + row * half + at[None, :], mask=held, other=0).to(tl.int32)
        power = e8m0(tl.load(scale + row * (columns // 32) + (at // 16)[None, :], mask=held, other=127).to(tl.int32))
        given = (m < rows_of_x)[:, None] & (at < half)[None, :]
        even = tl.load(x + m[:, None] * x_stride + 2 * at[None, :], mask=given, other=0.0).to(tl.float32)
        odd = tl.load(x + m[:, None] * x_stride + 2 * at[None, :] + 1, mask=given, other=0.0).to(tl.float32)
        low, high = e2m1(byte & 15) * power, e2m1(byte >> 4) * power
        total = tl.dot(even, tl.trans(low), total, input_precision=PRECISION)
        total = tl.dot(odd, tl.trans(high), total, input_precision=PRECISION)
    held = (m < rows_of_x)[:, None] & (o < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + o[None, :], total.to(y.dtype.element_ty), mask=held)


@triton.jit
def linear_fp8(
    x,
    codes,
    scale,
    y,
    rows_of_x,
    start,
    outputs,
    x_stride,
    scale_columns,
    columns: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    FLOAT_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same for E4M3 with a scale per block of `height` x `width`: bytes, or float32 if FLOAT_SCALE."""
    o, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    row = (start + o).to(tl.int64)[:, None]
    total = tl.zeros((M, ROWS), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        at = first + tl.arange(0, COLUMNS)
        held = (o < outputs)[:, None] & (at < columns)[None, :]
        code = e4m3(tl.load(codes + row * columns + at[None, :], mask=held, other=0).to(tl.int32))
        block = scale + (row // height) * scale_columns + (at // width)[None, :]
        if FLOAT_SCALE:
            power = tl.load(block, mask=held, other=1.0)
        else:
            power = e8m0(tl.load(block, mask=held, other=127).to(tl.int32))
        given = (m < rows_of_x)[:, None] & (at < columns)[None, :]
        values = tl.load(x + m[:, None] * x_stride + at[None, :], mask=given, other=0.0).to(tl.float32)
        total = tl.dot(values, tl.trans(code * power), total, input_precision=PRECISION)
    held = (m < rows_of_x)[:, None] & (o < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + o[None, :], total.to(y.dtype.element_ty), mask=held)


@triton.jit
def simulate_fp8(x, y, groups, GROUP: tl.constexpr, TOGETHER: tl.constexpr):
    """x and y are `groups` groups of GROUP elements: to E4M3 under the smallest power of two that fits, and back."""
    number = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    at = number[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + at, mask=(number < groups)[:, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4)
    bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    scaled = values * e8m0(254 - exponent)[:, None]  # the reciprocal of a power of two: nothing is rounded
    result = to_e4m3(scaled) * e8m0(exponent)[:, None]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=(number < groups)[:, None])


@triton.jit
def inverse_rms(x, y, columns, eps, COLUMNS: tl.constexpr):
    """One row a program: 1 / sqrt(mean of the squares + eps)."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    values = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(y + row, 1.0 / tl.sqrt(tl.sum(values * values) / columns + eps))


@triton.jit
def rms_norm(x, weight, y, columns, eps, COLUMNS: tl.constexpr):
    """One row a program: over its root mean square, times weight."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    values = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values) / columns + eps)
    result = values * factor * tl.load(weight + at, mask=at < columns, other=0.0)
    tl.store(y + row * columns + at, result.to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def hc_split_sinkhorn(mixes, scale, base, pre, post, comb, eps, iterations: tl.constexpr, N: tl.constexpr):
    """One token a program: mixes [(2 + N) N] -> pre [N], post [N], comb [N, N], nearly doubly stochastic."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    mixes += token * (2 + N) * N
    tl.store(pre + token * N + i, sigmoid(tl.load(mixes + i) * tl.load(scale) + tl.load(base + i)) + eps)
    mixed = tl.load(mixes + N + i) * tl.load(scale + 1) + tl.load(base + N + i)
    tl.store(post + token * N + i, 2.0 * sigmoid(mixed))
    at = i[:, None] * N + i[None, :]
    logits = tl.load(mixes + 2 * N + at) * tl.load(scale + 2) + tl.load(base + 2 * N + at)
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    mix = weights / tl.sum(weights, axis=1)[:, None] + eps
    mix = mix / (tl.sum(mix, axis=0)[None, :] + eps)
    for _ in range(iterations - 1):
        mix = mix / (tl.sum(mix, axis=1)[:, None] + eps)
        mix = mix / (tl.sum(mix, axis=0)[None, :] + eps)
    tl.store(comb + token * N * N + at, mix)


@triton.jit
def hc_pre(weights, h, y, columns, N: tl.constexpr, COLUMNS: tl.constexpr):
    """weights [N] and streams h [N, columns] of each token -> sum_j weights_j h_j [columns]."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for j in range(N):
        stream = tl.load(h + (token * N + j) * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        total += tl.load(weights + token * N + j) * stream
    tl.store(y + token * columns + at, total.to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def hc_post(output, h, post, comb, y, columns, N: tl.constexpr, COLUMNS: tl.constexpr):
    """One new stream k: post_k * output + sum_j comb[j, k] h_j."""
    token, k = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mixed = tl.zeros((COLUMNS,), dtype=tl.float32)
    for j in range(N):
        stream = tl.load(h + (token * N + j) * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        mixed += tl.load(comb + (token * N + j) * N + k) * stream
    wide = tl.load(output + token * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    result = tl.load(post + token * N + k) * wide + mixed
    tl.store(y + (token * N + k) * columns + at, result.to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def swiglu(gate, up, share, y, columns, limit, SHARED: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up, clamped, times the row's share unless SHARED says that there is none."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = tl.load(gate + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    other = tl.load(up + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    clamped = tl.minimum(wide, limit)
    result = clamped * sigmoid(clamped) * tl.minimum(tl.maximum(other, -limit), limit)
    if not SHARED:
        result = tl.load(share + row) * result
    tl.store(y + row * columns + at, result.to(y.dtype.element_ty), mask=at < columns)
