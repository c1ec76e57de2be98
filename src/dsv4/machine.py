"""The resources of this machine: cores, memory and disk, and the peak memory of this process.

psutil has most of them for every system. It lacks a container's memory limit and, except on Windows, the peak memory of
a process; this module reads both.
"""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dsv4.errors import UsageError

MARGIN = 0.8  # of the free memory; the rest is for activations, keys and other programs

# (limit, current use) of a container's memory, in version 2 and version 1 of control groups
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# (quota, period) of a container's processor time in microseconds: version 2 has both in one file
PROCESSOR_TIME = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
NO_LIMIT = 2**60  # version 1 writes a huge number where there is no limit
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}

# Rounds that a thread of libgomp spins before it sleeps. By default 300,000: beside a busy process the spinning threads
# keep the core from the one that they wait for, and decoding takes up to 40 times as long.
SPIN_ROUNDS = "1000"


def limit_spinning() -> None:
    """Have OpenMP's threads sleep early, unless the user decided. Before torch is imported: libgomp reads it then."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)


def use_large_pages() -> None:
    """Have torch allocate large tensors in large pages, unless the user decided. Before it is imported.

    A prompt's activations are tens of MB, which the allocator maps anew each time: clearing small pages one by one
    takes longer than most of what is then computed.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _container_cores() -> int | None:
    """Cores whose time the container that this process runs in may use, rounded up; None without a limit."""
    for files in PROCESSOR_TIME:
        try:
            quota, period = map(int, " ".join(Path(file).read_text(encoding="ascii") for file in files).split())
        except (OSError, ValueError):  # "max" is no number
            continue
        return -(-quota // period) if quota > 0 and period > 0 else None  # -1 is no limit
    return None


def _affinity_cores() -> int:
    """Cores that the system may run this process on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Cores that this process may use: by its affinity and its container's share of processor time."""
    return min(_affinity_cores(), _container_cores() or sys.maxsize)


def limit_threads() -> None:
    """Have torch start no more threads than its container runs at once, unless the user decided. Before it is imported.

    torch knows of affinity only; threads beyond the container's share of processor time would wait for each other.
    """
    if usable_cores() < _affinity_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return psutil.virtual_memory().total


def available_memory() -> int:
    """Bytes of memory available without swapping, regardless of this process's limit."""
    return psutil.virtual_memory().available


def _container_memory() -> tuple[int, int] | None:
    """(limit, current use) in bytes of the container that this process runs in; None outside of one."""
    for limit, used in CONTROL_GROUPS:
        try:
            found = int(Path(limit).read_text(encoding="ascii")), int(Path(used).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no number
            continue
        return found if found[0] < NO_LIMIT else None
    return None


def memory_limit() -> int | None:
    """Bytes of memory that this process's container may use; None without a limit."""
    container = _container_memory()
    return None if container is None else container[0]


def usable_memory() -> int:
    """Bytes that weights may occupy: what is free in the machine and in the container, less a margin."""
    free, container = available_memory(), _container_memory()
    if container is not None:
        free = min(free, max(container[0] - container[1], 0))
    return int(free * MARGIN)


def peak_memory() -> int:
    """The largest number of bytes of memory that this process has occupied."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage also counts what a large parent had before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write to the disk that holds, or will hold, `folder`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the search for garbage in cycles, which looks at all objects often while many are made that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_size(size: str | int) -> int:
    """`5GB` -> 5000000000, `512MiB` -> 536870912, `1000` -> 1000; decimal units unless they carry an `i`.

    Raises UsageError for anything else, zero and negative sizes included.
    """
    upper = str(size).strip().upper()
    digits = upper.rstrip("BKMGTI")
    unit = upper[len(digits) :].strip()
    factor = _UNITS.get(unit, _UNITS.get(unit.removesuffix("B")))
    try:
        count = int(float(digits) * factor) if factor else 0
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise UsageError(f"'{size}' is not a size", "Write a number and a unit, such as 5GB, 512MiB or 100000.")
    return count
