"""How do shared conversions and runs scale? Measured with one and two processes; a model for 8 and 64.

    python benchmarks/ranks.py [FOLDER] [--layers 3] [--experts 16] [--tokens 24] [--rounds 3]

Makes a checkpoint of V4-Flash's layer dimensions (few layers, experts and words) in FOLDER and runs, in turns, with one
and with two processes of one thread each, under torchrun: `dsv4 convert` (bytes written per second; the time of the
slowest part, and the check at the end) and `dsv4 run` (tokens per second, prefill and decode).

Then a model, from dimensions alone. Its count of exchanges is compared with what the engine does on a small checkpoint,
and the program ends with an error if they are not equal. On a machine that others use too, look at ratios only.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4.convert.checkpoint.editions.v4 import Shape, mtp_stage, v4_tensors
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.geometry import config as config_json
from dsv4.model import load
from dsv4.model.config import OVERLAP_RATIO, Config
from dsv4.model.parallel import TensorParallelGroup

FLASH = Geometry(
    vocab_size=129280, hidden_size=4096, compress_ratios=(0, 0, *(4, 128) * 20, 4, 0), num_hash_layers=3,
    n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048, num_attention_heads=64, head_dim=512,
    q_lora_rank=1024, o_groups=8, o_lora_rank=1024, index_n_heads=64, index_topk=512,
)  # fmt: skip
PRO = Geometry(
    vocab_size=129280, hidden_size=7168, compress_ratios=(128, 128, *(4, 128) * 29, 4, 0), num_hash_layers=3,
    n_routed_experts=384, num_experts_per_tok=6, moe_intermediate_size=3072, num_attention_heads=128, head_dim=512,
    q_lora_rank=1536, o_groups=16, o_lora_rank=1024, index_n_heads=64, index_topk=1024,
)  # fmt: skip
FP8_NAMES = ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "shared_experts", "e_proj", "h_proj")
FP4, FP8 = 0.5 + 1 / 32, 1 + 1 / 128**2  # bytes per element, scale included
SHARD_BYTES = 5e9  # --max-shard-size
PROCESSES = (1, 2, 8, 64)
DRAWS = 2000
Exchange = tuple[str, int]  # gather or combine, bytes of the whole result


def torchrun(count: int, *arguments: object) -> dict[str, Any]:
    """The JSON that a command prints as `count` ranks of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dsv4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [*map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def middle(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {key: statistics.median(entry[key] for entry in found) for key in found[0]}


def measure_convert(source: Path, output: Path, count: int) -> dict[str, float]:
    """MB written per second."""
    found = torchrun(
        count, "convert", source, output, "--max-workers", 1, "--max-shard-size", "30MB", "--overwrite"
    )  # fmt: skip
    return {"convert, MB/s": found["output_bytes"] / found["seconds"] / 1e6}


def measure_run(source: Path, tokens: int, count: int) -> dict[str, float]:
    """Tokens per second."""
    prompt = ",".join(str(2 + i % 1000) for i in range(64))
    options = ["--tokens", prompt, "--temperature", 0, "--max-new-tokens", tokens]
    found = torchrun(count, "run", source, *options)["statistics"]
    names = {"prefill, tokens/s": "prefill_tokens_per_second", "decode, tokens/s": "decode_tokens_per_second"}
    return {name: found[key] for name, key in names.items()}


def measure(work: Callable[[int], dict[str, float]], rounds: int) -> None:
    """One and two processes in turns."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in found:
            found[count].append(work(count))
    one, two = middle(found[1]), middle(found[2])
    for name in one:
        print(f"{name:20} {one[name]:9.1f} {two[name]:9.1f}   x {two[name] / one[name]:.2f}", flush=True)


def exchanges(config: Config) -> list[Exchange]:
    """Those for one token of the main stack, from the dimensions alone."""
    hidden, activation = config.hidden_size, 2  # bfloat16
    found: list[Exchange] = [("combine", 4 * hidden)]  # embedding, float32
    for layer in range(config.num_hidden_layers):
        if config.ratio(layer) == OVERLAP_RATIO:
            found.append(("gather", activation * config.index_n_heads * config.index_head_dim))
        found.append(("gather", activation * config.o_groups * config.o_lora_rank))
        found.append(("gather", activation * hidden))  # after wo_b
        found.append(("combine", activation * hidden * config.num_experts_per_tok))  # outputs of the routed experts
        found.append(("gather", activation * config.moe_intermediate_size))  # shared expert, inside
        found.append(("gather", activation * hidden))  # and out of it
    return [*found, ("gather", 4 * config.vocab_size)]


def count_exchanges(folder: Path, count: int) -> list[Exchange]:
    """The same as the engine does it: one rank's calls, without the others."""
    found: list[Exchange] = []

    class Counting(TensorParallelGroup):
        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            found.append(("gather", x.nbytes * self.count))
            return torch.cat([x] * self.count, dim=-1)

        def all_reduce_disjoint(self, x: torch.Tensor) -> torch.Tensor:
            found.append(("combine", x.nbytes))
            return x

    model = load(folder, group=Counting(0, count))
    model.forward(torch.tensor([[1]]), model.new_cache(1))
    return found


def sent_bytes(found: list[Exchange], count: int) -> float:
    """What each rank sends: its part of a gathered result to all others; a ring's two rounds of a combined one."""
    return sum(size * (2 if kind == "combine" else 1) for kind, size in found) * (count - 1) / count


def stored_bytes(name: str, shape: Shape) -> float:
    """Bytes of a tensor in the release."""
    elements = float(torch.Size(shape).numel())
    if ".ffn.experts." in name:
        return elements * FP4
    if name.endswith("weight") and any(part in name for part in FP8_NAMES) and "compressor" not in name:
        return elements * FP8
    return elements * (8 if name.endswith("tid2eid") else 4 if "hc_" in name or "bias" in name else 2)


def rank_bytes(config: Config, shapes: dict[str, Shape], count: int) -> tuple[float, float]:
    """What one of `count` ranks holds, and reads for one token on average."""
    group, held, read = TensorParallelGroup(0, count), 0.0, 0.0
    for name, shape in shapes.items():
        if group.holds(name, config):
            size = stored_bytes(name, shape) / (count if group.rows(name, shape) else 1)
            held += size
            if name.startswith("mtp") or name == "embed.weight" or name.endswith("tid2eid"):
                continue  # not read, or a row of it, for a token
            read += size * config.num_experts_per_tok / config.n_routed_experts if ".ffn.experts." in name else size
    return held, read


def busiest(config: Config, count: int) -> float:
    """Experts of one token on the rank that has most of them, on average: the others wait for it."""
    draw, each = random.Random(0), config.n_routed_experts // count
    total = 0
    for _ in range(DRAWS):
        owners = [e // each for e in draw.sample(range(config.n_routed_experts), config.num_experts_per_tok)]
        total += max(owners.count(owner) for owner in owners)
    return total / DRAWS


def tell_run(name: str, config: Config, shapes: dict[str, Shape]) -> None:
    """What each rank of a run holds, reads and sends per token."""
    found = exchanges(config)
    print(f"\nrun {name}: {len(found)} exchanges per token, one after the other")
    print("ranks   held each   read per token   busiest rank's experts   sent by each per token")
    for count in sorted({*PROCESSES, config.o_groups}):
        if config.o_groups % count:
            print(f"{count:5}   no: {config.o_groups} groups of heads cannot be shared")
            continue
        held, read = rank_bytes(config, shapes, count)
        experts, sent = f"{busiest(config, count):.1f} of {config.num_experts_per_tok}", sent_bytes(found, count) / 1e3
        print(f"{count:5} {held / 1e9:8.1f} GB {read / 1e9:13.2f} GB {experts:>24} {sent:21.0f} kB")


def tell_convert(name: str, shapes: dict[str, Shape]) -> None:
    """The largest part's share of a conversion to FP8."""
    source = sum(stored_bytes(name, shape) for name, shape in shapes.items())
    experts = sum(stored_bytes(name, shape) for name, shape in shapes.items() if ".ffn.experts." in name)
    output = source + experts * (FP8 / FP4 - 1)
    shards = round(output / SHARD_BYTES)
    print(f"\nconvert {name}: {source / 1e9:.0f} GB read, {output / 1e9:.0f} GB written in {shards} shards", end="")
    print(" and read again; no messages but three barriers")
    for count in PROCESSES:
        largest = -(-shards // count) / shards
        moved = largest * (source + 2 * output) / 1e9
        print(f"{count:5} ranks: the largest part is {100 * largest:5.1f} %, {moved:.0f} GB")


def model(folder: Path) -> None:
    """Print the model, after a check of its exchanges against the engine."""
    make_checkpoint(folder)
    small = Config.from_json(json.loads((folder / "config.json").read_text()))
    if sorted(exchanges(small)) != sorted(count_exchanges(folder, 2)):
        sys.exit("the model's exchanges are not those of the engine")
    for name, geometry in (("Flash", FLASH), ("Pro", PRO)):
        values = config_json(geometry)
        shapes = v4_tensors(values, 1, mtp_stage)
        tell_convert(name, shapes)
        tell_run(name, Config.from_json(values), shapes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ratios = (*((0, 4, 128)[i % 3] for i in range(arguments.layers)), 0)
        geometry = Geometry(**{
            **vars(FLASH), "vocab_size": 16384, "compress_ratios": ratios, "num_hash_layers": 1,
            "n_routed_experts": arguments.experts,
        })  # fmt: skip
        make_checkpoint(folder / "source", geometry=geometry)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n{'processes':20} {1:9} {2:9}")
        measure(lambda count: measure_convert(folder / "source", folder / "output", count), arguments.rounds)
        measure(lambda count: measure_run(folder / "source", arguments.tokens, count), arguments.rounds)
        model(folder / "small")


if __name__ == "__main__":
    main()
