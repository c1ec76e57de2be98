"""The reference engine's rank files, `model{i}-mp{N}.safetensors`, read as the one checkpoint that they are slices of.

Every tensor has its whole shape and one extent in each file that holds a slice of it, so readers need not know the
layout, and their number may differ from N. All N files must be present.
"""

from pathlib import Path

from dsv4.errors import InputError
from dsv4.progress import Reached, ignore

from .config import Config
from .editions.engine_config import is_engine_config
from .editions.table import engine_of
from .editions.v41 import rows_of_tables
from .editions.view import release_view
from .forms.rank_files import RANK_FILES
from .index import ignored_files
from .names import expert_of, rank_file, rank_file_name
from .rank_layout import PADDED_ROWS, SLICED_COLUMNS, SLICED_ROWS, Slice
from .reader import CONFIG_NAME, INDEX_NAME, Checkpoint, Shard, TensorInfo, open_source, read_config, read_files
from .storage import Storage


def _slices(name: str, found: list[TensorInfo], count: int, label: str) -> list[TensorInfo]:
    """Of the tensors with one name, one per rank, those that together make the whole tensor.

    Raises InputError if a slice is missing or several ranks have the same expert.
    """
    if expert_of(name):
        expected = 1
    elif SLICED_ROWS.search(name) or SLICED_COLUMNS.search(name):
        expected = count
    else:
        return found[:1]
    if len(found) != expected:
        text = f"'{name}' is in {len(found)} of the {count} rank files, {expected} expected"
        raise InputError(f"{label}: {text}")
    return found


def _without_padding(name: str, slices: list[TensorInfo], config: Config, label: str) -> list[TensorInfo]:
    """The slices of a table, without what fills them up. Raises InputError if they are not those of its rows."""
    match = PADDED_ROWS.fullmatch(name)
    assert match is not None
    rows = rows_of_tables(config).get(int(match[1]))
    if rows is None:
        text = f"engram_num_embeddings has no number of rows for layer {match[1]}"
        raise InputError(f"{label}/{CONFIG_NAME}: {text}", "Copy inference/config.json of the release.")
    cuts = [Slice(0, rank, len(slices)) for rank in range(len(slices))]
    if any(info.shape[:1] != cut.apply_to((rows,)) for cut, info in zip(cuts, slices, strict=True)):
        shown = " + ".join(str(list(info.shape)) for info in slices)
        raise InputError(f"{label}: '{name}' is {shown} in the rank files, {CONFIG_NAME} says {rows} rows")
    bounds = (cut.bounds(rows) for cut in cuts)
    return [_first_rows(info, stop - start) for info, (start, stop) in zip(slices, bounds, strict=True)]


def _first_rows(info: TensorInfo, rows: int) -> TensorInfo:
    extent = info.extents[0].part(0, rows * info.row_bytes)
    return info._replace(shape=(rows, *info.shape[1:]), extents=(extent,))


def _whole(name: str, slices: list[TensorInfo], config: Config, label: str) -> TensorInfo:
    """The whole tensor that slices make. Raises InputError if dtypes or shapes do not fit."""
    first = slices[0]
    if len(slices) == 1:
        return first
    dim = 1 if SLICED_COLUMNS.search(name) else 0
    rests = {(s.dtype, s.shape[:dim], s.shape[dim + 1 :]) for s in slices}
    if len(rests) > 1 or len(first.shape) <= dim or (dim and any(s.nbytes % max(s.shape[0], 1) for s in slices)):
        raise InputError(f"{label}: the slices of '{name}' do not fit together")
    if PADDED_ROWS.fullmatch(name):
        slices = _without_padding(name, slices, config, label)
    shape = (*first.shape[:dim], sum(s.shape[dim] for s in slices), *first.shape[dim + 1 :])
    return first._replace(shape=shape, extents=tuple(s.extents[0] for s in slices), by_columns=dim == 1)


def rank_file_names(sizes: dict[str, int], label: str) -> list[str]:
    """The rank files of a folder in the order of ranks; [] if it is not of this layout.

    Raises InputError if some are missing, or files for different numbers of ranks are mixed.
    """
    counts = {found.ranks for found in map(rank_file, sizes) if found is not None}
    if not counts or INDEX_NAME in sizes:
        return []
    if len(counts) > 1:
        text = f"{label}: rank files of {' and '.join(map(str, sorted(counts)))} ranks are mixed"
        raise InputError(text, "Convert into an empty folder.")
    count = counts.pop()
    names = [rank_file_name(rank, count) for rank in range(count)]
    missing = [name for name in names if name not in sizes]
    if missing:
        text = f"{label}: {missing[0]} is missing ({len(missing)} of {len(names)} rank files are)"
        raise InputError(text, "Copy the missing files, or run the conversion again.")
    return names


def assemble(ranks: list[dict[str, TensorInfo]], config: Config, label: str) -> dict[str, TensorInfo]:
    """The whole tensors that the ranks' tensors are slices or copies of. Raises InputError if they do not fit.

    config: a `release_view`, which says how many rows the tables have.
    """
    found: dict[str, list[TensorInfo]] = {}
    for tensors in ranks:
        for name, info in tensors.items():
            found.setdefault(name, []).append(info)
    slices = {name: _slices(name, infos, len(ranks), label) for name, infos in found.items()}
    return {name: _whole(name, infos, config, label) for name, infos in slices.items()}


def check_engine_config(config: Config, label: str) -> None:
    """Raises InputError if a config beside rank files lacks a key that the reference engine needs."""
    if not is_engine_config(config) and "hidden_size" in release_view(config):
        return
    if missing := engine_of(config).missing(config):
        text = f"{label}/{CONFIG_NAME}: {missing[0]} is missing"
        raise InputError(text, "Copy inference/config.json of the release.")


def from_ranks(
    storage: Storage,
    config: Config,
    sizes: dict[str, int],
    shards: dict[str, Shard],
    ranks: list[dict[str, TensorInfo]],
) -> Checkpoint:
    """The checkpoint that rank files hold, from their headers. Raises InputError if slices do not fit together.

    sizes: of all files of the folder. ranks: the tensors of each file of `shards`.
    """
    stored = assemble(ranks, release_view(config), storage.label)
    tensors = {info.name: info for info in RANK_FILES.tensors(stored)}
    return Checkpoint(storage, dict(config), sizes, shards, tensors, ignored_files(list(shards), sizes), RANK_FILES)


def _open_ranks(storage: Storage, sizes: dict[str, int], names: list[str], progress: Reached) -> Checkpoint:
    config = read_config(storage, sizes)
    check_engine_config(config, storage.label)
    storage.choose_shards(names)
    shards, found = read_files(storage, names, sizes, progress)
    return from_ranks(storage, config, sizes, shards, list(found.values()))


def open_checkpoint(source: Path | str | Storage, progress: Reached = ignore) -> Checkpoint:
    """Open a folder (or any Storage) in either layout: Hugging Face, or rank files. Raises InputError."""

    def build(storage: Storage) -> Checkpoint:
        sizes = storage.sizes()
        names = rank_file_names(sizes, storage.label)
        return _open_ranks(storage, sizes, names, progress) if names else Checkpoint.open(storage, progress)

    return open_source(source, build)
