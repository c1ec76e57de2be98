"""Checks single layers on the inputs and outputs that the reference recorded, where they lie beside the project.

    python .ci/shared_layers.py FOLDER

Each folder in FOLDER with an `expected/layers.safetensors` is run layer by layer: each layer gets the reference's own
input, so that errors do not accumulate. In one place the reference's rounding depends on how tokens were split into
calls, and dsv4's does not: a first call of fewer tokens than the window lists as many window keys, not a full window,
and the keys after them fall into other blocks of the sum. This check lists the window keys as the reference does.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsv4.model import load
from dsv4.model.architectures.stack import Call
from dsv4.model.architectures.v4 import V4
from dsv4.model.layers import attention
from dsv4.model.transformer import Transformer

PREFILL = 126  # tokens of the first call; then single steps
MEDIAN_LIMIT, P90_LIMIT = 4e-3, 2e-2  # of the relative difference, over positions: what comes with the files asks for

window_rows = attention.window_rows


def window_rows_by_call(position: int, count: int, first: int, window: int) -> torch.Tensor:
    """attention.window_rows, as wide as the first call is long."""
    rows = window_rows(position, count, first, window)
    return rows[:, :count] if position == 0 and 1 < count < window else rows


@torch.inference_mode()
def outputs(model: Transformer, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output of each layer, and of the MTP block, for the reference's inputs."""
    config, tokens, count, stack = model.config, known["tokens"].long(), len(known["h0"]), model.stack
    assert isinstance(stack, V4)
    stack.reserve(count)
    cache, mtp_cache = model.new_cache(1), model.new_mtp_cache(1)
    made: dict[str, list[torch.Tensor]] = {}
    spans = [(0, PREFILL), *((begin, begin + 1) for begin in range(PREFILL, count))]
    for begin, end in spans:
        call = Call(cache, [0], [end - begin], model.device)
        for number, layer in enumerate(stack.layers):
            h = layer(known[f"h{number}"][begin:end], tokens[begin:end], call, f"layers.{number}", number)
            made.setdefault(f"h{number + 1}", []).append(h)
        call.finish()
        call, following = Call(mtp_cache, [0], [end - begin], model.device), tokens[begin + 1 : end + 1]
        embedded, last = model.store.embedding(following).bfloat16(), known[f"h{config.num_hidden_layers}"]
        made.setdefault("mtp_out", []).append(stack.mtp[0](last[begin:end], embedded, following, call))
        call.finish()
    return {name: torch.cat(parts) for name, parts in made.items()}


def check(folder: Path) -> list[dict[str, Any]]:
    """Relative differences of each module's output, over positions."""
    known = load_file(folder / "expected" / "layers.safetensors")
    found = []
    for name, made in outputs(load(folder), known).items():
        a, b = made.flatten(1).double(), known[name].flatten(1).double()
        difference = (a - b).norm(dim=1) / b.norm(dim=1)
        median, p90 = float(difference.median()), float(difference.quantile(0.9))
        ok = median < MEDIAN_LIMIT and p90 < P90_LIMIT
        found.append({"output": name, "median": median, "p90": p90, "equal": float((difference == 0).double().mean())})
        found[-1]["ok"] = ok
        print(f"{folder.name} {json.dumps(found[-1])}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--any-split", action="store_true", help="dsv4's own rules, the same for every split")
    options = parser.parse_args()
    if not options.any_split:
        attention.window_rows = window_rows_by_call
    files = sorted(options.folder.glob("*/expected/layers.safetensors"))
    return 0 if all(found["ok"] for file in files for found in check(file.parent.parent)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
