"""Write a small checkpoint in the release's exact format, from a seed.

Names, dtypes, shapes, header layout, shard names, index, configs, tokenizer and side files are the release's; only
the numbers are random. Every promise about a real checkpoint can be tested on one of these, in seconds and
without a download:

    from dsv4.convert.synthetic.checkpoint import make_checkpoint
    make_checkpoint("small")

Left out: Vision and V4.1 families, and the three-stage MTP of the 0731 releases.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from . import encoder
from .geometry import Geometry, config, inference_config
from .tensors import TensorSource
from .tokenizer import tokenizer_config, tokenizer_json

__all__ = ["Geometry", "make_checkpoint"]

Tensors = dict[str, torch.Tensor]

_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": "4.46.3",
}
_README = "---\nlicense: mit\nlibrary_name: transformers\n---\n# A small DeepSeek-V4 checkpoint with random weights\n"


def _released_shards(source: TensorSource) -> Iterator[Tensors]:
    """Embedding, one shard per layer, head, one shard per MTP block."""
    yield dict(source.embedding())
    for index in range(source.g.num_hidden_layers):
        yield dict(source.layer(index))
    yield dict(source.head())
    for index in range(source.g.num_nextn_predict_layers):
        yield dict(source.mtp(index))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, shards: Iterator[Tensors], count: int) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        (folder / name).write_bytes(save(tensors))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_side_files(folder: Path, geometry: Geometry, expert_dtype: str, with_tokenizer: bool) -> None:
    (folder / "inference").mkdir()
    (folder / "encoding").mkdir()
    _write_json(folder / "config.json", config(geometry, expert_dtype))
    _write_json(folder / "inference" / "config.json", inference_config(geometry, expert_dtype))
    _write_json(folder / "generation_config.json", _GENERATION)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    (folder / "LICENSE").write_text("MIT License\n", encoding="utf-8")
    (folder / encoder.FILE).write_text(encoder.PREVIEW, encoding="utf-8")
    if with_tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer_config())


def make_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    geometry: Geometry | None = None,
    experts: Literal["fp4", "fp8"] = "fp4",
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint into `folder`, which must not exist or be empty, and return its path.

    geometry: the dimensions, by default `Geometry()` (about 6 MB). experts: "fp4" as in the instruct releases, or "fp8"
    as in the Base releases, where everything quantized is FP8 with float32 powers of two as scales.
    tokenizer: whether to write one. The same arguments give the same bytes. Raises FileExistsError.
    """
    geometry = geometry or Geometry()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty")
    source = TensorSource(geometry, seed, base=experts == "fp8")
    count = geometry.num_hidden_layers + 2 + geometry.num_nextn_predict_layers
    _write_weights(path, _released_shards(source), count)
    _write_side_files(path, geometry, experts, tokenizer)
    return path
