"""How fast do weights come from the files? Loading, and experts that are read while computing.

    python benchmarks/loading.py [FOLDER] [--layers 6] [--experts 48] [--limit 2GB] [--rounds 3]

Makes a checkpoint with the layer dimensions of V4-Flash (benchmarks/run.py) in FOLDER and measures, each in processes
of its own, several to a row:

- loading with the files cached, alone and beside two busy processes: GB/s, and memory above that of the weights;
- tokens with `--limit` bytes of weights in memory, files cached: seconds a token, hit rate;
- the same with the files dropped from the page cache before each token, against the rate at which this disk gives the
  same files to plain reads of 4 MB between the tokens, one after the other or by four threads, whichever is faster.
  Bytes of matrices that were read on a guess and not used do not count.

The load that other programs put on the machine is printed with every row; a row measured beside others means little.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from run import flash

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.machine import limit_spinning, parse_size, usable_cores
from dsv4.model import load
from dsv4.model.reading.meter import ReadStatistics
from dsv4.text import human_bytes

READ_BYTES = 4 << 20
PLAIN_BYTES = 1 << 28  # about those of a token
TOKENS = 8
BUSY_LOOP = "while True: pass"


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def foreign_load(since: tuple[float, float, float]) -> float:
    """Cores that programs other than this one used since `clocks()`, on average."""
    wall, busy, own = (now - before for now, before in zip(clocks(), since, strict=True))
    return max(busy - own, 0.0) / wall


def clocks() -> tuple[float, float, float]:
    """Seconds: wall-clock, processor time of all programs, processor time of this process."""
    machine, own = psutil.cpu_times(), os.times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
    return time.perf_counter(), busy, own.user + own.system


def shards(folder: Path) -> list[Path]:
    """The files with weights."""
    return sorted(folder.glob("*.safetensors"))


def warm(folder: Path) -> None:
    """Read every file once, into the page cache."""
    buffer = bytearray(READ_BYTES)
    for path in shards(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in shards(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path, threads: int, nbytes: int) -> float:
    """Bytes per second of plain reads spread over the dropped files, by so many threads."""
    places = [(path, at) for path in shards(folder) for at in range(0, path.stat().st_size, READ_BYTES)]
    places = places[:: max(1, len(places) * READ_BYTES // nbytes)]
    drop(folder)

    def read(place: tuple[Path, int]) -> int:
        with place[0].open("rb", buffering=0) as file:
            file.seek(place[1])
            return len(file.read(READ_BYTES) or b"")

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, places))
    return total / (time.perf_counter() - began)


def take_memory(nbytes: int) -> None:
    """Use so much memory and let it go: a virtual machine gets what it did not use lately from its host, slowly."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        pages = memoryview(mapping)
        for page in range(0, nbytes, mmap.PAGESIZE):
            pages[page] = 1
        pages.release()


def measure_load(folder: Path, limit: int) -> dict[str, float]:
    """Load everything."""
    take_memory(sum(path.stat().st_size for path in shards(folder)) * 11 // 10)
    before, since = anonymous_memory(), clocks()
    model = load(folder)
    seconds, _, own = (now - start for now, start in zip(clocks(), since, strict=True))
    weights = model.store.resident_bytes
    above = anonymous_memory() - before - weights
    rates = {"GB/s": weights / seconds / 1e9, "GB/CPU s": weights / own / 1e9}
    return rates | {"above": above / weights, "foreign": foreign_load(since)}


def needed_bytes(first: ReadStatistics, last: ReadStatistics) -> float:
    """Bytes read between the two and not in vain; all experts have the same size."""
    share = 1 - (last.unneeded - first.unneeded) / (last.read - first.read)
    return share * (last.bytes_read - first.bytes_read)


def measure_tokens(folder: Path, limit: int, before_each: Callable[[], None]) -> dict[str, float]:
    """Single tokens with a limit; `before_each` is not timed."""
    model = load(folder, max_memory=limit)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS + 4), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(1)
    for position in range(4):
        model.forward(ids[:, position : position + 1], cache, rows="last")
    first, seconds, since = model.store.statistics, [], clocks()
    for position in range(4, TOKENS + 4):
        before_each()
        began = time.perf_counter()
        model.forward(ids[:, position : position + 1], cache, rows="last")
        seconds.append(time.perf_counter() - began)
    last, foreign = model.store.statistics, foreign_load(since)
    needed = needed_bytes(first, last)
    return {
        "s/token": statistics.median(seconds),
        "MB/token": needed / TOKENS / 1e6,
        "in vain": (last.bytes_read - first.bytes_read - needed) / TOKENS / 1e6,
        "hits": 1 - (last.read - last.unneeded - first.read + first.unneeded) / (last.used - first.used),
        "GB/s": needed / sum(seconds) / 1e9,
        "foreign": foreign,
    }


def measure_cached(folder: Path, limit: int) -> dict[str, float]:
    """Tokens with cached files."""
    return measure_tokens(folder, limit, lambda: None)


def measure_cold(folder: Path, limit: int) -> dict[str, float]:
    """Tokens with dropped files, as a share of the disk's rate between them: of one thread or of four."""
    rates: dict[int, list[float]] = {1: [], 4: []}

    def before_each() -> None:
        for threads, found in rates.items():
            found.append(disk_rate(folder, threads, PLAIN_BYTES))
        drop(folder)

    found = measure_tokens(folder, limit, before_each)
    rate = max(statistics.harmonic_mean(each) for each in rates.values())  # all bytes over all seconds
    return found | {"disk GB/s": rate / 1e9, "share": found["GB/s"] * 1e9 / rate}


ROWS: dict[str, tuple[Callable[[Path, int], dict[str, float]], int]] = {  # measured by, beside so many busy processes
    "load": (measure_load, 0),
    "load beside two busy processes": (measure_load, 2),
    "experts from cached files": (measure_cached, 0),
    "experts from the disk": (measure_cold, 0),
}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes that compute all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measured(row: str, folder: Path, limit: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--limit", str(limit), "--one", row]
    with busy(ROWS[row][1]):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def report(row: str, results: list[dict[str, float]]) -> None:
    """The median of each figure, and its range."""
    print(f"\n{row}, {len(results)} processes")
    for name in results[0]:
        values = sorted(result[name] for result in results)
        print(f"  {name:10} {statistics.median(values):8.3f}   ({values[0]:.3f} to {values[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--limit", type=parse_size, default=2 * 10**9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--one", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        json.dump(ROWS[arguments.one][0](arguments.folder, arguments.limit), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.folder or Path(scratch), arguments)


def run(folder: Path, arguments: Any) -> None:
    """Make the checkpoint if it is not there, measure every row, print."""
    source = folder / f"flash-{arguments.layers}x{arguments.experts}"
    if not source.exists():
        make_checkpoint(source, geometry=flash(arguments.layers, arguments.experts), tokenizer=False)
    size = sum(path.stat().st_size for path in shards(source))
    print(f"{human_bytes(size)} of weights, limit {human_bytes(arguments.limit)}, {usable_cores()} cores")
    for row in arguments.rows:
        warm(source)
        report(row, [measured(row, source, arguments.limit) for _ in range(arguments.rounds)])


if __name__ == "__main__":
    limit_spinning()
    main()
