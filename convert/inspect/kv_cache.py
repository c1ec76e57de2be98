"""Bytes of KV cache for one sequence, from the architecture and the formats that the release stores it in.

Keys and values are one vector of `head_dim` per position. Every layer keeps the last `sliding_window` of them; a
layer with compress ratio m keeps one more for every m tokens; a layer with an indexer keeps an index key of
`index_head_dim` for each compressed entry as well. The release counts these bytes:

    entry      head_dim - r dims in float8_e4m3fn, the r rotary dims in bfloat16    448 + 2 * 64 = 576 bytes
    index key  float4_e2m1fn and one float8_e8m0fnu scale per 32 dims               128 / 2 + 4  =  68 bytes

Scales of the FP8 part (one per 64 dims, 7 bytes an entry, 1%) and the raw state of the unfinished block of each
compressor are not counted, as in the release's figures. Neither is the window that each draft block keeps.

The release states the size as a share of DeepSeek-V3.2's cache at a million tokens. V3.2 keeps a latent of 512 dims,
64 rotary dims and an index key of 128 dims per token in each of its 61 layers. The share depends on V3.2's format, so
it is given for each of the usual ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = (8 * 1024, 128 * 1024, 384 * 1024, 1024 * 1024)
LENGTH_NAMES = {8192: "8K", 131072: "128K", 393216: "384K", 1048576: "1M"}

V3_2_LAYERS = 61
V3_2_LATENT = 512
V3_2_ROTARY = 64
V3_2_INDEX = 128
V3_2_INDEX_BYTES = V3_2_INDEX + 4  # FP8 and one float32 scale

# Bytes per token and layer of DeepSeek-V3.2, by how it is stored.
V3_2_STORAGE = {
    "FP8 latent, BF16 rotary, FP8 index keys": (
        V3_2_LATENT + V3_2_LATENT // 128 * 4 + 2 * V3_2_ROTARY + V3_2_INDEX_BYTES  # 656 + 132, scales float32
    ),
    "BF16 latent and rotary, FP8 index keys": 2 * (V3_2_LATENT + V3_2_ROTARY) + V3_2_INDEX_BYTES,  # 1152 + 132
    "BF16 latent and rotary, no index keys": 2 * (V3_2_LATENT + V3_2_ROTARY),  # 1152
}


@dataclass(frozen=True)
class CacheLayout:
    """What the size depends on: a compress ratio per layer (0: window only), which layers index, and the widths."""

    ratios: tuple[int, ...]
    indexed: tuple[bool, ...]
    sliding_window: int
    head_dim: int
    rope_dim: int
    index_head_dim: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of one key-value vector."""
        return self.head_dim - self.rope_dim + 2 * self.rope_dim

    @property
    def index_key_bytes(self) -> int:
        """Bytes of one index key."""
        return self.index_head_dim // 2 + -(-self.index_head_dim // 32)

    def bytes_at(self, tokens: int) -> int:
        """Bytes for one sequence of `tokens`, over all layers."""
        total = len(self.ratios) * min(tokens, self.sliding_window) * self.entry_bytes
        for ratio, indexed in zip(self.ratios, self.indexed, strict=True):
            if ratio:
                total += tokens // ratio * (self.entry_bytes + (self.index_key_bytes if indexed else 0))
        return total


def v3_2_bytes(per_token_and_layer: int, tokens: int) -> int:
    """Bytes of DeepSeek-V3.2's cache for one sequence."""
    return V3_2_LAYERS * per_token_and_layer * tokens


def shares_of_v3_2(layout: CacheLayout, tokens: int = LENGTHS[-1]) -> dict[str, float]:
    """This cache as a share of DeepSeek-V3.2's, for each way of storing the latter. 0.07 is 7%."""
    here = layout.bytes_at(tokens)
    return {how: here / v3_2_bytes(size, tokens) for how, size in V3_2_STORAGE.items()}


def cache_sizes(layout: CacheLayout, lengths: Sequence[int] = LENGTHS) -> dict[int, int]:
    """Bytes for one sequence at each length in tokens."""
    return {length: layout.bytes_at(length) for length in lengths}
