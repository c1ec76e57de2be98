"""Exact values of a folder of safetensors, by other people's code: ml_dtypes decodes, float64 multiplies.

A code has at most 4 significant bits and a scale at most 24, so every product is a float64 exactly. Two tensors are
the same if the bits of these products are: sign of zero included.
"""

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from raw_safetensors import Raw, Tensors, merged, read_folder, write_folder

from dsv4.cli import run

INDEX = "model.safetensors.index.json"
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def tensors_of(folder: Path) -> Tensors:
    return merged(read_folder(folder))


def packed_codes(tensor: Raw) -> np.ndarray:
    """FP4 codes [rows, columns], low nibble first; of I8 [rows, columns/2] or F4 [rows, columns]."""
    data = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
    return np.stack((data & 15, data >> 4), axis=-1).reshape(data.shape[0], -1)


def scale_of(name: str, tensors: Tensors) -> Raw | None:
    return tensors.get(name.removesuffix(".weight") + ".scale") if name.endswith(".weight") else None


def scale_values(scale: Raw) -> np.ndarray:
    if scale.dtype == "F32":
        return scale.array().astype(np.float64)
    assert scale.dtype == "F8_E8M0"
    return scale.array().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """One value per block to one per element."""
    return scale.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]


def values(name: str, tensors: Tensors, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """float64 values of a weight in any format."""
    tensor, scale = tensors[name], scale_of(name, tensors)
    if tensor.dtype in ("I8", "F4") and scale is not None:
        codes = packed_codes(tensor)
        return E2M1[codes] * spread(scale_values(scale), (1, 32), codes.shape)
    if tensor.dtype == "F8_E4M3" and scale is not None:
        shown = (1, 32) if ".engram.embed" in name else block
        codes = tensor.array().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return codes * spread(scale_values(scale), shown, tensor.shape)
    if tensor.dtype == "BF16":
        return tensor.array().view(ml_dtypes.bfloat16).astype(np.float64)
    assert tensor.dtype in ("F32", "I64", "I8", "U8")
    return tensor.array().astype(np.float64)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a.view(np.int64) == b.view(np.int64)).all())


def is_expert(name: str) -> bool:
    return ".experts." in name and name.endswith(".weight")


def experts(tensors: Tensors) -> list[str]:
    return [name for name in tensors if is_expert(name)]


def weights(tensors: Tensors) -> list[str]:
    """All tensors that are not scales."""
    owned = {name.removesuffix(".weight") + ".scale" for name in tensors if name.endswith(".weight")}
    return [name for name in tensors if name not in owned]


def different_values(source: Tensors, output: Tensors, block: tuple[int, int] = (128, 128)) -> list[str]:
    """Names of weights whose values differ, sign of zero included."""
    return [name for name in weights(source) if not same_bits(values(name, source, block), values(name, output, block))]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash; sub-folders too, so that nothing can appear unseen."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_config(folder: Path, **keys: Any) -> None:
    """Replace keys of config.json, in place and in order; None removes."""
    config = read_json(folder / "config.json") | keys
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2), encoding="utf-8")


def edit_tensors(folder: Path, new: Tensors, drop: tuple[str, ...] = ()) -> None:
    """Replace tensors where they are, add unknown ones to the first shard, drop others; rewrite the index."""
    shards = read_folder(folder)
    for name in drop:
        for tensors in shards.values():
            tensors.pop(name, None)
    for name, tensor in new.items():
        home = next((tensors for tensors in shards.values() if name in tensors), shards[min(shards)])
        home[name] = tensor
    write_folder(folder, shards)


def dsv4(*arguments: object) -> tuple[int, str, str]:
    """One command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def convert(source: Path, output: Path, *options: object) -> str:
    """A conversion that must succeed; returns what it printed."""
    code, _, err = dsv4("convert", source, output, *options)
    assert code == 0, err
    return err
