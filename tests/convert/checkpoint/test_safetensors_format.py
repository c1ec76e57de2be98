"""The header reader against safetensors' own: we may refuse more, never accept more, and read the same."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsv4.convert.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    build_header,
    header_length,
    parse_header,
    strict_json,
    tensor_bytes,
)
from dsv4.convert.proof.files import LocalFiles, read_shard
from dsv4.errors import InputError
from dsv4.text import printable

DTYPES = ["F32", "BF16", "F8_E4M3", "F8_E8M0", "I8", "I64", "F4", "BOOL", "U8", "F8_E5M2", "F64"]
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ours(content: bytes) -> dict[str, Any] | None:
    """Tensors by our reader, None if it refuses."""
    try:
        length = header_length(content[:8], len(content), "file")
        header = parse_header(content[8 : 8 + length], len(content), "file")
    except InputError:
        return None
    return {
        name: (entry.dtype, list(entry.shape), content[header.data_start + entry.begin : header.data_start + entry.end])
        for name, entry in header.entries.items()
    }


def theirs(path: Path) -> dict[str, Any] | None:
    """Tensors by safetensors' own reader, None if it refuses."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: (s.get_dtype(), s.get_shape()) for name in file.keys() for s in [file.get_slice(name)]}
    except SafetensorError:
        return None


def verifier_s(path: Path) -> dict[str, Any] | None:
    """Tensors by the second reader, which `verify` has for itself; None if it finds anything wrong."""
    files = LocalFiles(path.parent)
    try:
        shard = read_shard(files, path.name, path.stat().st_size)
    finally:
        files.close()
    if shard.broken or shard.unreadable or shard.problems:
        return None
    return {name: (entry.dtype, list(entry.shape)) for name, entry in shard.entries.items()}


def with_an_escape(content: bytes) -> bytes:
    """The same JSON with an escape in it: headers without any are read by a quicker check than all others."""
    if len(content) < 8 or (length := int.from_bytes(content[:8], "little")) > len(content) - 8:
        return content
    text = content[8 : 8 + length].replace(b'"dtype"', b'"\\u0064type"')
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def compare(content: bytes, folder: Path) -> None:
    """Whatever a reader of ours accepts, safetensors accepts too, with the same tensors."""
    assert ours(content) == ours(with_an_escape(content))
    path = folder / "x.safetensors"
    path.write_bytes(content)
    expected = theirs(path)
    mine = ours(content)
    if mine is not None:
        assert {name: (dtype, shape) for name, (dtype, shape, _) in mine.items()} == expected
    second = verifier_s(path)
    if second is not None:
        assert second == expected


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


numbers = st.one_of(
    st.integers(0, 40),
    st.sampled_from([-1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 1.0, 0.5, True, None, "8"]),
)
shapes = st.lists(st.integers(0, 5), max_size=4)
names = st.one_of(st.sampled_from(["a", "b.weight", "A", "../x", "", "__metadata__", "\x00", "é"]), st.text(max_size=8))
loose_entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "f32", "F16", "X"]), "shape": st.lists(numbers, max_size=3)},
    optional={"data_offsets": st.lists(numbers, max_size=3), "more": st.integers()},
)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A right header and its data's length, then perhaps one number of it changed."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        size = int(np.prod(shape, dtype=object)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    if not header:
        return header, position
    entry = header[draw(st.sampled_from(sorted(header)))]
    change, by = draw(st.sampled_from(["nothing", "number", "move", "stretch", "length"])), draw(st.integers(-8, 8))
    if change == "number":
        key = draw(st.sampled_from(["shape", "data_offsets"]))
        if entry[key]:
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(numbers)
    elif change == "move":  # overlaps, and holes at either side
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    elif change == "stretch":
        entry["data_offsets"][1] += by
    elif change == "length":
        position += by
    if change in ("move", "stretch") and draw(st.booleans()):  # let the file reach as far as the header says
        position = max(e["data_offsets"][1] for e in header.values())
    return header, max(0, position)


