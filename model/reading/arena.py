"""Memory for weights: mapped once, in large pages, and reused.

Weights are not allocated by the allocator: freed memory stays with the process between buffers that are still in use,
up to a third of a model's size. A mapping has exactly its size, and is returned to the system when it is closed. Fresh
pages cost more than copying a file from the page cache into them, so ranges that were returned are reused first.
"""

import contextlib
import mmap
import weakref

import torch

from dsv4.errors import MachineError
from dsv4.text import human_bytes

ALIGNMENT = 64  # bytes, of a cache line and of the widest vector
LARGE_PAGE = 1 << 21


def aligned(nbytes: int) -> int:
    """Rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _map(nbytes: int) -> mmap.mmap:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        text = f"the system gives no {human_bytes(nbytes)} of memory for weights: {error.strerror}"
        raise MachineError(text, "Allow less memory (--max-memory), or free some.") from None


class Arena:
    """One mapping of at least `nbytes`, handed out in parts that come back when no tensor uses them any more.

    Pages count as memory of the process from their first use on. Parts are taken by one thread; any may give back.
    """

    def __init__(self, nbytes: int) -> None:
        self._size = aligned(nbytes)
        self._mapping = _map(self._size + LARGE_PAGE)
        address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._start = -address % LARGE_PAGE
        self._used, self._parts = 0, 0  # bytes that were handed out so far, and in how many parts
        self._free: list[tuple[int, int]] = []  # (bytes, offset) of parts that came back
        large = self._size // LARGE_PAGE * LARGE_PAGE
        if large and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE, self._start, large)

    def _place(self, nbytes: int) -> tuple[int, int] | None:
        """(bytes, offset) of a part: the smallest that fits of those that came back, else an untouched one."""
        if self._parts == len(self._free):  # all came back: other sizes may be needed now
            self._used, self._parts = 0, 0
            self._free.clear()
        fitting = [part for part in self._free if part[0] >= nbytes]
        if fitting:
            part = min(fitting)
            self._free.remove(part)
            return part
        if self._used + nbytes > self._size:
            return None
        self._used, self._parts = self._used + nbytes, self._parts + 1
        return nbytes, self._used - nbytes

    def take(self, nbytes: int) -> torch.Tensor | None:
        """uint8 [nbytes], nbytes at least 1, of any contents, at a multiple of ALIGNMENT; None if there is no room."""
        part = self._place(aligned(nbytes))
        if part is None:
            return None
        first = self._start + part[1]
        lease = memoryview(self._mapping)[first : first + nbytes]
        # Tensors that share this memory keep `lease` alive, and nothing else does.
        weakref.finalize(lease, self._free.append, part).atexit = False
        memory = torch.frombuffer(lease, dtype=torch.uint8)
        # Makes the large pages. Of several threads that first used one at the same time, each would clear it.
        memory[::LARGE_PAGE] = 0
        return memory
