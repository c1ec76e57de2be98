"""Does drafting pay on a CPU? Answers with DSpark drafts against plain ones, at V4-Flash's layer sizes.

    python benchmarks/run.py FOLDER --rows "dsv4, drafts"     # whole answers, what this page is for
    python benchmarks/drafting.py FOLDER [--tokens 256] [--rounds 5] [--threads N]

Both make a checkpoint in FOLDER with the layer dimensions of V4-Flash-0731 (hidden size 4096, 64 heads of 512, experts
of 2048, six of them per token, three draft stages); few layers, experts and words, 7 GB. Its drafts are accepted about
as often as in the golden texts of the small DSpark checkpoints: the sublayers hardly move the streams, so the next
token nearly follows from the last one, and the Markov tables hold that rule. The streams of the embedding have as many
dimensions as the tables have, so that these keep the release's rank.

With few layers three stages weigh more than with 43. So this program takes passes of one token, passes of six, and
drafts apart by layer and stage, and adds them up for any number of layers. At the number that the checkpoint has, the
sum can be compared with the whole answers.

The six tokens of a pass choose experts of their own. If they choose independently, they read 34 of the release's 256
and 26 of 48 here; what that adds for the release is printed, by bytes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4.convert.synthetic.checkpoint import DSpark, Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.cache import Cache
from dsv4.model.drafting.dspark import Context
from dsv4.model.generate import Limits, Statistics, generate
from dsv4.model.sampling import Sampling
from dsv4.model.transformer import Transformer

LAYERS, WORDS, EXPERTS = 43, 129280, 256  # of the release
MADE_LAYERS, MADE_EXPERTS, VOCABULARY = 6, 48, 16384
CHOSEN, STAGES, BLOCK, RANK = 6, 3, 5, 256
QUIETER = 8  # powers of two by which the sublayers count less
STAGE_SHARE = 1 / 128  # of the stages' own logits; both decide how often drafts are accepted
PROMPT, ANSWER = 32, 61
NAME = "flash-0731"
Clock = tuple[float, float]  # wall and CPU seconds
Parts = dict[str, list[Clock]]


def flash() -> Geometry:
    """V4-Flash-0731 with few layers, experts and words."""
    return Geometry(
        vocab_size=VOCABULARY, hidden_size=4096, compress_ratios=(*(4, 128) * (MADE_LAYERS // 2), *(0,) * STAGES),
        num_hash_layers=0, n_routed_experts=MADE_EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=2048,
        num_attention_heads=64, head_dim=512, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, index_n_heads=64,
        index_topk=512, dspark=DSpark(BLOCK, VOCABULARY - 3, tuple(range(MADE_LAYERS))[-3:], RANK, STAGES),
    )  # fmt: skip


class Stored:
    """The tensors of one shard, in place: views that write into the file."""

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, np.uint8, "r+")
        length = int(self._data[:8].view("<u8")[0])
        self._start, self._header = 8 + length, json.loads(bytes(self._data[8 : 8 + length]))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._header)

    def bytes_of(self, name: str) -> np.ndarray:
        """uint8, writable."""
        begin, end = self._header[name]["data_offsets"]
        return self._data[self._start + begin : self._start + end]

    def bf16(self, name: str) -> torch.Tensor:
        """A matrix or vector of bfloat16, writable."""
        return torch.from_numpy(self.bytes_of(name)).view(torch.bfloat16).view(self._header[name]["shape"])


def make_agreeable(folder: Path) -> None:
    """Change a checkpoint so that its drafts are accepted; see above."""
    shards = [Stored(path) for path in sorted(folder.glob("*.safetensors"))]
    at = {name: shard for shard in shards for name in shard.names()}
    for name, shard in at.items():
        if name.endswith((".wo_b.scale", ".w2.scale")):
            shard.bytes_of(name)[:] -= QUIETER
    embedding, norm = (at[name].bf16(name) for name in ("embed.weight", "norm.weight"))
    embedding[:, RANK:] = 0
    wide = embedding.to(torch.float32)
    normed = wide / wide.square().mean(-1, keepdim=True).sqrt() * norm
    last = f"mtp.{STAGES - 1}."
    tables = [f"{last}markov_head.markov_{name}.weight" for name in ("w1", "w2")]
    at[tables[0]].bf16(tables[0]).copy_(normed[:, :RANK])
    at[tables[1]].bf16(tables[1]).copy_(at["head.weight"].bf16("head.weight")[:, :RANK])
    at[f"{last}norm.weight"].bf16(f"{last}norm.weight").mul_(STAGE_SHARE)


def prepare(folder: Path) -> None:
    """Make the checkpoint, if it is not there."""
    if (folder / NAME).exists():
        return
    unfinished = folder / f"{NAME}.unfinished"
    make_agreeable(make_checkpoint(unfinished, geometry=flash(), tokenizer=False))
    unfinished.rename(folder / NAME)


def some_tokens(count: int) -> list[int]:
    """Drawn from a seed."""
    ids: list[int] = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


def compare_answers(folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Whole greedy answers with drafts and without, in turn: tokens a second of decoding, and tokens of a step.

    The tokens are compared, too. The first round warms up.
    """
    model, found = load(folder / NAME), defaultdict[bool, list[Statistics]](list)
    for _ in range(rounds + 1):
        answers = {}
        for draft in (False, True):
            made, one, _ = generate(model, [some_tokens(PROMPT)], Limits(ANSWER), Sampling(0), draft=draft)
            answers[draft] = made[0].tokens
            found[draft].append(one)
        assert answers[False] == answers[True], "drafts change nothing"
    speed = {
        draft: statistics.median(one.decoded_tokens / one.decode_seconds for one in each[1:])
        for draft, each in found.items()
    }
    last = found[True][-1]
    return {
        "decode": speed[True],
        "plain": speed[False],
        "prefill": statistics.median(one.prompt_tokens / one.prefill_seconds for one in found[True][1:]),
        "tokens_per_step": last.decoded_tokens / last.steps,
        "acceptance": last.accepted / last.drafted,
    }


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
    watch = Stopwatch(("embed", *(f"layers.{i}" for i in range(MADE_LAYERS)), "logits"))
    [length] = cache.lengths
    model.forward(ids, cache, trace=watch)
    cache.truncate(0, length)
    return watch.parts


