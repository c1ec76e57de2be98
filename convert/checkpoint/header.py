"""Reads and writes the safetensors header. Headers are untrusted input and validated in full.

A file is: 8 bytes little-endian length N, N bytes of JSON, the data. The JSON maps each tensor name to its dtype,
shape and [begin, end) in the data. The format's own rules are checked (its README and its Rust reader). Beyond them,
these are refused: duplicate names, names that look like paths or hold control characters, names that differ only by
case.
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dsv4.errors import InputError
from dsv4.files import refuse_other_kinds

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
MAX_BITS = 2**63  # of a tensor whose empty dimensions count as 1
METADATA = "__metadata__"
KINDS = 4096  # dtypes with shapes: V4-Pro's 145116 tensors have 50, and each is asked for several times

# Bits per element. I8 with a sibling E8M0 scale is packed FP4; F4 is the reference engine's tag for the same bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip

_PATH_LIKE = re.compile(r"[/\\]|^\.{1,2}$|^[A-Za-z]:")
_PATH_SIGNS = "/\\:"
_MAX_NAME = 512
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_KEYS = frozenset({"dtype", "shape", "data_offsets"})


class Entry(NamedTuple):
    """One tensor of a header: dtype tag, logical shape, [begin, end) relative to the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A validated header: its tensors in file order, and where the data starts in the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def _count_strings(value: Any) -> int:
    """Strings in a parsed JSON value, keys included."""
    count, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            count += 1
        elif isinstance(one, dict):
            count += len(one)
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
    return count


def _has_strings(text: str, count: int) -> bool:
    """Whether a JSON text without escapes holds so many strings: each has two quotes.

    So no key of what was parsed from it appeared twice: of two equal keys, one would be missing in `count`.
    """
    return "\\" not in text and text.count('"') == 2 * count


def strict_json(raw: bytes | str, what: str, hint: str = "Download the file again.") -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN, no bad UTF-8, bounded depth. Raises InputError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise InputError(f"{what}: the name '{twice}' appears twice", hint)
        return keys

    def refuse(constant: str) -> None:
        raise InputError(f"{what}: holds {constant}, which is not JSON", hint)

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        if "\\" not in text:  # a call for each object takes longer than everything else
            value = json.loads(text, parse_constant=refuse)
            if _has_strings(text, _count_strings(value)):
                return value
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(raw, bytes):
            refuse_other_kinds(raw, what)
        reason = str(error) or type(error).__name__
        raise InputError(f"{what}: not valid JSON: {reason}", hint) from None


@lru_cache(maxsize=KINDS)
def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises ValueError if its bits do not fill whole bytes or its dimensions overflow 64 bits, those of an empty tensor
    included (safetensors multiplies them one by one); KeyError for an unknown dtype.
    """
    if math.prod(size or 1 for size in shape) * DTYPE_BITS[dtype] >= MAX_BITS:
        raise ValueError("the product of its dimensions overflows")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{bits} bits are not whole bytes")
    return bits // 8


def check_name(name: str, what: str) -> None:
    """Refuse a tensor name that is empty, has control characters or lone surrogates, or looks like a path."""
    if not name or len(name) > _MAX_NAME or not name.isprintable() or _PATH_LIKE.search(name):
        raise InputError(f"{what}: '{name[:80]}' is not a tensor name", "Names are short, printable and no paths.")


def _check_names(names: Collection[str], what: str) -> None:
    """`check_name` for all names of a file. Each is looked at only if all together might hold one that is refused."""
    text = "".join(names)
    plain = text.isprintable() and not any(sign in text for sign in _PATH_SIGNS)
    if plain and not {"", ".", ".."}.intersection(names) and max(map(len, names), default=0) <= _MAX_NAME:
        return
    for name in names:
        check_name(name, what)


class _Kind(NamedTuple):
    """The dtype and shape that many tensors share, and their bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@lru_cache(maxsize=KINDS)
def _one_of_each(dtype: str, shape: tuple[int, ...]) -> _Kind:
    """The same objects for equal arguments: a hundred bytes less for each tensor."""
    return _Kind(dtype, shape, tensor_bytes(dtype, shape))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _kind(dtype: Any, shape: Any, where: str) -> _Kind:
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{where}: unknown dtype {str(dtype)[:40]}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_count, shape)):
        raise InputError(f"{where}: the shape is not a list of counts")
    try:
        return _one_of_each(dtype, tuple(shape))
    except ValueError as error:
        raise InputError(f"{where}: {dtype} {shape}: {error}") from None


def _entries(parsed: dict[str, Any], what: str) -> dict[str, Entry]:
    """The tensors of a parsed header. A dtype with a shape is checked once, however many tensors have it."""
    kinds: dict[str, _Kind] = {}  # by repr, in which 1, true, 1.0 and "1" differ
    entries: dict[str, Entry] = {}
    for name, value in parsed.items():
        if not isinstance(value, dict) or value.keys() != _KEYS:
            raise InputError(
                f"{what}: tensor '{name}': expected dtype, shape and data_offsets, found {str(value)[:80]}"
            )
        offsets, key = value["data_offsets"], f"{value['dtype']!r}{value['shape']!r}"
        if key not in kinds:
            kinds[key] = _kind(value["dtype"], value["shape"], f"{what}: tensor '{name}'")
        dtype, shape, nbytes = kinds[key]
        if not isinstance(offsets, list) or len(offsets) != 2 or not (_is_count(offsets[0]) and _is_count(offsets[1])):
            raise InputError(f"{what}: tensor '{name}': data_offsets is not a pair of counts")
        begin, end = offsets
        if end - begin != nbytes:
            text = f"{dtype} {list(shape)} needs {nbytes} bytes, its offsets span {end - begin}"
            raise InputError(f"{what}: tensor '{name}': {text}")
        entries[name] = Entry(dtype, shape, begin, end)
    return entries


