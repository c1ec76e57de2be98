"""The format of the files that tensors are written into: safetensors, or that of a recipe.

A container decides the order of the tensors in a file, the header before their data, the names of the files, and the
index file, which is written last. Another format is another class like `Safetensors`; the one for GGUF is beside its
recipe.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from dsv4.convert.checkpoint.header import build_header, tensor_bytes
from dsv4.convert.checkpoint.reader import INDEX_NAME, read_header
from dsv4.convert.checkpoint.storage import Storage

# The order of the safetensors library: alignment first, so that every tensor starts at a multiple of its element size.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
_PLACES = {dtype: place for place, dtype in enumerate(DTYPE_ORDER)}


class Container(Protocol):
    """One file format for tensors."""

    index_name: str  # of the file that maps tensors to shards; "" if there is none

    def file_name(self, number: int, count: int) -> str:
        """Name of shard `number` (from 1) of `count`."""
        ...

    def order(self, dtype: str, name: str) -> tuple[int, str]:
        """Sort key of a tensor within its file."""
        ...

    def padding(self, nbytes: int) -> int:
        """Zero bytes that follow the data of a tensor of `nbytes`."""
        ...

    def header(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
        """The bytes before the data. tensors: dtype and shape by name, in data order."""
        ...

    def index(self, tensors: Mapping[str, dict[str, Any]]) -> bytes:
        """Content of the file `index_name`. tensors: manifest entries by name."""
        ...

    def check_file(self, storage: Storage, name: str, size: int) -> None:
        """Raises InputError if the header of a finished file is not valid, or does not fit its size."""
        ...


class Safetensors:
    """Shards of safetensors with the index of Hugging Face."""

    index_name = INDEX_NAME

    def file_name(self, number: int, count: int) -> str:
        """`model-00002-of-00009.safetensors`."""
        return f"model-{number:05d}-of-{count:05d}.safetensors"

    def order(self, dtype: str, name: str) -> tuple[int, str]:
        """By dtype and then by name, as the safetensors library does."""
        return _PLACES[dtype], name

    def padding(self, nbytes: int) -> int:
        """None: the order aligns them."""
        return 0

    def header(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
        """The length and the JSON."""
        return build_header(dict(tensors))

    def index(self, tensors: Mapping[str, dict[str, Any]]) -> bytes:
        """The sum of all tensors' bytes, and the shard of each, by name."""
        total_size = sum(tensor_bytes(entry["dtype"], tuple(entry["shape"])) for entry in tensors.values())
        weight_map = {name: tensors[name]["shard"] for name in sorted(tensors)}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()

    def check_file(self, storage: Storage, name: str, size: int) -> None:
        """Parse the header."""
        read_header(storage, name, size)


SAFETENSORS: Container = Safetensors()
