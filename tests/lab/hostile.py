"""Ways to damage a checkpoint, as one list that every command that opens one is tested with.

Each case takes a folder with a good checkpoint (`good_checkpoint`) and damages it. `STRUCTURE` damages headers, names
and files, which every command checks; `CONTENT` damages tensors or the config.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raw_safetensors import Tensors, read_file, write_file

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

# One layer and one MTP block with two experts each: 0.4 MB in four shards.
GEOMETRY = Geometry(
    vocab_size=64, hidden_size=128, compress_ratios=(0, 0), n_routed_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=64, num_attention_heads=2, head_dim=64, qk_rope_head_dim=32, q_lora_rank=64, o_lora_rank=128,
)  # fmt: skip

INDEX = "model.safetensors.index.json"
EMBED, LAYER, HEAD, MTP = (f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5))
EXPERT = "layers.0.ffn.experts.0.w1"

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A name for the test's id, what to do to the folder, and words that the message must have (a regex)."""

    name: str
    damage: Damage
    words: str


def good_checkpoint(folder: Path) -> Path:
    return make_checkpoint(folder, geometry=GEOMETRY)


def split_file(path: Path) -> tuple[bytes, bytes]:
    """Header JSON and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def join_file(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def header_text(edit: Callable[[bytes], bytes], file: str = EMBED) -> Damage:
    """Change the bytes of a header; its length field stays right."""

    def damage(folder: Path) -> None:
        header, data = split_file(folder / file)
        join_file(folder / file, edit(header), data)

    return damage


def header(edit: Callable[[dict[str, Any]], Any], file: str = EMBED) -> Damage:
    """Change the parsed header in place, or return another."""

    def edit_text(text: bytes) -> bytes:
        parsed = json.loads(text)
        changed = edit(parsed)
        return json.dumps(parsed if changed is None else changed).encode("utf-8", "surrogatepass")

    return header_text(edit_text, file)


def entry(**changes: Any) -> Damage:
    """Change keys of the one tensor of the embedding's shard; a value of None removes the key."""

    def edit(parsed: dict[str, Any]) -> None:
        values = parsed["embed.weight"]
        for key, value in changes.items():
            if value is None:
                del values[key]
            else:
                values[key] = value

    return header(edit)


def renamed(name: str) -> Damage:
    """Give the embedding another name, in its header and in the index."""

    def damage(folder: Path) -> None:
        header(lambda parsed: {name: parsed["embed.weight"]})(folder)
        index(lambda parsed: parsed["weight_map"].update({name: parsed["weight_map"].pop("embed.weight")}))(folder)

    return damage


