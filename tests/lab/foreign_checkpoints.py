"""Small checkpoints of the release whose routed experts another tool has quantized: its names, dtypes, shapes, config.

The numbers are random: what is tested is that the quantization is recognised, not that it is right.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from exact_values import edit_config, edit_tensors, experts, tensors_of
from raw_safetensors import ITEM_BITS, Raw, Tensors

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

SMALL = Geometry(compress_ratios=(4, 0), num_hash_layers=1, n_routed_experts=4)


def random(name: str, dtype: str, *shape: int) -> Raw:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return Raw(dtype, shape, rng.bytes(int(np.prod(shape)) * ITEM_BITS[dtype] // 8))


# What one matrix of `rows` x `columns` becomes: ending of the tensor's name -> dtype and shape.
Stored = dict[str, tuple[Any, ...]]


def nvfp4(rows: int, columns: int) -> Stored:
    scales = {"weight_scale": ("F8_E4M3", rows, columns // 16), "weight_scale_2": ("F32",), "input_scale": ("F32",)}
    return {"weight": ("U8", rows, columns // 2), **scales}


def compressed_nvfp4(rows: int, columns: int) -> Stored:
    scales = {"weight_scale": ("F8_E4M3", rows, columns // 16), "weight_global_scale": ("F32", 1)}
    return {"weight_packed": ("U8", rows, columns // 2), **scales}


def compressed_int4(rows: int, columns: int) -> Stored:
    scales = {"weight_scale": ("BF16", rows, columns // 32), "weight_shape": ("I32", 2)}
    return {"weight_packed": ("I32", rows, columns // 8), **scales}


def awq(rows: int, columns: int) -> Stored:
    zeros = {"qzeros": ("I32", columns // 128, rows // 8), "scales": ("F16", columns // 128, rows)}
    return {"qweight": ("I32", columns, rows // 8), **zeros}


def gptq(rows: int, columns: int) -> Stored:
    zeros = {"qzeros": ("I32", columns // 128, rows // 8), "scales": ("F16", columns // 128, rows)}
    return {"qweight": ("I32", columns // 8, rows), **zeros, "g_idx": ("I32", columns)}


def ascend(rows: int, columns: int) -> Stored:
    return {"weight": ("I8", rows, columns), "weight_scale": ("F32", rows, 1), "weight_offset": ("F32", rows, 1)}


def mlx(rows: int, columns: int) -> Stored:
    scales = {"scales": ("BF16", rows, columns // 64), "biases": ("BF16", rows, columns // 64)}
    return {"weight": ("U32", rows, columns // 8), **scales}


RELEASED = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
MODELOPT = {"moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION", "group_size": 16, "ignore": ["*.attn.*"]}
INT4 = {"bits": 4, "group_size": 128}
AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}

# Name that dsv4 gives it -> the matrices, and the keys of config.json that change (None: the key is removed).
KINDS: dict[str, tuple[Callable[[int, int], Stored], dict[str, Any]]] = {
    "NVFP4 of NVIDIA ModelOpt": (
        nvfp4,
        {"quantization_config": RELEASED | MODELOPT | {"quant_method": "modelopt"}, "expert_dtype": None},
    ),
    "compressed-tensors (nvfp4-pack-quantized)": (
        compressed_nvfp4,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
    ),
    "compressed-tensors (pack-quantized)": (
        compressed_int4,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    ),
    "AWQ": (awq, {"quantization_config": {"quant_method": "awq", "version": "gemm", "zero_point": True, **INT4}}),
    "GPTQ": (gptq, {"quantization_config": {"quant_method": "gptq", "desc_act": False, "sym": True, **INT4}}),
    "INT8 of Ascend ModelSlim": (ascend, {"quantization_config": None, "expert_dtype": None}),
    "MLX (affine)": (mlx, {"quantization": AFFINE, "quantization_config": None, "expert_dtype": None}),
}


def write_foreign(folder: Path, stored: Callable[[int, int], Stored], config: dict[str, Any]) -> Path:
    """A checkpoint whose routed experts are `stored`, with these keys in config.json."""
    make_checkpoint(folder, geometry=SMALL)
    tensors = tensors_of(folder)
    new: Tensors = {}
    dropped = []
    for name in experts(tensors):
        rows, packed = tensors[name].shape
        stem = name.removesuffix(".weight")
        dropped += [name, f"{stem}.scale"]
        for ending, (dtype, *shape) in stored(rows, 2 * packed).items():
            new[f"{stem}.{ending}"] = random(f"{stem}.{ending}", dtype, *shape)
    edit_tensors(folder, new, tuple(dropped))
    edit_config(folder, **config)
    return folder


def foreign(folder: Path, kind: str) -> Path:
    """A checkpoint of one of KINDS."""
    return write_foreign(folder, *KINDS[kind])
