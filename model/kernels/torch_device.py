"""The large operations on devices other than the CPU: torch's own matrix products.

Weights stay packed on the device and decode to the same exact values a piece at a time. Everything is rounded where the
reference rounds, but the order of sums is the device's: results agree with the CPU's within the noise of float32, not
to the bit. Nothing here asks the device for a number, so the host can queue a layer while the one before is computed.

Two products are in the table. `product_float32` works everywhere. On CUDA `product_cuda` gives bfloat16 inputs and
weights that bfloat16 holds exactly to the tensor cores, which add up in float32: the same numbers, added in another
order.
"""

from collections.abc import Callable

import torch

from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, Matrix
from dsv4.quant import e8m0
from dsv4.quant.block_scales import expand_scale
from dsv4.quant.to_bf16 import look_up_fp4

from .reference import KEYS_PER_BLOCK

DECODED_ELEMENTS = 1 << 26  # of a weight decoded at a time


def _fp8_to_bf16(codes: torch.Tensor, scale: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Codes [rows, columns] times power-of-two scales of their blocks, bfloat16: exact."""
    powers = (scale if scale.dtype == torch.float32 else e8m0.decode(scale)).to(torch.bfloat16)
    return codes.view(torch.float8_e4m3fn).to(torch.bfloat16) * expand_scale(powers, tuple(codes.shape), matrix.block)


def decode_to_bf16(matrix: Matrix, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a matrix with `exact_products` as bfloat16 [stop - start, in], exactly."""
    if matrix.scale is None:
        return matrix.values[start:stop]
    height = matrix.block.rows
    first = start // height * height
    codes, scale = matrix.values[first:stop], matrix.scale[first // height : -(-stop // height)]
    decode = DECODERS[matrix.format]
    return decode(codes, scale, matrix)[start - first :]


DECODERS: dict[str, Callable[[torch.Tensor, torch.Tensor, Matrix], torch.Tensor]] = {
    FLOAT4_E2M1FN: lambda codes, scale, _: look_up_fp4(codes.view(torch.uint8), scale.view(torch.uint8)),
    FLOAT8_E4M3FN: _fp8_to_bf16,
}


def product_float32(x: torch.Tensor, matrix: Matrix, start: int, stop: int) -> torch.Tensor:
    """x [M, in] @ rows [start, stop) of the matrix -> float32 [M, stop - start]."""
    decoded = decode_to_bf16(matrix, start, stop) if is_bf16(matrix) else matrix.decode(start, stop)
    return x.to(torch.float32) @ decoded.to(torch.float32).T


def product_cuda(x: torch.Tensor, matrix: Matrix, start: int, stop: int) -> torch.Tensor:
    """The same on CUDA. bfloat16 products are exact in float32, and the sums are float32."""
    if x.dtype == torch.bfloat16 and is_bf16(matrix):
        return torch.mm(x, decode_to_bf16(matrix, start, stop).T, out_dtype=torch.float32)
    return product_float32(x, matrix, start, stop)


def is_bf16(matrix: Matrix) -> bool:
    """Whether bfloat16 holds every value of the matrix, known without a look at them."""
    whole_groups = matrix.format != FLOAT4_E2M1FN or matrix.shape[1] % matrix.block.columns == 0
    return matrix.exact_products and whole_groups and matrix.format in (BFLOAT16, *DECODERS)


def linear(
    x: torch.Tensor,
    matrix: Matrix,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    product: Callable[[torch.Tensor, Matrix, int, int], torch.Tensor] = product_float32,
) -> torch.Tensor:
    """See reference.linear."""
    stop, rows = matrix.shape[0] if stop is None else stop, max(1, DECODED_ELEMENTS // matrix.shape[1])
    firsts = range(start, stop, rows)
    return torch.cat([product(x, matrix, first, min(stop, first + rows)) for first in firsts], dim=-1).to(dtype)


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
