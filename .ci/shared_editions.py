"""Checks dsv4 on checkpoints of later editions, with results that others computed, where those lie beside the project.

python .ci/shared_editions.py FOLDER

kernels-v41.safetensors          quantizations, quantized products, n-gram rows and the released hash: to the bit
trace.exact.npz                  every stream, list and table of one prefill, without simulation
layers.simulated.safetensors     every layer alone, from recorded inputs, with simulation
logits.*.npz                     whole runs, judged by the program that comes with them
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dsv4.model import load
from dsv4.model.architectures.stack import Call
from dsv4.model.architectures.v41 import V41
from dsv4.model.kernels.table import select_kernels
from dsv4.model.layers.engram.hashing import Engrams, NGramHash, look_back, multipliers, primes_of_tables
from dsv4.model.layers.shared_keys import nothing_chosen
from dsv4.model.transformer import Transformer
from dsv4.model.weights import FLOAT4_E2M1FN, FLOAT8_E4M3FN, Matrix
from dsv4.quant import activation
from dsv4.quant.block_scales import FP4_BLOCK, Block, dequantize_fp8

EXACT = 1e-5  # the reference differs from a second implementation by 1e-6
# Of one layer from recorded inputs, over tokens: the reference under perturbations has 0 and 3e-3.
LAYER_MEDIAN, LAYER_P90 = 2e-3, 1e-2
Tensors = dict[str, torch.Tensor]


def relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 difference of each token."""
    wide, right = found.to(torch.float64).flatten(1), expected.to(torch.float64).flatten(1)
    return (wide - right).norm(dim=1) / right.norm(dim=1).clamp(min=1e-30)


def check_kernels(t: Tensors) -> None:
    x, kernels = t["x"], select_kernels(torch.device("cpu"))
    codes, scales = activation.quantize_fp8(x, 32)
    assert torch.equal(codes.view(torch.uint8), t["fp8.values"].view(torch.uint8))
    assert torch.equal(scales, t["fp8.scales"].to(torch.float32))
    assert torch.equal(kernels.simulate_fp8(x, 32), t["fp8.simulated"])
    assert torch.equal(activation.simulate_fp4(x), t["fp4_e8m0.simulated"])
    assert torch.equal(activation.simulate_fp4_e4m3(x), t["fp4_e4m3.simulated"])
    for name, kind, block in (("linear8", FLOAT8_E4M3FN, Block(32, 32)), ("linear4", FLOAT4_E2M1FN, FP4_BLOCK)):
        matrix = Matrix(name, kind, (64, 96), t[f"{name}.weight"], t[f"{name}.scale"], block)
        y = kernels.linear(kernels.simulate_fp8(t["linear.x"], 32), matrix, dtype=torch.bfloat16)
        steps = (y.view(torch.int16).to(torch.int32) - t[f"{name}.y"].view(torch.int16).to(torch.int32)).abs()
        assert int(steps.max()) <= 1, f"{name}: {int(steps.max())} steps of bfloat16"
    rows = dequantize_fp8(t["engram.weight"], t["engram.scale"], Block(1, 32))
    assert torch.equal(rows.to(torch.bfloat16), t["engram.rows"])
    released = Engrams((1, 14), (384006168, 384016682), 4, 8, 256, 16000000, 2, 99092)
    found = primes_of_tables(released)
    assert torch.equal(torch.stack(found), t["hash.primes"])
    for table, layer in enumerate(released.layers):
        assert torch.equal(multipliers(layer, released.classes, 4), t["hash.multipliers"][table])
        pad = int(t["hash.classes"][0])
        back = look_back(t["hash.classes"][:0], t["hash.classes"], 4, pad)
        rows = NGramHash(released, table).rows(back)
        assert torch.equal(rows[3:], t["hash.rows"][3:, table]), f"layer {layer}: rows of the table"
    print("kernels-v41: equal to the bit", flush=True)


def stack_of(model: Transformer) -> V41:
    assert isinstance(model.stack, V41)
    return model.stack


