"""Checkpoints with the release's full dimensions and true headers, whose data is a hole in a sparse file.

V4-Flash is 160 GB and V4-Pro 865 GB; as sparse files they take a few MB of disk and a second to write. Everything that
works from headers alone can be tried on the real geometry. The inventory below is written from the published tables
of the releases, independent of the code under test: the published tensor counts and byte totals check it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from dsv4.convert.checkpoint.reader import Extent, TensorInfo
from dsv4.convert.synthetic.geometry import Geometry, config, inference_config

FLASH = Geometry(
    vocab_size=129280, hidden_size=4096, compress_ratios=(0, 0, *(4, 128) * 20, 4, 0), num_hash_layers=3,
    n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048, num_attention_heads=64, head_dim=512,
    q_lora_rank=1024, o_groups=8, o_lora_rank=1024, index_n_heads=64, index_topk=512, max_position_embeddings=1048576,
    original_max_position_embeddings=65536, rope_factor=16,
)  # fmt: skip
PRO = Geometry(
    vocab_size=129280, hidden_size=7168, compress_ratios=(128, 128, *(4, 128) * 29, 4, 0), num_hash_layers=3,
    n_routed_experts=384, num_experts_per_tok=6, moe_intermediate_size=3072, num_attention_heads=128, head_dim=512,
    q_lora_rank=1536, o_groups=16, o_lora_rank=1024, index_n_heads=64, index_topk=1024, max_position_embeddings=1048576,
    original_max_position_embeddings=65536, rope_factor=16, routed_scaling_factor=2.5,
)  # fmt: skip

# Published for the releases: tensors in the index, and its total_size.
FLASH_PUBLISHED = (69_187, 159_609_485_896)
PRO_PUBLISHED = (145_116, 864_704_792_696)

BITS = {"I64": 64, "F32": 32, "BF16": 16, "F8_E8M0": 8, "F8_E4M3": 8, "I8": 8}
Tensors = dict[str, tuple[str, list[int]]]


def fp8(name: str, rows: int, columns: int) -> Tensors:
    scale = [-(-rows // 128), -(-columns // 128)]
    return {f"{name}.weight": ("F8_E4M3", [rows, columns]), f"{name}.scale": ("F8_E8M0", scale)}


def fp4(name: str, rows: int, columns: int) -> Tensors:
    return {f"{name}.weight": ("I8", [rows, columns // 2]), f"{name}.scale": ("F8_E8M0", [rows, columns // 32])}


def compressor(name: str, ratio: int, width: int, hidden: int) -> Tensors:
    wide = width * (2 if ratio == 4 else 1)
    return {
        f"{name}.ape": ("F32", [ratio, wide]),
        f"{name}.wkv.weight": ("BF16", [wide, hidden]),
        f"{name}.wgate.weight": ("BF16", [wide, hidden]),
        f"{name}.norm.weight": ("BF16", [width]),
    }


def hyper_connection(name: str, rows: int, scales: int, hidden: int) -> Tensors:
    return {
        f"{name}_fn": ("F32", [rows, 4 * hidden]),
        f"{name}_base": ("F32", [rows]),
        f"{name}_scale": ("F32", [scales]),
    }


def attention(name: str, ratio: int, g: Geometry) -> Tensors:
    heads = g.num_attention_heads * g.head_dim
    tensors: Tensors = {
        f"{name}.attn_sink": ("F32", [g.num_attention_heads]),
        f"{name}.q_norm.weight": ("BF16", [g.q_lora_rank]),
        f"{name}.kv_norm.weight": ("BF16", [g.head_dim]),
        **fp8(f"{name}.wq_a", g.q_lora_rank, g.hidden_size),
        **fp8(f"{name}.wq_b", heads, g.q_lora_rank),
        **fp8(f"{name}.wkv", g.head_dim, g.hidden_size),
        **fp8(f"{name}.wo_a", g.o_groups * g.o_lora_rank, heads // g.o_groups),
        **fp8(f"{name}.wo_b", g.hidden_size, g.o_groups * g.o_lora_rank),
    }
    if ratio:
        tensors |= compressor(f"{name}.compressor", ratio, g.head_dim, g.hidden_size)
    if ratio == 4:
        tensors |= fp8(f"{name}.indexer.wq_b", g.index_n_heads * g.index_head_dim, g.q_lora_rank)
        tensors[f"{name}.indexer.weights_proj.weight"] = ("BF16", [g.index_n_heads, g.hidden_size])
        tensors |= compressor(f"{name}.indexer.compressor", 4, g.index_head_dim, g.hidden_size)
    return tensors


def block(name: str, ratio: int, hashed: bool, g: Geometry) -> Tensors:
    hidden, inner = g.hidden_size, g.moe_intermediate_size
    tensors = {f"{name}.{norm}.weight": ("BF16", [hidden]) for norm in ("attn_norm", "ffn_norm")}
    tensors |= hyper_connection(f"{name}.hc_attn", 24, 3, hidden) | hyper_connection(f"{name}.hc_ffn", 24, 3, hidden)
    tensors |= attention(f"{name}.attn", ratio, g)
    tensors[f"{name}.ffn.gate.weight"] = ("BF16", [g.n_routed_experts, hidden])
    if hashed:
        tensors[f"{name}.ffn.gate.tid2eid"] = ("I64", [g.vocab_size, g.num_experts_per_tok])
    else:
        tensors[f"{name}.ffn.gate.bias"] = ("F32", [g.n_routed_experts])
    for matrix, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
        tensors |= fp8(f"{name}.ffn.shared_experts.{matrix}", rows, columns)
        for expert in range(g.n_routed_experts):
            tensors |= fp4(f"{name}.ffn.experts.{expert}.{matrix}", rows, columns)
    return tensors


def shards(g: Geometry) -> Iterator[Tensors]:
    """The release's shards: embedding, one per layer, head, the MTP block."""
    hidden, matrix = g.hidden_size, ("BF16", [g.vocab_size, g.hidden_size])
    yield {"embed.weight": matrix}
    for layer in range(g.num_hidden_layers):
        yield block(f"layers.{layer}", g.compress_ratios[layer], layer < g.num_hash_layers, g)
    yield {
        "head.weight": matrix, "norm.weight": ("BF16", [hidden]), **hyper_connection("hc_head", 4, 1, hidden)
    }  # fmt: skip
    mtp = block("mtp.0", 0, False, g)
    mtp |= {f"mtp.0.{norm}.weight": ("BF16", [hidden]) for norm in ("enorm", "hnorm", "norm")}
    yield (
        mtp
        | fp8("mtp.0.e_proj", hidden, hidden)
        | fp8("mtp.0.h_proj", hidden, hidden)
        | hyper_connection("mtp.0.hc_head", 4, 1, hidden)
    )


def write_sparse(path: Path, tensors: Tensors) -> int:
    """A safetensors file with these tensors, all zero; returns the bytes of their data."""
    entries, position = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (list(BITS).index(item[1][0]), item[0])):
        size = math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    return position


def released_tensors(g: Geometry) -> dict[str, TensorInfo]:
    """What the headers of a release would say, without files: quicker, for what has no need of files."""
    infos = {}
    for number, tensors in enumerate(shards(g), start=1):
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * BITS[dtype] // 8
            infos[name] = TensorInfo(name, dtype, tuple(shape), (Extent(f"{number}.safetensors", 0, size),))
    return infos


def make_released(folder: Path, g: Geometry) -> Path:
    """A checkpoint of the release's size in `folder`: true configs, headers and index, data full of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    every = list(shards(g))
    weight_map, total = {}, 0
    for number, tensors in enumerate(every, start=1):
        name = f"model-{number:05d}-of-{len(every):05d}.safetensors"
        total += write_sparse(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(g)))
    (folder / "inference").mkdir()
    (folder / "inference" / "config.json").write_text(json.dumps(inference_config(g)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    return folder
