"""How much of the machine a conversion may use: memory for the whole process, and threads.

hashlib, preadv, write, torch and the compiled cast all let go of the interpreter's lock, so threads are enough.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch

from dsv4.convert.plan.plan import Plan
from dsv4.errors import MachineError
from dsv4.progress import Progress, bounded_map

BASE_MEMORY = 320 * 2**20  # the interpreter, an imported torch, the cast's table, blocks on their way to the disk
TENSOR_MEMORY = 3000  # of the headers, the plan and the manifest, for each output tensor
SPARED_BYTES = 256 * 2**20  # results of one shard's scan that are kept although they could be computed again, at most
PIECES_AHEAD = 4  # computed but not yet written: the writer waits for the disk now and then, the workers do not

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Resources:
    """What one run uses.

    window: pieces that are submitted and not yet written. piece_memory: bytes for one of them, or for one that a
    worker computes. spared_bytes: results of a scan that may be kept. fixed_memory: bytes for everything else.
    """

    workers: int
    window: int
    piece_memory: int
    spared_bytes: int
    fixed_memory: int

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that the process needs, whatever the data is."""
        return self.fixed_memory + self.spared_bytes + (self.window + self.workers) * self.piece_memory


def decide_resources(
    plan: Plan, cores: int, max_workers: int | None = None, max_memory_bytes: int | None = None
) -> Resources:
    """Workers (default: one per core that may be used) and window, within a bound on the memory of the process.

    Raises MachineError if not even one worker fits.
    """
    fixed, piece = BASE_MEMORY + plan.tensors * TENSOR_MEMORY, plan.piece_memory
    workers, spared = max_workers or cores, min(SPARED_BYTES, plan.spared_bytes)
    if max_memory_bytes is None:
        return Resources(workers, workers + PIECES_AHEAD, piece, spared, fixed)
    spared = min(spared, max(max_memory_bytes - fixed, 0) // 4)
    pieces = (max_memory_bytes - fixed - spared) // piece
    if pieces < 2:
        needed = Resources(1, 1, piece, 0, fixed).peak_memory_bytes
        raise MachineError(f"--max-memory {max_memory_bytes} is too little: {needed} bytes are the least", "Raise it.")
    workers = min(workers, pieces // 2)
    return Resources(workers, min(workers + PIECES_AHEAD, pieces - workers), piece, spared, fixed)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed buffers instead of returning them. For the command line only: it cannot be taken back.

    Pieces of a few MB come and go all the time, and fresh pages for each cost as much as converting them. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 64 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


class Workers:
    """The threads of a run: some that compute pieces, one that hashes shards and one that writes them.

    Use as a context manager: all have ended when it is left.
    """

    def __init__(self, resources: Resources) -> None:
        self.spared_bytes = resources.spared_bytes
        self._window = resources.window
        self.pool = ThreadPoolExecutor(resources.workers, "dsv4", initializer=lambda: torch.set_num_threads(1))
        self.hasher = ThreadPoolExecutor(1, "dsv4-hash")
        self.writer = ThreadPoolExecutor(1, "dsv4-write")

    def map(self, function: Callable[[T], R], items: Iterable[T], progress: Progress) -> Iterator[tuple[T, R]]:
        """(item, result) in the order of `items`, see `bounded_map`."""
        return bounded_map(self.pool, function, items, self._window, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self.pool, self.hasher, self.writer):
            threads.shutdown(wait=True, cancel_futures=True)
