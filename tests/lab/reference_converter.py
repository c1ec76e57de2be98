"""The reference converter, written anew from its rules: makes other people's conversions for tests of `verify`.

`model{i}-mp{N}.safetensors` for N ranks; `wo_a` decoded to BF16; FP4 experts kept (dtype tag F4) or cast to FP8 by
the reference's rule: block scale = largest scale / 2^6, in float32, stored as E8M0, nothing checked; -0 becomes +0.
Of V4.1: blocks of 32, and n-gram tables cut into ceil(rows / N) rows, the last ones filled up.
Shares no code with dsv4. Numbers through ml_dtypes and float32, as the original does it.
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
from raw_safetensors import Raw, Tensors, merged, raw, read_folder, write_file

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
_TOP = ("embed.weight", "head.weight")
_MARKOV = ("markov_w1.weight", "markov_w2.weight", "markov_head.embed.weight", "markov_head.head.weight")


def scale_values(scale: Raw) -> np.ndarray:
    """E8M0 or float32 scales as float32."""
    if scale.dtype == "F32":
        return scale.array()
    return scale.array().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def unpacked(weight: Raw) -> np.ndarray:
    """FP4 codes `[rows, columns]`, low nibble first."""
    data = weight.array()
    return np.stack((data & 15, data >> 4), axis=-1).reshape(data.shape[0], -1)


def spread(values: np.ndarray, rows: int, columns: int, shape: tuple[int, ...]) -> np.ndarray:
    """Block values to one per element."""
    return values.repeat(rows, axis=0).repeat(columns, axis=1)[: shape[0], : shape[1]]


def cast_to_fp8(weight: Raw, scale: Raw, block: int = 128) -> tuple[Raw, Raw]:
    """The reference's FP4 -> FP8: no check of any kind."""
    codes, scales = unpacked(weight), scale_values(scale)
    rows, columns = codes.shape
    tiles = scales.reshape(rows // block, block, columns // block, block // 32)
    block_scales = tiles.max(axis=(1, 3)) / np.float32(64)
    ratio = spread(scales, 1, 32, codes.shape) / spread(block_scales, block, block, codes.shape)
    values = (FP4_VALUES[codes] * ratio).astype(ml_dtypes.float8_e4m3fn)
    stored = np.maximum(block_scales, np.float32(2.0**-127)).astype(ml_dtypes.float8_e8m0fnu)
    return raw("F8_E4M3", values.view(np.uint8)), raw("F8_E8M0", stored.view(np.uint8))


def decode_fp8(weight: Raw, scale: Raw, block: int = 128) -> Raw:
    """FP8 in square blocks to BF16."""
    values = weight.array().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    decoded = (values * spread(scale_values(scale), block, block, values.shape)).astype(ml_dtypes.bfloat16)
    return raw("BF16", decoded.view(np.uint16))


def _axis(name: str) -> int | None:
    if re.fullmatch(r"(.*\.)?attn\.wo_b\.(weight|scale)", name):
        return 1
    sliced = re.search(r"attn\.wq_b\.|indexer\.wq_b\.|attn\.wo_a\.|attn\.attn_sink$|indexer\.weights_proj\.", name)
    top = name in _TOP or name.endswith(_MARKOV)
    return 0 if sliced or top else None


def _slice(tensor: Raw, axis: int, rank: int, ranks: int) -> Raw:
    assert tensor.shape[axis] % ranks == 0
    return tensor.like(np.split(tensor.array(), ranks, axis=axis)[rank])


def _table_slice(name: str, tensor: Raw, rank: int, ranks: int) -> Raw:
    rows, codes = -(-tensor.shape[0] // ranks), tensor.array()
    filled = np.full((rows * ranks - tensor.shape[0], tensor.shape[1]), 127 if name.endswith("scale") else 0, np.uint8)
    return tensor.like(np.concatenate((codes, filled))[rank * rows : (rank + 1) * rows])


def _is_expert(name: str) -> re.Match[str] | None:
    return re.search(r"(.*)\.ffn\.experts\.(\d+)\.", name)


def rank_tensors(tensors: Tensors, rank: int, ranks: int, expert_dtype: str = "fp4", block: int = 128) -> Tensors:
    """What rank `rank` of `ranks` gets."""
    experts: dict[str, int] = {}  # of the main layers, and of the draft stages
    for match in filter(None, map(_is_expert, tensors)):
        stack = match[1].partition(".")[0]
        experts[stack] = max(experts.get(stack, 0), 1 + int(match[2]))
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = _is_expert(name)
        if match and int(match[2]) * ranks // experts[match[1].partition(".")[0]] != rank:
            continue
        if ".engram.embed." in name:
            found[name] = _table_slice(name, tensor, rank, ranks)
            continue
        axis = _axis(name)
        found[name] = tensor if axis is None or ranks == 1 else _slice(tensor, axis, rank, ranks)
    for name in [name for name in found if name.endswith(".wo_a.weight")]:
        found[name] = decode_fp8(found[name], found.pop(name.replace("weight", "scale")), block)
    for name in [name for name in found if _is_expert(name) and found[name].dtype == "I8"]:
        weight, scale = found[name], name.replace("weight", "scale")
        if expert_dtype == "fp8":
            found[name], found[scale] = cast_to_fp8(weight, found[scale], block)
        else:
            found[name] = Raw("F4", (weight.shape[0], weight.shape[1] * 2), weight.data)
    return found


def convert(source: Path, output: Path, ranks: int, expert_dtype: str = "fp4", block: int = 128) -> None:
    """All rank files. Tokenizer files are copied when there are some; no index, no config."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = merged(read_folder(source))
    for rank in range(ranks):
        found = rank_tensors(tensors, rank, ranks, expert_dtype, block)
        write_file(output / f"model{rank}-mp{ranks}.safetensors", dict(sorted(found.items())))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (output / name).write_bytes((source / name).read_bytes())
