"""How do time and memory grow with the context? A prompt in pieces of 512 tokens, and single steps on the way.

    python benchmarks/long_context.py [FOLDER] [--tokens 131072] [--heads 16] [--threads 1] [--seconds 600]

Makes a checkpoint with short layers (hidden size 256, 8 heads of 128, one layer without compression, one with ratio 4
and an indexer of `--heads` heads, one with ratio 128) in FOLDER: the sums over the context are those of a large model,
all else is small. Prints at each power of two, from 1024 tokens on: CPU seconds of a piece, of all pieces so far, and
of a single step, the size of the key cache, and the most memory of the process. Ends early after `--seconds`.
Then the rate of the indexer's scores alone, at the sizes of V4-Flash (64 heads of 128), and of its choice, and of a
product of matrices, which is what the processor can do just then.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.machine import peak_memory
from dsv4.model import load
from dsv4.model.kernels.table import select_kernels
from dsv4.model.layers.indexer import SCORES_AT_ONCE
from dsv4.model.transformer import Transformer
from dsv4.model.weights import Matrix

PIECE = 512
SHORTEST_LINE = 1024
STEPS = 4
FLASH_HEADS, FLASH_WIDTH = 64, 128


def short(tokens: int, heads: int) -> Geometry:
    """Three short layers, one of each kind."""
    return Geometry(
        vocab_size=512, hidden_size=256, compress_ratios=(0, 4, 128), num_nextn_predict_layers=0, num_hash_layers=1,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, num_attention_heads=8, head_dim=128,
        q_lora_rank=128, o_groups=4, o_lora_rank=64, index_n_heads=heads, index_topk=512,
        max_position_embeddings=tokens + STEPS * 64,
    )  # fmt: skip


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call: other programs on the machine do not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def grow(model: Transformer, tokens: int, most_seconds: float) -> None:
    """One sequence, a piece at a time; a line at each power of two."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens + PIECE), generator=torch.Generator().manual_seed(3))
    cache, total, line, began = model.new_cache(1), 0.0, SHORTEST_LINE, time.monotonic()
    print("| context | a piece, s | so far, s | a step, ms | keys, MB | peak memory, MB |\n|---|---|---|---|---|---|")
    while (length := cache.lengths[0]) < tokens and time.monotonic() - began < most_seconds:
        piece = ids[:, length : min(length + PIECE, line)]
        took = cpu_seconds(lambda piece=piece: model.forward(piece, cache, rows="last"))
        total += took
        if cache.lengths[0] != line:
            continue
        step = min(cpu_seconds(lambda i=i: model.forward(ids[:, i : i + 1], cache, rows="last")) for i in range(STEPS))
        sizes = f"{cache.nbytes / 1e6:.1f} | {peak_memory() / 1e6:.0f}"
        print(f"| {line} | {took:.2f} | {total:.1f} | {step * 1e3:.1f} | {sizes} |", flush=True)
        line = min(2 * line, tokens) if line < tokens else tokens + 1
    print(f"stopped at {cache.lengths[0]} tokens" if cache.lengths[0] < tokens else "")


def rates(queries: int, blocks: int) -> None:
    """The indexer of a layer of Flash: scores of a piece, and the choice of 512 blocks."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(queries, FLASH_HEADS, FLASH_WIDTH, generator=generator).to(torch.bfloat16)
    weights = torch.randn(queries, FLASH_HEADS, generator=generator).to(torch.bfloat16)
    keys = torch.randn(blocks, FLASH_WIDTH, generator=generator).to(torch.bfloat16)
    kernels = select_kernels(torch.device("cpu"))
    scores = kernels.index_scores(q, weights, keys)
    seconds = min(cpu_seconds(lambda: kernels.index_scores(q, weights, keys)) for _ in range(5))
    parts = scores.split(max(1, SCORES_AT_ONCE // blocks))
    reach = torch.full((len(parts[0]),), blocks)
    choice = min(
        cpu_seconds(lambda: [kernels.best_in_reach(part, reach[: len(part)], 512) for part in parts]) for _ in range(5)
    )
    flops = 2 * queries * FLASH_HEADS * blocks * FLASH_WIDTH
    print(f"{queries} queries, {blocks} blocks: {flops / seconds / 1e9:.0f} GFLOP per CPU second, "
          f"{seconds * 1e3:.1f} ms; choice of 512 {choice * 1e3:.1f} ms")  # fmt: skip


def matrix_rate(rows: int, columns: int) -> None:
    """512 rows times a matrix."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(PIECE, columns, generator=generator).to(torch.bfloat16)
    matrix = Matrix("matrix", "bfloat16", (rows, columns), x.repeat(rows // PIECE, 1))
    kernels = select_kernels(torch.device("cpu"))
    seconds = min(cpu_seconds(lambda: kernels.linear(x, matrix)) for _ in range(5))
    print(f"matrix product: {2 * PIECE * rows * columns / seconds / 1e9:.0f} GFLOP per CPU second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = (arguments.folder or Path(scratch)) / f"short-{arguments.tokens}-{arguments.heads}"
        if not source.exists():
            make_checkpoint(source, geometry=short(arguments.tokens, arguments.heads), tokenizer=False)
        grow(load(source), arguments.tokens, arguments.seconds)
    for queries, blocks in ((1, 32768), (PIECE, 4096)):
        rates(queries, blocks)
        matrix_rate(1024, 4096)


if __name__ == "__main__":
    main()
