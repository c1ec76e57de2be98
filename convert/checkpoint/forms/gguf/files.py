"""Reads a folder of GGUF files as a checkpoint: the files of the model, and its tensors as the release has them.

A model is one file or its splits, `NAME-00001-of-00003.gguf`. Drafts are in a file of their own: an MTP block is known
by its `nextn` tensors, DSpark's stages by their architecture and Markov table. What such a file repeats (embedding and
head) is not read again. Where the file says in which dtype the release has a tensor (dsv4 writes that), it is read in
that dtype; else in the file's.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4.convert.checkpoint.config import Config
from dsv4.convert.checkpoint.forms.tensor import Encoding, Extent, Shard, TensorInfo
from dsv4.convert.checkpoint.storage import Storage
from dsv4.errors import InputError

from .container import TENSOR_TYPES, GgufHeader, GgufTensor, data_bytes, read_header
from .keys import (
    ARCHITECTURE,
    MARKOV,
    PREFIX,
    STAGES_ARCHITECTURE,
    STAGES_PREFIX,
    config_of,
    released_dtypes,
    stage_config,
)
from .names import (
    DRAFT_PROJECTION,
    PROJECTIONS,
    REPEATED,
    FileNames,
    Place,
    draft_block_names,
    draft_stage_names,
    model_names,
)
from .values import BF16_AS_F32, CODES, I64_AS_I32, Q8_0, SCALES, column_range, q8_0_columns

SUFFIX = ".gguf"
MOST_BLOCKS = 1 << 12  # more are not believable
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Type in the file, dtype in the release: what is read of the former.
_DTYPES: dict[tuple[str, str], tuple[str, Encoding | None]] = {
    ("F32", "BF16"): ("BF16", BF16_AS_F32),
    ("I32", "I64"): ("I64", I64_AS_I32),
}
_AS_STORED: dict[str, tuple[str, Encoding | None]] = {
    "F32": ("F32", None), "F16": ("F16", None), "BF16": ("BF16", None), "I32": ("I32", None), "Q8_0": ("F32", Q8_0),
}  # fmt: skip

# Two matrices that lie side by side: the dtype that they are read in, and how columns are taken.
_SIDE_BY_SIDE = {"BF16": ("BF16", column_range), "F32": ("F32", column_range), "Q8_0": ("F32", q8_0_columns)}


@dataclass
class GgufFolder:
    """The contents of the files of a folder. config: what their keys say, as config.json of the release says it."""

    config: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class GgufForm:
    """The release's config lies beside the files or is made from their keys. Its keys about storage do not apply."""

    name = "GGUF"

    def tensor_name(self, name: str) -> str:
        """The name itself: names are mapped when the files are read."""
        return name

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
        """The tensors themselves."""
        return stored.values()

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The config for experts in FP4, with nothing else quantized."""
        inner = {key: value for key, value in config.items() if key != "quantization_config"}
        return {**inner, "expert_dtype": "fp4"}

    def released_config(self, config: Config) -> dict[str, Any]:
        """The config itself: it is the release's."""
        return dict(config)


GGUF = GgufForm()


def _info(name: str, tensor: GgufTensor, file: str, released: str) -> TensorInfo:
    """A tensor that is one in both, stored as a type that has a dtype."""
    if tensor.kind not in _AS_STORED:
        raise InputError(f"{file}: '{tensor.name}' is {tensor.kind}: only routed experts are read in it")
    dtype, encoding = _DTYPES.get((tensor.kind, released), _AS_STORED[tensor.kind])
    shape = tensor.shape
    extent = Extent(file, tensor.start, tensor.nbytes)
    return TensorInfo(name, dtype, shape, (extent,), encoding=encoding, released_dtype=released)


