"""FP4 experts whose scales differ more within an FP8 block than in any release: some blocks have no exact FP8 form."""

import zlib
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from exact_values import edit_tensors, experts, packed_codes, tensors_of
from raw_safetensors import Tensors

Pattern = Literal[
    "plain", "spread_14", "spread_16_small_top", "spread_18", "zero_group_huge", "negative_zero_group_huge",
    "smallest_scales", "all_zero",
]  # fmt: skip
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
"""What an FP8 block (128 x 128) may look like:

- plain: five neighbouring exponents, as in the release
- spread_14: exponents 14 apart and all codes: exact in FP8 with the usual scale, and only just
- spread_16_small_top: exponents 16 apart, nothing above 1 in the largest groups: exact with a smaller scale than usual
- spread_18: exponents 18 apart and all codes: no FP8 block with one scale holds these values
- zero_group_huge, negative_zero_group_huge: as plain, and groups of +0 or -0 whose scale is 2^40 times larger
- smallest_scales: scale bytes 0 to 3 (2^-127 to 2^-124), where the usual FP8 scale would need a byte below 0
- all_zero: both zeros, any scale
"""

NEGATIVE_ZERO = 0b1_000


def block_pattern(name: str, row: int, column: int) -> Pattern:
    """The pattern of block (`row`, `column`) of the expert weight `name`, without `.weight`."""
    return PATTERNS[(zlib.crc32(name.encode()) + 3 * row + column) % len(PATTERNS)]


def fill_block(codes: np.ndarray, bytes_: np.ndarray, pattern: Pattern, rng: np.random.Generator) -> None:
    """Shape one block in place: `codes` [rows, columns], `bytes_` [rows, columns / 32]."""
    groups = codes.reshape(codes.shape[0], -1, 32)
    top = int(bytes_.max())
    odd = np.zeros(bytes_.shape, dtype=bool)
    odd[::3, 0] = True
    if pattern == "spread_14":
        bytes_[...] = np.where(odd, top - 14, top)
    elif pattern == "spread_16_small_top":
        bytes_[...] = np.where(odd, top - 16, top)
        groups[~odd] = rng.integers(0, 3, groups[~odd].shape)  # 0, 0.5, 1
    elif pattern == "spread_18":
        bytes_[...] = np.where(odd, top - 18, top)
    elif pattern in ("zero_group_huge", "negative_zero_group_huge"):
        bytes_[odd] = top + 40
        groups[odd] = NEGATIVE_ZERO if pattern == "negative_zero_group_huge" else 0
    elif pattern == "smallest_scales":
        bytes_[...] = rng.integers(0, 4, bytes_.shape)
    elif pattern == "all_zero":
        codes[...] = rng.integers(0, 2, codes.shape) * NEGATIVE_ZERO


def _mix(name: str, tensors: Tensors) -> Tensors:
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    codes, bytes_ = packed_codes(weight), scale.array().copy()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for row in range(0, codes.shape[0], 128):
        for column in range(0, codes.shape[1], 128):
            block = codes[row : row + 128, column : column + 128]
            scales = bytes_[row : row + 128, column // 32 : column // 32 + 4]
            fill_block(block, scales, block_pattern(name, row // 128, column // 128), rng)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return {f"{name}.weight": weight.like(packed), f"{name}.scale": scale.like(bytes_)}


def mix_scales(folder: Path) -> Path:
    """Give every block of the routed FP4 experts of a checkpoint its pattern; returns the folder."""
    tensors = tensors_of(folder)
    new: Tensors = {}
    for name in experts(tensors):
        new |= _mix(name.removesuffix(".weight"), tensors)
    edit_tensors(folder, new)
    return folder
