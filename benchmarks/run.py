"""How fast is the engine? Against transformers and llama.cpp on the same weights, and the rate at which memory is read.

    python benchmarks/run.py [FOLDER] [--layers 3] [--experts 12] [--tokens 512] [--processes 3] [--rows NAME ...]

Makes a checkpoint with the layer dimensions of V4-Flash (hidden size 4096, 64 heads of 512, experts of 2048, six of
them per token; few layers, experts and words) in FOLDER, and converts it to BF16 for transformers. Then it starts the
rows below in turn, each several times as a process of its own, because where a process's memory lies changes its speed
more than anything else does. A process measures

- decode: single steps after a prompt of 32 tokens, the median step;
- prefill: a prompt of `--tokens`, logits of the last one only;
- the bound: how fast this machine reads memory, between every few steps, because what else its host does can halve
  that from one second to the next; and so the share of it that these steps reach. What other processes used of the
  processor meanwhile is printed as "foreign"; where it is not near zero, only ratios mean much.

transformers runs in bfloat16 with each of its two expert implementations; the faster counts. llama.cpp runs the file of
`convert --to gguf` (BF16 and MXFP4: the same weights) where its prebuilt library can be had from npm. The row "dsv4,
drafts" has a checkpoint of its own, with draft stages (drafting.py): whole answers with `--draft` and without, in turn.
Loading and experts in files are in loading.py, a GPU is in gpu.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import drafting
import llama_cpp
import psutil

from dsv4 import machine
from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

EXPERT_IMPLEMENTATIONS = ("grouped_mm", "eager")
LLAMA_CPP, DRAFTS = "llama.cpp", "drafts"
RATIOS = (0, 4, 128)
PROMPT, STEPS, PREFILLS = 32, 40, 2
STEPS_TOGETHER = 5  # between two readings of the rate of memory
BUSY = "while True: pass"
BANDWIDTH_BYTES = 1 << 29
RATES = [i * 1e10 for i in range(100)]  # bounds of the classes that shares are printed for, bytes per second


@dataclass(frozen=True)
class Row:
    """A kind of process: the engine, its threads (0: as many as cores), variables, busy processes beside it."""

    name: str
    engine: str = "dsv4"
    threads: int = 0
    busy: int = 0
    variables: dict[str, str] = field(default_factory=dict)


ROWS = (
    Row("dsv4"),
    Row("dsv4, 1 thread", threads=1),
    Row("dsv4, AVX2", variables={"DSV4_KERNELS": "avx2"}),
    Row("dsv4, plain", variables={"DSV4_KERNELS": "plain"}),
    Row("dsv4, 1 busy process", busy=1),
    Row("dsv4, 2 busy processes", busy=2),
    Row("dsv4, drafts", DRAFTS),
    *(Row(f"transformers, {name}", name) for name in EXPERT_IMPLEMENTATIONS),
    Row(LLAMA_CPP, LLAMA_CPP),
)


class Engine(Protocol):
    """What a row measures. Token ids are int64 [1, n]."""

    def prefill(self, ids: Any) -> None:
        """A fresh cache and the whole prompt."""

    def step(self, ids: Any) -> None:
        """More tokens."""


class Ours:
    """The engine, simulation on."""

    def __init__(self, folder: Path) -> None:
        from dsv4.model import load

        self.model = load(folder / "flash")
        self.cache = self.model.new_cache(1)

    def prefill(self, ids: Any) -> None:
        """A fresh cache and the whole prompt."""
        self.cache = self.model.new_cache(1)
        self.step(ids)

    def step(self, ids: Any) -> None:
        """More tokens."""
        self.model.forward(ids, self.cache, rows="last")

    def active_bytes(self) -> int:
        """Stored bytes of the weights that one token uses: all but the embedding and the experts not chosen."""
        sizes, config = self.model.store.sizes, self.model.config
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        rest = sum(size for name, size in sizes.items() if ".experts." not in name and name != "embed.weight")
        return rest + routed * config.num_experts_per_tok // config.n_routed_experts


class Theirs:
    """transformers in bfloat16 with one of its expert implementations."""

    def __init__(self, model: Any, implementation: str) -> None:
        self.model, self.implementation = model, implementation
        self.cache: object = None

    def prefill(self, ids: Any) -> None:
        """A fresh cache and the whole prompt."""
        from transformers.cache_utils import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.step(ids)

    def step(self, ids: Any) -> None:
        """More tokens."""
        import torch

        self.model.set_experts_implementation(self.implementation)
        with torch.inference_mode():
            self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1)


def load_theirs(folder: Path, implementation: str) -> Theirs:
    """transformers' model of the BF16 copy."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(folder / "flash-bf16", dtype=torch.bfloat16)
    return Theirs(model.eval(), implementation)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_bandwidth(numbers: Any) -> float:
    """Bytes per second that torch's threads read from memory when they add up a large tensor, the better of two."""
    return float(numbers.nbytes / min(seconds(numbers.sum) for _ in range(2)))