@torch.inference_mode()
def check_trace(folder: Path) -> None:
    golden = {name: torch.from_numpy(value) for name, value in np.load(folder / "expected/trace.exact.npz").items()}
    model = load(folder, simulation=False)
    stack, cache, seen = stack_of(model), model.new_cache(1), dict[str, torch.Tensor]()
    tokens = golden["tokens"].to(torch.int64)
    result = model.forward(tokens[None], cache, trace=lambda name, output: seen.__setitem__(name, output))
    assert result.logits is not None
    for layer in range(len(stack.layers)):
        before = f"layers.{layer}.engram" if layer in stack.engrams else f"layers.{layer - 1}" if layer else "embed"
        assert relative(seen[before], golden[f"x{layer}"]).max() < EXACT, before
    for layer in (int(name.removeprefix("compressed")) for name in golden if name.startswith("compressed")):
        own = cache.sequences[0].layers[layer]
        assert own.compressor is not None and own.indexer is not None
        assert relative(own.compressor.entries.rows(), golden[f"compressed{layer}"]).max() < EXACT
        assert relative(own.indexer.entries.rows(), golden[f"index_key{layer}"]).max() < EXACT
    for table, (layer, engram) in enumerate(stack.engrams.items()):
        assert torch.equal(engram.classes, golden["token_classes"].to(torch.int64))
        call = Call(model.new_cache(1), [0], [len(tokens)], torch.device("cpu"))
        rows = engram.rows(tokens, call.segments, call.layer_caches(layer))
        assert torch.equal(rows, golden["engram_rows"][:, table])
    assert relative(result.hidden[0], golden["main_hidden"]).max() < EXACT
    assert relative(result.logits[0, -1:], golden["logits_last"][None]).max() < EXACT
    print("trace.exact: streams, keys, classes, rows of tables, hidden states", flush=True)


@torch.inference_mode()
def run_layers(model: Transformer, t: Tensors) -> dict[int, torch.Tensor]:
    """The stream after each layer, from the recorded stream and weights before it: one prefill, then single steps."""
    stack, cache, found = stack_of(model), model.new_cache(1), dict[int, list[torch.Tensor]]()
    model.stack.reserve(len(t["tokens"]))
    for start, stop in [(0, 40), *((i, i + 1) for i in range(40, len(t["tokens"])))]:
        call = Call(cache, [0], [stop - start], torch.device("cpu"))
        selections = [nothing_chosen(stop - start)]
        ids = t["tokens"][start:stop].to(torch.int64)
        for number, layer in enumerate(stack.layers):
            shared = stack.shared(number, call, selections)
            h, _ = layer(t[f"x{number}"][start:stop], t[f"pre{number}"][start:stop], ids, call, number, shared)
            found.setdefault(number, []).append(h)
        call.finish()
    return {number: torch.cat(parts) for number, parts in found.items()}


def check_layers(folder: Path) -> None:
    t = load_file(folder / "expected/layers.simulated.safetensors")
    for number, h in run_layers(load(folder), t).items():
        difference = relative(h, t.get(f"y{number}", t.get(f"x{number + 1}")))
        median, p90 = float(difference.median()), float(difference.quantile(0.9))
        print(f"layer {number}: median {median:.1e}, p90 {p90:.1e}", flush=True)
        assert median < LAYER_MEDIAN and p90 < LAYER_P90, f"layer {number}"


def check_runs(shared: Path, checkpoint: Path) -> None:
    """Whole runs: without simulation in several splits, and with it, as near as the reference is to itself."""
    expected = checkpoint / "expected"
    judge = [sys.executable, str(shared / "check_v41.py"), str(checkpoint)]
    subprocess.run([*judge, str(expected / "logits.exact.npz"), "--splits", "--no-drafts"], check=True)
    released = [str(expected / "logits.exact.released-index-keys.npz"), "--run-option=--released-index-keys"]
    subprocess.run([*judge, *released, "--no-drafts"], check=True)
    simulated = [str(expected / "logits.simulated.npz"), "--noise", str(expected / "noise.json"), "--no-drafts"]
    subprocess.run([*judge, *simulated], check=True)


def main() -> None:
    shared = Path(sys.argv[1])
    v41 = shared / "tiny-v41"
    check_kernels(load_file(shared / "kernels-v41.safetensors"))
    check_trace(v41)
    check_layers(v41)
    check_runs(shared, v41)


if __name__ == "__main__":
    main()
