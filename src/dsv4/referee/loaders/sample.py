"""A part of a checkpoint that an engine loads like the whole: every kind of layer and of expert, and all formats.

An engine cannot load some tensors only, and a release does not fit the memory of most machines. A sample is a folder
with the first layers, the first experts of each, the first tokens of the vocabulary, and the same config.json with
these counts. Every tensor has the bytes of the source, or its first rows. It holds at least one layer of each kind
(names, dtypes, shapes, compression ratio, router) and one expert of each kind.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.convert.checkpoint.config import compress_ratios
from dsv4.convert.checkpoint.editions.table import describes_v4
from dsv4.convert.checkpoint.forms.form import RELEASED
from dsv4.convert.checkpoint.header import DTYPE_BITS, build_header, tensor_bytes
from dsv4.convert.checkpoint.names import block_of, expert_of, is_routed_expert
from dsv4.convert.checkpoint.reader import CONFIG_NAME, INDEX_NAME, Checkpoint, TensorInfo
from dsv4.errors import InputError
from dsv4.progress import Progress

SHARD = "model-00001-of-00001.safetensors"
LEAST_EXPERTS, MOST_TOKENS = 8, 1024
LARGEST_SIDE_FILE = 64 << 20
EMBEDDING = "embed.weight"
COUNTS = ("num_hidden_layers", "n_routed_experts", "vocab_size", "compress_ratios")

BY_EXPERT = re.compile(r".*\.gate\.(weight|bias|bias_vl)")  # one row for each expert
BY_TOKEN = re.compile(r"(embed|head)\.weight|.*\.gate\.tid2eid")  # one row for each token

Kind = frozenset[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Cut:
    """How many layers, routed experts of each and tokens of the vocabulary, of how many."""

    layers: int
    experts: int
    tokens: int
    of: tuple[int, int, int]

    def __str__(self) -> str:
        layers, experts, tokens = self.of
        return (
            f"{self.layers} of {layers} layers, {self.experts} of {experts} experts in each, "
            f"{self.tokens} of {tokens} tokens"
        )


def _prefix(kinds: list[Any]) -> int:
    """The length of the shortest beginning that has every kind."""
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)


def _kind(tensors: Iterable[tuple[str, TensorInfo]]) -> Kind:
    return frozenset((inner, info.dtype, info.shape) for inner, info in tensors)


def _by_layer(checkpoint: Checkpoint) -> dict[int, dict[str, TensorInfo]]:
    layers: dict[int, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if (block := block_of(name)) is not None and block.stack == "layers":
            layers.setdefault(block.number, {})[block.inner] = info
    return layers


def _expert_kinds(layer: dict[str, TensorInfo]) -> list[Kind]:
    experts: dict[int, list[tuple[str, TensorInfo]]] = {}
    for inner, info in layer.items():
        if is_routed_expert(info.name) and (expert := expert_of(inner)) is not None:
            experts.setdefault(expert.number, []).append((expert.inner, info))
    return [_kind(experts[number]) for number in sorted(experts)]


def _layer_kind(layer: dict[str, TensorInfo], ratio: int) -> tuple[int, Kind, frozenset[Kind]]:
    dense = _kind((inner, info) for inner, info in layer.items() if not is_routed_expert(info.name))
    return ratio, dense, frozenset(_expert_kinds(layer))


def check_can_cut(checkpoint: Checkpoint) -> None:
    """Raises InputError for a checkpoint of which no sample can be made."""
    released = checkpoint.form is RELEASED and describes_v4(checkpoint.config)
    lacking = [key for key in COUNTS if key not in checkpoint.config_json]
    released = released and EMBEDDING in checkpoint.tensors
    if not released or lacking:
        why = f"config.json has no {lacking[0]}" if lacking else "it is no V4 in the release's own form"
        raise InputError(f"{checkpoint.storage.label}: no sample can be made of it: {why}", "--all loads all of it.")


def cut_of(checkpoint: Checkpoint) -> Cut:
    """The smallest cut with every kind of layer and of expert. Raises InputError if there is none."""
    check_can_cut(checkpoint)
    config, layers = checkpoint.config, _by_layer(checkpoint)
    ratios = compress_ratios(config) or ()
    count, experts, tokens = (int(config[key]) for key in COUNTS[:3])
    kinds = [_layer_kind(layers.get(n, {}), ratios[n] if n < len(ratios) else 0) for n in range(count)]
    most = max((_prefix(_expert_kinds(layer)) for layer in layers.values()), default=0)
    least = max(LEAST_EXPERTS, int(config.get("num_experts_per_tok") or 0), most)
    return Cut(min(count, _prefix(kinds)), min(experts, least), min(tokens, MOST_TOKENS), (count, experts, tokens))


def _rows(name: str, info: TensorInfo, cut: Cut) -> tuple[int, ...] | None:
    """The shape of a tensor in the sample, None if it is not in it."""
    block, expert = block_of(name), expert_of(name)
    if block is not None and block.stack == "layers" and block.number >= cut.layers:
        return None
    if is_routed_expert(name) and expert is not None and expert.number >= cut.experts:
        return None
    most = cut.experts if BY_EXPERT.fullmatch(name) else cut.tokens if BY_TOKEN.fullmatch(name) else None
    return info.shape if most is None or not info.shape else (min(info.shape[0], most), *info.shape[1:])


def cut_config(config: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """config.json of the sample."""
    layers = cut.of[0]
    ratios = config["compress_ratios"]
    return config | {
        "num_hidden_layers": cut.layers,
        "n_routed_experts": cut.experts,
        "vocab_size": cut.tokens,
        "compress_ratios": [*ratios[: cut.layers], *ratios[layers:]],
    }


def sample_shapes(checkpoint: Checkpoint, cut: Cut) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the sample's tensors, wide elements first, so that each is aligned."""
    ordered = sorted(checkpoint.tensors.items(), key=lambda item: -DTYPE_BITS[item[1].dtype])
    found = ((name, info, _rows(name, info, cut)) for name, info in ordered)
    return {name: (info.dtype, shape) for name, info, shape in found if shape is not None}


def sample_bytes(checkpoint: Checkpoint, cut: Cut) -> int:
    """Bytes of the sample's tensors."""
    return sum(tensor_bytes(dtype, shape) for dtype, shape in sample_shapes(checkpoint, cut).values())


def write_sample(checkpoint: Checkpoint, cut: Cut, folder: Path, progress: Progress) -> None:
    """Write the sample into an empty folder. `progress` is called with the number of bytes written."""
    tensors = sample_shapes(checkpoint, cut)
    total = 0
    with open(folder / SHARD, "wb") as file:
        file.write(build_header(tensors))
        for name, (_, shape) in tensors.items():
            info = checkpoint.tensors[name]
            data = checkpoint.read_bytes(name, 0, info.row_bytes * shape[0] if shape else info.nbytes)
            file.write(data)
            total += len(data)
            progress(len(data))
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    (folder / CONFIG_NAME).write_text(json.dumps(cut_config(checkpoint.config_json, cut)), encoding="utf-8")
    _copy_side_files(checkpoint, folder)


def _copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    source = Path(checkpoint.storage.label)
    for name, size in checkpoint.files.items():
        written = name in (CONFIG_NAME, INDEX_NAME) or name.endswith(".safetensors")
        if not written and size <= LARGEST_SIDE_FILE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