def index(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the parsed index in place."""

    def damage(folder: Path) -> None:
        parsed = json.loads((folder / INDEX).read_text())
        edit(parsed)
        (folder / INDEX).write_bytes(json.dumps(parsed).encode("utf-8", "surrogatepass"))

    return damage


def config(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the parsed config in place."""

    def damage(folder: Path) -> None:
        parsed = json.loads((folder / "config.json").read_text())
        edit(parsed)
        (folder / "config.json").write_text(json.dumps(parsed))

    return damage


def written(file: str, content: bytes) -> Damage:
    """Replace a file's content."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def cut(file: str, keep: Callable[[int, int], int]) -> Damage:
    """Truncate a shard: `keep` gets the sizes of header (with its length field) and file."""

    def damage(folder: Path) -> None:
        path = folder / file
        os.truncate(path, keep(8 + len(split_file(path)[0]), path.stat().st_size))

    return damage


def replaced(file: str, make: Callable[[Path], None]) -> Damage:
    """Put something else, or nothing, in place of a file."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def sparse(path: Path, length_field: int, size: int) -> None:
    """A file of `size` bytes that takes no space, whose header claims to be `length_field` long."""
    path.write_bytes(struct.pack("<Q", length_field))
    os.truncate(path, size)


def tensors(file: str, edit: Callable[[Tensors], None]) -> Damage:
    """Change the tensors of a shard; header and index follow."""

    def damage(folder: Path) -> None:
        found = read_file(folder / file)
        edit(found)
        write_file(folder / file, found)
        parsed = json.loads((folder / INDEX).read_text())
        kept = {name: shard for name, shard in parsed["weight_map"].items() if shard != file}
        parsed["weight_map"] = kept | dict.fromkeys(found, file)
        (folder / INDEX).write_text(json.dumps(parsed))

    return damage


def shard_called(name: str) -> Damage:
    """Let the index call the embedding's shard something else. Nothing is put there."""
    return index(lambda parsed: parsed["weight_map"].update({"embed.weight": name}))


def duplicate(text: bytes) -> bytes:
    """Name the one tensor of a header twice."""
    return text.rstrip()[:-1] + b"," + text.strip()[1:]


def twice_in_shards(folder: Path) -> None:
    shard = read_file(folder / HEAD)
    shard["embed.weight"] = read_file(folder / EMBED)["embed.weight"]
    write_file(folder / HEAD, shard)


def stranger(folder: Path) -> None:
    (folder / "extra.safetensors").write_bytes((folder / EMBED).read_bytes())


def unlisted(folder: Path) -> None:
    write_file(folder / HEAD, read_file(folder / HEAD) | {"no.one": read_file(folder / HEAD)["norm.weight"]})


def gone(name: str) -> Damage:
    """Take a tensor out of its shard, but not out of the index."""

    def damage(folder: Path) -> None:
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        write_file(folder / file, {n: tensor for n, tensor in read_file(folder / file).items() if n != name})

    return damage


def swapped(folder: Path) -> None:
    first, second = (folder / HEAD).read_bytes(), (folder / EMBED).read_bytes()
    (folder / HEAD).write_bytes(second)
    (folder / EMBED).write_bytes(first)


def only_one_of_many(folder: Path) -> None:
    (folder / INDEX).unlink()


def escape_in_file_name(folder: Path) -> None:
    (folder / "\x1b[31mred.safetensors").write_bytes((folder / EMBED).read_bytes())


HUGE = 2**40
# One list of names that must not lead anywhere: POSIX, drives, UNC, NUL, terminal escapes, Windows devices and dots.
SHARD_NAMES = [
    "../x.safetensors", "/etc/x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\x.safetensors",
    "x\x00y.safetensors", "sub/x.safetensors", "a/../../x.safetensors", "./x.safetensors", "", ".", "..",
    "x.safetensors\n", "\x1b[2Jx.safetensors", "\u202ex.safetensors", "x.safetensors.", "x.safetensors ",
    " x.safetensors", "~root/x.safetensors", "x" * 300 + ".safetensors", "-rf.safetensors", "x.bin",
    "\ud800.safetensors",
]  # fmt: skip
TENSOR_NAMES = [
    "", "../x", "/etc/x", "a/b", "C:\\x", "C:x", "x\x00y", "x\ny", "\x1b[31mred", "\u202eevil", "\ud800", "x" * 600,
    ".", "..", "\x7f", "\u200b",
]  # fmt: skip

HEADERS = [
    Case("file_empty", cut(EMBED, lambda head, size: 0), "truncated"),
    Case("file_seven_bytes", cut(EMBED, lambda head, size: 7), "truncated"),
    Case("cut_in_header", cut(EMBED, lambda head, size: head - 1), "truncated"),
    Case("cut_at_header_end", cut(EMBED, lambda head, size: head), "truncated"),
    Case("cut_after_first_byte", cut(EMBED, lambda head, size: head + 1), "truncated"),
    Case("cut_at_tensor_edge", cut(LAYER, lambda head, size: head + 64 * 8), "truncated"),
    Case("cut_last_byte", cut(MTP, lambda head, size: size - 1), "truncated"),
    Case("trailing_byte", cut(EMBED, lambda head, size: size + 1), "longer than its header"),
    Case("all_zero", lambda f: written(EMBED, bytes((f / EMBED).stat().st_size))(f), "empty"),
    Case("header_too_long", lambda f: sparse(f / EMBED, 100_000_001, 100_000_100), "at most 100000000"),
    Case("header_beyond_file", lambda f: sparse(f / EMBED, 99_999_999, 1000), "truncated"),
    Case("header_length_huge", lambda f: sparse(f / EMBED, 2**64 - 1, 1000), "at most 100000000"),
    Case("header_of_zeros", lambda f: sparse(f / EMBED, 50_000_000, 60_000_000), "not a JSON object"),
    Case("header_not_json", header_text(lambda text: b"{" + b"x" * (len(text) - 1)), "not valid JSON"),
    Case("header_not_utf8", header_text(lambda text: text.replace(b"embed", b"emb\xff\xfe", 1)), "not valid JSON"),
    Case("header_array", header_text(lambda text: b"[1]"), "not a JSON object"),
    Case("header_string", header_text(lambda text: b'"x"'), "not a JSON object"),
    Case("header_deep", header_text(lambda text: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not valid JSON"),
    Case("header_deep_arrays", header_text(lambda text: b'{"a":' + b"[" * 200_000), "not valid JSON"),
    Case("header_two_objects", header_text(lambda text: text + text), "not valid JSON"),
    Case("header_byte_order_mark", header_text(lambda text: b"\xef\xbb\xbf" + text), "not a JSON object"),
    Case("header_leading_space", header_text(lambda text: b"  " + text), "not a JSON object"),
    Case("header_trailing_nul", header_text(lambda text: text + b"\0"), "not valid JSON"),
    Case("header_duplicate_name", header_text(duplicate), "twice"),
    Case("header_duplicate_key", header_text(lambda t: t.replace(b'"dtype"', b'"dtype":"F32","dtype"', 1)), "twice"),
    Case("header_nan", header_text(lambda text: b'{"a":NaN}'), "NaN"),
    Case("header_infinity", header_text(lambda text: b'{"a":-Infinity}'), "Infinity"),
    Case("header_long_number", header_text(lambda text: b'{"a":' + b"9" * 100_000 + b"}"), "not valid JSON"),
    Case("metadata_not_text", header(lambda parsed: {**parsed, "__metadata__": {"a": 1}}), "must map names to text"),
    Case("metadata_list", header(lambda parsed: {**parsed, "__metadata__": ["a"]}), "must map names to text"),
    Case("entry_not_object", header(lambda parsed: {"embed.weight": 7}), "expected dtype, shape"),
    Case("entry_lacks_dtype", entry(dtype=None), "expected dtype, shape"),
    Case("entry_lacks_shape", entry(shape=None), "expected dtype, shape"),
    Case("entry_lacks_offsets", entry(data_offsets=None), "expected dtype, shape"),
    Case("entry_has_more", entry(code="import os"), "expected dtype, shape"),
    Case("dtype_unknown", entry(dtype="F7"), "unknown dtype F7"),
    Case("dtype_escape", entry(dtype="\x1b[31mF32"), r"unknown dtype \\x1b"),
    Case("dtype_number", entry(dtype=32), "unknown dtype"),
    Case("dtype_list", entry(dtype=["F32"]), "unknown dtype"),
    Case("dtype_of_other_size", entry(dtype="F64"), "needs"),
    Case("shape_negative", entry(shape=[-64, -128]), "not a list of counts"),
    Case("shape_float", entry(shape=[64.0, 128]), "not a list of counts"),
    Case("shape_bool", entry(shape=[True, 64 * 128]), "not a list of counts"),
    Case("shape_text", entry(shape="64,128"), "not a list of counts"),
    Case("shape_overflow", entry(shape=[2**32, 2**32]), "overflows"),
    Case("shape_overflow_to_zero", entry(shape=[2**62, 4, 2]), "overflows"),
    Case("shape_beyond_int64", entry(shape=[2**63, 0]), "not a list of counts"),
    Case("shape_huge", entry(shape=[2**62] * 64), "overflows"),
    Case("shape_of_high_rank", entry(shape=[64, 128] + [1] * 100), "not a list of counts"),
    Case("shape_half_byte", entry(dtype="F4", shape=[3], data_offsets=[0, 2]), "not whole bytes"),
    Case("offsets_negative", entry(data_offsets=[-8, 64 * 256 - 8]), "not a pair of counts"),
    Case("offsets_float", entry(data_offsets=[0.0, 64.0 * 256]), "not a pair of counts"),
    Case("offsets_three", entry(data_offsets=[0, 1, 2]), "not a pair of counts"),
    Case("offsets_reversed", entry(data_offsets=[64 * 256, 0]), "offsets span -"),
    Case("offsets_beyond_file", entry(data_offsets=[HUGE, HUGE + 64 * 256]), "leaves a hole"),
    Case("offsets_beyond_int64", entry(data_offsets=[0, 2**64]), "not a pair of counts"),
    Case("claims_a_terabyte", entry(shape=[HUGE // 2], data_offsets=[0, HUGE]), "truncated"),
    Case(
        "overlap",
        header(lambda p: p["norm.weight"].update(data_offsets=p["hc_head_base"]["data_offsets"]), HEAD),
        "offsets span|overlaps",
    ),
    Case("header_without_tensors", header(lambda parsed: {}), "longer than its header|names 1 tensors"),
    Case("names_differ_by_case", header(lambda p: {**p, "Norm.weight": p.pop("head.weight")}, HEAD), "differ only by"),
    *(
        Case(f"tensor_name_{i}", renamed(name), "not a tensor name|not valid JSON")
        for i, name in enumerate(TENSOR_NAMES)
    ),
]  # fmt: skip

INDEXES = [
    Case("no_index", only_one_of_many, "neither"),
    Case("index_empty", written(INDEX, b""), "not valid JSON"),
    Case("index_not_json", written(INDEX, b"{weights}"), "not valid JSON"),
    Case("index_array", written(INDEX, b"[]"), "a JSON object is expected"),
    Case("index_not_utf8", written(INDEX, b'{"weight_map": "\xff"}'), "not valid JSON"),
    Case("index_deep", written(INDEX, b"[" * 100_000), "not valid JSON"),
    Case("index_nan", written(INDEX, b'{"metadata": {"total_size": NaN}}'), "NaN"),
    Case("index_duplicate", written(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'), "twice"),
    Case("index_without_map", index(lambda parsed: parsed.pop("weight_map")), "weight_map must map"),
    Case("index_map_list", index(lambda parsed: parsed.update(weight_map=["a"])), "must map"),
    Case("index_map_number", index(lambda parsed: parsed["weight_map"].update({"embed.weight": 1})), "must map"),
    Case("index_names_what_is_gone", gone("norm.weight"), "needs and no shard has"),
    Case("index_wrong_shard", index(lambda p: p["weight_map"].update({"norm.weight": EMBED})), "not in their shard"),
    Case("index_names_no_shard_of_one", shard_called(HEAD), "needs and no shard has"),
    Case("index_lacks_a_tensor", index(lambda p: p["weight_map"].pop("norm.weight")), "does not name"),
    Case("index_map_empty", index(lambda parsed: parsed.update(weight_map={})), "names no tensor"),
    Case("index_too_large", replaced(INDEX, lambda path: sparse(path, 0, 100_000_001)), "at most"),
    Case("index_of_zeros", written(INDEX, bytes(1000)), "not valid JSON"),
    *(
        Case(f"shard_name_{i}", shard_called(name), "not a plain file name|not a .safetensors|not valid JSON|missing")
        for i, name in enumerate(SHARD_NAMES)
    ),
]  # fmt: skip

FILES = [
    Case("shard_missing", lambda f: (f / EMBED).unlink(), "missing"),
    Case("shards_swapped", swapped, "not in their shard"),
    Case("shard_is_folder", replaced(EMBED, Path.mkdir), "missing|not a regular"),
    Case("shard_is_fifo", replaced(EMBED, os.mkfifo), "missing|not a regular"),
    Case("shard_is_device", replaced(EMBED, lambda p: p.symlink_to("/dev/zero")), "missing|not a regular"),
    Case("shard_is_dangling_link", replaced(EMBED, lambda p: p.symlink_to("nowhere")), "missing"),
    Case("shard_is_link_to_itself", replaced(EMBED, lambda p: p.symlink_to(p.name)), "missing"),
    Case("index_is_fifo", replaced(INDEX, os.mkfifo), "neither"),
    Case("index_is_device", replaced(INDEX, lambda p: p.symlink_to("/dev/zero")), "neither"),
    Case("config_missing", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    Case("config_is_fifo", replaced("config.json", os.mkfifo), "config.json is missing"),
    Case("config_is_device", replaced("config.json", lambda p: p.symlink_to("/dev/zero")), "config.json is missing"),
    Case("config_empty", written("config.json", b""), "not valid JSON"),
    Case("config_not_json", written("config.json", b"{'a': 1}"), "not valid JSON"),
    Case("config_array", written("config.json", b"[]"), "a JSON object is expected"),
    Case("config_deep", written("config.json", b'{"a":' * 100_000), "not valid JSON"),
    Case("config_duplicate", written("config.json", b'{"a": 1, "a": 2}'), "twice"),
    Case("config_nan", written("config.json", b'{"rms_norm_eps": NaN}'), "NaN"),
    Case("config_too_large", replaced("config.json", lambda p: sparse(p, 0, 10_000_001)), "at most"),
]  # fmt: skip

STRUCTURE = HEADERS + INDEXES + FILES

# What an index leaves out: not a fault, but said in a line.
LEFT_OUT = [
    Case("index_names_unknown", index(lambda p: p["weight_map"].update({"no.one": EMBED})), "no shard has it.*no.one"),
    Case("index_tensor_escape", index(lambda p: p["weight_map"].update({"\x1b[31mx": EMBED})), r"no shard has.*\\x1b"),
    Case("shard_not_in_index", stranger, "no index names it: extra.safetensors"),
    Case("file_name_escape", escape_in_file_name, r"no index names it: \\x1b"),
    Case("tensor_in_two_shards", twice_in_shards, "an older copy of embed.weight"),
    Case("tensor_not_in_index", unlisted, "the index does not name it.*no.one"),
]


def without(name: str) -> Damage:
    return tensors(LAYER, lambda found: found.__delitem__(name))


def scale_like(change: Callable[[Any], Any], dtype: str | None = None) -> Damage:
    """Change the codes (and so the shape) of an expert's scale, or its dtype."""

    def edit(found: Tensors) -> None:
        old = found[f"{EXPERT}.scale"]
        new = old.like(change(old.array()))
        found[f"{EXPERT}.scale"] = new if dtype is None else type(new)(dtype, new.shape, new.data)

    return tensors(LAYER, edit)


def with_byte(byte: int) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array = array.copy()
        array[3, 1] = byte
        return array

    return change


def _quantization(**changes: Any) -> Damage:
    return config(lambda parsed: parsed["quantization_config"].update(changes))


CONTENT = [
    Case("scale_missing", without(f"{EXPERT}.scale"), f"{EXPERT}.*scale.*missing"),
    Case("scale_of_dense_missing", without("layers.0.attn.wo_b.scale"), "wo_b.*scale.*missing"),
    Case("scale_one_row_short", scale_like(lambda scale: scale[:-1]), rf"{EXPERT}.scale.*shape \[63, 4\]"),
    Case("scale_transposed", scale_like(lambda scale: scale.T), rf"{EXPERT}.scale.*shape \[4, 64\]"),
    Case("scale_flat", scale_like(lambda scale: scale.reshape(-1)), rf"{EXPERT}.scale.*shape \[256\]"),
    Case("scale_of_wrong_dtype", scale_like(lambda scale: scale, "I8"), f"{EXPERT}.scale.*dtype I8"),
    Case("config_says_fp8", config(lambda parsed: parsed.update(expert_dtype="fp8")), "expert_dtype 'fp8'.*holds fp4"),
    Case("config_says_nonsense", config(lambda p: p.update(expert_dtype="\x1b[31m")), "expert_dtype"),
    Case("config_without_blocks", config(lambda p: p.pop("quantization_config")), "weight_block_size"),
    Case("config_blocks_zero", _quantization(weight_block_size=[0, 0]), "weight_block_size"),
    Case("config_blocks_text", _quantization(weight_block_size="128"), "weight_block_size"),
    Case("config_blocks_huge", _quantization(weight_block_size=[2**70, 2**70]), "weight_block_size"),
    Case("config_quantization_list", config(lambda p: p.update(quantization_config=[])), "quantization_config"),
]  # fmt: skip

# Found when the tensors themselves are read.
SCALE_NAN = Case("scale_byte_255", scale_like(with_byte(255)), f"{EXPERT}.scale.*255")