def _experts(place: Place, tensor: GgufTensor, file: str) -> Iterator[TensorInfo]:
    """The matrices of a stack, each with its scale."""
    if len(tensor.shape) != 3:
        raise InputError(f"{file}: '{tensor.name}' has shape {list(tensor.shape)}; a stack of matrices expected")
    count, rows, columns = tensor.shape
    size = data_bytes(tensor.kind, (rows, columns))
    for expert in range(count):
        stem = f"{place.prefix}ffn.experts.{expert}.{place.matrix}"
        extents = (Extent(file, tensor.start + expert * size, size),)
        if tensor.kind == "MXFP4":
            yield TensorInfo(f"{stem}.weight", "I8", (rows, columns // 2), extents, encoding=CODES)
            yield TensorInfo(f"{stem}.scale", "F8_E8M0", (rows, columns // 32), extents, encoding=SCALES)
        else:
            dtype, encoding = _AS_STORED[tensor.kind]
            yield TensorInfo(f"{stem}.weight", dtype, (rows, columns), extents, encoding=encoding)


def _projections(prefix: str, tensor: GgufTensor, file: str, released: Mapping[str, str]) -> Iterator[TensorInfo]:
    """e_proj and h_proj, which lie side by side."""
    columns = tensor.shape[1] // 2 if len(tensor.shape) == 2 else 0
    found = _SIDE_BY_SIDE.get(tensor.kind)
    if found is None or not columns or tensor.shape[1] % (2 * TENSOR_TYPES[tensor.kind].elements):
        raise InputError(f"{file}: '{tensor.name}' is {tensor.kind} {list(tensor.shape)}; two matrices expected")
    dtype, columns_of = found
    half = data_bytes(tensor.kind, (columns,))
    for number, inner in enumerate(PROJECTIONS):
        encoding = columns_of(2 * half, half * number, half * (number + 1))
        extent, name = Extent(file, tensor.start, tensor.nbytes), prefix + inner
        shape = (tensor.shape[0], columns)
        yield TensorInfo(name, dtype, shape, (extent,), encoding=encoding, released_dtype=released.get(name, ""))


def _tensors(header: GgufHeader, file: str, names: FileNames, released: Mapping[str, str]) -> Iterator[TensorInfo]:
    """The tensors of one file under the release's names. Raises InputError for one that has none."""
    for tensor in header.tensors:
        place = names.place_of(tensor.name)
        if place is None:
            found = f"{ARCHITECTURE} of {len(names.blocks)} layers" if len(names.blocks) != 1 else "a draft block"
            hint = f"dsv4 knows the tensors of llama.cpp's architecture {ARCHITECTURE}, and of its drafts."
            raise InputError(f"{file}: '{tensor.name}' is not a tensor of {found}", hint)
        if place == REPEATED:
            continue
        if place.matrix:
            yield from _experts(place, tensor, file)
        elif place.inner == DRAFT_PROJECTION:
            yield from _projections(place.prefix, tensor, file, released)
        else:
            name = place.prefix + place.inner
            yield _info(name, tensor, file, released.get(name, ""))


def gguf_files(sizes: Mapping[str, int]) -> list[str]:
    """Names of the GGUF files of a folder, sorted; those in sub-folders are not its own."""
    return sorted(name for name in sizes if "/" not in name and name.endswith(SUFFIX))


def is_gguf(sizes: Mapping[str, int]) -> bool:
    """Whether a folder is one of GGUF files: it has some, and no safetensors file."""
    return bool(gguf_files(sizes)) and not any("/" not in name and name.endswith(".safetensors") for name in sizes)


def _check_splits(names: list[str], label: str) -> None:
    """Raises InputError if splits are missing, or the files are of several models."""
    stems = {(match[1], match[3]) if (match := _SPLIT.fullmatch(name)) else (name, "") for name in names}
    if len(stems) > 1:
        raise InputError(f"{label}: the GGUF files are of several models: {', '.join(sorted(names)[:5])}",
                         "Keep one model, and the file of its draft block, in a folder.")  # fmt: skip
    for stem, count in stems:
        wanted = [f"{stem}-{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)] if count else []
        if missing := sorted(set(wanted) - set(names)):
            raise InputError(f"{label}: {missing[0]} is missing", "Finish the download first.")


def _is_draft_block(header: GgufHeader) -> bool:
    return any(".nextn." in tensor.name for tensor in header.tensors)


def _markov_rank(header: GgufHeader) -> int | None:
    """The width of the Markov table of DSpark's stages; None in a file of anything else."""
    if header.keys.get("general.architecture") != STAGES_ARCHITECTURE:
        return None
    return next((tensor.shape[-1] for tensor in header.tensors if tensor.name == MARKOV), None)


def _blocks(header: GgufHeader, prefix: str, where: str) -> int:
    count = header.keys.get(f"{prefix}block_count")
    if type(count) is not int or count > MOST_BLOCKS:
        raise InputError(f"{where}: {prefix}block_count is {'missing' if count is None else count}")
    return count


def _names_of_drafts(header: GgufHeader, layers: int, where: str) -> FileNames:
    if _is_draft_block(header):
        return draft_block_names(layers)
    return draft_stage_names(_blocks(header, STAGES_PREFIX, where))


def read_gguf(storage: Storage, sizes: Mapping[str, int]) -> GgufFolder:
    """Every tensor of the GGUF files of a folder. Raises InputError for types and names that are not read."""
    names = gguf_files(sizes)
    headers = {name: read_header(storage, name, sizes[name]) for name in names}
    folder = GgufFolder()
    ranks = {name: rank for name, header in headers.items() if (rank := _markov_rank(header)) is not None}
    drafts = sorted({name for name, header in headers.items() if _is_draft_block(header)} | ranks.keys())
    others = [n for n in names if n not in drafts and headers[n].keys.get("general.architecture") != ARCHITECTURE]
    main = [name for name in names if name not in drafts and name not in others]
    folder.notes += [f"ignored: {n} is of {headers[n].keys.get('general.architecture')}" for n in others]
    if not main or len(drafts) > 1:
        found = "no model" if not main else f"{len(drafts)} files of drafts"
        raise InputError(
            f"{storage.label}: the GGUF files hold {found} of {ARCHITECTURE}",
            "Name the folder of one DeepSeek-V4 model.",
        )
    _check_splits(main, storage.label)
    keys = headers[main[0]].keys
    layers = _blocks(headers[main[0]], PREFIX, f"{storage.label}/{main[0]}")
    folder.config = config_of(keys)
    for name in drafts:
        folder.config |= stage_config(headers[name].keys, ranks[name]) if name in ranks else {}
    for name in (*main, *drafts):
        header, is_draft = headers[name], name in drafts
        table = _names_of_drafts(header, layers, f"{storage.label}/{name}") if is_draft else model_names(layers)
        found_here = {
            info.name: info
            for info in _tensors(header, name, table, released_dtypes(header.keys if is_draft else keys))
        }
        if twins := folder.tensors.keys() & found_here.keys():
            raise InputError(f"{storage.label}: '{min(twins)}' is in {name} and in another file")
        digest = hashlib.sha256(header.raw).hexdigest()
        folder.shards[name] = Shard(name, sizes[name], digest, tuple(found_here))
        folder.tensors |= found_here
    if "embed.weight" in folder.tensors:  # llama.cpp's own files have no key for it
        folder.config.setdefault("vocab_size", folder.tensors["embed.weight"].shape[0])
    return folder
