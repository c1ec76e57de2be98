"""How does `convert` grow with the number of cores? One process with 1, 2, 4, … workers, each on as many cores.

    python benchmarks/scaling.py [FOLDER] [--gigabytes G] [--most-workers N]

Makes a checkpoint of FP4 experts of V4-Flash's dimensions in FOLDER (default: /dev/shm, where the disk is memory) and
converts it to FP8 with 1, 2, 4, … workers. Each run has a process of its own that is bound to as many cores as it has
workers, and is timed without the imports. Beside it in the same table: `cp` of the result's shards, as many processes
on the same cores, which is what the machine can do with these bytes.

Then the cost of each stage on one core, measured on pieces of the same size, and what follows for other numbers of
cores: the time of a core for each GB, divided by the cores, unless memory is slower. Where there are only two cores,
the model is all that there is for more.

Needs no network, compiler or hub library: numpy, torch and psutil. In a checkout without an installation:
`PYTHONPATH=src python3 benchmarks/scaling.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from dsv4.convert.checkpoint.header import build_header
from dsv4.convert.write.shards import sha256
from dsv4.machine import usable_cores
from dsv4.quant import fp4_to_fp8, fp4_to_fp8_compiled
from dsv4.quant.block_scales import Block

ROWS, COLUMNS = 2048, 4096  # an expert matrix of V4-Flash: one piece
BLOCK = Block(128, 128)
PIECE = ROWS * COLUMNS  # bytes of FP8
SOURCE_BYTES = PIECE // 2 + PIECE // 32
GIGABYTES_A_CORE = 0.6  # of FP4: several shards for each worker
SECONDS = 140  # no further run is begun after so many
CONFIG = {
    "model_type": "deepseek_v4",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
# Runs in a process of its own: bound to cores before torch counts them, timed after the imports.
CHILD = """
import json, os, sys, time
source, output, workers, shard_bytes = sys.argv[1:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(workers)])
from dsv4.convert import convert
from dsv4.convert.write.shards.resources import keep_freed_memory
from dsv4.machine import peak_memory
import torch
from dsv4.quant.fp4_to_fp8_compiled import best_kernel
best_kernel()
keep_freed_memory()
wall, cpu = time.perf_counter(), time.process_time()
convert(source, output, max_workers=int(workers), max_shard_size=int(shard_bytes))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak_memory()]))
"""


def make_source(folder: Path, gigabytes: float) -> int:
    """A checkpoint of FP4 experts in shards of at most 64 of them; the bytes repeat. Returns the number of matrices."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    count = max(4, round(gigabytes * 1e9 / SOURCE_BYTES))
    scales = random.integers(119, 122, (ROWS, COLUMNS // 32), dtype=np.uint8)
    codes = [random.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8) for _ in range(4)]
    starts, weight_map = range(0, count, 64), {}
    for number, start in enumerate(starts, 1):
        file = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        stems = [f"layers.{e // 256}.ffn.experts.{e % 256}.w1" for e in range(start, min(start + 64, count))]
        scale_infos = {f"{stem}.scale": ("F8_E8M0", (ROWS, COLUMNS // 32)) for stem in stems}
        infos = scale_infos | {f"{stem}.weight": ("I8", (ROWS, COLUMNS // 2)) for stem in stems}
        with (folder / file).open("wb") as out:
            out.write(build_header(infos))
            for _ in stems:
                out.write(scales)
            for i, _ in enumerate(stems):
                out.write(codes[i % 4])
        weight_map |= dict.fromkeys(infos, file)
    index = {"metadata": {"total_size": count * SOURCE_BYTES}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return count


def convert_once(source: Path, output: Path, workers: int, shard_bytes: int) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak bytes of memory) of one conversion into a fresh folder."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, *map(str, (source, output, workers, shard_bytes))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, processor, peak = json.loads(done.stdout)
    return seconds, processor, peak


def copy_once(folder: Path, output: Path, processes: int) -> float:
    """Seconds that `cp` of all shards takes, so many at a time, on as many cores."""
    output.mkdir()
    shards = "\n".join(map(str, sorted(folder.glob("*.safetensors"))))
    command = ["xargs", "-P", str(processes), "-I", "{}", "cp", "{}", str(output)]
    if taskset := shutil.which("taskset"):
        cores = sorted(os.sched_getaffinity(0))[:processes]
        command = [taskset, "-c", ",".join(map(str, cores)), *command]
    started = time.perf_counter()
    subprocess.run(command, input=shards, check=True, text=True)
    taken = time.perf_counter() - started
    shutil.rmtree(output)
    return taken


def _processor_time(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def seconds_per_gigabyte(work: Callable[[], object], moved: int) -> float:
    """Time of a core, the least of some calls that handle so many bytes."""
    work()
    return min(_processor_time(work) for _ in range(9)) / moved * 1e9


def hash_cost(data: np.ndarray) -> float:
    """Seconds of one core for each GB of SHA-256: of two files at a time where it can, as `convert` does it."""
    algorithm, view = sha256.algorithm(), data.data
    first, second = algorithm.new(), algorithm.new()
    if algorithm.update_two is None:
        return seconds_per_gigabyte(lambda: first.update(view), data.nbytes)
    together = partial(algorithm.update_two, first, view, second, view)
    return seconds_per_gigabyte(together, 2 * data.nbytes)


def stages(folder: Path) -> dict[str, tuple[float, float]]:
    """By stage: seconds of one core for each GB that it handles, and how many GB that is for each GB written."""
    torch.set_num_threads(1)
    packed = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
    groups = torch.randint(119, 122, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    scales = fp4_to_fp8.scales_if_safe(groups, BLOCK)
    assert scales is not None
    made, other = torch.empty(ROWS, COLUMNS, dtype=torch.uint8), np.ones(PIECE, np.uint8)
    cast, read = fp4_to_fp8_compiled.best_kernel(), np.ones(PIECE // 2, np.uint8)
    file = folder / "piece"
    file.write_bytes(bytes(PIECE))
    descriptor = os.open(file, os.O_RDWR)

    def cast_piece() -> None:
        for top in range(0, ROWS, 512):
            rows = slice(top, top + 512)
            cast(packed[rows], groups[rows], scales.scale_bytes[top // 128 : top // 128 + 4], BLOCK, made[rows])

    share = SOURCE_BYTES / PIECE
    costs = {
        "read": (seconds_per_gigabyte(lambda: os.preadv(descriptor, [read], 0), read.nbytes), share),
        "cast": (seconds_per_gigabyte(cast_piece, PIECE), 1.0),
        "SHA-256 of shards": (hash_cost(other), 1.0),
        "write": (seconds_per_gigabyte(lambda: os.pwrite(descriptor, other, 0), PIECE), 1.0),
    }
    os.close(descriptor)
    file.unlink()
    return costs


def memory_rate(threads: int) -> float:
    """GB/s that so many threads copy together."""
    pairs = [(np.ones(64 << 20, np.uint8), np.ones(64 << 20, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(4):
            np.copyto(*pair)

    with ThreadPoolExecutor(threads) as pool:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(copy, pairs))
            taken.append(time.perf_counter() - started)
    return threads * 4 * (64 << 20) / min(taken) / 1e9


def print_model(folder: Path, cores: int) -> None:
    """Cost of each stage on one core, and the throughput that follows for so many cores."""
    costs = stages(folder)
    print("\nstage                        s/GB handled   GB handled per GB written   s per GB written")
    for name, (cost, share) in costs.items():
        print(f"{name:28} {cost:12.3f} {share:27.2f} {cost * share:18.3f}")
    total = sum(cost * share for cost, share in costs.values())
    sha, rate = costs["SHA-256 of shards"][0], memory_rate(cores)
    files = 1 if sha256.algorithm().update_two is None else 2  # that one core hashes
    print(f"{'all':28} {'':12} {'':27} {total:18.3f}   ({total / (SOURCE_BYTES / PIECE):.2f} per GB of FP4)")
    print(f"{cores} threads copy {rate:.1f} GB/s; a conversion moves about twice as much as a copy does")
    print("\ncores   GB/s written by the model   shards in flight that keep up with it")
    for count in (1, 2, 4, 8, 16, 32, 64):
        print(f"{count:5} {count / total:27.1f} {files * max(1, round(count / total * sha + 0.5)):39}")


def counts(most: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def measure(work: Path, gigabytes: float, most: int) -> None:
    """The table of measured runs."""
    began, source, output = time.perf_counter(), work / "source", work / "output"
    matrices = make_source(source, gigabytes)
    written = matrices * PIECE / 1e9
    shard_bytes = max(2 * PIECE, round(written * 1e9 / (4 * most)))
    where = "compiled" if fp4_to_fp8_compiled.is_compiled() else "in torch"
    print(f"{matrices * SOURCE_BYTES / 1e9:.1f} GB of FP4 experts, {written:.1f} GB of FP8 in shards of", end=" ")
    print(f"{shard_bytes / 1e6:.0f} MB; cast {where}; {usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    print("\nworkers   seconds   GB/s written   CPU s/GB of FP4   peak memory   cp: GB/s   convert/cp   load")
    for workers in counts(most):
        if time.perf_counter() - began > SECONDS:
            print(f"{workers:7}   left out: {SECONDS} s are over")
            continue
        seconds, processor, peak = convert_once(source, output, workers, shard_bytes)
        copied = written / copy_once(output, work / "copy", workers)
        print(
            f"{workers:7} {seconds:9.2f} {written / seconds:14.2f} {processor / (matrices * SOURCE_BYTES / 1e9):17.2f}"
            f" {peak / 1e6:10.0f} MB {copied:10.2f} {written / seconds / copied:12.2f} {os.getloadavg()[0]:6.1f}",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    memory = Path("/dev/shm")
    parser.add_argument("folder", nargs="?", type=Path, default=memory if memory.is_dir() else None)
    parser.add_argument("--gigabytes", type=float, help="of FP4; default: by cores and free space")
    parser.add_argument("--most-workers", type=int, default=usable_cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        room = min(shutil.disk_usage(name).free, psutil.virtual_memory().available) / 1e9
        gigabytes = options.gigabytes or min(GIGABYTES_A_CORE * options.most_workers, room / 8)
        measure(Path(name), gigabytes, options.most_workers)
        print_model(Path(name), options.most_workers)


if __name__ == "__main__":
    main()
