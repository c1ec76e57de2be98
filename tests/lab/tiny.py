"""Geometries for tests: the smallest that still has a ratio-4 layer, an indexer and an MTP block, and an uneven one."""

import json
import shutil
from pathlib import Path

from dsv4.convert.synthetic.checkpoint import Geometry

TINY = Geometry(
    hidden_size=128, compress_ratios=(0, 4, 0), n_routed_experts=2, num_experts_per_tok=1, num_attention_heads=2,
    head_dim=64, qk_rope_head_dim=32, q_lora_rank=64, o_groups=1, o_lora_rank=64, index_n_heads=2, index_head_dim=64,
    hc_mult=2, hc_sinkhorn_iters=2, moe_intermediate_size=64, max_position_embeddings=200,
)  # fmt: skip
# No width is a multiple of 128, so every FP8 matrix has cut-off blocks at its right and lower edge.
RAGGED = Geometry(hidden_size=224, moe_intermediate_size=160, q_lora_rank=96, o_lora_rank=80, n_routed_experts=4)


def flipped(folder: Path | str, copy: Path, tensor: str) -> Path:
    """A copy of a checkpoint in which the last bit of a tensor's first byte is another one."""
    shutil.copytree(folder, copy)
    for shard in copy.glob("*.safetensors"):
        raw = bytearray(shard.read_bytes())
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        if tensor in header:
            raw[end + header[tensor]["data_offsets"][0]] ^= 1
            shard.write_bytes(raw)
            return copy
    raise KeyError(tensor)
