"""How fast is `dsv4 convert`, and how much memory does it take? Ratios, measured side by side in one run.

    python benchmarks/convert.py [FOLDER] [--gigabytes 0.5] [--rounds 5]

Makes a checkpoint of real V4-Flash expert dimensions (2048 x 4096) in FOLDER, reads everything once so that the page
cache is warm, and then compares, in turns:

- the whole conversion with the obvious one: whole files in memory, table lookup into float32, multiply, cast;
- the whole conversion with what must be read and written in any case: `cat` of the source, and `cp` of the result made
  durable with fsync; into eight shards, because the release has dozens, and into one, where no second shard is in
  flight; also those into the forms of other tools;
- the way back from BF16 with the way to FP8;
- the kernel alone, two threads, with a memcpy of its output by two threads: compiled, and in torch.

Every run of the first two has a process of its own, as it would for a user, and is timed without what a process does
once: imports, tables, loading the compiled code. A conversion of one expert goes before it. The
conversion is what the command line does, which tells the C library to keep freed memory. Processor time is that of the
conversion's process, for each GB of the source's FP4 codes.

Peak memory is that of a child process, less that of one that only imports torch; once for the checkpoint and once
for one eight times as large.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4.convert import convert
from dsv4.convert.checkpoint.header import build_header
from dsv4.convert.synthetic.geometry import Geometry, config
from dsv4.convert.write.shards.resources import keep_freed_memory
from dsv4.quant import e2m1, fp4_to_fp8, fp4_to_fp8_compiled
from dsv4.quant.block_scales import Block

ROWS, COLUMNS = 2048, 4096
LAYER = 256  # experts
SHARDS = 8  # of the output
BLOCK = Block(128, 128)
# With what a form needs beside its name.
FORMS: dict[str, dict[str, str]] = {"mxfp8": {}, "mxfp4": {}, "gguf": {}, "mlx": {}, "nvfp4": {"input_scale": "1.0"}}


def config_of(experts: int) -> dict[str, Any]:
    """config.json of V4 for as many experts; the other dimensions are those of a small checkpoint."""
    widths = Geometry(hidden_size=COLUMNS, moe_intermediate_size=ROWS, n_routed_experts=min(experts, LAYER))
    return config(widths)


def make_source(folder: Path, gigabytes: float, pairs: bool = False) -> None:
    """Experts of random codes and scales that span 2^2, as measured in the real ones; a layer to a shard, as there.

    An expert has one matrix, w1. With `pairs` it has w3 as well, of which NVFP4 needs both.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    matrices = ("w1", "w3") if pairs else ("w1",)
    experts = max(1, round(gigabytes * 1e9 / (ROWS * COLUMNS // 2) / len(matrices)))
    shards = [range(start, min(start + LAYER, experts)) for start in range(0, experts, LAYER)]
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stems = [f"layers.{e // LAYER}.ffn.experts.{e % LAYER}.{matrix}" for e in members for matrix in matrices]
        scales = {f"{s}.scale": ("F8_E8M0", (ROWS, COLUMNS // 32)) for s in stems}
        weights = {f"{s}.weight": ("I8", (ROWS, COLUMNS // 2)) for s in stems}
        with (folder / file).open("wb") as out:
            out.write(build_header(scales | weights))
            for _ in stems:
                out.write(random.integers(119, 122, (ROWS, COLUMNS // 32), dtype=np.uint8))
            for _ in stems:
                out.write(random.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8))
        weight_map |= dict.fromkeys([*scales, *weights], file)
    total = experts * len(matrices) * ROWS * (COLUMNS // 2 + COLUMNS // 32)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(experts)))


def obvious(source: Path, output: Path) -> None:
    """The converter anybody would write first: a whole shard in memory, float32 in between."""
    from safetensors.torch import load_file, save_file

    output.mkdir()
    table = torch.tensor(e2m1.VALUES)
    for file in sorted(source.glob("*.safetensors")):
        tensors, made = load_file(file), {}
        for name in [n for n in tensors if n.endswith(".weight")]:
            packed, scale = tensors[name].view(torch.uint8), tensors[name.replace(".weight", ".scale")].float()
            values = table[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]
            values = values * scale.repeat_interleave(32, 1)
            block = scale.view(ROWS // 128, 128, COLUMNS // 128, 4).amax((1, 3)) / 64
            wide = block.repeat_interleave(128, 0).repeat_interleave(128, 1)
            made[name] = (values / wide).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".scale")] = block
        save_file(made, output / file.name)
        with (output / file.name).open("rb+") as out:
            os.fsync(out.fileno())


def converted(source: Path, output: Path, to: str = "fp8", shards: int = 1) -> None:
    """As the command line does it; FP8 into so many shards."""
    keep_freed_memory()
    shard_bytes = 2 * sum(file.stat().st_size for file in source.glob("*.safetensors")) // shards
    convert(source, output, to=to, max_shard_size=shard_bytes, **FORMS.get(to, {}))


def read_and_write(source: Path, result: Path, output: Path) -> None:
    """`cat` of the source's shards, `cp` of the result's files, and fsync of every copy."""
    output.mkdir()
    shards = sorted(map(str, source.glob("*.safetensors")))
    subprocess.run(["cat", *shards], check=True, stdout=subprocess.DEVNULL)
    for file in sorted(path for path in result.iterdir() if path.is_file()):
        subprocess.run(["cp", str(file), str(output)], check=True)
        with (output / file.name).open("rb+") as out:
            os.fsync(out.fileno())


def _seconds(work: Callable[[Path], object], scratch: Path, small: Path) -> tuple[float, float]:
    converted(small, scratch)
    shutil.rmtree(scratch)
    started, processor = time.perf_counter(), time.process_time()
    work(scratch)
    return time.perf_counter() - started, time.process_time() - processor


def seconds(work: Callable[[Path], object], scratch: Path) -> tuple[float, float]:
    """Wall time and processor time of one run into a fresh folder, in a fresh process."""
    shutil.rmtree(scratch, ignore_errors=True)
    small = scratch.with_name("small")
    if not small.is_dir():
        make_source(small, 0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        taken = process.submit(_seconds, work, scratch, small).result()
    shutil.rmtree(scratch, ignore_errors=True)
    return taken


def row(name: str, a: list[float], b: list[float], target: str) -> None:
    """One line of the table: medians, and the median of the ratios of neighbouring runs."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    middle = statistics.median
    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
    print(f"| {name} | {middle(a):.3f} s | {middle(b):.3f} s | {middle(ratios):.2f} ({spread}) | {target} |")


def form_row(source: Path, work: Path, to: str, rounds: int) -> None:
    """A conversion into another tool's form against what must be read and written for it, in turns."""
    result = work / to
    convert(source, result, to=to, **FORMS[to])
    jobs = [partial(converted, source, to=to), partial(read_and_write, source, result)]
    times = [[seconds(job, work / "scratch")[0] for job in jobs] for _ in range(rounds + 1)][1:]
    first, second = ([turn[i] for turn in times] for i in (0, 1))
    row(f"dsv4 convert --to {to} / cat of source and cp of result, fsynced", first, second, "at most 1.25")
    shutil.rmtree(result)


def way_back_row(source: Path, work: Path, rounds: int) -> None:
    """BF16 to FP4 against FP4 to FP8, in turns: the same weights, so the ratio of times is that of rates."""
    wide = work / "bf16"
    convert(source, wide, to="bf16")
    jobs = [partial(converted, wide, to="fp4"), partial(converted, source)]
    times = [[seconds(job, work / "scratch")[0] for job in jobs] for _ in range(rounds + 1)][1:]
    row("BF16 to FP4 / FP4 to FP8, the same weights", *([turn[i] for turn in times] for i in (0, 1)), "at most 3")
    shutil.rmtree(wide)


def kernel_times(rounds: int) -> dict[str, list[float]]:
    """Both forms of the cast and a memcpy of its output, on two threads over 512 MiB of output."""
    pieces = 64
    packed = [torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8) for _ in range(4)]
    groups = torch.randint(119, 122, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    scales = fp4_to_fp8.scales_if_safe(groups, BLOCK)
    assert scales is not None
    made = torch.empty(pieces, ROWS * COLUMNS, dtype=torch.uint8)
    other = torch.ones_like(made)

    def cast(form: fp4_to_fp8.CastInto, piece: int) -> None:
        out = made[piece].view(ROWS, COLUMNS)
        for a in range(0, ROWS, 512):
            rows, chosen = slice(a, a + 512), scales.scale_bytes[a // 128 : a // 128 + 4]
            form(packed[piece % 4][rows], groups[rows], chosen, BLOCK, out[rows])

    def copy(piece: int) -> None:
        made[piece].copy_(other[piece])

    jobs = {
        "fastest": partial(cast, fp4_to_fp8_compiled.best_kernel()),
        "torch": partial(cast, fp4_to_fp8.cast_into),
        "copy": copy,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with ThreadPoolExecutor(2, initializer=lambda: torch.set_num_threads(1)) as pool:
        for turn in range(rounds + 1):
            for name, function in jobs.items():
                started = time.perf_counter()
                list(pool.map(function, range(pieces)))
                times[name] += [time.perf_counter() - started] if turn else []
    return times


def peak_bytes(code: str) -> int:
    """Largest resident size of a Python that runs `code`."""
    tail = "\nfrom dsv4.machine import peak_memory; print(peak_memory())"
    run = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return int(run.stdout.split()[-1])


def peak_of_conversion(source: Path, scratch: Path) -> int:
    """Bytes that a conversion takes over an imported torch."""
    shutil.rmtree(scratch, ignore_errors=True)
    code = f"from dsv4.convert import convert\nconvert({str(source)!r}, {str(scratch)!r})"
    peak = peak_bytes(code) - peak_bytes("import torch")
    shutil.rmtree(scratch, ignore_errors=True)
    return peak


def main() -> None:
    """Make the checkpoint, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options.gigabytes, options.rounds)


def measure(work: Path, gigabytes: float, rounds: int) -> None:
    """All measurements, in the folder `work`."""
    source, result, scratch = work / "source", work / "result", work / "scratch"
    make_source(source, gigabytes)
    convert(source, result)
    jobs: dict[str, Callable[[Path], object]] = {
        "dsv4": partial(converted, source, shards=SHARDS),
        "one shard": partial(converted, source),
        "obvious": partial(obvious, source),
        "cat+cp": partial(read_and_write, source, result),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    processor: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            taken, used = seconds(job, scratch)
            times[name] += [taken] if turn else []
            processor[name] += [used / gigabytes] if turn else []
    print(f"{gigabytes} GB of FP4 experts, {len(os.sched_getaffinity(0))} cores, {rounds} rounds,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print("| compared | first | second | ratio, median (range) | wanted |\n|---|---|---|---|---|")
    row("obvious code / dsv4 convert", times["obvious"], times["dsv4"], "at least 10")
    row("dsv4 convert / cat of source and cp of result, fsynced", times["dsv4"], times["cat+cp"], "at most 1.15")
    row("the same into one shard", times["one shard"], times["cat+cp"], "at most 1.15")
    for name, words in (("dsv4", ""), ("one shard", ", into one shard")):
        taken = processor[name]
        used = f"{statistics.median(taken):.2f} s ({min(taken):.2f}..{max(taken):.2f})"
        print(f"| processor time of dsv4 convert for each GB of FP4 codes{words} | {used} | | | at most 1.8 s |")
    way_back_row(source, work, rounds)
    for to in FORMS:
        if to == "nvfp4":
            shutil.rmtree(source)
            make_source(source, gigabytes, pairs=True)
        form_row(source, work, to, rounds)
    kernel = kernel_times(rounds)
    form = "compiled" if fp4_to_fp8_compiled.is_compiled() else "not compiled"
    row(f"cast kernel ({form}) / memcpy of its output, 2 threads", kernel["fastest"], kernel["copy"], "at most 4")
    row("cast kernel in torch / memcpy of its output, 2 threads", kernel["torch"], kernel["copy"], "")
    shutil.rmtree(source)
    make_source(source, gigabytes)
    small = peak_of_conversion(source, scratch)
    shutil.rmtree(result)
    shutil.rmtree(source)
    make_source(source, 8 * gigabytes)
    large = peak_of_conversion(source, scratch)
    print(f"\nPeak memory over an imported torch: {small / 2**20:.0f} MiB for {gigabytes} GB of experts,", end=" ")
    print(f"{large / 2**20:.0f} MiB for {8 * gigabytes} GB (wanted: at most 1024 MiB, the same for both).")


if __name__ == "__main__":
    main()
