"""FP8: float8_e4m3fn, the format of the dense weights and of converted experts.

A code has eight bits, `0bS_EEEE_MMM`, exponent bias 7. The only NaNs are 0x7F and 0xFF, there is no infinity, and
the largest value is 448. Decoding and encoding are torch's own casts; the tests compare them with ml_dtypes on all
256 codes, on every midpoint and on the float32 neighbours of each midpoint.
"""

import torch

MAX = 448.0  # 0b0_1111_110  1.75 * 2**8
MIN_NORMAL_EXPONENT = -6  # 0b0_0001_000  1.0 * 2**-6
MIN_SUBNORMAL_EXPONENT = -9  # 0b0_0000_001  2**-9
NAN = 0b0_1111_111
SIGN = 0b1_0000_000
NEGATIVE_ZERO = 0b1_0000_000


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Codes (uint8 or float8_e4m3fn, any shape) -> their values, float32, sign of zero and NaN kept."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Values (any float dtype and shape) -> nearest codes, uint8; ties to even, saturating at 448.

    The sign of zero is kept, NaN becomes NaN of the same sign. Raises ValueError on infinity: E4M3FN has none.
    """
    values = values.to(torch.float32)
    if torch.isinf(values).any():
        raise ValueError("float8_e4m3fn has no infinity")
    # torch 2.13 saturates by itself, earlier releases make NaN of what exceeds 464.
    codes = values.clamp(-MAX, MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = torch.signbit(values).to(torch.uint8) * SIGN | NAN
    return torch.where(torch.isnan(values), nan, codes)


def is_nan(codes: torch.Tensor) -> torch.Tensor:
    """Codes (uint8 or float8_e4m3fn) -> bool, true at 0x7F and 0xFF."""
    return (codes.view(torch.uint8) & NAN) == NAN
