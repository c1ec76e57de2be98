"""The numbers: FP4, FP8 and their block scales. Tensors in, tensors out; no files, no printing.

    from dsv4.quant import Block, dequantize_fp8, fp4_to_fp8

    block = Block(128, 128)
    scales = fp4_to_fp8.choose_block_scales(packed, scale_bytes, block)     # which S, and is it exact?
    codes = fp4_to_fp8.cast(packed, scale_bytes, scales.scale_bytes, block)
    values = dequantize_fp8(codes, scales.scale_bytes, block)               # float32

Codes and E8M0 scales are uint8 tensors of any rank >= 2 on any torch device; the last two dimensions are [out, in].
Modules, bottom-up: e2m1, e4m3, e8m0 (one format each), block_scales (codes and scales to values and back),
fp4_to_fp8 (and its compiled form), fp8_to_fp4, to_bf16 (one conversion each, with an account of what is exact),
activation (the simulated quantizations that are part of the model).
"""

from . import e2m1, e4m3, e8m0, fp4_to_fp8, fp8_to_fp4, to_bf16
from .block_scales import FP4_BLOCK, Block, dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8

__all__ = [
    "FP4_BLOCK",
    "Block",
    "dequantize_fp4",
    "dequantize_fp8",
    "e2m1",
    "e4m3",
    "e8m0",
    "fp4_to_fp8",
    "fp8_to_fp4",
    "quantize_fp4",
    "quantize_fp8",
    "to_bf16",
]
