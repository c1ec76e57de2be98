"""GGUF files of llama.cpp's `deepseek4` and its drafts, as `verify` reads them: its own reader, its own table of names.

Every tensor is read as the release has it: stacks of experts as matrices with scales, the two projections of a draft
block apart, tables of ids as int64. A file of drafts holds an MTP block, numbered after the layers, or DSpark's stages,
numbered from 0; what it repeats of the model is compared with the model. Names that the architecture does not have are
extra tensors, under the name that the file has.
"""

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsv4.convert.proof.files import Entry, Files, read_bytes
from dsv4.convert.proof.layout import Checkpoint, Tensor
from dsv4.errors import InputError

from .packing import MXFP4_CODES, MXFP4_SCALES, Q8_0_VALUES, WIDE_INTEGERS, Packing, half_of_q8_0_rows, half_of_rows

LAYOUT = "gguf"
_ALIGNMENT = 32
_MOST_BYTES = 1 << 28
# ggml's number of a type: (name, elements of a block, bytes of a block).
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 26: ("I32", 1, 4), 30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_SHOWN: dict[str, tuple[str, Packing | None]] = {
    "F32": ("F32", None), "F16": ("F16", None), "BF16": ("BF16", None), "Q8_0": ("F32", Q8_0_VALUES),
    "I32": ("I64", WIDE_INTEGERS),
}  # fmt: skip
_HALVES = {"BF16": half_of_rows, "F32": half_of_rows, "Q8_0": half_of_q8_0_rows}
_WHOLE = {
    "token_embd": "embed.weight", "output": "head.weight", "output_norm": "norm.weight", "output_hc_fn": "hc_head_fn",
    "output_hc_base": "hc_head_base", "output_hc_scale": "hc_head_scale",
}  # fmt: skip
_IN_BLOCK = {
    "attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "attn_sinks": "attn.attn_sink",
    "attn_q_a": "attn.wq_a.weight", "attn_q_a_norm": "attn.q_norm.weight", "attn_q_b": "attn.wq_b.weight",
    "attn_kv": "attn.wkv.weight", "attn_kv_a_norm": "attn.kv_norm.weight", "attn_output_a": "attn.wo_a.weight",
    "attn_output_b": "attn.wo_b.weight", "indexer.proj": "attn.indexer.weights_proj.weight",
    "indexer.attn_q_b": "attn.indexer.wq_b.weight", "ffn_gate_inp": "ffn.gate.weight",
    "ffn_gate_tid2eid": "ffn.gate.tid2eid", "nextn.enorm": "enorm.weight", "nextn.hnorm": "hnorm.weight",
    "nextn.shared_head_norm": "norm.weight",
    **{f"ffn_{part}_shexp": f"ffn.shared_experts.w{n}.weight" for part, n in (("gate", 1), ("down", 2), ("up", 3))},
    **{f"hc_{part}_{what}": f"hc_{part}_{what}" for part in ("attn", "ffn") for what in ("fn", "base", "scale")},
    **{f"{new}_{what}": f"{old}.{inner}"
       for new, old in (("attn_compressor", "attn.compressor"), ("indexer_compressor", "attn.indexer.compressor"))
       for what, inner in (("kv", "wkv.weight"), ("gate", "wgate.weight"), ("ape", "ape"), ("norm", "norm.weight"))},
}  # fmt: skip
# Outside of blocks in a file of drafts: of the first stage, and of the last.
_FIRST = {"fc": "main_proj.weight", "enc.output_norm": "main_norm.weight"}
_LAST = {
    "output_hc_fn": "hc_head_fn", "output_hc_base": "hc_head_base", "output_hc_scale": "hc_head_scale",
    "conf_proj": "confidence_head.proj.weight", "markov_w1": "markov_head.markov_w1.weight",
    "markov_w2": "markov_head.markov_w2.weight",
}  # fmt: skip
_STACKS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_BIAS = re.compile(r"blk\.(\d+)\.exp_probs_b(_vl)?\.bias")
_SPLIT = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")
# Keys that change what a model computes, and the key of config.json with the same number.
_KEYS = {
    "vocab_size": "vocab_size", "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "attention.q_lora_rank": "q_lora_rank",
    "attention.sliding_window": "sliding_window", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.indexer.head_count": "index_n_heads", "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk", "attention.output_group_count": "o_groups",
    "attention.output_lora_rank": "o_lora_rank", "attention.compress_rope_freq_base": "compress_rope_theta",
    "rope.dimension_count": "qk_rope_head_dim", "rope.freq_base": "rope_theta", "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor", "hyper_connection.count": "hc_mult",
    "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters", "hyper_connection.epsilon": "hc_eps",
    "hash_layer_count": "num_hash_layers", "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: name, type, shape with the rows first, place."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class _Header:
    """The keys and tensors of one file; ValueError for what is not GGUF."""

    def __init__(self, raw: bytes, file_bytes: int) -> None:
        self._raw, self._at = raw, 0
        if self._bytes(4) != b"GGUF" or self._number("I") != 3:
            raise ValueError("not a GGUF file of version 3")
        tensors, keys = self._number("Q"), self._number("Q")
        self.keys = {self._text(): self._value() for _ in range(keys)}
        described = [self._tensor() for _ in range(tensors)]
        self.end = self._at
        start = self._at + -self._at % _ALIGNMENT
        self.tensors = [replace(stored, offset=start + stored.offset) for stored in described]
        for stored in self.tensors:
            if stored.offset + stored.size > file_bytes:
                raise ValueError(f"{stored.name} ends behind the file")

    def _bytes(self, count: int) -> bytes:
        if self._at + count > len(self._raw):
            raise ValueError("its header ends too early")
        self._at += count
        return self._raw[self._at - count : self._at]

    def _number(self, layout: str) -> Any:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "surrogateescape")

    def _value(self, kind: int | None = None) -> Any:
        kind = self._number("I") if kind is None else kind
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _NUMBERS:
                layout = f"<{count}{_NUMBERS[inner]}"
                return list(struct.unpack(layout, self._bytes(struct.calcsize(layout))))
            return [self._value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a key has the unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _tensor(self) -> _Stored:
        name = self._text()
        shape = tuple(self._number("Q") for _ in range(self._number("I")))[::-1]
        number, offset = self._number("I"), self._number("Q")
        kind, elements, size = _TYPES.get(number, (f"ggml type {number}", 1, 0))
        if shape and shape[-1] % elements:
            raise ValueError(f"{name} has rows of {shape[-1]} elements, which are not blocks of {elements}")
        return _Stored(name, kind, shape, offset, math.prod(shape) // elements * size)


def gguf_names(files: Files) -> list[str]:
    """The GGUF files of a folder that has no safetensors file, sorted."""
    names = [name for name in files.sizes() if "/" not in name]
    if any(name.endswith(".safetensors") for name in names):
        return []
    return sorted(name for name in names if name.endswith(".gguf"))


def _read(files: Files, name: str) -> _Header:
    """Raises ValueError. The header is read in growing pieces: its length stands nowhere."""
    size, length = files.sizes()[name], 1 << 20
    while True:
        raw = read_bytes(files, name, 0, min(length, size))
        try:
            return _Header(raw, size)
        except ValueError as error:
            if "too early" not in str(error) or len(raw) == size or length >= _MOST_BYTES:
                raise
        length *= 4


def _entry(name: str, stored: _Stored, file: str, dtype: str, packing: Packing | None) -> Entry:
    size = stored.size if packing is None else stored.size // packing.packed * packing.unpacked
    return Entry(name, dtype, stored.shape, file, stored.offset, size, packing)


def _matrices(prefix: str, matrix: str, stored: _Stored, file: str) -> Iterator[Entry]:
    """The experts of a stack."""
    count, rows, columns = stored.shape
    each = stored.size // count
    for expert in range(count):
        one = replace(stored, shape=(rows, columns), offset=stored.offset + expert * each, size=each)
        stem = f"{prefix}ffn.experts.{expert}.{matrix}"
        if stored.kind == "MXFP4":
            codes, scales = replace(one, shape=(rows, columns // 2)), replace(one, shape=(rows, columns // 32))
            yield _entry(f"{stem}.weight", codes, file, "I8", MXFP4_CODES)
            yield _entry(f"{stem}.scale", scales, file, "F8_E8M0", MXFP4_SCALES)
        else:
            yield _entry(f"{stem}.weight", one, file, *_SHOWN[stored.kind])


@dataclass(frozen=True)
class _Kind:
    """What blocks of a file are: of the model, which has `layers`, or drafts. stages: of DSpark."""

    layers: int
    is_draft: bool = False
    stages: int = 0

    def prefix(self, block: int) -> str:
        """What stands before a name in block `block`, in the release."""
        if self.stages:
            return f"mtp.{block}."
        return f"mtp.{block - self.layers}." if block >= self.layers else f"layers.{block}."

    def whole(self, stored: str) -> str | None:
        """The release's name of a tensor outside of blocks."""
        stem = stored.removesuffix(".weight")
        last = max(self.stages - 1, 0)
        if self.is_draft and stem in _FIRST:
            return f"mtp.0.{_FIRST[stem]}"
        if self.is_draft and stem in _LAST:
            return f"mtp.{last}.{_LAST[stem]}"
        if self.stages and stem == "output_norm":
            return f"mtp.{last}.norm.weight"
        return _WHOLE.get(stem)


def _name(stored: str, kind: _Kind) -> str | None:
    """The release's name of a tensor that is one in both; None for one that the architecture does not have."""
    if match := _BIAS.fullmatch(stored):
        inner = f"ffn.gate.bias{match[2] or ''}"
    elif match := _BLOCK.fullmatch(stored):
        inner = _IN_BLOCK.get(match[2], "")
    else:
        return kind.whole(stored)
    return kind.prefix(int(match[1])) + inner if inner else None


def _is_stack(stored: _Stored) -> bool:
    match = _BLOCK.fullmatch(stored.name)
    return match is not None and match[2] in _STACKS and len(stored.shape) == 3 and stored.shape[0] > 0


def _is_pair(stored: _Stored) -> bool:
    """Whether rows can be taken apart in the middle, which has to be between two blocks."""
    elements = next(count for name, count, _ in _TYPES.values() if name == stored.kind)
    return stored.kind in _HALVES and len(stored.shape) == 2 and stored.shape[1] % (2 * elements) == 0


def _entries(stored: _Stored, file: str, kind: _Kind) -> Iterator[Entry]:
    """What a tensor of a file holds, under the release's names."""
    match = _BLOCK.fullmatch(stored.name)
    prefix = kind.prefix(int(match[1])) if match else ""
    if match and _is_stack(stored):
        yield from _matrices(prefix, _STACKS[match[2]], stored, file)
    elif match and match[2] == "nextn.eh_proj" and _is_pair(stored):
        half = replace(stored, shape=(stored.shape[0], stored.shape[1] // 2))
        row, split = stored.size // max(stored.shape[0], 1), _HALVES[stored.kind]
        dtype, _ = _SHOWN[stored.kind]
        yield _entry(f"{prefix}e_proj.weight", half, file, dtype, split(row, False))
        yield _entry(f"{prefix}h_proj.weight", half, file, dtype, split(row, True))
    else:
        yield _entry(_name(stored.name, kind) or stored.name, stored, file, *_SHOWN[stored.kind])


def _add(checkpoint: Checkpoint, entry: Entry, may_repeat: bool) -> None:
    first = checkpoint.tensors.get(entry.name)
    if first is None:
        checkpoint.tensors[entry.name] = Tensor(entry.name, entry.dtype, entry.shape, 0, (entry,))
    elif may_repeat and (entry.dtype, entry.shape) == (first.dtype, first.shape):
        checkpoint.tensors[entry.name] = replace(first, copies=(*first.copies, entry))
    else:
        checkpoint.problem("layout", f"{entry.name} is in {entry.shard} and in {first.slices[0].shard}", "unreadable")
        checkpoint.unreadable[entry.name] = "the checkpoint holds it twice"


def _read_headers(checkpoint: Checkpoint, names: list[str], on_header: Callable[[], None]) -> dict[str, _Header]:
    headers, sizes, described = {}, checkpoint.files.sizes(), []
    for name in names:
        try:
            headers[name] = _read(checkpoint.files, name)
            raw = read_bytes(checkpoint.files, name, 0, headers[name].end)
            described.append(f"{name} {sizes[name]} {hashlib.sha256(raw).hexdigest()}")
        except (ValueError, struct.error, MemoryError, OverflowError, RecursionError) as error:
            checkpoint.problem("shard", f"{name} cannot be read: {error}", "unreadable")
        on_header()
    checkpoint.headers_sha256 = hashlib.sha256("\n".join(described).encode("utf-8", "surrogatepass")).hexdigest()
    return headers


def _check_splits(checkpoint: Checkpoint, names: list[str]) -> None:
    counts = {int(match[1]) for name in names if (match := _SPLIT.fullmatch(name))}
    found = sum(_SPLIT.fullmatch(name) is not None for name in names)
    if counts and counts != {found}:
        said = " and ".join(map(str, sorted(counts)))
        checkpoint.problem("shard", f"{found} splits are there, their names say {said}", "unreadable")


def _kind(header: _Header, layers: int) -> _Kind:
    """What a file of a model of `layers` layers holds."""
    stages = header.keys.get("dflash.block_count")
    if header.keys.get("general.architecture") == "dflash" and isinstance(stages, int):
        return _Kind(layers, is_draft=True, stages=stages)
    return _Kind(layers, is_draft=any(".nextn." in stored.name for stored in header.tensors))


def _add_file(checkpoint: Checkpoint, name: str, header: _Header, kind: _Kind) -> None:
    for stored in header.tensors:
        if stored.kind not in _SHOWN and not (stored.kind == "MXFP4" and _is_stack(stored)):
            checkpoint.problem("shard", f"{name}: {stored.name} is {stored.kind}", "unreadable")
            checkpoint.unreadable[_name(stored.name, kind) or stored.name] = stored.kind
            continue
        for entry in _entries(stored, name, kind):
            _add(checkpoint, entry, may_repeat=kind.is_draft)


def open_gguf(files: Files, where: str, on_header: Callable[[], None] = lambda: None) -> Checkpoint:
    """Read all headers of a folder of GGUF files. Raises InputError if none of them is of `deepseek4`."""
    checkpoint, names = Checkpoint(where, files, LAYOUT, repacked=True), gguf_names(files)
    headers = _read_headers(checkpoint, names, on_header)
    checkpoint.shards = names
    drafts = {name for name, header in headers.items() if _kind(header, 0).is_draft}
    for name in headers:
        mark = "drafts " if name in drafts else ""
        checkpoint.keys |= {mark + key: value for key, value in headers[name].keys.items()}
    layers = checkpoint.keys.get("deepseek4.block_count")
    if not isinstance(layers, int):
        raise InputError(f"{files.label} holds no GGUF file of deepseek4", "Give the folder of a converted checkpoint.")
    _check_splits(checkpoint, names)
    for name in sorted(headers, key=lambda name: (name in drafts, name)):
        _add_file(checkpoint, name, headers[name], _kind(headers[name], layers))
    for name in checkpoint.unreadable:
        checkpoint.tensors.pop(name, None)
    return checkpoint


def _same(said: Any, expected: Any) -> bool:
    """Equal, in float32 where the file has that."""
    if isinstance(said, float) and isinstance(expected, int | float) and not isinstance(expected, bool):
        return bool(struct.unpack("<f", struct.pack("<f", expected))[0] == said)
    return bool(said == expected)


def _plain_faults(keys: dict[str, Any], prefix: str, config: dict[str, Any]) -> Iterator[str]:
    """Of one file: keys with the number of a key of the config, ratios, and limits of activations."""
    for key, path in _KEYS.items():
        said, expected = keys.get(prefix + key), config.get(path)
        if said is None and key == "vocab_size":  # llama.cpp's own files lack it: it counts the tokens
            continue
        if expected is not None and not _same(said, expected):
            yield f"{prefix}{key} is {said}, expected {expected} (the source's {path})"
    ratios, expected = keys.get(f"{prefix}attention.compress_ratios"), config.get("compress_ratios")
    layers = config.get("num_hidden_layers")
    if isinstance(ratios, list) and isinstance(expected, list) and ratios[:layers] != expected[:layers]:
        yield f"{prefix}attention.compress_ratios are {ratios}, expected {expected} (the source's compress_ratios)"
    limits = keys.get(f"{prefix}swiglu_clamp_exp")
    if isinstance(limits, list) and not all(_same(limit, config.get("swiglu_limit")) for limit in limits):
        yield f"{prefix}swiglu_clamp_exp is {limits}, expected {config.get('swiglu_limit')} (the source's swiglu_limit)"


def _stage_faults(keys: dict[str, Any], prefix: str, config: dict[str, Any]) -> Iterator[str]:
    """Of the file of DSpark's stages: keys that only it has. A target is numbered by the layer after it."""
    targets = config.get("dspark_target_layer_ids")
    expected = [layer + 1 for layer in targets] if isinstance(targets, list) else None
    for key, path, wanted in (
        (f"{prefix}block_size", "dspark_block_size", config.get("dspark_block_size")),
        (f"{prefix}target_layers", "dspark_target_layer_ids", expected),
        ("drafts tokenizer.ggml.mask_token_id", "dspark_noise_token_id", config.get("dspark_noise_token_id")),
    ):
        if keys.get(key) != wanted:
            yield f"{key} is {keys.get(key)}, expected {wanted} (the source's {path})"


def key_faults(keys: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Sentences about keys of the files that differ from the config of the source."""
    yield from _plain_faults(keys, "deepseek4.", config)
    blocks, stages = keys.get("drafts deepseek4.block_count"), keys.get("drafts dflash.block_count")
    if blocks is not None:
        layers = config.get("num_hidden_layers")
        yield from _plain_faults(keys, "drafts deepseek4.", {**config, "num_hidden_layers": (layers or 0) + 1})
    if isinstance(stages, int):
        other = {"num_hidden_layers": stages, "num_hash_layers": 0, "compress_ratios": [0] * stages}
        yield from _plain_faults(keys, "drafts dflash.", config | other)
        yield from _stage_faults(keys, "drafts dflash.", config)
