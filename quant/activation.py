"""Quantization of activations, as the released models apply it inside the forward pass.

A group of G consecutive elements of the last dimension shares one scale. In the first two formats it is the smallest
power of two with which nothing saturates; in the third, which V4.1's compressed keys have, an E4M3 value:

    FP8             a = max(amax|x|, 1e-4)        s = 2**ceil(log2(a / 448))   q = e4m3(clamp(x / s, -448, 448))
    FP4             a = max(amax|x|, 6 * 2**-126) s = 2**ceil(log2(a / 6))     q = e2m1(clamp(x / s, -6, 6))
    FP4, E4M3 scale a = max(amax|x|, 6 * 2**-9)   s = e4m3(a / 6)              q = e2m1(clamp(x / s, -6, 6))

All codes round to nearest, ties to even. The logarithm is never computed: `a * (1 / 448)` is a float32 whose exponent
field is the answer, plus one if any mantissa bit is set. Dividing by a power of two is exact.
"Simulating" is quantizing and multiplying back: codes have at most four significant bits, E2M1 codes two, E4M3 scales
four, so `q * s` is exact in bfloat16. Nothing here depends on the neighbours of a row or on the number of threads.
"""

import torch

from . import e2m1, e4m3

FP8_GROUP = 128  # group of the input of a quantized linear layer
FP4_GROUP = 32
FP4_E4M3_GROUP = 16
SMALLEST_FP8_AMAX = 1e-4
SMALLEST_FP4_AMAX = 6.0 * 2.0**-126
SMALLEST_FP4_E4M3_AMAX = 6.0 * 2.0**e4m3.MIN_SUBNORMAL_EXPONENT


def group_scale(amax: torch.Tensor, largest_code: float) -> torch.Tensor:
    """2**ceil(log2(amax / largest_code)), float32, for positive float32 `amax` of any shape."""
    bits = (amax * torch.tensor(1.0 / largest_code, dtype=torch.float32, device=amax.device)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    return ((exponent + (mantissa != 0).to(torch.int32)) << 23).view(torch.float32)


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., n] -> float32 [..., ceil(n / group), group]; a ragged last group is filled with zeros."""
    values = x.to(torch.float32)
    padding = -x.shape[-1] % group
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    return torch.unflatten(values, -1, (-1, group))


def quantize_fp8(x: torch.Tensor, group: int = FP8_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] -> (float8_e4m3fn [..., n], float32 power-of-two scales [..., ceil(n / group)])."""
    values = _grouped(x, group)
    scale = group_scale(values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_FP8_AMAX), e4m3.MAX)
    codes = (values / scale).clamp(-e4m3.MAX, e4m3.MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def quantize_fp4(x: torch.Tensor, group: int = FP4_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] -> (E2M1 codes 0..15 uint8 [..., n], float32 power-of-two scales [..., ceil(n / group)])."""
    values = _grouped(x, group)
    scale = group_scale(values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_FP4_AMAX), e2m1.MAX)
    codes = e2m1.encode((values / scale).clamp(-e2m1.MAX, e2m1.MAX))
    return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def quantize_fp4_e4m3(x: torch.Tensor, group: int = FP4_E4M3_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] -> (E2M1 codes 0..15 uint8 [..., n], float32 values of E4M3 scales [..., ceil(n / group)])."""
    values = _grouped(x, group)
    amax = values.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_FP4_E4M3_AMAX)
    scale = e4m3.decode(e4m3.encode(amax / e2m1.MAX))
    codes = e2m1.encode((values / scale).clamp(-e2m1.MAX, e2m1.MAX))
    return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def _multiply_back(values: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    return (values * scale.repeat_interleave(group, -1)[..., : values.shape[-1]]).to(dtype)


def simulate_fp8(x: torch.Tensor, group: int = FP8_GROUP) -> torch.Tensor:
    """x [..., n] quantized to float8_e4m3fn in groups and back, in x's dtype (bfloat16 or float32: exact)."""
    codes, scale = quantize_fp8(x, group)
    return _multiply_back(codes.to(torch.float32), scale, group, x.dtype)


def simulate_fp4(x: torch.Tensor, group: int = FP4_GROUP) -> torch.Tensor:
    """x [..., n] quantized to float4_e2m1fn in groups and back, in x's dtype (bfloat16 or float32: exact)."""
    codes, scale = quantize_fp4(x, group)
    return _multiply_back(e2m1.decode(codes), scale, group, x.dtype)


def simulate_fp4_e4m3(x: torch.Tensor, group: int = FP4_E4M3_GROUP) -> torch.Tensor:
    """x [..., n] quantized to float4_e2m1fn with E4M3 scales and back, in x's dtype (bfloat16 or float32: exact)."""
    codes, scale = quantize_fp4_e4m3(x, group)
    return _multiply_back(e2m1.decode(codes), scale, group, x.dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., n], n a power of two, times the orthonormal Hadamard matrix; float32 butterflies, x's dtype out.

    Raises ValueError if n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two, the last dimension is {n}")
    values, half = x.to(torch.float32), 1
    while half < n:
        pairs = torch.unflatten(values, -1, (n // (2 * half), 2, half))
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((upper + lower, upper - lower), dim=-2).flatten(-3)
        half *= 2
    orthonormal: float = n**-0.5
    return (values * orthonormal).to(x.dtype)