def draft(model: Transformer, context: Context) -> dict[str, Clock]:
    """One draft: the time of its stages, and of everything after them, the head and the Markov steps."""
    assert model.dspark is not None
    watch = Stopwatch((f"mtp.{STAGES - 1}", "mtp.logits"))
    start = context.start(context.length, 17, model.config.sliding_window)
    model.dspark.draft([start], BLOCK, trace=watch)
    return watch.parts


@torch.inference_mode()
def measure(model: Transformer, tokens: int, rounds: int) -> tuple[Parts, Parts, Parts]:
    """Parts of a pass of one token, of a pass with proposals, and of a draft, in turns; a first round warms up."""
    assert model.dspark is not None
    ids = torch.tensor([some_tokens(tokens + (rounds + 1) * (BLOCK + 1))])
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


def whole_pass(parts: Parts, which: int, layers: int, words: int) -> float:
    """Milliseconds of a pass through so many layers: half of them of each ratio, as here."""
    made = [middle(parts[f"layers.{i}"], which) for i in range(MADE_LAYERS)]
    return layers * statistics.mean(made) + middle(parts["logits"], which) * words / VOCABULARY


def expected_experts(experts: int, tokens: int) -> float:
    """How many different ones tokens choose, if they choose independently."""
    return experts * (1 - (1 - CHOSEN / experts) ** tokens)


def report(single: Parts, proposed: Parts, drafts: Parts, which: int, unit: str) -> None:
    """What a step costs in plain tokens, by the number of layers."""
    stages, end = middle(drafts[f"mtp.{STAGES - 1}"], which), middle(drafts["mtp.logits"], which)
    layer = [statistics.mean(middle(p[f"layers.{i}"], which) for i in range(MADE_LAYERS)) for p in (single, proposed)]
    print(f"\n{unit}: a layer, 1 token {layer[0]:.1f} ms, {BLOCK + 1} tokens {layer[1]:.1f} ms; {STAGES} stages")
    print(
        f"{stages:.1f} ms; head {middle(single['logits'], which):.1f} ms; head and Markov steps of a draft {end:.1f} ms"
    )
    print(
        "\n| layers, words | a plain token, ms | a step with five proposals, ms | as plain tokens |\n|---|---|---|---|"
    )
    for layers, words in ((MADE_LAYERS, VOCABULARY), (12, WORDS), (24, WORDS), (LAYERS, WORDS)):
        plain = whole_pass(single, which, layers, words)
        drafted = whole_pass(proposed, which, layers, words) + stages + end * words / VOCABULARY
        print(f"| {layers}, {words} | {plain:.0f} | {drafted:.0f} | {drafted / plain:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        prepare(folder)
        parts = measure(load(folder / NAME), arguments.tokens, arguments.rounds)
        for which, unit in enumerate(("wall time", "CPU time")):
            report(*parts, which, unit)
        found = [expected_experts(count, BLOCK + 1) for count in (MADE_EXPERTS, EXPERTS)]
        print(
            f"\nexperts of a pass of {BLOCK + 1}, if chosen independently: {found[0]:.0f} of {MADE_EXPERTS} here, ",
            end="",
        )
        print(f"{found[1]:.0f} of {EXPERTS} in the release")


if __name__ == "__main__":
    main()