@pytest.mark.slow
@settings(FUZZ, max_examples=1200)
@given(nearly_right())
@example(({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 4))
@example(({"__metadata__": {"a": "b"}}, 0))
@example(
    (
        {
            "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
            "b": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]},
        },
        0,
    )
)
@example(({"a": {"dtype": "F32", "shape": [4, 2**62, 0], "data_offsets": [0, 0]}}, 0))
@example(({"a": {"dtype": "I8", "shape": [2**62, 2, 2, 0], "data_offsets": [0, 0]}}, 0))
@example(({"a": {"dtype": "F64", "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0))
def test_headers_that_are_nearly_right(tmp_path: Path, case: tuple[dict[str, Any], int]) -> None:
    header, length = case
    compare(file_of(header, bytes(length)), tmp_path)


@FUZZ
@given(st.dictionaries(names, loose_entry, max_size=3), st.integers(0, 40))
@pytest.mark.slow
def test_headers_that_are_mostly_wrong(tmp_path: Path, header: dict[str, Any], length: int) -> None:
    compare(file_of(header, bytes(length)), tmp_path)


GOOD = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.int8)}, {"format": "pt"})


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.slow
def test_flipped_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    compare(bytes(content), tmp_path)


@FUZZ
@given(st.binary(max_size=200))
@pytest.mark.slow
def test_noise(tmp_path: Path, content: bytes) -> None:
    compare(content, tmp_path)


def test_every_cut_of_a_file(tmp_path: Path) -> None:
    assert ours(GOOD) is not None
    for length in range(len(GOOD)):
        assert ours(GOOD[:length]) is None
        compare(GOOD[:length], tmp_path)
    assert ours(GOOD + b"\0") is None


@pytest.mark.parametrize("shape", [[4, 2**62, 0], [0, 2**62, 4], [2**62, 0, 4], [2**63 - 1, 2, 0], [2**64, 0]])
def test_dimensions_that_overflow_are_refused_wherever_the_zero_is(tmp_path: Path, shape: list[int]) -> None:
    content = file_of({"a": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}, b"")
    assert ours(content) is None
    (tmp_path / "x.safetensors").write_bytes(content)
    assert verifier_s(tmp_path / "x.safetensors") is None


@pytest.mark.parametrize("shape", [[True], [1.0], "[1]", ["1"], {"1": 1}])
def test_a_shape_that_equals_one_seen_before_is_still_looked_at(shape: Any) -> None:
    """A dtype with a shape is checked once for all tensors that have it; 1, true and 1.0 are equal in Python."""
    first = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"a": first, "b": {"dtype": "U8", "shape": shape, "data_offsets": [1, 2]}}).encode()
    with pytest.raises(InputError, match="tensor 'b': the shape is not a list of counts"):
        parse_header(header, 8 + len(header) + 2, "x")


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "twice"),
    [
        (f'{{"a":{EMPTY},"b":{EMPTY},"a":{EMPTY}}}', "a"),
        ('{"a":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}', "shape"),
        (f'{{"__metadata__":{{"format":"pt","format":"pt"}},"a":{EMPTY}}}', "format"),
        (f'{{"__metadata__":{{}},"a":{EMPTY},"__metadata__":{{}}}}', "__metadata__"),
        (f'{{"a":{EMPTY},"\\u0061":{EMPTY}}}', "a"),
    ],
)
def test_a_name_that_appears_twice_is_refused_even_with_equal_tensors(header: str, twice: str) -> None:
    with pytest.raises(InputError, match=f"the name '{twice}' appears twice"):
        parse_header(header.encode(), 8 + len(header), "file")


@pytest.mark.parametrize("value", ["true", "0.0", "null", "[0]", '"0"', "{}", "-0.0", "1e0"])
def test_an_offset_that_only_equals_a_count_is_refused(value: str) -> None:
    header = f'{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}},"b":{EMPTY.replace("[0,0]", f"[1,{value}]")}}}'
    with pytest.raises(InputError, match="tensor 'b': data_offsets is not a pair of counts"):
        parse_header(header.encode(), 8 + len(header) + 1, "file")


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\\b", "C:x", "n" * 513, "a\tb", "\ud800"])
def test_one_bad_name_among_good_ones_is_named(bad: str) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({"good": entry, bad: entry, "x.y": entry, "x:y": entry}).encode()
    with pytest.raises(InputError, match="is not a tensor name") as raised:
        parse_header(header, 8 + len(header), "file")
    assert f"'{printable(bad[:80])}'" in str(raised.value)


def test_reads_what_safetensors_writes() -> None:
    header = ours(GOOD)
    assert header == {
        "a.weight": ("F32", [2, 3], np.arange(6, dtype=np.float32).tobytes()),
        "b": ("I8", [3], bytes(3)),
    }


def test_build_header_is_what_both_readers_expect(tmp_path: Path) -> None:
    tensors = {
        "b": ("F8_E4M3", (3, 5)),
        "a": ("BF16", (2,)),
        "s": ("F32", ()),
        "e": ("I64", (0, 7)),
        "é": ("F4", (2, 4)),
    }
    start = build_header(tensors)
    assert (len(start) - 8) % 8 == 0
    content = start + bytes(sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values()))
    (tmp_path / "x.safetensors").write_bytes(content)
    expected = {name: (dtype, list(shape)) for name, (dtype, shape) in tensors.items()}
    assert theirs(tmp_path / "x.safetensors") == expected
    mine = ours(content)
    assert mine is not None and list(mine) == list(tensors)  # data order is the order given
    assert {name: found[:2] for name, found in mine.items()} == expected


def test_a_long_header_is_refused_before_it_is_read() -> None:
    for length in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        with pytest.raises(InputError, match="at most"):
            header_length(struct.pack("<Q", length), 10**12, "file")
    assert header_length(struct.pack("<Q", MAX_HEADER_BYTES), 10**12, "file") == MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', "1 2", "'a'", "[1,]", "", "\x00"]
)
def test_strict_json_refuses(text: str) -> None:
    with pytest.raises(InputError, match="file"):
        strict_json(text.encode(), "file")


@pytest.mark.slow
@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_strict_json_reads_json(value: Any) -> None:
    assert strict_json(json.dumps(value).encode(), "file") == value


def test_strict_json_looks_for_names_that_appear_twice_at_any_depth() -> None:
    deep = '[{"a":{"b":[1,{"c":"x","c":"x"}]}},"y"]'
    with pytest.raises(InputError, match="the name 'c' appears twice"):
        strict_json(deep, "file")
    assert strict_json(deep.replace('"c":"x","c"', '"d":"x","c"'), "file")[0]["a"]["b"][1] == {"c": "x", "d": "x"}


def test_messages_carry_nothing_raw() -> None:
    header = {"\x1b[31m\u202e": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(InputError) as caught:
        parse_header(json.dumps(header).encode(), 100, "file")
    assert caught.value.message.isprintable()
