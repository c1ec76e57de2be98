"""The resources of this machine: cores, memory and disk, and the peak memory of this process.

psutil has most of them for every system. It lacks the limits of control groups and, except on Windows, the peak memory
of a process; this module reads both.
"""

import gc
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dsv4.errors import UsageError

MARGIN = 0.8  # of the free memory; the rest is for activations, keys and other programs

# Control groups: of containers, of a batch system's jobs, of systemd's units. Version 2 has one tree of them, version 1
# a tree for each controller. The names below are of version 2 and version 1.
GROUPS = Path("/sys/fs/cgroup")
GROUPS_OF_THIS_PROCESS = Path("/proc/self/cgroup")
MEMORY_FILES = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")  # (limit, use)
# Processor time, (quota, period) in microseconds: version 2 has both in one file.
PROCESSOR_FILES = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
# Of memory.stat, in bytes: what files have in the page cache. It counts as used, and is freed when memory is needed.
PAGE_CACHE = {"inactive_file", "active_file"}, {"total_inactive_file", "total_active_file"}
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


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, innermost first: each one's limits hold for those inside it, too.

    A container may see the path of its host, where nothing is; its own group is then the top of the tree.
    """
    try:
        lines = GROUPS_OF_THIS_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = GROUPS / controller if controllers else GROUPS
        innermost = top / path.lstrip("/")
        yield from (folder for folder in (innermost, *innermost.parents) if folder.is_relative_to(top))


def _numbers(folder: Path, versions: Iterable[tuple[str, ...]]) -> tuple[int, int] | None:
    """Two numbers of a control group, from the files of the version that it has; None if they limit nothing."""
    for files in versions:
        try:
            one, other = map(int, " ".join((folder / name).read_text(encoding="ascii") for name in files).split())
        except (OSError, ValueError):  # "max" is no number
            continue
        return one, other
    return None


def _container_cores() -> int | None:
    """Cores whose time this process's control groups may use, rounded up; None without a limit."""
    found = (_numbers(group, PROCESSOR_FILES) for group in _groups("cpu"))
    # A quota of -1 is no limit.
    return min((-(-quota // period) for quota, period in filter(None, found) if quota > 0 and period > 0), default=None)


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


def _page_cache(group: Path) -> int:
    """Bytes of files that a control group has in memory."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").split("\n")
    except OSError:
        return 0
    counts = {name: int(count) for name, _, count in (line.partition(" ") for line in lines) if count.isdecimal()}
    return max(sum(counts.get(name, 0) for name in names) for names in PAGE_CACHE)


def _container_memory() -> tuple[int, int] | None:
    """(limit, free) in bytes, each the smallest of this process's control groups; None without a limit."""
    limits: list[tuple[int, int]] = []
    for group in _groups("memory"):
        limit, used = _numbers(group, MEMORY_FILES) or (NO_LIMIT, 0)
        if limit < NO_LIMIT:
            limits.append((limit, min(limit, max(limit - used + _page_cache(group), 0))))
    return (min(limit for limit, _ in limits), min(free for _, free in limits)) if limits else None


def memory_limit() -> int | None:
    """Bytes of memory that this process's container may use; None without a limit."""
    container = _container_memory()
    return None if container is None else container[0]


def usable_memory() -> int:
    """Bytes that weights may occupy: what is free in the machine and in the container, less a margin."""
    container = _container_memory()
    free = available_memory() if container is None else min(available_memory(), container[1])
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
