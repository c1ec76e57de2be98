"""How fast `dsv4 verify` is, beside `sha256sum` and `openssl` over the same files in the same run.

Makes a checkpoint of real Flash dimensions (experts of 2048 x 4096, FP4 with E8M0 scales) and FP8 conversions of it,
reads everything once so that all work from the page cache, then takes turns and compares the best of each. Where the
processor has instructions for SHA-256, openssl uses them; sha256sum does if it was built with openssl.
Peak memory is that of the whole process, less that of a process which only imports torch.

    python benchmarks/verify.py [FOLDER with 3 GB free] [--experts 80] [--runs 3]

Limits: 0.4 of the wall time of `sha256sum` and 0.8 of openssl's, with as many processes as cores; 1 GiB of memory.
"""

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SHARDS = 8
MATRICES = {"w1": (2048, 4096), "w2": (4096, 2048), "w3": (2048, 4096)}
DISTINCT = 4  # experts with numbers of their own; the others repeat their bytes under other names
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def make_matrix(shape: tuple[int, int], generator: torch.Generator, keep_sign: bool) -> list[tuple[str, bytes]]:
    """One expert matrix in FP4 and FP8: [(kind, bytes)] for FP4 codes and scales, FP8 codes and scales."""
    rows, columns = shape
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 124, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    largest = scales.view(rows // 128, 128, columns // 128, 4).amax((1, 3)) - 6
    exponent = scales.int() - largest.repeat_interleave(128, 0).repeat_interleave(4, 1).int()
    values = E2M1[codes.int()].view(rows, -1, 32) * torch.exp2(exponent)[..., None]
    if not keep_sign:
        values = values + 0.0  # -0 becomes +0, as in the reference converter
    fp8 = values.view(shape).to(torch.float8_e4m3fn).view(torch.uint8)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return [(kind, t.numpy().tobytes()) for kind, t in (("I8", packed), ("S4", scales), ("F8", fp8), ("S8", largest))]


def write_shard(path: Path, tensors: Tensors) -> None:
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


def make_folders(folder: Path, experts: int, keep_sign: bool) -> tuple[Path, Path]:
    """`source` (FP4) and `output` (FP8), plus a BF16 tensor that passes through."""
    generator = torch.Generator().manual_seed(0)
    made = [
        {name: make_matrix(shape, generator, keep_sign) for name, shape in MATRICES.items()} for _ in range(DISTINCT)
    ]
    embedding = np.random.default_rng(0).integers(0, 256, 32 << 20, dtype=np.uint8).tobytes()
    folders = folder / "source", folder / "output"
    for place in folders:
        place.mkdir()
    for shard in range(SHARDS):
        both: tuple[Tensors, Tensors] = ({}, {})
        for expert in range(shard, experts, SHARDS):
            for name, (rows, columns) in MATRICES.items():
                stem = f"layers.0.ffn.experts.{expert}.{name}"
                parts = dict(made[expert % DISTINCT][name])
                both[0][f"{stem}.scale"] = ("F8_E8M0", (rows, columns // 32), parts["S4"])
                both[0][f"{stem}.weight"] = ("I8", (rows, columns // 2), parts["I8"])
                both[1][f"{stem}.scale"] = ("F8_E8M0", (rows // 128, columns // 128), parts["S8"])
                both[1][f"{stem}.weight"] = ("F8_E4M3", (rows, columns), parts["F8"])
        for place, tensors in zip(folders, both, strict=True):
            tensors[f"layers.{shard}.ffn.gate.weight"] = ("BF16", (4096, 4096), embedding)
            write_shard(place / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors", tensors)
    return folders


HASHES = {"sha256sum": ["sha256sum"], "openssl": ["openssl", "dgst", "-sha256"]}


def hash_once(files: list[str], program: str) -> tuple[float, float]:
    """(wall seconds, processor seconds) of a program of HASHES over the files, as many processes as cores."""
    command = ["xargs", "-P", str(len(os.sched_getaffinity(0))), "-n", "1", *HASHES[program]]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, input="\n".join(files), check=True, stdout=subprocess.DEVNULL, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - started, processor


MEASURE = """
import resource, sys, time
import torch
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
from dsv4.convert.proof.run import verify
started, processor = time.perf_counter(), time.process_time()
result = verify(sys.argv[1], sys.argv[2])
seconds, processor = time.perf_counter() - started, time.process_time() - processor
assert result.exit_code == 0, result.verdict
print(seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""


def verify_once(source: Path, output: Path) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, peak bytes above an imported torch), imports of torch not counted."""
    command = [sys.executable, "-c", MEASURE, str(source), str(output)]
    wall, processor, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(wall), float(processor), int(memory)


def measure(source: Path, output: Path, runs: int, what: str) -> None:
    """Take turns and print the best of each. Processor time says more than wall time on a busy machine."""
    files = [str(path) for place in (source, output) for path in sorted(place.glob("*.safetensors"))]
    size = sum(os.path.getsize(file) for file in files)
    programs = [program for program in HASHES if shutil.which(program)]
    hash_once(files, programs[0])  # into the page cache
    hashes: dict[str, list[tuple[float, float]]] = {program: [] for program in programs}
    verifies = []
    for _ in range(runs):
        for program in programs:
            hashes[program].append(hash_once(files, program))
        verifies.append(verify_once(source, output))
    best = {program: [min(column) for column in zip(*times, strict=True)] for program, times in hashes.items()}
    walls, processors, memories = zip(*verifies, strict=True)
    wall, processor, memory = min(walls), min(processors), max(memories)
    print(f"{what}: {size / 1e9:.2f} GB, peak {memory / 2**20:.0f} MiB over an imported torch")
    for name, (seconds, used) in {"verify": [wall, processor], **best}.items():
        print(f"  {name:9}  {seconds:6.2f} s wall  {used:6.2f} s processor  {size / seconds / 1e9:5.2f} GB/s")
    for name, (seconds, used) in best.items():
        print(f"  {wall / seconds:.2f} of the wall time of {name}, {processor / used:.2f} of its processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=80, help="12.6 MB in FP4 each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="where to make the checkpoints; default: a temporary folder"
    )
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dsv4-verify-", dir=arguments.folder))
    try:
        for keep_sign, what in ((True, "signs of zero kept"), (False, "signs of zero lost")):
            inside = place / what.replace(" ", "-")
            inside.mkdir()
            source, output = make_folders(inside, arguments.experts, keep_sign)
            measure(source, output, arguments.runs, what)
            shutil.rmtree(inside)
        print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, python {sys.version.split()[0]}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
