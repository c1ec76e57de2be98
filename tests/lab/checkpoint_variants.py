"""Small checkpoints from seeds: the variants of releases and Base releases, and those of other people."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from exact_values import edit_config, edit_tensors, experts, read_json, scale_of, spread, tensors_of, values
from raw_safetensors import Raw, Tensors, raw, scatter
from tiny import RAGGED

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

# One hash layer with compressor and indexer, one draft block; every matrix but w1 and w3 has several FP8 blocks.
SMALL = Geometry(
    vocab_size=64, compress_ratios=(4, 0), num_hash_layers=1, n_routed_experts=4, index_n_heads=4, o_groups=4
)  # fmt: skip
V41_BLOCK = (32, 32)


def random_scales(name: str, shape: tuple[int, ...], low: int = 110, high: int = 125) -> Raw:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return raw("F8_E8M0", rng.integers(low, high, shape, dtype=np.uint8))


def early(folder: Path) -> Path:
    """The first revision of Flash: config.json without expert_dtype."""
    make_checkpoint(folder, geometry=SMALL)
    edit_config(folder, expert_dtype=None)
    return folder


def strangers() -> Tensors:
    """Tensors unknown to dsv4: odd names and dtypes, empty, scalar, sub-byte, a BF16 weight with a scale beside it."""
    rng = np.random.default_rng(5)
    return {
        "vision.blocks.0.mlp.w1.weight": raw("BF16", rng.integers(0, 2**15, (6, 10), dtype=np.uint16)),
        "zzz.unknown": raw("I64", rng.integers(-9, 9, (3, 2, 2))),
        "zzz.empty": Raw("F32", (0, 7), b""),
        "zzz.also_empty": Raw("BF16", (7, 0), b""),
        "zzz.scalar": Raw("F32", (), b"\x00\x00\x80\xbf"),
        "zzz.bytes.weight": raw("U8", rng.integers(0, 256, (5, 3), dtype=np.uint8)),
        "zzz.ints.weight": raw("I8", rng.integers(0, 256, (5, 3), dtype=np.uint8)),
        "zzz.plain.weight": raw("BF16", rng.integers(0, 2**15, (5, 3), dtype=np.uint16)),
        "zzz.plain.scale": raw("F32", np.array([1.5], dtype=np.float32)),
        "zzz.nibbles": Raw("F4", (2, 3), b"\x12\x34\x56"),
        "layers.0.ffn.experts.bias_vl": raw("F32", rng.standard_normal(4).astype(np.float32)),
        "größe.weight": raw("F32", np.array([-0.0, np.inf, np.nan], dtype=np.float32)),
    }


def with_strangers(folder: Path) -> Path:
    make_checkpoint(folder, geometry=SMALL)
    edit_tensors(folder, strangers())
    return folder


def v41(folder: Path) -> Path:
    """As V4.1: nested config, expert_dtype inside quantization_config, 32 x 32 blocks, an n-gram table in 1 x 32."""
    make_checkpoint(folder, geometry=SMALL)
    tensors = tensors_of(folder)
    new: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dtype == "F8_E4M3":
            blocks = tuple(-(-n // 32) for n in tensor.shape)
            new[name.replace(".weight", ".scale")] = random_scales(name, blocks)
    rng = np.random.default_rng(41)
    new["layers.0.engram.embed.weight"] = raw("F8_E4M3", rng.integers(0, 127, (77, 64), dtype=np.uint8))
    new["layers.0.engram.embed.scale"] = random_scales("engram", (77, 2))
    new["layers.0.engram.q_weight"] = raw("BF16", rng.integers(0, 2**15, (4, 32), dtype=np.uint16))
    edit_tensors(folder, new)
    old = read_json(folder / "config.json")
    quantization = {key: value for key, value in old.pop("quantization_config").items() if key != "fmt"}
    old["model_type"] = "deepseek_v41_text"
    config = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": old.pop("torch_dtype"),
        "quantization_config": quantization | {"weight_block_size": list(V41_BLOCK), "expert_dtype": "fp4"},
        "text_config": {key: value for key, value in old.items() if key not in ("architectures", "expert_dtype")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def odd_scales(folder: Path) -> Path:
    """A Base checkpoint whose float32 scales are no powers of two."""
    make_checkpoint(folder, geometry=SMALL, experts="fp8")
    rng = np.random.default_rng(7)
    new = {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(".scale"):
            new[name] = raw("F32", (tensor.array() * rng.uniform(1, 2, tensor.shape)).astype(np.float32))
    edit_tensors(folder, new)
    return folder


def _fp8_of(name: str, tensors: Tensors, tiles: np.ndarray) -> Tensors:
    exact = values(name, tensors)
    scales = raw("F8_E8M0", tiles)
    wide = spread(np.exp2(tiles.astype(np.float64) - 127), (128, 128), exact.shape)
    codes = (exact / wide).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return {name: raw("F8_E4M3", codes.view(np.uint8)), name.replace(".weight", ".scale"): scales}


def upcast(folder: Path, source: Path) -> Path:
    """A checkpoint whose FP8 experts hold the FP4 values of `source`, by ml_dtypes: each block by its largest scale."""
    make_checkpoint(folder, geometry=SMALL)
    tensors = tensors_of(source)
    new: Tensors = {}
    for name in experts(tensors):
        scale = scale_of(name, tensors)
        assert scale is not None
        exponents = scale.array().astype(int)
        shape = (tensors[name].shape[0], 2 * tensors[name].shape[1])
        tiles = [
            [int(exponents[r : r + 128, c : c + 4].max()) - 6 for c in range(0, exponents.shape[1], 4)]
            for r in range(0, shape[0], 128)
        ]
        new |= _fp8_of(name, tensors, np.array(tiles, dtype=np.uint8))
    edit_tensors(folder, new)
    edit_config(folder, expert_dtype="fp8")
    return folder


def release(folder: Path) -> Path:
    return make_checkpoint(folder, geometry=SMALL)


def base(folder: Path) -> Path:
    return make_checkpoint(folder, geometry=SMALL, experts="fp8")


def ragged(folder: Path) -> Path:
    """No width is a multiple of 128."""
    return make_checkpoint(folder, geometry=replace(RAGGED, vocab_size=64, compress_ratios=(4, 0)))


def scattered(folder: Path) -> Path:
    return scatter(make_checkpoint(folder, geometry=SMALL), 3)


VARIANTS = {
    "release": release,
    "base": base,
    "ragged": ragged,
    "scattered": scattered,
    "early": early,
    "strangers": with_strangers,
    "v41": v41,
}
