"""How fast is the engine? Against transformers on the same weights and machine, and against the memory bandwidth.

    python benchmarks/run.py [FOLDER] [--layers 3] [--experts 12] [--tokens 512] [--rounds 3] [--threads N]

Makes a checkpoint with the layer dimensions of V4-Flash (hidden size 4096, 64 heads of 512, experts of 2048, six of
them per token; few layers, experts and words) in FOLDER, converts it to BF16 for transformers, and measures in turns:

- decode: single steps after a prompt, the median step;
- prefill: a prompt of `--tokens`, logits of the last one only;
- the bandwidth bound: bytes of the weights that one token uses, over the rate at which this machine copies memory.

transformers runs in bfloat16 with whichever of its two expert implementations is faster, each phase on its own.
Wall time and CPU time are given: on a machine that others use as well, only the second means anything.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.transformer import Transformer

EXPERT_IMPLEMENTATIONS = ("grouped_mm", "eager")
RATIOS = (0, 4, 128)
Times = list[tuple[float, float]]  # wall and CPU seconds


def flash(layers: int, experts: int) -> Geometry:
    """V4-Flash with few layers, experts and words, and no MTP block, which transformers does not have."""
    return Geometry(
        vocab_size=16384, hidden_size=4096, compress_ratios=tuple(RATIOS[i % 3] for i in range(layers)),
        num_nextn_predict_layers=0, num_hash_layers=1, n_routed_experts=experts, num_experts_per_tok=6,
        moe_intermediate_size=2048, num_attention_heads=64, head_dim=512, q_lora_rank=1024, o_groups=8,
        o_lora_rank=1024, index_n_heads=64, index_topk=512,
    )  # fmt: skip


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Ours:
    """The engine, simulation on."""

    name = "dsv4"

    def __init__(self, folder: Path) -> None:
        self.model: Transformer = load(folder)
        self.cache = self.model.new_cache(1)

    def prefill(self, ids: torch.Tensor) -> None:
        """A fresh cache and the whole prompt."""
        self.cache = self.model.new_cache(1)
        self.model.forward(ids, self.cache, rows="last")

    def step(self, ids: torch.Tensor) -> None:
        """One more token."""
        self.model.forward(ids, self.cache, rows="last")


class Theirs:
    """transformers in bfloat16 with one of its expert implementations. The model is shared between them."""

    def __init__(self, model: object, implementation: str) -> None:
        self.name, self.model, self.implementation = f"transformers, {implementation}", model, implementation
        self.cache: object = None

    def prefill(self, ids: torch.Tensor) -> None:
        """A fresh cache and the whole prompt."""
        from transformers.cache_utils import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.step(ids)

    def step(self, ids: torch.Tensor) -> None:
        """More tokens."""
        self.model.set_experts_implementation(self.implementation)
        with torch.inference_mode():
            self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1)


def measure(engines: list[Ours | Theirs], tokens: int, rounds: int) -> dict[str, dict[str, Times]]:
    """Prefill and decode times of each engine, one after the other in every round; a first round warms up."""
    ids = torch.randint(0, 16384, (1, tokens + rounds), generator=torch.Generator().manual_seed(0))
    times: dict[str, dict[str, Times]] = {phase: {e.name: [] for e in engines} for phase in ("prefill", "decode")}
    for number in range(rounds + 1):
        for engine in engines:
            prefill = timed(lambda engine=engine: engine.prefill(ids[:, :tokens]))
            step = [timed(lambda engine=engine, i=i: engine.step(ids[:, i : i + 1])) for i in range(4)]
            if number:
                times["prefill"][engine.name].append(prefill)
                times["decode"][engine.name] += step
    return times


def middle(times: Times) -> tuple[float, float]:
    """Median wall and median CPU seconds."""
    return statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times)


def report(times: dict[str, dict[str, Times]], tokens: int) -> None:
    """A table per phase: tokens per second, and our ratio to the faster transformers."""
    for phase, count in (("prefill", tokens), ("decode", 1)):
        print(f"\n| {phase} | tokens/s | ms/token | CPU ms/token |\n|---|---|---|---|")
        medians = {name: middle(values) for name, values in times[phase].items()}
        for name, (wall, cpu) in medians.items():
            print(f"| {name} | {count / wall:.1f} | {wall / count * 1e3:.1f} | {cpu / count * 1e3:.1f} |")
        wall, cpu = medians.pop(Ours.name)
        best = [min(values[i] for values in medians.values()) for i in range(2)]
        print(f"\n{phase}: {best[0] / wall:.2f} times as fast as transformers, {best[1] / cpu:.2f} times by CPU time")


def copy_bandwidth() -> float:
    """Bytes per second read from memory when copying 512 MiB; the writes are as many again, and not counted."""
    source, target = torch.ones(1 << 29, dtype=torch.uint8), torch.empty(1 << 29, dtype=torch.uint8)
    return source.nbytes / min(timed(lambda: target.copy_(source))[0] for _ in range(5)) * 2


def active_bytes(model: Transformer, experts: int) -> int:
    """Stored bytes of the weights that one token uses: all but the embedding and the experts not chosen."""
    sizes = model.store.sizes
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(size for name, size in sizes.items() if ".experts." not in name and name != "embed.weight")
    return rest + routed * model.config.num_experts_per_tok // experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        source, decoded = folder / "flash", folder / "flash-bf16"
        if not source.exists():
            make_checkpoint(source, geometry=flash(arguments.layers, arguments.experts), tokenizer=False)
        if not decoded.exists():
            convert(source, decoded, to="bf16")
        run(source, decoded, arguments)


def run(source: Path, decoded: Path, arguments: argparse.Namespace) -> None:
    """Load both, measure, print."""
    from transformers import DeepseekV4ForCausalLM

    theirs = DeepseekV4ForCausalLM.from_pretrained(decoded, dtype=torch.bfloat16).eval()
    ours = Ours(source)
    engines = [ours, *(Theirs(theirs, name) for name in EXPERT_IMPLEMENTATIONS)]
    times = measure(engines, arguments.tokens, arguments.rounds)
    report(times, arguments.tokens)
    used, rate = active_bytes(ours.model, arguments.experts), copy_bandwidth()
    step = middle(times["decode"][Ours.name])[0]
    print(f"\nweights per token {used / 1e6:.0f} MB, memory copies at {rate / 1e9:.1f} GB/s (read and written)")
    print(f"decode: {used / rate / step:.0%} of the bandwidth bound, with {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
