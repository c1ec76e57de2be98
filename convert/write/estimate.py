"""How long a conversion will take, estimated from a second of measuring: the source's disk, the output's, the hash.

All that is written is read, hashed and written, whatever else is done with it; so the estimate is the time of the
disks, or that of the hash on all cores, whichever is longer. Casts come on top: little for FP8 where it is compiled,
much where torch computes. What the system has in memory is read faster than from the disk, here as in the conversion.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.storage import Folder
from dsv4.convert.plan.plan import Plan
from dsv4.convert.write.atomic_file import set_direct
from dsv4.convert.write.shards import sha256

BLOCK_BYTES = 8 * 2**20
SECONDS = 0.3  # of reading, and of writing; a third of it for the hash


@dataclass(frozen=True)
class Rates:
    """Bytes per second: of the disks, None if it could not be measured, and of SHA-256 on one core.

    same_disk: whether source and output share a disk, and its rate.
    """

    read: float | None
    write: float | None
    sha256: float
    same_disk: bool


def _rate(step: Callable[[int], int], most_bytes: int, seconds: float) -> float | None:
    """Bytes per second of `step`, called with how many bytes were done and returning how many more are."""
    done, started = 0, time.perf_counter()
    while done < most_bytes and time.perf_counter() - started < seconds:
        count = step(done)
        if not count:
            break
        done += count
    return done / max(time.perf_counter() - started, 1e-9) if done else None


def _read_rate(checkpoint: Checkpoint) -> float | None:
    """Of blocks that lie apart in the largest shards, which are hardly all in memory."""
    shards = sorted(checkpoint.shards.values(), key=lambda shard: -shard.size)[:8]
    buffer = memoryview(bytearray(BLOCK_BYTES))
    places = [(s.name, at, s.size) for at in range(8) for s in shards]

    def read(done: int) -> int:
        name, eighth, size = places[done // BLOCK_BYTES % len(places)]
        part = buffer[: min(BLOCK_BYTES, size)]
        checkpoint.storage.read_into(name, part, (size - len(part)) * eighth // 8)
        return len(part)

    return _rate(read, sum(shard.size for shard in shards), SECONDS)


def _write_rate(folder: Path, most_bytes: int) -> float | None:
    """Of a file without a name, whole pages at a time that are on the disk when a step ends.

    One fsync at the end could take a minute: memory fills much faster than a busy disk empties it.
    """
    size = min(BLOCK_BYTES, -(-most_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        block, is_direct = mmap.mmap(-1, size), set_direct(file.fileno(), True)

        def write(done: int) -> int:
            count = os.write(file.fileno(), block)
            if not is_direct:
                os.fsync(file.fileno())
            return count

        return _rate(write, most_bytes, SECONDS)
    return None


def _hash_rate(plan: Plan) -> float:
    """Of one core: of two files at a time where it can and there are several."""
    algorithm, most_bytes = sha256.algorithm(), plan.output_bytes
    first, second, block = algorithm.new(), algorithm.new(), memoryview(bytes(min(BLOCK_BYTES, max(most_bytes, 1))))
    update_two = algorithm.update_two if len(plan.shards) > 1 else None

    def step(done: int) -> int:
        if update_two is None:
            first.update(block)
            return len(block)
        update_two(first, block, second, block)
        return 2 * len(block)

    return _rate(step, most_bytes, SECONDS / 3) or float("inf")


def measure(checkpoint: Checkpoint, plan: Plan, output: Path) -> Rates:
    """Measure for about a second, less for a small checkpoint. Leaves nothing on the disk."""
    there = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    local = checkpoint.storage.path if isinstance(checkpoint.storage, Folder) else None
    return Rates(
        _read_rate(checkpoint) if local is not None else None,
        _write_rate(there, plan.output_bytes),
        _hash_rate(plan),
        same_disk=local is not None and os.stat(local).st_dev == os.stat(there).st_dev,
    )


def estimated_seconds(plan: Plan, rates: Rates, cores: int) -> float:
    """Time of the disks, or of the hash on so many cores, whichever is longer."""
    reading = plan.source_bytes / rates.read if rates.read else 0.0
    writing = plan.output_bytes / rates.write if rates.write else 0.0
    disks = reading + writing if rates.same_disk else max(reading, writing)
    return max(disks, plan.output_bytes / rates.sha256 / cores)
