"""Does drafting pay on a CPU? The time of a token with DSpark drafts, and without, at V4-Flash's layer sizes.

    python benchmarks/drafting.py [FOLDER] [--experts 48] [--tokens 256] [--rounds 5] [--threads N]

Makes a checkpoint in FOLDER with the layer dimensions of V4-Flash-0731 (hidden size 4096, 64 heads of 512, experts of
2048, six of them per token): one layer of each compress ratio, one draft stage, few experts and words. Passes of one
token, and of the last certain token with five proposals, are taken apart by layer; drafts by stage. From these parts
the step of the whole model is added up: 43 layers, three stages, a vocabulary of 129280.

The six tokens of a pass choose experts of their own: with 48 experts the passes read as many different ones as nearly
all of the release's 256 would give. What a step yields depends on the text. The golden checkpoints' texts give four
tokens for a step of five proposals; the break-even is printed too.
Wall time and CPU time are given: on a machine that others use as well, only the second means anything.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from dsv4.convert.synthetic.checkpoint import DSpark, Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.cache import Cache
from dsv4.model.drafting.dspark import Context
from dsv4.model.transformer import Transformer

RATIOS = (4, 128)
LAYERS, STAGES, WORDS = 43, 3, 129280  # of the release
BLOCK = 5
GOLDEN_YIELD = 60 / 15  # tokens of a step: passes for 60 tokens in the golden set of Flash's editions
VOCABULARY = 16384
Clock = tuple[float, float]  # wall and CPU seconds
Parts = dict[str, list[Clock]]


def flash(experts: int) -> Geometry:
    """V4-Flash-0731 with few layers, stages, experts and words."""
    return Geometry(
        vocab_size=VOCABULARY, hidden_size=4096, compress_ratios=(*RATIOS, 0), num_hash_layers=0,
        n_routed_experts=experts, num_experts_per_tok=6, moe_intermediate_size=2048, num_attention_heads=64,
        head_dim=512, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, index_n_heads=64, index_topk=512,
        dspark=DSpark(BLOCK, VOCABULARY - 3, (0, 1), 256, stages=1),
    )  # fmt: skip


def now() -> Clock:
    return time.perf_counter(), time.process_time()


class Stopwatch:
    """A trace that takes the time between the ends of the modules it knows."""

    def __init__(self, ends: tuple[str, ...]) -> None:
        self._ends, self.parts, self._last = ends, dict[str, Clock](), now()

    def __call__(self, name: str, output: torch.Tensor) -> None:
        if name in self._ends:
            before, self._last = self._last, now()
            self.parts[name] = (self._last[0] - before[0], self._last[1] - before[1])


def step(model: Transformer, ids: torch.Tensor, cache: Cache) -> dict[str, Clock]:
    """One pass after a prompt, taken back again: the time of each layer and of the head."""
    watch = Stopwatch(("embed", *(f"layers.{i}" for i in range(len(RATIOS))), "logits"))
    [length] = cache.lengths
    model.forward(ids, cache, trace=watch)
    cache.truncate(0, length)
    return watch.parts


def draft(model: Transformer, context: Context) -> dict[str, Clock]:
    """One draft: the time of the stage, and of everything after it, the head and the Markov steps."""
    assert model.dspark is not None
    watch = Stopwatch(("mtp.0", "mtp.logits"))
    start = context.start(context.length, 17, model.config.sliding_window)
    model.dspark.draft([start], BLOCK, trace=watch)
    return watch.parts


@torch.inference_mode()
def measure(model: Transformer, tokens: int, rounds: int) -> tuple[Parts, Parts, Parts]:
    """Parts of a pass of one token, of a pass with proposals, and of a draft, in turns; a first round warms up."""
    assert model.dspark is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, tokens + (rounds + 1) * (BLOCK + 1)), generator=generator)
    cache = model.new_cache(1)
    context = model.dspark.new_context()
    model.dspark.extend([context], [model.forward(ids[:, :tokens], cache, rows="last").hidden[0]])
    found: tuple[Parts, Parts, Parts] = (defaultdict(list), defaultdict(list), defaultdict(list))
    for number in range(rounds + 1):
        some = ids[:, tokens + number * (BLOCK + 1) :][:, : BLOCK + 1]
        made = step(model, some[:, :1], cache), step(model, some, cache), draft(model, context)
        for parts, new in zip(found, made, strict=True):
            for name, clock in new.items() if number else ():
                parts[name].append(clock)
    return found


def middle(clocks: list[Clock], which: int) -> float:
    """The median, in milliseconds."""
    return statistics.median(clock[which] for clock in clocks) * 1e3


def whole_pass(parts: Parts, which: int) -> float:
    """Milliseconds of a pass of the release: its layers are of the two ratios by halves."""
    layers = [middle(parts[f"layers.{i}"], which) for i in range(len(RATIOS))]
    return LAYERS * sum(layers) / len(layers) + middle(parts["logits"], which) * WORDS / VOCABULARY


def report(single: Parts, proposed: Parts, drafts: Parts, which: int, unit: str) -> None:
    """The parts, and what a token of the release takes."""
    print(f"\n| {unit} | 1 token, ms | {BLOCK + 1} tokens, ms |\n|---|---|---|")
    for name in single:
        print(f"| {name} | {middle(single[name], which):.1f} | {middle(proposed[name], which):.1f} |")
    stage, end = middle(drafts["mtp.0"], which), middle(drafts["mtp.logits"], which)
    print(f"\na draft stage {stage:.1f} ms, head and Markov steps of a draft {end:.1f} ms")
    plain = whole_pass(single, which)
    drafted = whole_pass(proposed, which) + STAGES * stage + end * WORDS / VOCABULARY
    print(f"whole model: a token {plain:.0f} ms; a step with drafts {drafted:.0f} ms, as {drafted / plain:.2f} tokens")
    each = drafted / GOLDEN_YIELD
    print(f"with {GOLDEN_YIELD:.0f} tokens a step, a token takes {each:.0f} ms: {each / plain:.2f} of the plain time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = (arguments.folder or Path(scratch)) / "flash-dspark"
        if not source.exists():
            make_checkpoint(source, geometry=flash(arguments.experts), tokenizer=False)
        parts = measure(load(source), arguments.tokens, arguments.rounds)
        for which, unit in enumerate(("wall time", "CPU time")):
            report(*parts, which, unit)


if __name__ == "__main__":
    main()
