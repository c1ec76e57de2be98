"""Block scales: float8_e8m0fnu, eight bits of exponent and nothing else.

Byte k stands for 2**(k - 127), k = 0..254; byte 255 is NaN. Byte 0 is 2**-127, which float32 holds as a subnormal.
"""

import torch

BIAS = 127
MAX_BYTE = 254  # 2**127
NAN = 255


def decode(scale_bytes: torch.Tensor) -> torch.Tensor:
    """Bytes (uint8 or float8_e8m0fnu, any shape) -> powers of two, float32; 255 -> NaN."""
    wide = scale_bytes.view(torch.uint8).to(torch.int32)
    bits = wide << 23  # the byte is the exponent field of a float32, whose bias is 127 too
    bits = torch.where(wide == 0, 1 << 22, bits)  # 0b0_00000000_1000…  2**-127
    bits = torch.where(wide == NAN, 0x7FC00000, bits)
    return bits.view(torch.float32)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 values (any shape) -> nearest bytes, uint8; ties up, saturating; NaN -> 255.

    A tie is 1.5 * 2**e. With no mantissa bit there is no even neighbour; ml_dtypes and torch go up, and so do we.
    Raises ValueError on zero, negative values and infinity: E8M0 has no sign, no zero and no infinity.
    """
    values = values.to(torch.float32)
    if ((values <= 0) | torch.isinf(values)).any():
        raise ValueError("float8_e8m0fnu holds positive finite values only")
    bits = values.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Below 2**-126 float32 has no hidden bit: byte 0 is 0.5 * 2**-126, the midpoint to byte 1 is 0.75 * 2**-126.
    up = torch.where(exponent == 0, mantissa >= 0x600000, mantissa >= 0x400000)
    nearest = (exponent + up).clamp(max=MAX_BYTE)
    return torch.where(torch.isnan(values), NAN, nearest).to(torch.uint8)


def exact(values: torch.Tensor) -> torch.Tensor:
    """float32 powers of two 2**-127..2**127 (any shape) -> their bytes, uint8, nothing rounded.

    Raises ValueError if any value is not such a power.
    """
    values = values.to(torch.float32)
    bits = values.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    normal = (exponent >= 1) & (exponent <= MAX_BYTE) & (mantissa == 0)
    if not (normal | (bits == 1 << 22)).all():
        raise ValueError("a float32 block scale is not a power of two between 2**-127 and 2**127")
    return exponent.to(torch.uint8)
