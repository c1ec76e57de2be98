"""Sums, dot products and transcendental functions whose bits depend on their arguments only.

A BLAS picks its order of summation from the shape of the whole product and the number of threads, so the same token
gives other bits in a batch than alone. Here every order is fixed by the length of the sum:

    tree_sum   adds the upper half of a vector to the lower half until one element is left
    lane_sum   sixteen lanes; lane l adds elements l, l + 16, l + 32, ... in that order, then the lanes are added by
               halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1
    lane_dot   sixteen lanes; of every 32 elements, lane l adds the product of element 2l + 1 and then that of 2l,
               rounding each product and each sum to float32, then the lanes are added by halves

Sixteen float32 are one 512-bit register, and the order of lane_dot is that of its bfloat16 dot product (vdpbf16ps), so
compiled code in the same order (`cpu.py`) is fast and gives the same bits.
Additions, products and divisions are correctly rounded wherever they are computed; other functions are not, and
libraries use different code for the body and the tail of an array, so `exp`, `log1p` and even `sqrt` (torch's is off
by a unit in a fifth of all cases) are built here from such operations in float64 and rounded to float32 once.
"""

import math
from collections.abc import Callable

import torch

Elementwise = Callable[[torch.Tensor], torch.Tensor]

LANES = 16
ELEMENTS_PER_STEP = 32  # of a dot product: an odd and an even one per lane

LOG2_E = 1.0 / math.log(2.0)
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # 32 bits of ln 2, so that n * LN2_HIGH is exact for small n
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
EXP_TERMS = 13  # 0.35**14 / 14! is below 2**-53
LOG_TERMS = 12  # 0.172**26 / 13 is below 2**-53


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, [..., n] -> [...], by halves; an odd element waits for the next round."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((folded, x[..., 2 * half :]), -1) if x.shape[-1] % 2 else folded
    return x.squeeze(-1)


def in_lanes(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [ceil(n / 16), ..., 16], contiguous, padded with zeros."""
    padding = -x.shape[-1] % LANES
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
    return torch.unflatten(x, -1, (-1, LANES)).movedim(-2, 0).contiguous()


def lane_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, [..., n] -> [...], in lane order."""
    lanes = in_lanes(x)
    total = torch.zeros_like(lanes[0])
    for step in lanes:
        total += step
    return tree_sum(total)


def paired(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., ceil(n / 32), 2, 16], padded with zeros: of every 32 the odd elements, then the even ones."""
    padding = -x.shape[-1] % ELEMENTS_PER_STEP
    if padding:
        x = torch.nn.functional.pad(x, (0, padding))
    return torch.unflatten(x, -1, (-1, LANES, 2)).flip(-1).transpose(-1, -2)


def lane_dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float32 x [..., M, n] and w [..., O, n] -> x @ w.T, float32 [..., M, O], in lane order."""
    x_lanes = paired(x.unsqueeze(-2)).flatten(-3, -2).movedim(-2, 0).contiguous()
    w_lanes = paired(w.unsqueeze(-3)).flatten(-3, -2).movedim(-2, 0).contiguous()
    total = torch.zeros_like(x_lanes[0] * w_lanes[0]) if len(x_lanes) else x.new_zeros(*x.shape[:-1], w.shape[-2], 1)
    product = torch.empty_like(total)
    for x_step, w_step in zip(x_lanes, w_lanes, strict=True):
        torch.mul(x_step, w_step, out=product)
        total += product
    return tree_sum(total)


def _power_of_two(n: torch.Tensor) -> torch.Tensor:
    """2.0 ** n for integral float64 n in [-1022, 1023], made from its bits."""
    return ((n.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exp64(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 in [-700, 700], to within a few units in the last place."""
    n = torch.floor(x * LOG2_E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    value = torch.full_like(r, 1.0 / math.factorial(EXP_TERMS))
    for k in range(EXP_TERMS - 1, -1, -1):
        value = value * r + 1.0 / math.factorial(k)
    return value * _power_of_two(n)


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp of float32, any shape; -inf gives 0."""
    return _exp64(x.to(torch.float64).clamp(-700.0, 700.0)).to(torch.float32)


def _log1p64(y: torch.Tensor) -> torch.Tensor:
    """log(1 + y) of float64 y >= 0: exponent * ln 2 + 2 artanh(s), the series of artanh to s ** 25."""
    mantissa, exponent = torch.frexp(1.0 + y)  # mantissa in [0.5, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    n = exponent.to(torch.float64) - low.to(torch.float64)
    small = y < 0.25  # 1 + y would round y away
    s = torch.where(small, y / (2.0 + y), (mantissa - 1.0) / (mantissa + 1.0))
    n = torch.where(small, 0.0, n)
    square, series = s * s, torch.zeros_like(s)
    for k in range(LOG_TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return n * math.log(2.0) + 2.0 * s * series


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)) of float32, any shape."""
    wide = x.to(torch.float64).clamp(-700.0, 700.0)
    return torch.where(wide > 40.0, wide, _log1p64(_exp64(wide.clamp(max=40.0)))).to(torch.float32)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """Square root of float32, any shape, correctly rounded.

    No square root of a float32 is closer than 2**-51 (relative) to the middle between two float32, so a float64 root
    that is off by a unit rounds to the right one.
    """
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def sigmoid(x: torch.Tensor, exp: Elementwise = exp) -> torch.Tensor:
    """1 / (1 + exp(-x)) of float32, any shape."""
    return 1.0 / (1.0 + exp(-x))


def silu(x: torch.Tensor, exp: Elementwise = exp) -> torch.Tensor:
    """x * sigmoid(x) of float32, any shape."""
    return x / (1.0 + exp(-x))
