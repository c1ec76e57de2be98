"""Reads and writes the header of a GGUF file, version 3.

    magic, version, counts | keys with typed values | name, dimensions, type, offset of each tensor | padding | data

Dimensions stand with the innermost first; here shapes have it last, as everywhere else. Data of a tensor begins at a
multiple of ALIGNMENT. The header is written here
because the library gguf writes whole files itself, not through our writer, which can be interrupted. The tests read the
files with that library.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dsv4.convert.checkpoint.storage import Storage
from dsv4.errors import InputError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
ALIGNMENT_KEY = "general.alignment"
READ_AT_ONCE = 1 << 20
MOST_TENSORS, MOST_KEYS = 1 << 20, 1 << 16
MAX_HEADER_BYTES = 1 << 28


class TensorType(NamedTuple):
    """A type of ggml: its number, and how many elements are stored in how many bytes."""

    number: int
    elements: int
    nbytes: int


TENSOR_TYPES = {
    "F32": TensorType(0, 1, 4), "F16": TensorType(1, 1, 2), "Q8_0": TensorType(8, 32, 34), "I32": TensorType(26, 1, 4),
    "BF16": TensorType(30, 1, 2), "MXFP4": TensorType(39, 32, 17),
}  # fmt: skip
_NAMES = {kind.number: name for name, kind in TENSOR_TYPES.items()}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
U16, U32, I32, F32, BOOL, TEXT, ARRAY = 2, 4, 5, 6, 7, 8, 9


class Entry(NamedTuple):
    """A key with its value and the type of that; of an array, the type of its elements."""

    key: str
    kind: int
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: the name of its type, its shape, and where its data begins in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return data_bytes(self.kind, self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The keys and tensors of a file, tensors in data order, and the bytes that describe them."""

    keys: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    raw: bytes


def data_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError if its rows are not whole blocks of the type."""
    found, columns = TENSOR_TYPES[kind], shape[-1] if shape else 1
    if columns % found.elements:
        raise ValueError(f"rows of {columns} elements are not whole blocks of {found.elements}")
    return math.prod(shape) // found.elements * found.nbytes


def padding(nbytes: int) -> int:
    """Bytes that fill up to a multiple of ALIGNMENT."""
    return -nbytes % ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    return _text(value) if kind == TEXT else struct.pack(_SCALARS[kind], value)


def _entry(entry: Entry) -> bytes:
    if not isinstance(entry.value, list):
        return _text(entry.key) + struct.pack("<I", entry.kind) + _value(entry.kind, entry.value)
    head = struct.pack("<IIQ", ARRAY, entry.kind, len(entry.value))
    return _text(entry.key) + head + b"".join(_value(entry.kind, item) for item in entry.value)


def build_header(entries: Iterable[Entry], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes before the data. tensors: name, type and shape in data order."""
    keys, described, position = [_entry(entry) for entry in entries], [], 0
    for name, kind, shape in tensors:
        dimensions = shape[::-1] or (1,)
        described.append(
            _text(name)
            + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, TENSOR_TYPES[kind].number, position)
        )
        size = data_bytes(kind, shape)
        position += size + padding(size)
    raw = MAGIC + struct.pack("<IQQ", VERSION, len(described), len(keys)) + b"".join((*keys, *described))
    return raw + bytes(padding(len(raw)))


