"""Safetensors files as dictionaries of raw bytes, for tests that write files which no library would write."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ITEM_BITS = {
    "F4": 4, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64,
}  # fmt: skip
NUMPY = {"I8": "u1", "U8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1", "BF16": "<u2", "U32": "<u4", "F32": "<f4",
         "I64": "<i8"}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """One tensor: dtype as the header has it, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """Codes of the dtype's size (float32 and int64 as numbers), in the tensor's shape."""
        return np.frombuffer(self.data, dtype=NUMPY[self.dtype]).reshape(self.shape)

    def like(self, array: np.ndarray) -> "Raw":
        """The same dtype with other codes (and shape)."""
        return replace(self, shape=array.shape, data=np.ascontiguousarray(array).tobytes())


Tensors = dict[str, Raw]


def raw(dtype: str, array: np.ndarray) -> Raw:
    return Raw(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def read_file(path: Path) -> Tensors:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, value in header.items():
        begin, end = value["data_offsets"]
        found[name] = Raw(value["dtype"], tuple(value["shape"]), data[8 + length + begin : 8 + length + end])
    return found


def prefix_sha256(path: Path) -> dict[str, str]:
    """By tensor, without those of no bytes: SHA-256 of the file from its first byte to the tensor's last."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: value for name, value in json.loads(data[8:start]).items() if name != "__metadata__"}
    places = {name: value["data_offsets"] for name, value in header.items()}
    return {
        name: hashlib.sha256(data[: start + end]).hexdigest() for name, (begin, end) in places.items() if begin < end
    }


def header_of(tensors: Tensors) -> dict[str, Any]:
    header, position = {}, 0
    for name, tensor in tensors.items():
        assert len(tensor.data) * 8 == math.prod(tensor.shape) * ITEM_BITS[tensor.dtype]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(tensor.data)],
        }
        position += len(tensor.data)
    return header


def write_file(path: Path, tensors: Tensors, header: dict[str, Any] | str | None = None) -> None:
    """Tensors in the order given. `header` replaces the right header, as an object or as text."""
    text = header if isinstance(header, str) else json.dumps(header_of(tensors) if header is None else header)
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(t.data for t in tensors.values()))


def read_folder(folder: Path) -> dict[str, Tensors]:
    """Every shard of a folder."""
    return {path.name: read_file(path) for path in sorted(folder.glob("*.safetensors"))}


def merged(shards: dict[str, Tensors]) -> Tensors:
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def write_index(folder: Path, shards: dict[str, Tensors]) -> None:
    total = sum(len(t.data) for tensors in shards.values() for t in tensors.values())
    weights = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def scatter(folder: Path, count: int) -> Path:
    """Share the tensors of a checkpoint among `count` shards, a weight's scale in another than the weight."""
    everything = merged(read_folder(folder))
    shards: dict[str, Tensors] = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": {} for i in range(count)}
    files = list(shards)
    weights = [name for name in everything if not name.endswith(".scale")]
    for position, name in enumerate(weights):
        place = position * count // len(weights)
        shards[files[place]][name] = everything[name]
        scale = name.removesuffix(".weight") + ".scale"
        if scale in everything:
            shards[files[(place + 1) % count]][scale] = everything[scale]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_folder(folder, shards)
    return folder


def write_folder(folder: Path, shards: dict[str, Tensors], index: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        write_file(folder / name, tensors)
    if index:
        write_index(folder, shards)
