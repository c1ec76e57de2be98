"""The read side of a checkpoint: config, index and every header, validated once before any work.

`Checkpoint.open` reads headers only, a few MB even for the 865 GB of V4-Pro. Bytes of tensors are read on demand, by
rows, so that the caller decides about memory. Where index and shards disagree, the index decides (index.py).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4.errors import InputError
from dsv4.files import PREFIX_BYTES, refuse_other_kinds
from dsv4.machine import collection_paused
from dsv4.progress import Reached, ignore

from .editions.view import release_view
from .forms import recorded_scales
from .forms.form import RELEASED, Form
from .forms.gguf.files import GGUF, gguf_files, is_gguf, read_gguf
from .forms.table import form_of
from .forms.tensor import Encoding
from .forms.tensor import Extent as Extent
from .forms.tensor import Shard as Shard
from .forms.tensor import TensorInfo as TensorInfo
from .forms.tensor import row_count as row_count
from .header import LENGTH_BYTES, Header, check_twins, header_length, parse_header, strict_json, tensor_bytes
from .index import check_needed, ignored_files, select, shards_of, weight_map_of
from .names import rank_file
from .other_files import refuse_other_weights
from .storage import Folder, Storage, check_component

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MAX_INDEX_BYTES = 100_000_000
MAX_CONFIG_BYTES = 10_000_000

Span = tuple[str, int, int]
"""Bytes [start, stop) of a tensor's data, by its name."""


