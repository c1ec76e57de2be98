"""Decides the resources of a conversion: threads, shards in flight, and memory for the whole process."""

import ctypes
from dataclasses import dataclass

from dsv4.convert.plan.plan import Plan
from dsv4.errors import MachineError
from dsv4.text import human_bytes

from .pipeline import BLOCK_BYTES, BLOCKS

BASE_MEMORY = 288 * 2**20  # the interpreter, an imported torch, the cast's table
TENSOR_MEMORY = 3000  # of the headers, the plan and the manifest, for each output tensor
RECORD_MEMORY = 4  # of each character of recorded scales: its entry, line of the journal, and line of the manifest
SPARED_BYTES = 256 * 2**20  # results of scans that are kept although they could be computed again, at most
PIECES_AHEAD = 4  # pieces submitted beyond the workers, so that they have work while the disk is waited for
PIECES_OF_A_SHARD = 2  # one that is computed and one that waits


@dataclass(frozen=True)
class Resources:
    """What one run uses.

    workers: threads that compute pieces. shards: most shards that are in flight at a time. window: pieces that are
    submitted and not yet taken, of all shards together. piece_memory: bytes to compute a piece; a sixth of them hold
    what came of it, until that is written. spared_bytes: results of scans that may be kept.
    fixed_memory: bytes for everything that is none of these.
    """

    workers: int
    shards: int
    window: int
    piece_memory: int
    spared_bytes: int
    fixed_memory: int

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that the process needs, whatever the data is."""
        waiting = self.window + self.shards * (BLOCKS - 1)
        pieces = self.workers * self.piece_memory + waiting * (self.piece_memory // 6)
        return self.fixed_memory + self.spared_bytes + self.shards * BLOCKS * BLOCK_BYTES + pieces


def _fixed_memory(plan: Plan) -> int:
    return BASE_MEMORY + plan.tensors * TENSOR_MEMORY + plan.record_limit * RECORD_MEMORY


def _with_workers(plan: Plan, workers: int, spared_bytes: int) -> Resources:
    """As many shards in flight as workers: where one core hashes slowly, each shard needs a core for that alone.

    Two at least, so that one is computed while the other is made durable.
    """
    shards = min(max(workers, 2), max(len(plan.shards), 1))
    window = workers + max(PIECES_AHEAD, PIECES_OF_A_SHARD * shards)
    spared = min(spared_bytes, shards * plan.spared_bytes)
    return Resources(workers, shards, window, plan.piece_memory, spared, _fixed_memory(plan))


def decide_resources(
    plan: Plan, cores: int, max_workers: int | None = None, max_memory_bytes: int | None = None
) -> Resources:
    """Workers (default: one per core that may be used), shards in flight and window, within a bound on the memory.

    Raises MachineError if not even one worker with one shard fits.
    """
    workers = max_workers or cores
    if max_memory_bytes is None:
        return _with_workers(plan, workers, SPARED_BYTES)
    fixed = _fixed_memory(plan)
    spared = min(SPARED_BYTES, max(max_memory_bytes - fixed, 0) // 4)
    least = Resources(1, 1, PIECES_OF_A_SHARD, plan.piece_memory, 0, fixed)
    for found in (*(_with_workers(plan, count, spared) for count in range(workers, 0, -1)), least):
        if found.peak_memory_bytes <= max_memory_bytes:
            return found
    needed = f"{-(-least.peak_memory_bytes // 10**6)}MB"
    text = f"--max-memory {human_bytes(max_memory_bytes)} is too little: {needed} are the least"
    raise MachineError(text, f"Give --max-memory {needed}, or more.")


def keep_freed_memory() -> None:
    """Ask glibc to keep freed buffers instead of returning them, where every thread finds them. For the command line
    only: it cannot be undone.

    Pieces of a few MB come and go all the time, and fresh pages for each cost as much as converting them. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 64 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: one heap, of which no thread has a part to itself
