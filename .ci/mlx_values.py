"""MLX reads folders of `--to mlx`: every matrix dequantized by it, against the exact values of the source.

Run by .ci/run with the package mlx (its CPU build) and mlx-lm; where they do not install, one line there says so.
Checkpoints with every kind of weight: FP4 and FP8 experts, widths that are not multiples of 128, n-gram tables. On one
of V4.1, mlx-lm itself loads the files that are its model's, under its names and with the modes that config.json says;
it has no model of V4, and none with n-gram tables.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from dsv4.convert import convert
from dsv4.convert.checkpoint.forms.mlx_names import released_name
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.v41 import V41Geometry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))
from exact_values import edit_config, edit_tensors, read_json, same_bits, spread, tensors_of, values
from raw_safetensors import Tensors
from tiny import RAGGED

SMALL = Geometry(compress_ratios=(4, 0, 0), num_hash_layers=1, n_routed_experts=4)
SOURCES: dict[str, dict[str, Any]] = {
    "FP4 experts": {"geometry": SMALL},
    "FP8 experts": {"geometry": SMALL, "experts": "fp8"},
    "widths that are not multiples of 128": {"geometry": RAGGED},
    "V4.1": {"geometry": V41Geometry()},
}


def modes(config: dict[str, Any], module: str) -> dict[str, Any]:
    """What the config says of a module, as mlx-lm looks it up."""
    quantization = config["quantization"]
    found = quantization.get(module, quantization)
    return {key: found[key] for key in ("group_size", "bits", "mode")}


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """float64 values of every tensor that MLX loads, under its names; of those with scales, dequantized."""
    config, stored, found = read_json(folder / "config.json"), {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= mx.load(str(file))
    for name, array in stored.items():
        module = name.removesuffix(".weight")
        if name.endswith(".scales"):
            continue
        if f"{module}.scales" in stored:
            array = mx.dequantize(array, stored[f"{module}.scales"], dtype=mx.float32, **modes(config, module))
        elif array.dtype == mx.bfloat16:
            array = array.astype(mx.float32)
        found[name] = np.array(array).astype(np.float64)
    return found


def released(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Under the release's names: stacks taken apart, the groups of wo_a joined."""
    if ".switch_mlp." in name:
        return {released_name(name, expert): array[expert] for expert in range(len(array))}
    joined = array.reshape(math.prod(array.shape[:2]), -1) if array.ndim == 3 else array
    return {released_name(name): joined}


def exact(name: str, source: Tensors, block: tuple[int, int]) -> np.ndarray:
    """The source's values, with the 1x32 blocks of FP8 n-gram tables."""
    if ".engram.embed.weight" not in name:
        return values(name, source, block)
    codes = source[name].array().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = source[name.replace("weight", "scale")].array().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return codes * spread(scale, (1, 32), codes.shape)


def compare(source: Path, output: Path) -> int:
    """The number of weights, all of which are equal to the bit. Exits, naming one, where they are not."""
    before = tensors_of(source)
    block = tuple(read_json(source / "config.json")["quantization_config"]["weight_block_size"])
    found: dict[str, np.ndarray] = {}
    for name, array in dequantized(output).items():
        found |= released(name, array)
    weights = {n for n in before if not (n.endswith(".scale") and n.removesuffix("scale") + "weight" in before)}
    if weights != found.keys():
        sys.exit(f"names differ: {sorted(weights ^ found.keys())[:5]}")
    for name in weights:
        if not same_bits(exact(name, before, block), found[name]):
            sys.exit(f"{name} has other values in MLX")
    return len(weights)


def load_with_mlx_lm(folder: Path) -> int:
    """The number of arrays of the model that mlx-lm builds and loads; it stops at any that is missing or too many."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return len(tree_flatten(model.parameters()))


def without_tables(source: Path) -> Path:
    """A checkpoint of V4.1 without its n-gram tables, which mlx-lm refuses."""
    edit_tensors(source, {}, tuple(name for name in tensors_of(source) if ".engram." in name))
    config = read_json(source / "config.json")
    edit_config(source, text_config=config["text_config"] | {"engram_layer_ids": []})
    return source


def main() -> None:
    """Every source, and mlx-lm on one of V4.1."""
    with tempfile.TemporaryDirectory() as temporary:
        for number, (words, options) in enumerate(SOURCES.items()):
            source, output = Path(temporary, str(number)), Path(temporary, f"{number}-mlx")
            make_checkpoint(source, seed=number, **options)
            convert(source, output, to="mlx")
            print(f"{words}: MLX {mx.__version__} reads {compare(source, output)} weights, every value equal")
        source = make_checkpoint(Path(temporary, "plain"), seed=9, geometry=V41Geometry())
        convert(without_tables(source), Path(temporary, "plain-mlx"), to="mlx")
        print(f"mlx-lm loads a model of V4.1: {load_with_mlx_lm(Path(temporary, 'plain-mlx'))} arrays")


if __name__ == "__main__":
    main()