class _Cursor:
    """Reads a file from the start, in pieces of READ_AT_ONCE."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size = storage, name, size
        self.where = f"{storage.label}/{name}"
        self.raw, self.position = bytearray(), 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises InputError if the file, or what is believable of a header, ends before."""
        end = self.position + count
        if end > min(self._size, MAX_HEADER_BYTES):
            raise InputError(f"{self.where}: truncated: its header needs more than {end} bytes", "Download it again.")
        while len(self.raw) < end:
            length = min(max(READ_AT_ONCE, end - len(self.raw)), self._size - len(self.raw))
            self.raw += self._storage.read(self._name, len(self.raw), length)
        found = bytes(self.raw[self.position : end])
        self.position = end
        return found

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """The next numbers, by the layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self) -> str:
        """The next text."""
        (length,) = self.numbers("<Q")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.where}: text that is not UTF-8") from None


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == TEXT:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind])[0]
    raise InputError(f"{cursor.where}: a key has the unknown type {kind}")


def _read_key(cursor: _Cursor) -> tuple[str, Any]:
    key = cursor.text()
    (kind,) = cursor.numbers("<I")
    if kind != ARRAY:
        return key, _read_value(cursor, kind)
    inner, count = cursor.numbers("<IQ")
    if count > MAX_HEADER_BYTES:
        raise InputError(f"{cursor.where}: a key has an array of {count} values")
    if inner in _SCALARS:
        return key, list(cursor.numbers(f"<{count}{_SCALARS[inner][1]}"))
    return key, [_read_value(cursor, inner) for _ in range(count)]


def _read_tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.text()
    (dimensions,) = cursor.numbers("<I")
    if not 1 <= dimensions <= 4:
        raise InputError(f"{cursor.where}: '{name}' has {dimensions} dimensions")
    *shape, number, offset = cursor.numbers(f"<{dimensions}QIQ")
    if number not in _NAMES:
        hint = "dsv4 reads MXFP4, BF16, F32, F16, Q8_0 and I32."
        raise InputError(f"{cursor.where}: '{name}' has the ggml type {number}, which dsv4 does not read", hint)
    return name, _NAMES[number], tuple(reversed(shape)), offset


def _check_places(tensors: list[GgufTensor], where: str, size: int) -> None:
    """Raises InputError if data overlaps, leaves more than a padding, or ends behind the file."""
    for before, tensor in zip([None, *tensors], tensors, strict=False):
        end = 0 if before is None else before.start + before.nbytes
        if before is not None and tensor.start != end + padding(end - tensors[0].start):
            raise InputError(f"{where}: '{tensor.name}' begins at byte {tensor.start}; '{before.name}' ends at {end}")
    if tensors and tensors[-1].start + tensors[-1].nbytes > size:
        raise InputError(f"{where}: truncated: '{tensors[-1].name}' ends behind the file", "Download it again.")


def read_header(storage: Storage, name: str, size: int) -> GgufHeader:
    """The header of one file. Raises InputError for what is not valid, and for types that are not read."""
    cursor = _Cursor(storage, name, size)
    if cursor.take(4) != MAGIC:
        raise InputError(f"{cursor.where}: not a GGUF file", "Download it again.")
    version, count, keys = cursor.numbers("<IQQ")
    if version != VERSION or count > MOST_TENSORS or keys > MOST_KEYS:
        text = f"{cursor.where}: GGUF version {version}, {count} tensors and {keys} keys are not readable"
        raise InputError(text, "The file is damaged or of another version: download it again.")
    found = dict(_read_key(cursor) for _ in range(keys))
    described = [_read_tensor(cursor) for _ in range(count)]
    if found.get(ALIGNMENT_KEY, ALIGNMENT) != ALIGNMENT:
        raise InputError(f"{cursor.where}: data aligned to {found[ALIGNMENT_KEY]}, {ALIGNMENT} expected")
    if len({one[0] for one in described}) != len(described):
        raise InputError(f"{cursor.where}: two tensors have one name")
    start = cursor.position + padding(cursor.position)
    tensors = [GgufTensor(name, kind, shape, start + offset) for name, kind, shape, offset in described]
    for tensor in tensors:
        try:
            data_bytes(tensor.kind, tensor.shape)
        except ValueError as error:
            raise InputError(f"{cursor.where}: '{tensor.name}': {error}") from None
    tensors.sort(key=lambda tensor: tensor.start)
    _check_places(tensors, cursor.where, size)
    return GgufHeader(found, tuple(tensors), bytes(cursor.raw[: cursor.position]))
