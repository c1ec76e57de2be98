"""A tensor of a checkpoint: name, dtype, shape, and the places of its bytes in the files of any layout.

Most tensors lie in a file as they are. Some forms pack several into common blocks (codes and scales of GGUF's MXFP4),
or store one in another dtype of the same values; an `Encoding` turns such bytes into the release's.

TensorInfo and Extent are named tuples: V4-Pro has 145116 of each, and a frozen dataclass takes three times as long.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Extent(NamedTuple):
    """A run of bytes in one file. `offset` counts from the start of the file."""

    shard: str
    offset: int
    nbytes: int

    def part(self, begin: int, end: int) -> "Extent":
        """Bytes [begin, end) of these."""
        return Extent(self.shard, self.offset + begin, end - begin)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the bytes of a file become those of a tensor: each `stored` bytes make `decoded` bytes.

    decode: uint8 [n, stored] -> uint8 [n, decoded]. Raises ValueError for bytes that stand for no value of the dtype.
    beside: another tensor that it needs; its bytes are then a second argument.
    """

    stored: int
    decoded: int
    decode: Callable[..., Array]
    beside: Extent | None = None


def row_count(shape: tuple[int, ...], nbytes: int) -> int:
    """Number of rows that can be read one by one: the first dimension; 1 for a scalar or rows of partial bytes."""
    return shape[0] if shape and shape[0] and nbytes % shape[0] == 0 else 1


class TensorInfo(NamedTuple):
    """What a header declares of a tensor, and where its bytes are.

    A tensor of the Hugging Face layout lies in one extent. One that is split over the rank files has an extent for
    each rank: rows one after the other, or, with `by_columns`, columns side by side.
    """

    name: str
    dtype: str  # safetensors tag, such as F8_E4M3
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    by_columns: bool = False
    encoding: Encoding | None = None  # None: the file has the tensor's own bytes
    released_dtype: str = ""  # the dtype that the release has, where the files say that it is another one

    @property
    def shard(self) -> str:
        """The file that holds it, the first of several."""
        return self.extents[0].shard

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        extents = self.extents
        stored = extents[0].nbytes if len(extents) == 1 else sum(extent.nbytes for extent in extents)
        return stored if self.encoding is None else stored // self.encoding.stored * self.encoding.decoded

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of everything for a scalar."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    @property
    def is_columns(self) -> bool:
        """Whether each of several extents holds some columns of every row."""
        return self.by_columns and len(self.extents) > 1

    def stored(self, start: int, stop: int) -> Iterator[Extent]:
        """The bytes of the files that bytes [start, stop) of its data are made of, in order; `beside` comes last.

        Of columns, whole rows; of encoded data, whole pieces.
        """
        if start >= stop:
            return
        if self.encoding is not None:
            (extent,), encoding = self.extents, self.encoding
            first, last = start // encoding.decoded, -(-stop // encoding.decoded)
            yield extent.part(first * encoding.stored, last * encoding.stored)
            if encoding.beside is not None:
                yield encoding.beside
        elif self.is_columns:
            first, last = start // self.row_bytes, -(-stop // self.row_bytes)
            for extent in self.extents:
                share = extent.nbytes // self.shape[0]
                yield extent.part(first * share, last * share)
        else:
            first = 0  # where the extent begins in the data
            for extent in self.extents:
                begin, end = max(start - first, 0), min(stop - first, extent.nbytes)
                if begin < end:
                    yield extent.part(begin, end)
                first += extent.nbytes


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint: its size, the SHA-256 of its header, and its tensors in data order."""

    name: str
    size: int
    header_sha256: str
    tensors: tuple[str, ...]
