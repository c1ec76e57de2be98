"""The reference engine's rank files, `model{i}-mp{N}.safetensors`, read as the one checkpoint that they are slices of.

Every tensor has its whole shape, and rows of it are read from the files that hold them, so whoever reads needs to
know nothing of the layout: the number of readers may be another one than N. All N files must be there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsv4.errors import InputError, printable

from .config import INFERENCE_KEYS, OPTIONAL_KEYS
from .names import expert_of, rank_file, rank_file_name
from .rank_layout import SLICED_COLUMNS, SLICED_ROWS
from .reader import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    Checkpoint,
    Headers,
    TensorInfo,
    read_file,
    read_json,
    untold,
)
from .storage import Folder, Storage

# What the reference engine does not read from its config, because it is the same in every release.
CONSTANTS: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True)
class RankFiles(Checkpoint):
    """See Checkpoint. `holders`: the rank files that a tensor is read from, in the order of their slices."""

    ranks: tuple[Checkpoint, ...]
    holders: dict[str, tuple[int, ...]]

    def read_tensor(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """See Checkpoint."""
        parts = [self.ranks[rank] for rank in self.holders[name]]
        if SLICED_COLUMNS.search(name):
            return _joined([part.read_tensor(name, start_row, stop_row) for part in parts], 1)
        stop, first, found = self.tensors[name].shape[0] if stop_row is None else stop_row, 0, []
        for part in parts:
            count = part.tensors[name].shape[0]
            begin, end = max(start_row - first, 0), min(stop - first, count)
            if begin < end:
                found.append(part.read_tensor(name, begin, end))
            first += count
        return _joined(found, 0) if found else parts[0].read_tensor(name, 0, 0)


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Slices put together, as bytes: not every dtype can be concatenated."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(torch.uint8) for part in parts], dim).view(parts[0].dtype)


def _holders(name: str, there: list[int], count: int, label: str) -> tuple[int, ...]:
    """Which files to read a tensor from. Raises InputError if a slice is missing or an expert is in several."""
    if expert_of(name):
        expected = 1
    elif SLICED_ROWS.search(name) or SLICED_COLUMNS.search(name):
        expected = count
    else:
        return (there[0],)
    if len(there) != expected:
        text = f"'{printable(name)}' is in {len(there)} of the {count} rank files, {expected} expected"
        raise InputError(f"{label}: {text}")
    return tuple(there)


def _whole(name: str, parts: list[TensorInfo], label: str) -> TensorInfo:
    """What a tensor is when its slices are put together. Raises InputError if they do not fit."""
    dim = 1 if SLICED_COLUMNS.search(name) else 0
    rests = {(p.dtype, p.shape[:dim], p.shape[dim + 1 :]) for p in parts}
    if len(rests) > 1 or (len(parts) > 1 and len(parts[0].shape) <= dim):
        raise InputError(f"{label}: the slices of '{printable(name)}' do not fit together")
    if len(parts) == 1:
        return parts[0]
    shape = parts[0].shape
    length = sum(part.shape[dim] for part in parts)
    return replace(parts[0], shape=(*shape[:dim], length, *shape[dim + 1 :]), nbytes=sum(part.nbytes for part in parts))


def _names(sizes: dict[str, int], label: str) -> list[str]:
    """The rank files in the order of ranks; [] if there are none. Raises InputError if some are missing."""
    counts = {found.ranks for found in map(rank_file, sizes) if found is not None}
    if not counts or INDEX_NAME in sizes:
        return []
    if len(counts) > 1:
        raise InputError(f"{label}: rank files of {' and '.join(map(str, sorted(counts)))} ranks are mixed")
    count = counts.pop()
    names = [rank_file_name(rank, count) for rank in range(count)]
    missing = [name for name in names if name not in sizes]
    if missing:
        raise InputError(f"{label}: {missing[0]} is missing ({len(missing)} of {len(names)} rank files are)")
    return names


def release_config(config: dict[str, Any], label: str) -> dict[str, Any]:
    """config.json in the release's terms, from the reference engine's. Raises InputError for a key that is missing."""
    if "hidden_size" in config:
        return config
    made: dict[str, Any] = {**CONSTANTS, "rope_scaling": {"type": "yarn"}, "quantization_config": {}}
    for key, path in INFERENCE_KEYS:
        if key in config:
            outer, _, inner = path.rpartition(".")
            (made[outer] if outer else made)[inner] = config[key]
        elif key not in OPTIONAL_KEYS:
            raise InputError(f"{label}/{CONFIG_NAME}: {key} is missing", "Copy inference/config.json of the release.")
    scaling = made["rope_scaling"]
    try:
        made["max_position_embeddings"] = int(scaling["original_max_position_embeddings"] * scaling["factor"])
    except (TypeError, ValueError):
        raise InputError(f"{label}/{CONFIG_NAME}: original_seq_len and rope_factor must be numbers") from None
    return made


def open_checkpoint(folder: str | Path, headers: Headers = untold) -> Checkpoint:
    """A folder in either layout: Hugging Face, or rank files. Raises InputError."""
    storage: Storage = Folder(Path(folder))
    sizes, label = storage.sizes(), storage.label
    names = _names(sizes, label)
    if not names:
        return Checkpoint.open(storage, headers)
    if CONFIG_NAME not in sizes:
        raise InputError(f"{label}: {CONFIG_NAME} is missing", "Copy it from the release.")
    config = release_config(read_json(storage, CONFIG_NAME, sizes[CONFIG_NAME], MAX_CONFIG_BYTES), label)
    ranks = []
    for name in names:
        shard, tensors = read_file(storage, name, sizes[name])
        ranks.append(Checkpoint(storage, config, sizes, {name: shard}, tensors))
        headers(len(ranks), len(names))
    there: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        for name in rank.tensors:
            there.setdefault(name, []).append(number)
    holders = {name: _holders(name, numbers, len(ranks), label) for name, numbers in there.items()}
    whole = {n: _whole(n, [ranks[i].tensors[n] for i in numbers], label) for n, numbers in holders.items()}
    shards = {name: shard for rank in ranks for name, shard in rank.shards.items()}
    return RankFiles(storage, config, sizes, shards, whole, tuple(ranks), holders)
