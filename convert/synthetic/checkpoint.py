"""Write a small checkpoint in the release's exact format, from a seed.

Names, dtypes, shapes, header layout, shard names, index, configs, tokenizer and side files are the release's; only
the numbers are random. Every promise about a real checkpoint can be tested on one of these, in seconds and
without a download:

    from dsv4.convert.synthetic.checkpoint import make_checkpoint
    make_checkpoint("small")

A geometry says which architecture it is of, and what its edition has.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from .geometry import DSpark, Geometry
from .release import AnyGeometry, Release, Tensors
from .tokenizer import tokenizer_config, tokenizer_json
from .v41 import V41Geometry

__all__ = ["AnyGeometry", "DSpark", "Geometry", "V41Geometry", "make_checkpoint"]

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


def _releases() -> list[Release]:
    """One for each file of this room whose name is that of an architecture, such as v41; the earliest first."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("v[0-9]*.py"))
    return [import_module(f".{name}", __package__).RELEASE for name in names]


RELEASES: dict[type, Release] = {release.geometry: release for release in _releases()}
EDITIONS: dict[str, AnyGeometry] = {n: g for release in RELEASES.values() for n, g in release.editions.items()}


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


def _write_side_files(folder: Path, geometry: AnyGeometry, expert_dtype: str, with_tokenizer: bool) -> None:
    release = RELEASES[type(geometry)]
    (folder / "inference").mkdir()
    (folder / "encoding").mkdir()
    _write_json(folder / "config.json", release.config(geometry, expert_dtype))
    _write_json(folder / "inference" / "config.json", release.inference_config(geometry, expert_dtype))
    _write_json(folder / "generation_config.json", _GENERATION)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    (folder / "LICENSE").write_text("MIT License\n", encoding="utf-8")
    file, text = release.encoder(geometry)
    (folder / file).write_text(text, encoding="utf-8")
    if with_tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json(release.special_tokens(geometry)), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer_config())


def make_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    geometry: AnyGeometry | None = None,
    experts: Literal["fp4", "fp8"] = "fp4",
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint into `folder`, which must not exist or be empty, and return its path.

    geometry: the dimensions, by default `Geometry()` (about 6 MB). experts: "fp4" as in the instruct releases, or "fp8"
    as in the Base releases of V4, where everything quantized is FP8 with float32 powers of two as scales.
    tokenizer: whether to write one. The same arguments give the same bytes. Raises FileExistsError.
    """
    geometry = geometry or Geometry()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty")
    release = RELEASES[type(geometry)]
    _write_weights(path, release.shards(geometry, seed, experts == "fp8"), release.count(geometry))
    _write_side_files(path, geometry, experts, tokenizer)
    return path