def read_json(storage: Storage, name: str, size: int, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises InputError."""
    where = f"{storage.label}/{name}"
    if size > limit:
        raise InputError(f"{where}: {size} bytes, at most {limit} are believable")
    value = strict_json(storage.read(name, 0, size), where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is expected", "Download the file again.")
    return value


def read_config(storage: Storage, sizes: dict[str, int]) -> dict[str, Any]:
    """The object in config.json. Raises InputError."""
    if CONFIG_NAME not in sizes:
        raise InputError(f"{storage.label}: {CONFIG_NAME} is missing", "Copy it from the release.")
    return read_json(storage, CONFIG_NAME, sizes[CONFIG_NAME], MAX_CONFIG_BYTES)


def read_header(storage: Storage, name: str, size: int) -> tuple[Header, str]:
    """Validated header of one file and the SHA-256 of its bytes. Raises InputError."""
    where = f"{storage.label}/{name}"
    start = storage.read(name, 0, min(size, PREFIX_BYTES))
    refuse_other_kinds(start, where)
    prefix = start[:LENGTH_BYTES]
    raw = storage.read(name, LENGTH_BYTES, header_length(prefix, size, where))
    return parse_header(raw, size, where), hashlib.sha256(prefix + raw).hexdigest()


def _read_index(storage: Storage, sizes: dict[str, int]) -> dict[str, Any] | None:
    """The object in the index, its `weight_map` checked; None for a checkpoint of one file. Raises InputError."""
    if INDEX_NAME in sizes:
        index = read_json(storage, INDEX_NAME, sizes[INDEX_NAME], MAX_INDEX_BYTES)
        return {**index, "weight_map": weight_map_of(index, f"{storage.label}/{INDEX_NAME}")}
    if SINGLE_NAME in sizes:
        return None
    found = sum(f.endswith(".safetensors") for f in sizes)
    refuse_other_weights(storage, sizes)
    raise InputError(
        f"{storage.label}: neither {INDEX_NAME} nor {SINGLE_NAME} is there ({found} other .safetensors files)",
        "`dsv4 convert` reads the rank files of --layout mp from a folder: fetch them with `dsv4 download`."
        if any(map(rank_file, sizes))
        else "Name the folder of a complete checkpoint.",
    )


def read_file(storage: Storage, name: str, size: int) -> tuple[Shard, dict[str, TensorInfo]]:
    """Read the header of one safetensors file: the shard and its tensors by name. Raises InputError."""
    header, digest = read_header(storage, name, size)
    tensors = {
        tensor: TensorInfo(
            tensor, entry.dtype, entry.shape, (Extent(name, header.data_start + entry.begin, entry.end - entry.begin),)
        )
        for tensor, entry in header.entries.items()
    }
    return Shard(name, size, digest, tuple(header.entries)), tensors


def read_files(
    storage: Storage, names: list[str], sizes: dict[str, int], progress: Reached
) -> tuple[dict[str, Shard], dict[str, dict[str, TensorInfo]]]:
    """Read the headers of several files: shards, and by file name their tensors. Raises InputError."""
    shards: dict[str, Shard] = {}
    tensors: dict[str, dict[str, TensorInfo]] = {}
    for number, name in enumerate(names, 1):
        shards[name], tensors[name] = read_file(storage, name, sizes[name])
        progress(number, len(names))
    return shards, tensors


def as_released(form: Form, stored: dict[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    """The tensors of a form under the release's names and dtypes. Raises InputError if two become one."""
    every = list(form.tensors(stored))
    found = {info.name: info for info in every}
    if len(found) != len(every):
        twice = next(name for name, count in Counter(info.name for info in every).items() if count > 1)
        raise InputError(f"{where}: two tensors both stand for '{twice}'")
    return found


def open_source(source: Path | str | Storage, build: Callable[[Storage], "Checkpoint"]) -> "Checkpoint":
    """Build a checkpoint from a Storage or a folder. If that fails, the folder's files are closed."""
    with collection_paused():
        if not isinstance(source, str | Path):
            return build(source)
        storage = Folder(Path(source))
        try:
            return build(storage)
        except BaseException:
            storage.close()
            raise


@dataclass(frozen=True)
class Checkpoint:
    """An opened, validated checkpoint. Get one with `Checkpoint.open`, or in any layout with `open_checkpoint`.

    Tensors have the release's names and dtypes, whatever the form of the files; with the form RELEASED, their own.
    """

    storage: Storage
    config_json: dict[str, Any]  # as the file has it
    files: dict[str, int]  # every file and its size
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    notes: list[str] = field(default_factory=list)  # one line for each thing that was ignored
    form: Form = RELEASED
    index: dict[str, Any] | None = None  # the object in the index, but for its `weight_map`; None if none was read

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json in the release's keys, from any writer; its keys about storage describe these files."""
        return release_view(self.form.stored_config(self.config_json))

    @cached_property
    def released_json(self) -> dict[str, Any]:
        """config.json as the release of this model has it: what an output's config is made from."""
        return self.form.released_config(self.config_json)

    @cached_property
    def released(self) -> dict[str, Any]:
        """`released_json` in the release's keys."""
        return release_view(self.released_json)

    @cached_property
    def recorded_scales(self) -> dict[str, recorded_scales.Texts]:
        """What `dsv4.json` says of scales that were dropped, by the weight's name. Read when it is first asked for."""
        return recorded_scales.read(self.storage, self.files)

    @classmethod
    def open(cls, source: Path | str | Storage, progress: Reached = ignore) -> "Checkpoint":
        """Open a folder (or any Storage) in the Hugging Face layout. Raises InputError if it is not valid."""
        return open_source(source, lambda storage: cls._read(storage, progress))

    @classmethod
    def _read(cls, storage: Storage, progress: Reached) -> "Checkpoint":
        sizes = storage.sizes()
        if is_gguf(sizes):
            return cls._of_gguf(storage, sizes)
        index = _read_index(storage, sizes)
        weight_map = None if index is None else index.pop("weight_map")
        names = [SINGLE_NAME] if weight_map is None else shards_of(weight_map, sizes, storage.label)
        config, notes = read_config(storage, sizes), ignored_files(names, sizes)
        form = form_of(config)
        checkpoint = cls(storage, config, sizes, {}, {}, notes, form, index)
        storage.choose_shards(names)
        shards, stored = read_files(storage, names, sizes, progress)
        if weight_map is None:
            return replace(checkpoint, shards=shards, tensors=as_released(form, stored[SINGLE_NAME], storage.label))
        where = f"{storage.label}/{INDEX_NAME}"
        selection = select(weight_map, stored, where)
        released = replace(
            selection,
            tensors=as_released(form, selection.tensors, storage.label),
            absent=[form.tensor_name(name) for name in selection.absent],
            unlisted=[form.tensor_name(name) for name in selection.unlisted],
        )
        check_needed(released, checkpoint.config, where)
        check_twins(list(released.tensors), storage.label)
        return replace(checkpoint, shards=shards, tensors=released.tensors, notes=[*notes, *selection.notes])

    @classmethod
    def _of_gguf(cls, storage: Storage, sizes: dict[str, int]) -> "Checkpoint":
        storage.choose_shards(gguf_files(sizes))
        folder = read_gguf(storage, sizes)
        config = read_config(storage, sizes) if CONFIG_NAME in sizes else folder.config
        return cls(storage, config, sizes, folder.shards, folder.tensors, folder.notes, GGUF)

    def extents(self, spans: Iterable[Span]) -> Iterator[Extent]:
        """The bytes of the files that these bytes of tensors are made of."""
        return (extent for name, start, stop in spans for extent in self.tensors[name].stored(start, stop))

    def expect(self, spans: Iterable[Span]) -> None:
        """These bytes of tensors are read next, see `Storage.expect`."""
        self.storage.expect(self.extents(spans))

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` (bytes) from byte `start` of a tensor's data. Raises KeyError for an unknown name."""
        info, done = self.tensors[name], 0
        extents = info.stored(start, start + len(buffer))
        if info.is_columns:
            self._read_columns(info, list(extents), buffer, start)
        elif info.encoding is not None:
            self._read_encoded(info, info.encoding, list(extents), buffer, start)
        else:
            for extent in extents:
                self.storage.read_into(extent.shard, buffer[done : done + extent.nbytes], extent.offset)
                done += extent.nbytes

    def _read_encoded(
        self, info: TensorInfo, encoding: Encoding, extents: list[Extent], buffer: memoryview, start: int
    ) -> None:
        """Fill `buffer` where the file has other bytes of the same values."""
        if not extents:
            return
        own, *beside = extents
        raw = np.empty((own.nbytes // encoding.stored, encoding.stored), np.uint8)
        self.storage.read_into(own.shard, raw.data.cast("B"), own.offset)
        more = [self.storage.read(*extent) for extent in beside]
        try:
            decoded = encoding.decode(raw, *more).reshape(-1)
        except ValueError as error:
            raise InputError(f"'{info.name}': {error}", "The file is damaged, or holds what no release does.") from None
        skipped = start % encoding.decoded
        np.copyto(np.frombuffer(buffer, np.uint8), decoded[skipped : skipped + len(buffer)])

    def _read_columns(self, info: TensorInfo, extents: list[Extent], buffer: memoryview, start: int) -> None:
        """Fill `buffer` where each extent holds some columns of every row."""
        if not extents:
            return
        width, nbytes = info.row_bytes, sum(extent.nbytes for extent in extents)
        rows, column, count = bytearray(nbytes), 0, nbytes // info.row_bytes
        for extent in extents:
            share = extent.nbytes // count
            piece = self.storage.read(*extent)
            for row in range(count):
                rows[row * width + column : row * width + column + share] = piece[row * share : (row + 1) * share]
            column += share
        skipped = start % width
        buffer[:] = memoryview(rows)[skipped : skipped + len(buffer)]

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes [start, stop) of a tensor's data, in fresh memory. Raises KeyError for an unknown name."""
        buffer = bytearray((self.tensors[name].nbytes if stop is None else stop) - start)
        self.read_into(name, memoryview(buffer), start)
        return buffer

    def read_rows(self, info: TensorInfo, start_row: int = 0, stop_row: int | None = None) -> "torch.Tensor":
        """Rows [start_row, stop_row) of a tensor in the dtype of `info` (F4: bytes of two codes), in fresh memory.

        Raises InputError for a dtype that torch does not have.
        """
        from .torch_tensors import as_tensor  # torch takes a second to import, and headers do without

        name, shape = info.name, info.shape
        if not shape or not (start_row or stop_row is not None):
            return as_tensor(self.read_bytes(name), info.dtype, shape, name)
        stop_row = shape[0] if stop_row is None else min(stop_row, shape[0])
        data = self.read_bytes(name, start_row * info.row_bytes, stop_row * info.row_bytes)
        return as_tensor(data, info.dtype, (stop_row - start_row, *shape[1:]), name)

    def read_tensor(self, name: str, start_row: int = 0, stop_row: int | None = None) -> "torch.Tensor":
        """As `read_rows`, in the dtype that the header declares. Raises KeyError for an unknown name."""
        return self.read_rows(self.tensors[name], start_row, stop_row)

    def close(self) -> None:
        """Close the open files."""
        self.storage.close()


def open_file(path: Path) -> Checkpoint:
    """One .safetensors file, which need not belong to a checkpoint, with an empty config. Raises InputError."""
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            refuse_other_kinds(file.read(PREFIX_BYTES), str(path))
        raise InputError(f"{path}: not a .safetensors file", "Name a checkpoint's folder or one shard.")
    check_component(path.name, str(path.parent))
    size = path.stat().st_size

    def build(storage: Storage) -> Checkpoint:
        shard, tensors = read_file(storage, path.name, size)
        return Checkpoint(storage, {}, {path.name: size}, {path.name: shard}, tensors)

    return open_source(path.parent, build)


def layout_bytes(tensors: dict[str, TensorInfo]) -> int:
    """Sum of the tensors' bytes: `total_size` of an index."""
    return sum(tensor_bytes(info.dtype, info.shape) for info in tensors.values())
