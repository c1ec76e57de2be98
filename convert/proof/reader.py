"""Rows of whole tensors, whatever parts they are stored in."""

import threading

import numpy as np

from .files import Entry, Files
from .formats import Array
from .layout import Tensor


class Reader:
    """Reads into buffers that each thread keeps: memory does not grow with the checkpoint."""

    def __init__(self, source: Files | None, output: Files) -> None:
        self._files = {"source": source, "output": output}
        self._local = threading.local()

    def _buffer(self, key: str, size: int) -> Array:
        buffers = self._local.__dict__
        if key not in buffers or len(buffers[key]) < size:
            buffers[key] = np.empty(size, dtype=np.uint8)
        buffer: Array = buffers[key][:size]
        return buffer

    def _into(self, side: str, entry: Entry, offset: int, buffer: Array) -> None:
        files = self._files[side]
        assert files is not None
        if len(buffer):
            files.read_into(entry.shard, entry.offset + offset, buffer.data.cast("B"))

    def _flat(self, side: str, tensor: Tensor, offset: int, buffer: Array) -> None:
        """Parts along the first axis are one stream of bytes."""
        done, begin = 0, 0
        for part in tensor.parts:
            inside = offset + done - begin
            if done < len(buffer) and 0 <= inside < part.size:
                count = min(part.size - inside, len(buffer) - done)
                self._into(side, part, inside, buffer[done : done + count])
                done += count
            begin += part.size

    def rows(self, side: str, key: str, tensor: Tensor, step: int, start: int, stop: int) -> Array:
        """Rows `start` to `stop`, `step` bytes each, as uint8 `[stop - start, step]`, valid until the next call."""
        buffer = self._buffer(side + key, (stop - start) * step)
        if tensor.axis == 0:
            self._flat(side, tensor, start * step, buffer)
            return buffer.reshape(-1, step)
        table, column = buffer.reshape(-1, step), 0
        for part in tensor.parts:
            width = part.size // max(part.shape[0], 1)
            piece = self._buffer("part", (stop - start) * width)
            self._into(side, part, start * width, piece)
            table[:, column : column + width] = piece.reshape(-1, width)
            column += width
        return table

    def copies_differ(self, side: str, tensor: Tensor, start: int, wanted: Array) -> set[str]:
        """Files whose copy of the tensor has other bytes at `start`."""
        found = set()
        for copy in tensor.copies:
            buffer = self._buffer("part", wanted.size)
            self._into(side, copy, start, buffer)
            if not np.array_equal(buffer, wanted.reshape(-1)):
                found.add(copy.shard)
        return found
