"""Bytes of KV cache for one sequence, from the architecture and the formats that the release stores it in.

Keys and values are one vector of `head_dim` per position. Every layer keeps the last `sliding_window` of them; a
layer with compress ratio m keeps one more for every m tokens; a layer with an indexer keeps an index key of
`index_head_dim` for each compressed entry as well. The release counts these bytes:

    entry      head_dim - r dims in float8_e4m3fn, the r rotary dims in bfloat16    448 + 2 * 64 = 576 bytes
    index key  float4_e2m1fn and one float8_e8m0fnu scale per 32 dims               128 / 2 + 4  =  68 bytes

V4.1 keeps compressed entries and index keys in a few source layers only, which the others read:

    window     float8_e4m3fn, one float8_e8m0fnu scale per 32 dims                  512 + 16     = 528 bytes
    entry      float4_e2m1fn, one float8_e4m3fn scale per 16 dims                   512 / 2 + 32 = 288 bytes
    index key  as V4's                                                                              68 bytes

Scales of V4's FP8 part (one per 64 dims, 7 bytes an entry, 1%) and the raw state of the unfinished block of each
compressor are not counted, as in the release's figures. Neither is the window that each draft block keeps.

The release states the size as a share of DeepSeek-V3.2's cache at a million tokens. V3.2 keeps a latent of 512 dims,
64 rotary dims and an index key of 128 dims per token in each of its 61 layers. The share depends on V3.2's format, so
it is given for each of the usual ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Compressed(NamedTuple):
    """What one layer keeps of all tokens: `nbytes` for every `ratio` of them."""

    ratio: int
    nbytes: int


@dataclass(frozen=True)
class CacheLayout:
    """What the size depends on: how many layers keep a window, its length, and what else grows with the context.

    window_entry_bytes, entry_bytes: of a key-value vector in a window, and of a compressed one. formats: in words.
    """

    windows: int
    sliding_window: int
    window_entry_bytes: int
    entry_bytes: int
    index_key_bytes: int
    compressed: tuple[Compressed, ...]
    formats: str

    def bytes_at(self, tokens: int) -> int:
        """Bytes for one sequence of `tokens`, over all layers."""
        windows = self.windows * min(tokens, self.sliding_window) * self.window_entry_bytes
        return windows + sum(tokens // layer.ratio * layer.nbytes for layer in self.compressed)


class Widths(NamedTuple):
    """What both architectures' sizes follow from, as config.json calls it."""

    sliding_window: int
    head_dim: int
    rope_dim: int
    index_head_dim: int

    @property
    def index_key_bytes(self) -> int:
        """Bytes of one index key."""
        return self.index_head_dim // 2 + -(-self.index_head_dim // 32)


def v4_cache(widths: Widths, ratios: Sequence[int], indexed: Sequence[bool]) -> CacheLayout:
    """Of V4, by the compress ratio of each layer (0: a window only) and which layers have an indexer."""
    entry, index_key = widths.head_dim - widths.rope_dim + 2 * widths.rope_dim, widths.index_key_bytes
    grows = (Compressed(m, entry + index_key * has) for m, has in zip(ratios, indexed, strict=True) if m)
    formats = "FP8 keys with BF16 rotary part, FP4 index keys"
    return CacheLayout(len(ratios), widths.sliding_window, entry, entry, index_key, tuple(grows), formats)


def v41_cache(widths: Widths, ratios: Sequence[int], sources: Sequence[int]) -> CacheLayout:
    """Of V4.1, by the compress ratio of each layer and the numbers of the KV source layers."""
    width, index_key = widths.head_dim, widths.index_key_bytes
    window, entry = width + -(-width // 32), width // 2 + -(-width // 16)
    grows = tuple(Compressed(ratios[layer], entry + index_key) for layer in sources if ratios[layer])
    formats = "FP8 window keys, FP4 compressed and index keys"
    return CacheLayout(len(ratios), widths.sliding_window, window, entry, index_key, grows, formats)


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