def _check_contiguous(entries: dict[str, Entry], data_bytes: int, what: str) -> None:
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            kind = "overlaps its neighbour" if entry.begin < position else "leaves a hole before it"
            raise InputError(f"{what}: tensor '{name}' starts at {entry.begin}, {position} expected: {kind}")
        position = entry.end
    if position != data_bytes:
        state = "truncated" if data_bytes < position else "longer than its header says"
        hint = "Download the file again."
        raise InputError(f"{what}: {state}: the header describes {position} bytes of data, found {data_bytes}", hint)


def check_twins(names: list[str], what: str) -> None:
    """Refuse names that differ only by case: on some file systems and in some engines they are one."""
    text = "".join(names)
    if text == text.casefold():
        return
    folded: dict[str, str] = {}
    for name in names:
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            raise InputError(f"{what}: '{twin}' and '{name}' differ only by case")


def header_length(prefix: bytes, file_bytes: int, what: str) -> int:
    """Length of the JSON from the first 8 bytes of a file of `file_bytes`, checked before anything is allocated."""
    hint = "Download the file again."
    if len(prefix) < LENGTH_BYTES:
        raise InputError(f"{what}: truncated: {file_bytes} bytes are too few for a safetensors file", hint)
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length == 0:
        raise InputError(f"{what}: the header is empty (all zeros? a failed download leaves such files)", hint)
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{what}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed", hint)
    if length > file_bytes - LENGTH_BYTES:
        raise InputError(f"{what}: truncated: header of {length} bytes in a file of {file_bytes}", hint)
    return length


def _refuse_number(number: str) -> None:
    raise ValueError(f"{number} is no count")


def _plain_entries(parsed: dict[str, Any]) -> dict[str, Entry]:
    """The tensors of a header that holds neither true, false nor floats: what equals a count is one.

    Raises an error of several classes for all but tensors that follow each other without holes, in the header's order.
    """
    kinds: dict[tuple[Any, ...], _Kind] = {}
    entries: dict[str, Entry] = {}
    position, new = 0, tuple.__new__  # Entry's own takes twice as long
    for name, value in parsed.items():
        (begin, end), shape = value["data_offsets"], value["shape"]
        key = value["dtype"], *shape
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _kind(value["dtype"], shape, name)
        dtype, declared, nbytes = kind
        if type(shape) is not list or len(value) != 3 or begin != position or end - begin != nbytes:
            raise ValueError(name)
        entries[name] = new(Entry, (dtype, declared, begin, end))
        position = end
    return entries


def _plain_header(raw: bytes, file_bytes: int) -> Header | None:
    """A header as writers make them; None for one that is unusual or wrong.

    Takes a third of the time of `_any_header`, accepts less, and reads the same.
    """
    try:
        text = raw.decode("utf-8")
        if not text.startswith("{") or "true" in text or "false" in text:
            return None
        parsed = json.loads(text, parse_float=_refuse_number, parse_constant=_refuse_number)
        strings = int(METADATA in parsed)  # the metadata's name; below its texts, and 5 strings of each tensor
        metadata = parsed.pop(METADATA, {})
        entries = _plain_entries(parsed)
        plain = all(isinstance(v, str) for v in metadata.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InputError):
        return None
    strings += 2 * len(metadata) + 5 * len(entries)
    data_start = LENGTH_BYTES + len(raw)
    data_end = next(reversed(entries.values())).end if entries else 0
    if not plain or not _has_strings(text, strings) or data_start + data_end != file_bytes:
        return None
    return Header(entries, metadata, data_start)


def _any_header(raw: bytes, file_bytes: int, what: str) -> Header:
    """Any header, checked one thing after the other. Raises InputError, which says what is wrong."""
    if not raw.startswith(b"{"):
        raise InputError(f"{what}: the header is not a JSON object", "Download the file again.")
    parsed = strict_json(raw, what)
    if not isinstance(parsed, dict):
        raise InputError(f"{what}: the header is not a JSON object", "Download the file again.")
    metadata = parsed.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{what}: {METADATA} must map names to text")
    _check_names(parsed, what)
    check_twins(list(parsed), what)
    entries = _entries(parsed, what)
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    data_start = LENGTH_BYTES + len(raw)
    _check_contiguous(ordered, file_bytes - data_start, what)
    return Header(ordered, metadata, data_start)


def parse_header(raw: bytes, file_bytes: int, what: str) -> Header:
    """Validate the JSON of a header (`raw`, without the length) of a file of `file_bytes`. Raises InputError.

    `what` names the file in messages. Entries come back in the order of their data.
    """
    header = _plain_header(raw, file_bytes)
    if header is None:
        return _any_header(raw, file_bytes, what)
    _check_names(header.entries, what)
    check_twins(list(header.entries), what)
    return header


@lru_cache(maxsize=KINDS)
def _described(dtype: str, shape: tuple[int, ...]) -> str:
    """Dtype and shape in the JSON of a header."""
    return f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}]'


def build_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The bytes before the data, for tensors {name: (dtype, shape)} in data order, padded to a multiple of 8."""
    described, position = [], 0
    for name, (dtype, shape) in tensors.items():
        end = position + tensor_bytes(dtype, shape)
        kind = _described(dtype, shape)
        described.append(f'{_quoted(name)}:{{{kind},"data_offsets":[{position},{end}]}}')
        position = end
    raw = f"{{{','.join(described)}}}".encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw
