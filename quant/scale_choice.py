"""Does the scale of a block follow from its values? If not, a conversion that drops the scale must record it.

Different scales fit one block: 3 under 2**s and 6 under 2**(s - 1) are one value. The way back from BF16 takes the
scale that the rule of the releases gives, see from_bf16.py. This file looks at codes and finds the blocks that have
another one. Near the ends of the range of scales it may name a block too many, and it leaves out none.

Of codes that a release rounded itself it finds few: FP4 groups whose largest code is 6 and that have neither 0.5 nor
1.5, 1 in 50 000, and FP8 blocks whose largest code is 448, about 1 in 30. Under the next scale the largest code of such
a block is 3 or 224, which a value that was a little larger had been rounded to.
"""

import ctypes
from functools import cache

import torch

from dsv4 import compiled

from . import e2m1, e8m0
from .block_scales import FP4_BLOCK, Block
from .from_bf16 import in_blocks

FOLLOWS, DOES_NOT, ZEROS = 0, 1, 2
# Of FP4 and FP8: half of the largest magnitude, the largest, and from where on odd codes have a half.
FP4_LIMITS = 0b0_10_1, 0b0_11_1, 0b0_10_0  # 3, 6, 2
FP8_LIMITS = 0b0_1110_110, 0b0_1111_110, 0b0_0010_000  # 224, 448, 2**-5
SAFE_BYTES = 12, 242  # between them every step of the rule is in the range of BF16 and of E8M0


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library()
    if library is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        byte = ctypes.c_uint8
        library.dsv4_scale_choice_fp4.restype = library.dsv4_scale_choice_fp8.restype = None
        library.dsv4_scale_choice.restype = None
        library.dsv4_scale_choice.argtypes = [pointer, pointer, count, byte, byte, byte]
        library.dsv4_scale_choice_fp4.argtypes = [pointer, count, pointer]
        library.dsv4_scale_choice_fp8.argtypes = [pointer, count, count, count, count, pointer]
    return library


def in_torch(codes: torch.Tensor, block: Block, packed: bool) -> torch.Tensor:
    """FOLLOWS, DOES_NOT or ZEROS for each block, uint8, by the codes alone."""
    half, largest, odd_below = FP4_LIMITS if packed else FP8_LIMITS
    blocks = in_blocks(e2m1.unpack(codes) & 0b0111 if packed else codes & 0b0_1111_111, block)
    top = blocks.amax((-1, -2))
    odd = ((blocks & 1).bool() & (blocks < odd_below)).any(-1).any(-1)
    found = torch.where((top >= half) & ((top != largest) | odd), FOLLOWS, DOES_NOT)
    return torch.where(top == 0, ZEROS, found).to(torch.uint8)


def by_codes(codes: torch.Tensor, block: Block, packed: bool) -> torch.Tensor:
    """As `in_torch`, compiled where that is there and fits."""
    library, (rows, width) = _library(), codes.shape
    whole = not packed or (block == FP4_BLOCK and width % (e2m1.GROUP_SIZE // 2) == 0)
    if library is None or not whole or codes.device.type != "cpu" or not codes.is_contiguous():
        return in_torch(codes, block, packed)
    columns = 2 * width if packed else width
    found = torch.empty((-(-rows // block.rows), -(-columns // block.columns)), dtype=torch.uint8)
    if packed:
        library.dsv4_scale_choice_fp4(codes.data_ptr(), found.numel(), found.data_ptr())
    else:
        library.dsv4_scale_choice_fp8(codes.data_ptr(), rows, columns, *block, found.data_ptr())
    return found


def not_by_rule(codes: torch.Tensor, scale_bytes: torch.Tensor, block: Block, packed: bool) -> torch.Tensor:
    """Blocks whose E8M0 scale the way back from BF16 would not choose, bool like `scale_bytes`.

    codes: E4M3 uint8 [rows, columns], or `packed` E2M1 uint8 [rows, columns/2]. No NaN.
    """
    found, (low, high), library = by_codes(codes, block, packed), SAFE_BYTES, _library()
    if library is not None and found.device.type == "cpu" and scale_bytes.is_contiguous():
        library.dsv4_scale_choice(found.data_ptr(), scale_bytes.data_ptr(), found.numel(), e8m0.BIAS, low, high)
        return found.view(torch.bool)
    outside = (scale_bytes < low) | (scale_bytes > high)
    return torch.where(found == ZEROS, scale_bytes != e8m0.BIAS, (found == DOES_NOT) | outside)