@contextmanager
def foreign_load(result: dict[str, Any]) -> Iterator[None]:
    """Put into `result` the share of all processors that other processes used meanwhile."""

    def used() -> tuple[float, float]:
        times, own = psutil.cpu_times(), os.times()
        busy = times.user + times.nice + times.system + getattr(times, "steal", 0.0)
        return busy, own.user + own.system

    start, (busy, own) = time.perf_counter(), used()
    yield
    (busy_after, own_after), cores = used(), psutil.cpu_count() or 1
    result["foreign"] = max(0.0, busy_after - busy - own_after + own) / (time.perf_counter() - start) / cores


def decode(engine: Engine, ids: Any) -> dict[str, Any]:
    """The median step in tokens per second, that of each few steps, and the rate of memory around these."""
    import torch

    numbers = torch.ones(BANDWIDTH_BYTES // 4)
    steps: list[float] = []
    medians, rates = [], [read_bandwidth(numbers)]
    for first in range(0, STEPS, STEPS_TOGETHER):
        some = [seconds(lambda i=i: engine.step(ids[:, i : i + 1])) for i in range(first, first + STEPS_TOGETHER)]
        rates.append(read_bandwidth(numbers))
        medians.append(1 / statistics.median(some))
        steps += some
    around = [(before + after) / 2 for before, after in pairwise(rates)]
    return {"decode": 1 / statistics.median(steps), "decode of each": medians, "bandwidth of each": around}


def measure(engine: Engine, tokens: int) -> dict[str, Any]:
    """Medians of decode and prefill in tokens per second, after a step and a prompt that warm up."""
    import torch

    ids = torch.randint(0, 16384, (1, max(tokens, PROMPT + STEPS + 4)), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    engine.prefill(ids[:, :PROMPT])
    for i in range(4):
        engine.step(ids[:, i : i + 1])
    with foreign_load(found):
        found |= decode(engine, ids)
        prompts = [seconds(lambda: engine.prefill(ids[:, :tokens])) for _ in range(PREFILLS + 1)][1:]
    return found | {"prefill": tokens / statistics.median(prompts)}


def drafted(folder: Path) -> dict[str, Any]:
    """Whole answers with drafts, and without."""
    load: dict[str, Any] = {}
    with foreign_load(load):
        found = drafting.compare_answers(folder)
    return load | found


def work(row: Row, folder: Path, tokens: int) -> dict[str, Any]:
    """What a process of a row prints as JSON."""
    if row.engine in ("dsv4", DRAFTS):
        machine.use_large_pages()  # as its command line does it
    import torch

    threads = row.threads or machine.usable_cores()
    torch.set_num_threads(threads)
    if row.engine == DRAFTS:
        return drafted(folder)
    if row.engine == LLAMA_CPP:
        found = llama_cpp.libraries(folder / LLAMA_CPP)
        assert found is not None, "fetched before"
        return measure(llama_cpp.LlamaCpp(found, folder / "flash-gguf", threads), tokens)
    if row.engine != "dsv4":
        return measure(load_theirs(folder, row.engine), tokens)
    engine = Ours(folder)
    return measure(engine, tokens) | {"bytes": engine.active_bytes()}


def start(row: Row, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one process of a row, with busy processes beside it if the row has them."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(row.busy)]
    command = [sys.executable, __file__, str(folder), "--tokens", str(arguments.tokens), "--work", row.name]
    try:
        done = subprocess.run(command, env=os.environ | row.variables, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cells(results: list[dict[str, Any]], key: str) -> str:
    """Median, smallest and largest of a figure over the processes of a row."""
    values = [result[key] for result in results]
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def rates_and_shares(results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of each few steps of a row that says how many bytes a step reads: the rate of memory, and the share reached."""
    return [
        (rate, result["bytes"] * tokens / rate)
        for result in results
        if "bytes" in result
        for tokens, rate in zip(result["decode of each"], result["bandwidth of each"], strict=True)
    ]


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """The table, and how the engine compares with the faster transformers."""
    print("\n| row | decode, tokens/s | prefill, tokens/s | share of read bandwidth | foreign |\n|---|---|---|---|---|")
    for name, results in found.items():
        shares = [share for _, share in rates_and_shares(results)]
        share = f"{statistics.median(shares):.0%}" if shares else ""
        foreign = statistics.median(result["foreign"] for result in results)
        print(f"| {name} | {cells(results, 'decode')} | {cells(results, 'prefill')} | {share} | {foreign:.0%} |")
    ours = found.get(ROWS[0].name)
    for low, high in pairwise(RATES):
        shares = [share for rate, share in rates_and_shares(ours or []) if low <= rate < high]
        if shares:
            text = f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
            steps = len(shares) * STEPS_TOGETHER
            print(
                f"memory read at {low / 1e9:.0f} to {high / 1e9:.0f} GB/s: dsv4 reaches {text} of it in {steps} steps"
            )
    for result in found.get("dsv4, drafts", ()):
        print(
            "drafts: {tokens_per_step:.2f} tokens a step, of each draft {acceptance:.0%} accepted; ".format(**result),
            end="",
        )
        print(f"a token takes {result['plain'] / result['decode']:.2f} of the time without drafts")
    for key in ("decode", "prefill") if ours and len(found) > 1 else ():
        own = statistics.median(result[key] for result in ours or ())
        others = {n: statistics.median(r[key] for r in rs) for n, rs in found.items() if rs is not ours}
        print(f"{key}: dsv4 is " + ", ".join(f"{own / other:.2f} of {name}" for name, other in others.items()))


def flash(layers: int, experts: int) -> Geometry:
    """V4-Flash with few layers, experts and words, and no MTP block, which transformers does not have."""
    return Geometry(
        vocab_size=16384, hidden_size=4096, compress_ratios=tuple(RATIOS[i % 3] for i in range(layers)),
        num_nextn_predict_layers=0, num_hash_layers=1, n_routed_experts=experts, num_experts_per_tok=6,
        moe_intermediate_size=2048, num_attention_heads=64, head_dim=512, q_lora_rank=1024, o_groups=8,
        o_lora_rank=1024, index_n_heads=64, index_topk=512,
    )  # fmt: skip


def can_run(row: Row, folder: Path) -> bool:
    """Whether the engine of a row can be had; llama.cpp's library is fetched."""
    return row.engine != LLAMA_CPP or llama_cpp.libraries(folder / LLAMA_CPP) is not None


def prepare(folder: Path, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Make the checkpoints that are not there yet."""
    if any(row.engine == DRAFTS for row in rows):
        drafting.prepare(folder)
    if any(row.engine != DRAFTS for row in rows) and not (folder / "flash").exists():
        geometry = flash(arguments.layers, arguments.experts)
        make_checkpoint(folder / "flash", geometry=geometry, tokenizer=False)
    if any(row.engine in EXPERT_IMPLEMENTATIONS for row in rows) and not (folder / "flash-bf16").exists():
        convert(folder / "flash", folder / "flash-bf16", to="bf16")
    if any(row.engine == LLAMA_CPP for row in rows) and not (folder / "flash-gguf").exists():
        convert(folder / "flash", folder / "flash-gguf", to="gguf")


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """All processes of all rows, in turn, and the table."""
    rows = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    rows = [row for row in rows if can_run(row, folder)]
    prepare(folder, arguments, rows)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.processes):
        for row in rows:
            result = start(row, arguments, folder)
            found.setdefault(row.name, []).append(result)
            print(f"{number + 1}: {row.name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    report(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        row = next(row for row in ROWS if row.name == arguments.work)
        print(json.dumps(work(row, arguments.folder, arguments.tokens)))
        return
    machine.limit_spinning()  # for the processes of the rows, as the command line does it
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.folder or Path(scratch), arguments)


if __name__ == "__main__":
    main()
