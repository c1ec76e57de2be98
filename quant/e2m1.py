"""FP4: float4_e2m1fn, the format of the released routed experts.

A code has four bits, sign, two of exponent (bias 1), one of mantissa: `0bS_EE_M`. There is no infinity and no NaN,
and code 8 is -0, which is as frequent as +0 in real weights and therefore kept everywhere.

Two codes share a byte, the element with the even index in the low nibble:

    bit   7 6 5 4   3 2 1 0
          element 2j+1   element 2j
"""

import torch

from .blocks import GROUP_SIZE as GROUP_SIZE

MAGNITUDES = (
    0.0,  # 0b0_00_0  zero
    0.5,  # 0b0_00_1  subnormal: 0.5 * 2**0
    1.0,  # 0b0_01_0  1.0 * 2**0
    1.5,  # 0b0_01_1  1.5 * 2**0
    2.0,  # 0b0_10_0  1.0 * 2**1
    3.0,  # 0b0_10_1  1.5 * 2**1
    4.0,  # 0b0_11_0  1.0 * 2**2
    6.0,  # 0b0_11_1  1.5 * 2**2
)
MAX = 6.0
SIGN = 0b1_00_0
NEGATIVE_ZERO = 0b1_00_0

VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 (uint8, any shape) -> their values, float32, sign of zero kept."""
    return torch.tensor(VALUES, dtype=torch.float32, device=codes.device)[codes.int()]


def encode(values: torch.Tensor) -> torch.Tensor:
    """Values (any float dtype and shape) -> nearest codes, uint8; ties to the even code, saturating at 6.

    The sign of zero is kept, also of what rounds to zero. Raises ValueError on NaN and infinity: E2M1 has neither.
    """
    values = values.to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("float4_e2m1fn has no NaN and no infinity")
    magnitude = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for code in range(7):
        midpoint = (MAGNITUDES[code] + MAGNITUDES[code + 1]) / 2
        # A tie goes to the even of the two codes: upwards where the upper one is even.
        codes += magnitude >= midpoint if code % 2 else magnitude > midpoint
    return codes | (torch.signbit(values).to(torch.uint8) * SIGN)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., 2n] uint8 -> bytes [..., n] uint8, the even element in the low nibble. Raises ValueError if odd."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte, but the last dimension is {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] (uint8 or int8) -> codes [..., 2n] uint8, the low nibble first."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
