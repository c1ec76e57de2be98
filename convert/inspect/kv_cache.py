"""Bytes of KV cache for one sequence at several lengths, and as a share of DeepSeek-V3.2's.

How the bytes of an architecture are counted is in its file in `convert/checkpoint/editions/`, which its row names.

The release states the size as a share of DeepSeek-V3.2's cache at a million tokens. V3.2 keeps a latent of 512 dims,
64 rotary dims and an index key of 128 dims per token in each of its 61 layers. The share depends on V3.2's format, so
it is given for each of the usual ones.
"""

from collections.abc import Sequence

from dsv4.convert.checkpoint.editions.kv_cache import CacheLayout

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
