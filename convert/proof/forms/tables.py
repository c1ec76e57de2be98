"""The n-gram tables of V4.1 in the reference engine's rank files: each rank has as many rows, the last ones filled up.

The files do not say how many rows are the table's own. The engine's config does, and the other side of a comparison.
What fills the ranks' slices up after the last row is 0 for codes and 1 for scales. It is no part of the tensor, and is
checked by itself.
"""

import re
from dataclasses import replace

import numpy as np

from dsv4.convert.proof.config import read_config
from dsv4.convert.proof.files import Entry
from dsv4.convert.proof.layout import Checkpoint, Tensor
from dsv4.convert.proof.values.formats import Array

TABLE = re.compile(r"layers\.(\d+)\.engram\.embed\.(?:weight|scale)")
_ONE = {"F8_E8M0": b"\x7f", "U8": b"\x7f", "F32": b"\x00\x00\x80\x3f"}


def _rows_by_config(checkpoint: Checkpoint) -> dict[str, int]:
    """Layer -> rows of its table, as far as the config, of the engine or of the release, says it."""
    config = read_config(checkpoint) or {}
    nested = config.get("text_config")
    config = {**(nested if isinstance(nested, dict) else {}), **config}
    layers, rows = config.get("engram_layer_ids"), config.get("engram_num_embeddings")
    if not isinstance(layers, list) or not isinstance(rows, list):
        return {}
    return {str(layer): count for layer, count in zip(layers, rows, strict=False) if type(count) is int and count > 0}


def _first_rows(entry: Entry, rows: int) -> tuple[Entry, Entry]:
    """The first rows of a tensor, and the others."""
    size = entry.size // entry.shape[0] * rows
    own = replace(entry, shape=(rows, *entry.shape[1:]), size=size)
    rest = (entry.shape[0] - rows, *entry.shape[1:])
    return own, replace(entry, shape=rest, offset=entry.offset + size, size=entry.size - size)


def _without_filling(table: Tensor, rows: int) -> Tensor | str:
    """A table of `rows` rows from all ranks' slices, or why that cannot be."""
    count = len(table.slices)
    step = -(-rows // count)
    if any(entry.shape[0] != step for entry in table.slices):
        found = " + ".join(str(entry.shape[0]) for entry in table.slices)
        return f"of {rows} rows each of {count} ranks has {step}, they have {found}"
    owned = [min(max(rows - rank * step, 0), step) for rank in range(count)]
    parts = [_first_rows(entry, own) for entry, own in zip(table.slices, owned, strict=True)]
    slices, filling = (tuple(part for part in some if part.size) for some in zip(*parts, strict=True))
    return replace(table, shape=(rows, *table.shape[1:]), slices=slices, filling=filling)


def _rows_of_other(other: Checkpoint | None, name: str) -> int | None:
    """Rows of the same tensor on a side whose tensors are whole."""
    tensor = None if other is None or other.layout == "mp" else other.tensors.get(name)
    return tensor.shape[0] if tensor is not None and tensor.shape else None


def take_filling_apart(checkpoint: Checkpoint, other: Checkpoint | None) -> None:
    """Leave what fills the ranks' slices up out of the tables of rank files. other: the other side, if there is one."""
    tables = {name: match for name in checkpoint.tensors if (match := TABLE.fullmatch(name))}
    if checkpoint.layout != "mp" or checkpoint.ranks == 1 or not tables:
        return
    by_config = _rows_by_config(checkpoint)
    for name, match in tables.items():
        table, rows = checkpoint.tensors[name], by_config.get(match[1]) or _rows_of_other(other, name)
        if rows is None:
            text = f"{name}: nothing says how many rows it has without those that fill the ranks' slices up"
            checkpoint.problem("layout", text, "note")
        elif len(table.slices) == checkpoint.ranks:  # if a rank lacks it, that is a problem already
            found = _without_filling(table, rows)
            if isinstance(found, str):
                checkpoint.problem("layout", f"{name}: {found}", "unreadable")
                checkpoint.unreadable[name] = found
                del checkpoint.tensors[name]
            else:
                checkpoint.tensors[name] = found


def wrong_bytes(name: str, dtype: str, data: Array) -> int:
    """How many of the bytes after the last row of a table, or of its scale, are not as they should be."""
    element = _ONE.get(dtype, b"\0") if name.endswith(".scale") else b"\0"
    return int(np.count_nonzero(data.reshape(-1, len(element)) != np.frombuffer(element, np.uint8)))
