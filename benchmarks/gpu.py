"""What does the engine do on a GPU? Logits against the CPU's noise, speed against transformers, memory, waits.

    python benchmarks/gpu.py [FOLDER] [--layers 3] [--experts 12] [--tokens 512]

For a machine with a CUDA GPU; with two GPUs it also shares the model between them. Takes under four minutes and ends
with 1 if the logits are off. The checkpoint has the layer dimensions of V4-Flash, as in run.py, few layers and experts.

- logits: of 160 tokens, prefill and single steps, float32 and simulated, against the CPU. Simulated logits move when
  sums are added in another order, so the yardstick is how far they move on the CPU itself when torch's own products
  take the place of ours;
- speed: prefill and single steps, against transformers in bfloat16 with the faster of its expert implementations;
- memory: what is allocated beyond the weights as stored; waits: how often the host waits for the GPU in a step.

A script cuda.py would be imported in place of NVIDIA's package `cuda`, which torch needs: hence the name.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from run import EXPERT_IMPLEMENTATIONS, Theirs, flash

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model import load
from dsv4.model.architectures.v4 import V4
from dsv4.model.evaluate.logits import teacher_forced
from dsv4.model.kernels.table import TORCH_DEVICE
from dsv4.model.layers.numerics import Numerics
from dsv4.model.transformer import Transformer

PROMPT = [7 * i % 16384 for i in range(160)]
PREFILL = 156
NOISE_FACTOR = 3.0  # of the CPU's own noise: both are draws of the same size
FLOAT32_LIMIT = 1e-5  # float32 sums of some thousand elements in another order


def logits_of(model: Transformer) -> torch.Tensor:
    """Float32 [160, V] on the CPU, the last four rows from single steps."""
    return teacher_forced(model, PROMPT, prefill=PREFILL).logits.cpu()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Median over rows of the relative L2 difference."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())


def noise_of(model: Transformer, expected: torch.Tensor) -> float:
    """How far the CPU's simulated logits move when torch's own products add in another order."""
    numerics = Numerics(True, TORCH_DEVICE)
    stack = V4(model.config, 0, model.store, numerics)
    return difference(logits_of(Transformer(model.config, stack, model.store, numerics)), expected)


def check_logits(folder: Path) -> bool:
    """Compare CUDA with the CPU in both modes, print, and say whether all is well."""
    good = True
    for simulation in (False, True):
        here = load(folder, simulation=simulation)
        expected = logits_of(here)
        limit = NOISE_FACTOR * noise_of(here, expected) if simulation else FLOAT32_LIMIT
        del here
        found = difference(logits_of(load(folder, "cuda", simulation)), expected)
        good &= found <= limit
        print(f"logits, {'simulated' if simulation else 'float32'}: {found:.1e} from the CPU's, limit {limit:.1e}")
    return good


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of a call, until the GPU has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Ours:
    """The engine on the GPU, simulation on."""

    name = "dsv4"

    def __init__(self, folder: Path) -> None:
        self.model: Transformer = load(folder, "cuda")
        self.cache = self.model.new_cache(1)

    def prefill(self, ids: torch.Tensor) -> None:
        """A fresh cache and the whole prompt."""
        self.cache = self.model.new_cache(1)
        self.model.forward(ids, self.cache, rows="last")

    def step(self, ids: torch.Tensor) -> None:
        """One more token."""
        self.model.forward(ids, self.cache, rows="last")


def measure(engine: Ours | Theirs, tokens: int) -> tuple[float, float]:
    """Tokens per second of a prefill and of single steps, medians."""
    ids = torch.randint(0, 16384, (1, tokens + 16), generator=torch.Generator().manual_seed(0)).cuda()
    prefills = [seconds(lambda: engine.prefill(ids[:, :tokens])) for _ in range(4)][1:]
    steps = [seconds(lambda i=i: engine.step(ids[:, tokens + i : tokens + i + 1])) for i in range(16)][4:]
    return tokens / statistics.median(prefills), 1 / statistics.median(steps)


def waits(engine: Ours, tokens: int) -> int:
    """How often the host waits for the GPU in one step."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.step(ids)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def speed_and_memory(folder: Path, tokens: int) -> None:
    """Our part of the table, and what a step costs besides."""
    before = torch.cuda.memory_allocated()
    engine = Ours(folder)
    loaded = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    prefill, decode = measure(engine, tokens)
    peak, stored = torch.cuda.max_memory_allocated() - before, engine.model.store.resident_bytes
    print(f"\n| | prefill of {tokens}, tokens/s | decode, tokens/s |\n|---|---|---|")
    print(f"| dsv4 | {prefill:.0f} | {decode:.1f} |", flush=True)
    print(
        f"\nmemory: weights {stored / 1e6:.0f} MB, loaded {loaded / 1e6:.0f}, at most {peak / 1e6:.0f} with activations"
    )
    print(f"the host waits {waits(engine, tokens)} times in a step of {engine.model.config.num_hidden_layers} layers")


def transformers_speed(folder: Path, tokens: int) -> None:
    """The other part of the table."""
    from transformers import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().cuda()
    for name in EXPERT_IMPLEMENTATIONS:
        prefill, decode = measure(Theirs(model, name), tokens)
        print(f"| transformers, {name} | {prefill:.0f} | {decode:.1f} |", flush=True)


def two_ranks(folder: Path) -> bool:
    """Greedy tokens of two ranks on two GPUs against one."""
    command = ["-m", "dsv4", "run", str(folder), "--tokens", "1,2,3", "--temperature", "0", "--max-new-tokens", "8"]
    command += ["--no-simulation", "--json", "--device", "cuda"]
    one = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
    two = subprocess.run(torchrun, capture_output=True, text=True, check=True).stdout
    same = one.split('"statistics"')[0] == two.split('"statistics"')[0]
    print(f"two ranks: {'the same tokens as one' if same else 'OTHER tokens than one'}")
    return same


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: nothing was run", file=sys.stderr)
        return 4
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        source, decoded = folder / "flash", folder / "flash-bf16"
        if not source.exists():
            make_checkpoint(source, geometry=flash(arguments.layers, arguments.experts), tokenizer=False)
        good = check_logits(source)
        speed_and_memory(source, arguments.tokens)
        torch.cuda.empty_cache()
        if not decoded.exists():
            convert(source, decoded, to="bf16")
        transformers_speed(decoded, arguments.tokens)
        if torch.cuda.device_count() > 1:
            good &= two_ranks(source)
        else:
            print("two ranks: not run, there is one GPU")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
