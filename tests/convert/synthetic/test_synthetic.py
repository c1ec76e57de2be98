"""The small checkpoints that every other test builds on: are they what the release looks like, to the bit?"""

import json
import os
import stat
import struct
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from mixed_scales import PATTERNS, block_pattern, mix_scales
from raw_safetensors import scatter
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import RAGGED
from tokenizers import Tokenizer

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.tokenizer import FIRST_TOKENS, LAST_TOKENS
from dsv4.model import load

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = {float(v) for v in np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64) if v == v}
SMALL = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)


def header(path: Path) -> tuple[int, dict[str, dict]]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return size, json.loads(raw[8 : 8 + size])


def raw_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as bytes [shape.., itemsize], whatever its dtype."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        size, entries = header(path)
        data = path.read_bytes()[8 + size :]
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start:end], np.uint8).reshape(*entry["shape"], -1)
    return tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), geometry=SMALL)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = Geometry(compress_ratios=(0, 0), n_routed_experts=4, moe_intermediate_size=256)
    return mix_scales(make_checkpoint(tmp_path_factory.mktemp("mixed"), geometry=geometry))


def test_shards_are_the_release_s(plain: Path) -> None:
    shards = {path.name: set(header(path)[1]) for path in sorted(plain.glob("*.safetensors"))}
    assert list(shards) == [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    embed, first, second, third, head, mtp = shards.values()
    assert embed == {"embed.weight"}
    assert head == {"norm.weight", "head.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    for index, names in enumerate((first, second, third)):
        assert {name.split(".")[1] for name in names} == {str(index)}
    assert all(name.startswith("mtp.0.") for name in mtp)


def test_headers_are_the_release_s(plain: Path) -> None:
    order = ["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"]
    for path in plain.glob("*.safetensors"):
        size, entries = header(path)
        assert size % 8 == 0
        assert "__metadata__" not in entries
        keys = [(order.index(entry["dtype"]), name) for name, entry in entries.items()]
        assert keys == sorted(keys)
        ends = [entry["data_offsets"] for entry in entries.values()]
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]


def test_which_tensors_a_layer_has(plain: Path) -> None:
    names = set(raw_tensors(plain))
    assert {f"layers.{i}.ffn.gate.{n}" for i, n in ((0, "tid2eid"), (1, "bias"), (2, "bias"))} <= names
    assert "mtp.0.ffn.gate.bias" in names
    with_compressor = {n.split(".")[1] for n in names if n.endswith("attn.compressor.ape")}
    with_indexer = {n.split(".")[1] for n in names if n.endswith("attn.indexer.wq_b.scale")}
    assert (with_compressor, with_indexer) == ({"1", "2"}, {"1"})
    assert {"mtp.0.e_proj.scale", "mtp.0.h_proj.weight", "mtp.0.enorm.weight", "mtp.0.hc_head_fn"} <= names


def test_shapes_and_dtypes_follow_the_release_s_formulas(plain: Path) -> None:
    entries = {n: e for path in plain.glob("*.safetensors") for n, e in header(path)[1].items()}
    found = {name: (entries[name]["dtype"], entries[name]["shape"]) for name in entries}
    assert found["layers.1.ffn.experts.3.w2.weight"] == ("I8", [256, 64])
    assert found["layers.1.ffn.experts.3.w2.scale"] == ("F8_E8M0", [256, 4])
    assert found["layers.1.attn.wo_a.weight"] == ("F8_E4M3", [256, 256])
    assert found["layers.1.attn.wo_a.scale"] == ("F8_E8M0", [2, 2])
    assert found["layers.1.attn.compressor.ape"] == ("F32", [4, 256])
    assert found["layers.2.attn.compressor.ape"] == ("F32", [128, 128])
    assert found["layers.0.ffn.gate.tid2eid"] == ("I64", [512, 3])
    assert found["layers.0.hc_attn_fn"] == ("F32", [24, 1024])
    assert found["hc_head_scale"] == ("F32", [1])


def test_index_lists_every_tensor_and_their_bytes(plain: Path) -> None:
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    sizes = {}
    for path in plain.glob("*.safetensors"):
        for name, entry in header(path)[1].items():
            assert index["weight_map"][name] == path.name
            sizes[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
    assert set(index["weight_map"]) == set(sizes)
    assert index["metadata"] == {"total_size": sum(sizes.values())}


def test_side_files_and_their_modes(plain: Path) -> None:
    names = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()}
    assert {"config.json", "inference/config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "encoding/encoding_dsv4.py", "README.md", "LICENSE"} <= names
    umask = os.umask(0)
    os.umask(umask)
    for path in plain.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    geometry = Geometry(compress_ratios=(0, 0), n_routed_experts=2)
    folders = [make_checkpoint(tmp_path / str(i), seed=seed, geometry=geometry) for i, seed in enumerate((7, 7, 8))]
    first, same, other = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in folders)
    assert first == same
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_a_filled_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("")
    with pytest.raises(FileExistsError):
        make_checkpoint(tmp_path)


def test_every_fp4_code_and_several_exponents_occur(plain: Path) -> None:
    tensors = raw_tensors(plain)
    packed = tensors["layers.1.ffn.experts.0.w1.weight"]
    counts = Counter((packed & 15).ravel().tolist()) + Counter((packed >> 4).ravel().tolist())
    assert set(counts) == set(range(16))
    assert 0.8 < counts[8] / counts[0] < 1.25  # as many -0 as +0
    assert len(np.unique(tensors["layers.1.ffn.experts.0.w1.scale"])) == 5


def test_fp8_has_subnormals_and_no_nan(plain: Path) -> None:
    tensors = raw_tensors(plain)
    names = ("attn.wo_b.weight", "attn.wkv.weight")
    codes = np.concatenate([t.ravel() for n, t in tensors.items() if n.endswith(names)])
    assert not np.isin(codes, (0x7F, 0xFF)).any()
    assert ((codes & 0x78 == 0) & (codes & 7 != 0)).any()


def decoded(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A packed expert weight as float64, by the formula."""
    packed = tensors[f"{name}.weight"][..., 0]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    scales = np.exp2(tensors[f"{name}.scale"][..., 0].astype(np.float64) - 127)
    return E2M1[codes] * scales.repeat(32, axis=1)


def exact_exponents(block: np.ndarray) -> list[int]:
    """Every S with which the block is E4M3 times 2^S, among those that E8M0 can store."""
    values = np.unique(np.abs(block[block != 0]))
    if not len(values):
        return list(range(-127, 128))
    near = range(int(np.floor(np.log2(values[0]))) - 10, int(np.ceil(np.log2(values[-1]))) + 10)
    return [s for s in near if s >= -127 and all(v * 2.0**-s in E4M3 for v in values.tolist())]


def test_mixed_scales_are_what_their_names_say(mixed: Path) -> None:
    tensors = raw_tensors(mixed)
    seen = Counter()
    for name in [n.removesuffix(".scale") for n in tensors if ".ffn.experts." in n and n.endswith(".scale")]:
        weight, scales = decoded(tensors, name), tensors[f"{name}.scale"][..., 0].astype(int)
        for row in range(0, weight.shape[0], 128):
            for column in range(0, weight.shape[1], 128):
                pattern = block_pattern(name, row // 128, column // 128)
                seen[pattern] += 1
                bytes_ = scales[row : row + 128, column // 32 : column // 32 + 4]
                block = weight[row : row + 128, column : column + 128]
                usual = bytes_.max() - 127 - 6  # the reference converter's choice
                exact = exact_exponents(block)
                spread = bytes_.max() - bytes_.min()
                if pattern in ("plain", "spread_14"):
                    assert usual in exact
                    assert spread == (4 if pattern == "plain" else 14)
                elif pattern == "spread_16_small_top":
                    assert (exact, spread) == ([usual - 2], 16)
                elif pattern == "spread_18":
                    assert (exact, spread) == ([], 18)
                elif pattern == "smallest_scales":
                    assert usual < -127 and -127 in exact and bytes_.min() == 0
                elif pattern == "all_zero":
                    assert not block.any() and np.signbit(block).any()
                else:
                    huge = bytes_ == bytes_.max()
                    zeros = block.reshape(128, 4, 32)[huge]
                    assert spread >= 40 and usual not in exact and exact and not zeros.any()
                    assert np.signbit(zeros).all() == (pattern == "negative_zero_group_huge")
    assert set(seen) == set(PATTERNS)


def test_base_style(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, geometry=Geometry(compress_ratios=(4, 0), n_routed_experts=2), experts="fp8")
    entries = {n: e["dtype"] for path in folder.glob("*.safetensors") for n, e in header(path)[1].items()}
    assert entries["layers.0.ffn.experts.0.w1.weight"] == "F8_E4M3"
    assert {dtype for name, dtype in entries.items() if name.endswith(".scale")} == {"F32"}
    scales = raw_tensors(folder)["layers.0.ffn.experts.0.w1.scale"].view(np.float32)
    assert (np.frexp(scales)[0] == 0.5).all()
    assert json.loads((folder / "config.json").read_text())["expert_dtype"] == "fp8"
    assert "expert_dtype" not in json.loads((folder / "inference" / "config.json").read_text())


def test_ragged_shapes(tmp_path: Path) -> None:
    folder = mix_scales(make_checkpoint(tmp_path, geometry=RAGGED))
    entries = {n: e["shape"] for path in folder.glob("*.safetensors") for n, e in header(path)[1].items()}
    assert (entries["layers.0.attn.wq_a.weight"], entries["layers.0.attn.wq_a.scale"]) == ([96, 224], [1, 2])
    assert entries["layers.0.ffn.experts.0.w1.weight"] == [160, 112]
    assert entries["layers.0.ffn.experts.0.w1.scale"] == [160, 7]


def test_scattered_shards_separate_weight_and_scale(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", geometry=SMALL)
    scattered = scatter(make_checkpoint(tmp_path / "scattered", geometry=SMALL), 3)
    where = json.loads((scattered / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(where.values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    for name in where:
        if name.endswith(".scale"):
            assert where[name] != where[name.removesuffix(".scale") + ".weight"]
    one, other = raw_tensors(whole), raw_tensors(scattered)
    assert one.keys() == other.keys() and all((one[n] == other[n]).all() for n in one)


def test_an_independent_reader_agrees(plain: Path) -> None:
    for path in plain.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as shard:
            assert set(shard.keys()) == set(header(path)[1])
    embed = load_file(plain / "model-00001-of-00006.safetensors")["embed.weight"].astype(np.float32)
    assert embed.shape == (512, 256) and 0.95 < embed.std() < 1.05


def test_experts_of_a_token_are_distinct(plain: Path) -> None:
    table = raw_tensors(plain)["layers.0.ffn.gate.tid2eid"].view(np.int64)[..., 0]
    assert all(len(set(row)) == 3 for row in table.tolist())
    assert set(table.ravel().tolist()) == set(range(4))


@pytest.mark.slow
def test_activations_keep_their_size(tmp_path: Path) -> None:
    geometry = Geometry(compress_ratios=(0, 4, 128, 4, 0, 0, 4, 128, 0, 0), n_routed_experts=4)
    model = load(make_checkpoint(tmp_path, geometry=geometry))
    sizes: dict[str, float] = {}

    def trace(name: str, output: torch.Tensor) -> None:
        sizes[name] = float(output.double().square().mean().sqrt())

    model.forward(torch.arange(3, 19)[None], model.new_cache(1), trace=trace)
    layers = [sizes[f"layers.{i}"] for i in range(geometry.num_hidden_layers)]
    assert all(1 < size < 20 for size in layers)
    assert layers[-1] < 4 * layers[0]  # each layer adds about as much as the one before: growth as a square root
    assert 1 < sizes["logits"] < 10


def test_tokenizer_has_the_protocol_s_tokens_and_loses_nothing(plain: Path) -> None:
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in FIRST_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= SMALL.vocab_size
    text = "".join(LAST_TOKENS) + "Hello, the world: 你好 🌍\n\tend"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids[: len(LAST_TOKENS)] == [tokenizer.token_to_id(token) for token in LAST_TOKENS]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, geometry=Geometry(compress_ratios=(0, 0), n_routed_experts=2), tokenizer=False)
    assert not list(folder.glob("tokenizer*"))
