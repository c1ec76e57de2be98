"""A checkpoint of a few tall matrices, so that a small share of its blocks is a small share of its bytes."""

from pathlib import Path

import numpy as np
from raw_safetensors import Tensors, raw, write_folder

SIDE = 128


def tall(rows: int, columns: int = 2 * SIDE) -> Tensors:
    """Two experts in FP8 with 128x128 scales, an embedding in BF16, and a norm."""
    numbers = np.random.default_rng(20)
    found: Tensors = {"norm.weight": raw("BF16", numbers.integers(0, 1 << 14, columns, np.uint16))}
    for expert in range(2):
        stem = f"layers.0.ffn.experts.{expert}.w1"
        scales = numbers.integers(110, 125, (rows // SIDE, columns // SIDE), np.uint8)
        found[f"{stem}.weight"] = raw("F8_E4M3", numbers.integers(0, 127, (rows, columns), np.uint8))
        found[f"{stem}.scale"] = raw("F8_E8M0", scales)
    found["embed.weight"] = raw("BF16", numbers.integers(0, 1 << 14, (rows, SIDE), np.uint16))
    return found


def write_tall(folder: Path, tensors: Tensors) -> Path:
    """One shard for each of the large tensors, with its scale."""
    names = [name for name in tensors if not name.endswith("scale")]
    shards: dict[str, Tensors] = {f"model-{n + 1:05d}-of-{len(names):05d}.safetensors": {} for n in range(len(names))}
    for file, name in zip(shards, names, strict=True):
        shards[file] = {name: tensors[name]}
        if (scale := name.removesuffix("weight") + "scale") in tensors:
            shards[file][scale] = tensors[scale]
    write_folder(folder, shards)
    return folder
