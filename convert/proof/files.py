"""Files as `verify` reads them: its own reader of safetensors headers and of the index, by positioned reads.

Nothing here is shared with the converter's reader, so a mistake in how one of them understands a header cannot hide in
the other. Files are reached through the protocols `Files` and `RemoteFiles`: the same code reads a folder and a
repository whose shards have to be fetched first.

A header that breaks a rule of the format does not stop the reading: the fault is recorded as a `Problem`, the tensors
that cannot be trusted are listed as unreadable, and all others are still compared. If a download lacks its last
300 MB, the report names the tensors in them.
"""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from dsv4.convert.proof.forms.packing import Packing
from dsv4.errors import InputError
from dsv4.files import OTHER_WEIGHTS, PREFIX_BYTES, kind_of, refuse_other_kinds
from dsv4.text import natural_order

Severity = Literal["note", "difference", "unreadable"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
INDEX_NAME = "model.safetensors.index.json"
MAX_BITS = 2**63  # of a tensor whose empty dimensions count as 1: the library multiplies dimensions in 64 bits

# Bits of one element in a safetensors header. F4 is two E2M1 codes a byte, with a shape in elements.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class Problem:
    """A fault beside the tensors' values.

    `area` is one of index, shard, layout, config, codes, side file, manifest, edition (one that is not known), and
    model (of another family). `where` is "source" or "output".
    """

    area: str
    where: str
    text: str
    severity: Severity = "difference"

    def to_json(self) -> dict[str, str]:
        """The problem as `--json` shows it."""
        return {"area": self.area, "where": self.where, "severity": self.severity, "text": self.text}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one shard as the header describes it. `offset` is in the file, `size` is bytes of the tensor.

    With a `packing`, the file has other bytes than the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    size: int
    packing: Packing | None = None


@dataclass
class Shard:
    """One safetensors file: the tensors that can be read, and those that cannot, with the reason for each."""

    name: str
    entries: dict[str, Entry] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    broken: str = ""  # why the whole file cannot be read, or ""
    header_sha256: str = ""  # in hex; "" if the header cannot be read


class Files(Protocol):
    """A checkpoint's files, readable from several threads."""

    label: str

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file, by its path relative to the checkpoint with `/` between the parts."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset` on. Raises InputError if the file ends before."""

    def stamp(self, name: str) -> list[int | str]:
        """Plain data that differs once the file was changed; last, when it was, in ns since 1970, or a text."""


@runtime_checkable
class RemoteFiles(Files, Protocol):
    """Files whose shards are fetched before their tensors are read. Headers and small files need no fetching."""

    def slots(self) -> int:
        """How many shards may be on disk at the same time."""

    def bytes_to_fetch(self, name: str) -> int:
        """Bytes of a shard that cross the network when it is fetched; 0 if a copy is on this machine."""

    def seconds_for(self, count: int) -> float:
        """Estimated seconds to fetch `count` bytes, from the rate at which the headers arrived."""

    def listed_sha256(self, name: str) -> str | None:
        """The SHA-256 in hex that the hub lists for a file; None if it lists none."""

    def check_unchanged(self) -> None:
        """Raises InputError if the files are no longer those that were listed: a branch may move, a commit does not."""

    def check_needs(self, groups: Sequence[Collection[str]]) -> None:
        """Raises UsageError if one of the groups has more shards than can be on disk at the same time."""

    def prepare(self, now: Collection[str], upcoming: Collection[str] = ()) -> None:
        """Make the shards in `now` readable, start to fetch `upcoming`, and release all others."""


class LocalFiles:
    """A folder. Files are opened read-only, once, and read by `preadv`; no file is mapped or loaded whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.label = str(folder)
        self._open: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise InputError(f"{self.label} {what}", "Give the folder of a checkpoint.")

    def sizes(self) -> dict[str, int]:
        """Regular files without hidden ones, listed once. Links are followed: a hub's cache consists of links."""
        if self._sizes:
            return self._sizes
        for parent, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                if not name.startswith(".") and path.exists() and stat.S_ISREG(path.stat().st_mode):
                    self._sizes[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return self._sizes

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises InputError if the file ends before."""
        descriptor = self._open.get(name)
        if descriptor is None:
            # Two threads may both open; setdefault keeps one, the other descriptor is closed at once.
            opened = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._open.setdefault(name, opened)
            if descriptor != opened:
                os.close(opened)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise InputError(f"{self.label}/{name} ends before byte {offset + len(buffer)}")
            done += count

    def stamp(self, name: str) -> list[int | str]:
        """The stamp of a file, with the inode's time of change: unlike that of modification, it cannot be set back."""
        found = (self.folder / name).stat()
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def read_bytes(files: Files, name: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file."""
    buffer = bytearray(size)
    files.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


def refuse_other_weights(files: Files, sizes: dict[str, int]) -> None:
    """Raises InputError if there are weights of another kind, such as those of torch.save."""
    for name in sorted(name for name in sizes if name.endswith(OTHER_WEIGHTS)):
        start = read_bytes(files, name, 0, min(sizes[name], PREFIX_BYTES))
        refuse_other_kinds(start, f"{files.label}/{name}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key '{name}' occurs twice")
        found[name] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN. Raises ValueError with the reason."""
    if kind := kind_of(data):
        raise ValueError(f"it is {kind}")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry_problem(name: str, value: object) -> str:
    """Why a header's entry cannot be understood; "" if it can."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "its header entry lacks dtype, shape or data_offsets"
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPE_BITS:
        return f"its dtype '{value['dtype']}' is not one that safetensors has"
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        return "its shape is not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        return "its data_offsets are not two byte positions"
    if math.prod(size or 1 for size in shape) * DTYPE_BITS[value["dtype"]] >= MAX_BITS:
        return "the product of its dimensions overflows"
    bits = math.prod(shape) * DTYPE_BITS[value["dtype"]]
    if offsets[1] - offsets[0] != bits // 8 or bits % 8:
        return f"its shape needs {bits // 8} bytes, its data_offsets give it {offsets[1] - offsets[0]}"
    return ""


def _read_entry(shard: Shard, name: str, value: Any, data_start: int, file_size: int) -> None:
    reason = _entry_problem(name, value)
    if not reason:
        begin, end = value["data_offsets"]
        entry = Entry(name, value["dtype"], tuple(value["shape"]), shard.name, data_start + begin, end - begin)
        if data_start + end <= file_size:
            shard.entries[name] = entry
            return
        reason = f"it ends at byte {data_start + end} of a file of {file_size} bytes"
    shard.unreadable[name] = reason


def _check_order(shard: Shard, data_start: int, file_size: int) -> None:
    """The format allows no holes, no overlaps and nothing after the last tensor."""
    position, last = data_start, ""
    for entry in sorted(shard.entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset < position:
            shard.unreadable[entry.name] = f"its bytes overlap those of {last}"
        elif entry.offset > position and not shard.unreadable:
            shard.problems.append(f"{entry.offset - position} bytes before {entry.name} belong to no tensor")
        position, last = max(position, entry.offset + entry.size), entry.name
    if position < file_size and not shard.unreadable:
        shard.problems.append(f"{file_size - position} bytes after the last tensor belong to no tensor")
    for name in shard.unreadable:
        shard.entries.pop(name, None)


def _header_length(files: Files, name: str, size: int) -> int:
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", read_bytes(files, name, 0, 8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        if kind := kind_of(read_bytes(files, name, 0, min(size, PREFIX_BYTES))):
            raise ValueError(f"it is {kind}")
        raise ValueError(f"it claims a header of {length} bytes in a file of {size}")
    return int(length)


def read_shard(files: Files, name: str, size: int) -> Shard:
    """Read the header of one safetensors file. Faults of the format are in the result, never raised."""
    shard = Shard(name)
    try:
        length = _header_length(files, name, size)
        text = read_bytes(files, name, 8, length)
        shard.header_sha256 = hashlib.sha256(text).hexdigest()
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ does not map names to text")
    except (ValueError, InputError) as error:
        shard.broken = error.message if isinstance(error, InputError) else str(error)
        return shard
    for tensor, value in header.items():
        _read_entry(shard, tensor, value, 8 + length, size)
    _check_order(shard, 8 + length, size)
    return shard


def shard_names(files: Files) -> Iterator[str]:
    """The safetensors files of the top folder in natural order: rank 10 after rank 9."""
    names = [name for name in files.sizes() if name.endswith(".safetensors") and "/" not in name]
    yield from sorted(names, key=natural_order)
