"""The row of the kernel table for CUDA: Triton's kernels for what a step consists of, torch's for the rest.

Linear layers of up to `FEW_ROWS` rows decode their weights in registers, so that a step reads each weight once, packed.
With more rows the weights are decoded to bfloat16 a piece at a time, for torch's products on the tensor cores. Triton
comes with torch's CUDA builds; where it does not, `torch_device.py` does everything.
"""

import math
from functools import partial

import torch
from triton import next_power_of_2

from dsv4.model.weights import FLOAT4_E2M1FN, FLOAT8_E4M3FN, Matrix
from dsv4.quant import activation

from . import reference_small as small
from . import torch_device
from . import triton_kernels as kernels

FEW_ROWS = 16  # the smallest tile of a product on tensor cores
ROWS, COLUMNS = 16, 256  # of a weight that one program decodes at a time
GROUPS_TOGETHER = 8
PRECISION = {torch.bfloat16: "tf32", torch.float32: "ieee"}
ELEMENTS = 1024  # of a row that one program of an elementwise kernel computes

linear_of_many = partial(torch_device.linear, product=torch_device.product_cuda)


def _linear_fp4(x: torch.Tensor, matrix: Matrix, start: int, y: torch.Tensor) -> None:
    assert matrix.scale is not None
    kernels.linear_fp4[(math.ceil(y.shape[1] / ROWS),)](
        x, matrix.values.view(torch.uint8), matrix.scale.view(torch.uint8), y, len(x), start, y.shape[1],
        x.stride(0), matrix.shape[1], PRECISION[x.dtype], FEW_ROWS, ROWS, COLUMNS // 2,
    )  # fmt: skip


def _linear_fp8(x: torch.Tensor, matrix: Matrix, start: int, y: torch.Tensor) -> None:
    assert matrix.scale is not None
    is_float = matrix.scale.dtype == torch.float32
    scale = matrix.scale if is_float else matrix.scale.view(torch.uint8)
    kernels.linear_fp8[(math.ceil(y.shape[1] / ROWS),)](
        x, matrix.values.view(torch.uint8), scale, y, len(x), start, y.shape[1], x.stride(0),
        scale.shape[1], matrix.shape[1], matrix.block.rows, matrix.block.columns, is_float, PRECISION[x.dtype],
        FEW_ROWS, ROWS, COLUMNS,
    )  # fmt: skip


LINEAR = {FLOAT4_E2M1FN: _linear_fp4, FLOAT8_E4M3FN: _linear_fp8}


def linear(
    x: torch.Tensor, matrix: Matrix, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See reference.linear."""
    if not 0 < len(x) <= FEW_ROWS or matrix.format not in LINEAR or not torch_device.is_bf16(matrix):
        return linear_of_many(x, matrix, start, stop, dtype)
    stop = matrix.shape[0] if stop is None else stop
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(len(x), stop - start, dtype=dtype, device=x.device)
    LINEAR[matrix.format](x, matrix, start, y)
    return y


def simulate_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """See dsv4.quant.activation.simulate_fp8."""
    if x.shape[-1] % group or next_power_of_2(group) != group or not x.numel():
        return activation.simulate_fp8(x, group)
    x = x.contiguous()
    y, groups = torch.empty_like(x), x.numel() // group
    kernels.simulate_fp8[(math.ceil(groups / GROUPS_TOGETHER),)](x, y, groups, group, GROUPS_TOGETHER)
    return y


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.inverse_rms."""
    x, columns = x.contiguous(), x.shape[-1]
    y = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if y.numel():
        kernels.inverse_rms[(y.numel(),)](x, y, columns, eps, next_power_of_2(columns))
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See reference_small.rms_norm."""
    x, columns = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if y.numel():
        kernels.rms_norm[(x.numel() // columns,)](x, weight, y, columns, eps, next_power_of_2(columns))
    return y


def hc_split_sinkhorn(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, n: int, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reference_small.hc_split_sinkhorn."""
    if next_power_of_2(n) != n or not len(mixes):
        return small.hc_split_sinkhorn(mixes, scale, base, n, iterations, eps, exp=torch.exp)
    pre, post, comb = mixes.new_empty(len(mixes), n), mixes.new_empty(len(mixes), n), mixes.new_empty(len(mixes), n, n)
    kernels.hc_split_sinkhorn[(len(mixes),)](mixes.contiguous(), scale, base, pre, post, comb, eps, iterations, n)
    return pre, post, comb


def hc_pre(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_pre."""
    h, (tokens, n, columns) = h.contiguous(), h.shape
    y = torch.empty(tokens, columns, dtype=h.dtype, device=h.device)
    if tokens:
        grid = (tokens, math.ceil(columns / ELEMENTS))
        kernels.hc_pre[grid](weights.contiguous(), h, y, columns, n, ELEMENTS)
    return y


def hc_post(output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """See reference_small.hc_post."""
    h, (tokens, n, columns) = h.contiguous(), h.shape
    y = torch.empty_like(h)
    if tokens:
        grid = (tokens, math.ceil(columns / ELEMENTS), n)
        arguments = (output.contiguous(), h, post.contiguous(), comb.contiguous())
        kernels.hc_post[grid](*arguments, y, columns, n, ELEMENTS)
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, share: torch.Tensor | None) -> torch.Tensor:
    """See reference_small.swiglu."""
    gate, (rows, columns) = gate.contiguous(), gate.shape
    y = torch.empty_like(gate)
    if rows:
        grid = (rows, math.ceil(columns / ELEMENTS))
        shares = gate if share is None else share.contiguous()
        kernels.swiglu[grid](gate, up.contiguous(), shares, y, columns, limit, share is None, ELEMENTS)
    return y
