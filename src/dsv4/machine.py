"""What memory the machine has to give, and the most that this process used."""

import os
import resource
import sys
from pathlib import Path

MARGIN = 0.8  # of the free memory; the rest is for activations, keys and everybody else

_CGROUP = Path("/sys/fs/cgroup")


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_available() -> int | None:
    """What the container may still take, None outside of one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def usable_memory() -> int | None:
    """Bytes that weights may occupy: what is free, less a margin. None if the system does not say."""
    free = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    available = min(free) if free else _physical_memory()
    return None if available is None else max(int(available * MARGIN), 0)


def peak_memory() -> int:
    """Most bytes of memory that this process occupied so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage also counts what a large parent had before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
