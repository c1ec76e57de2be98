"""GGUF files as a container: the first has the model's keys, and each its number among the splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.convert.checkpoint.forms.gguf.container import I32, TEXT, U16, Entry, build_header, padding, read_header
from dsv4.convert.checkpoint.forms.gguf.keys import ARCHITECTURE
from dsv4.convert.checkpoint.storage import Storage

NAME = "model"


@dataclass(frozen=True)
class Gguf:
    """File `number` (from 1) of `count` files with `tensors` tensors in all. keys: of the model, in the first file."""

    architecture: str = ARCHITECTURE
    keys: tuple[Entry, ...] = ()
    number: int = 1
    count: int = 1
    tensors: int = 0
    stem: str = NAME

    index_name = ""  # each file says what it holds

    def file_name(self, number: int, count: int) -> str:
        """As llama.cpp names a file, and its splits."""
        return f"{self.stem}.gguf" if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.gguf"

    def order(self, dtype: str, name: str) -> tuple[int, str]:
        """By name."""
        return 0, name

    def padding(self, nbytes: int) -> int:
        """Bytes that fill up to the alignment of the next tensor."""
        return padding(nbytes)

    def header(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
        """The keys, and the table of tensors."""
        entries = [Entry("general.architecture", TEXT, self.architecture)]
        if self.count > 1:
            entries += [
                Entry("split.no", U16, self.number - 1),
                Entry("split.count", U16, self.count),
                Entry("split.tensors.count", I32, self.tensors),
            ]
        if self.number == 1:
            entries += self.keys
        return build_header(entries, ((name, dtype, shape) for name, (dtype, shape) in tensors.items()))

    def index(self, tensors: Mapping[str, dict[str, Any]]) -> bytes:
        """There is none."""
        raise NotImplementedError("GGUF files have no index")

    def check_file(self, storage: Storage, name: str, size: int) -> None:
        """Parse the header."""
        read_header(storage, name, size)
