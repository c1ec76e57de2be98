"""How much of the machine a conversion may use: threads, and memory for the pieces it works on."""

import ctypes
from dataclasses import dataclass

from dsv4.errors import MachineError
from dsv4.machine import usable_cores

from .pieces import PIECE_MEMORY

BASE_MEMORY = 320 * 2**20  # the interpreter, an imported torch and the cast's table
PIECES_AHEAD = 4  # made but not yet written: the writer waits for the disk now and then, the workers do not


@dataclass(frozen=True)
class Resources:
    """Threads, and pieces that are alive at once."""

    workers: int
    window: int

    @property
    def peak_memory_bytes(self) -> int:
        """What the run is expected to need at most."""
        return BASE_MEMORY + (self.window + self.workers) * PIECE_MEMORY


def decide_resources(max_workers: int | None = None, max_memory_bytes: int | None = None) -> Resources:
    """Workers (default: one per usable core) and window within a bound on memory.

    Raises MachineError if not even one worker fits.
    """
    workers = max_workers or usable_cores()
    if max_memory_bytes is None:
        return Resources(workers, workers + PIECES_AHEAD)
    pieces = (max_memory_bytes - BASE_MEMORY) // PIECE_MEMORY
    if pieces < 2:
        needed = Resources(1, 1).peak_memory_bytes
        raise MachineError(f"--max-memory {max_memory_bytes} is too little: {needed} bytes are the least", "Raise it.")
    workers = min(workers, pieces // 2)
    return Resources(workers, min(workers + PIECES_AHEAD, pieces - workers))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed buffers instead of returning them: pieces of a few MB come and go all the time, and
    getting fresh pages for each costs as much as converting them. Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 64 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
