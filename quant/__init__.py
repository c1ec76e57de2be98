"""The numbers: FP4, FP8 and their block scales. Tensors in, tensors out; no files, no printing.

    from dsv4.quant import Block, dequantize_fp8, fp4_to_fp8

    block = Block(128, 128)
    scales = fp4_to_fp8.choose_block_scales(packed, scale_bytes, block)     # which S, and is it exact?
    codes = fp4_to_fp8.cast(packed, scale_bytes, scales.scale_bytes, block)
    values = dequantize_fp8(codes, scales.scale_bytes, block)               # float32

Codes and E8M0 scales are uint8 tensors of any rank >= 2 on any torch device; the last two dimensions are [out, in].
Modules, bottom-up: blocks (which elements share a scale; without torch), e2m1, e4m3, e8m0 (one format each),
block_scales (codes and scales to values and back), fp4_to_fp8 (and its compiled form), fp8_to_fp4, to_bf16, from_bf16
(one conversion each, with an account of what is exact), activation (the simulated quantizations of the model); gguf/
has the order of bytes in GGUF files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import e2m1 as e2m1
    from . import e4m3 as e4m3
    from . import e8m0 as e8m0
    from . import fp4_to_fp8 as fp4_to_fp8
    from . import fp4_to_fp8_compiled as fp4_to_fp8_compiled
    from . import fp8_to_fp4 as fp8_to_fp4
    from . import from_bf16 as from_bf16
    from . import scale_choice as scale_choice
    from . import to_bf16 as to_bf16
    from .block_scales import dequantize_fp4 as dequantize_fp4
    from .block_scales import dequantize_fp8 as dequantize_fp8
    from .block_scales import quantize_fp4 as quantize_fp4
    from .block_scales import quantize_fp8 as quantize_fp8

from .blocks import FP4_BLOCK, Block

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
    "from_bf16",
    "quantize_fp4",
    "quantize_fp8",
    "scale_choice",
    "to_bf16",
]


def __getattr__(name: str) -> Any:
    """Modules and functions are imported when first used: torch takes a second, and a plan does without it."""
    if name in ("dequantize_fp4", "dequantize_fp8", "quantize_fp4", "quantize_fp8"):
        return getattr(import_module(".block_scales", __name__), name)
    if name in __all__ or name == "fp4_to_fp8_compiled":
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
