"""`--layout mp` against an independent reference converter, tensor for tensor; what it does not divide is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference_converter
from checkpoint_variants import SMALL, VARIANTS, strangers
from exact_values import (
    convert,
    dsv4,
    edit_config,
    edit_tensors,
    experts,
    packed_codes,
    read_json,
    same_bits,
    scale_of,
    sha256,
    tensors_of,
    tree,
    values,
)
from raw_safetensors import Raw, Tensors, prefix_sha256, raw, read_file
from tiny import RAGGED

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times

MP = ("--layout", "mp", "--model-parallel")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release, and what the 0731 release adds that is sliced or looks as if: a Markov head in a draft block."""
    folder = VARIANTS["release"](tmp_path_factory.mktemp("mp") / "source")
    rng = np.random.default_rng(1)
    names = ("mtp.0.markov_head.markov_w1.weight", "mtp.0.markov_head.markov_w2.weight")
    more = {name: raw("BF16", rng.integers(0, 2**15, (8, 6), dtype=np.uint16)) for name in names}
    more["mtp.0.confidence_head.proj.weight"] = raw("BF16", rng.integers(0, 2**15, (1, 6), dtype=np.uint16))
    edit_tensors(folder, more)
    return folder


def without_negative_zero(tensor: Raw) -> Raw:
    """The reference loses the sign of zero when it casts."""
    codes = tensor.array()
    return tensor.like(np.where(codes == 0x80, 0, codes).astype(np.uint8))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("to", "expert_dtype"), [("fp8", "fp8"), ("same", "fp4")])
@pytest.mark.fast_cases(1)
def test_equals_the_reference_converter(source: Path, ranks: int, to: str, expert_dtype: str, tmp_path: Path) -> None:
    before = tree(source)
    convert(source, tmp_path / "ours", *MP, ranks, "--to", to)
    reference_converter.convert(source, tmp_path / "theirs", ranks, expert_dtype)
    assert tree(source) == before
    shards = {f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)}
    assert {path.name for path in (tmp_path / "ours").glob("*.safetensors")} == shards
    for shard in shards:
        ours, theirs = read_file(tmp_path / "ours" / shard), read_file(tmp_path / "theirs" / shard)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            cast = expert_dtype == "fp8" and name in experts(ours)
            assert (without_negative_zero(ours[name]) if cast else ours[name]) == theirs[name], name


def test_casts_keep_the_sign_of_zero(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", *MP, 2)
    old = tensors_of(source)
    for rank in (0, 1):
        new = read_file(tmp_path / "out" / f"model{rank}-mp2.safetensors")
        assert all(same_bits(values(name, old), values(name, new)) for name in experts(new))
        assert all(int((new[n].array() == 0x80).sum()) == int((packed_codes(old[n]) == 8).sum()) for n in experts(new))


def test_files_beside_the_ranks(source: Path, tmp_path: Path) -> None:
    """The tokenizer, the engine's own config, the manifest; no index, which would be wrong for slices."""
    convert(source, tmp_path / "out", *MP, 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model0-mp2.safetensors", "model1-mp2.safetensors", "config.json", "dsv4.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("to", ["fp8", "same"])
@pytest.mark.fast_cases(1)
def test_the_engines_config(to: str, source: Path, tmp_path: Path) -> None:
    """From the released inference/config.json, or made from config.json where there is none: the same either way."""
    released = read_json(source / "inference" / "config.json")
    expected = released if to == "same" else {k: v for k, v in released.items() if k != "expert_dtype"}
    convert(source, tmp_path / "shipped", *MP, 1, "--to", to)
    assert list(read_json(tmp_path / "shipped" / "config.json").items()) == list(expected.items())
    bare = VARIANTS["release"](tmp_path / "bare")
    (bare / "inference" / "config.json").unlink()
    convert(bare, tmp_path / "made", *MP, 1, "--to", to)
    assert list(read_json(tmp_path / "made" / "config.json").items()) == list(expected.items())


def test_three_draft_stages_are_counted_by_their_names(tmp_path: Path) -> None:
    """config.json of the 0731 releases says one stage where three exist."""
    source = VARIANTS["release"](tmp_path / "source")
    stage = {n: t for n, t in tensors_of(source).items() if n.startswith("mtp.0.")}
    edit_tensors(source, {n.replace("mtp.0.", f"mtp.{i}."): t for n, t in stage.items() for i in (1, 2)})
    (source / "inference" / "config.json").unlink()
    convert(source, tmp_path / "out", *MP, 1)
    made = read_json(tmp_path / "out" / "config.json")
    assert made["n_mtp_layers"] == 3 and list(made).index("n_mtp_layers") == list(made).index("n_hash_layers") + 1


def test_a_base_source(tmp_path: Path) -> None:
    """FP8 experts and float32 scales stay; wo_a is decoded."""
    source = VARIANTS["base"](tmp_path / "source")
    convert(source, tmp_path / "ours", *MP, 2)
    reference_converter.convert(source, tmp_path / "theirs", 2, "fp8")
    for rank in (0, 1):
        shard = f"model{rank}-mp2.safetensors"
        assert read_file(tmp_path / "ours" / shard) == read_file(tmp_path / "theirs" / shard)


def test_names_of_hugging_face_conversions(tmp_path: Path) -> None:
    """`model.layers.0.self_attn…` becomes the engine's; the vision tower's own `mlp` stays."""
    source = VARIANTS["release"](tmp_path / "source")
    tensors = tensors_of(source)
    renamed = {
        f"model.{n}".replace("ffn.", "mlp.").replace("attn.", "self_attn.").replace(".scale", ".weight_scale_inv"): n
        for n in tensors
        if n.startswith("layers.0.") and ".experts." not in n
    }
    edit_tensors(source, {new: tensors[old] for new, old in renamed.items()}, drop=tuple(renamed.values()))
    edit_tensors(source, {"vision.blocks.0.mlp.w1.weight": strangers()["vision.blocks.0.mlp.w1.weight"]})
    convert(source, tmp_path / "out", *MP, 1, "--to", "same")
    made = read_file(tmp_path / "out" / "model0-mp1.safetensors")
    original = VARIANTS["release"](tmp_path / "original")
    convert(original, tmp_path / "expected", *MP, 1, "--to", "same")
    expected = read_file(tmp_path / "expected" / "model0-mp1.safetensors")
    assert made.pop("vision.blocks.0.mlp.w1.weight") == strangers()["vision.blocks.0.mlp.w1.weight"]
    wo_a = "layers.0.attn.wo_a.weight"
    assert made == expected, sorted(made.keys() ^ expected.keys()) or wo_a


def test_copies_of_the_embedding_are_left_out(source: Path, tmp_path: Path) -> None:
    folder = VARIANTS["release"](tmp_path / "source")
    matrix = tensors_of(source)["embed.weight"]
    left = ("mtp.0.embed.weight", "mtp.0.head.weight", "mtp.0.emb_tokens.weight")
    kept = ("mtp.0.markov_head.embed.weight", "mtp.0.markov_head.head.weight")
    edit_tensors(folder, dict.fromkeys((*left, *kept), matrix))
    convert(folder, tmp_path / "out", *MP, 1)
    made = read_file(tmp_path / "out" / "model0-mp1.safetensors")
    assert set(kept) <= made.keys() and not set(left) & made.keys()


def test_manifest_names_every_slice(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", *MP, 2)
    manifest = read_json(tmp_path / "out" / "dsv4.json")
    ranks = {
        f"model{rank}-mp2.safetensors": read_file(tmp_path / "out" / f"model{rank}-mp2.safetensors") for rank in (0, 1)
    }
    assert manifest["tensors"].keys() == {name for tensors in ranks.values() for name in tensors}
    prefixes = {shard: prefix_sha256(tmp_path / "out" / shard) for shard in ranks}
    for name, entry in manifest["tensors"].items():
        holders = {shard: tensors[name] for shard, tensors in ranks.items() if name in tensors}
        digests = {shard: prefixes[shard][name] for shard in holders}
        assert entry["prefix_sha256"] == digests[entry["shard"]]
        assert entry.get("prefix_sha256_by_shard", digests) == digests, name
        assert ("prefix_sha256_by_shard" in entry) == (len(holders) > 1)
        assert entry["shape"] == list(holders[entry["shard"]].shape)
    for name, said in manifest["shards"].items():
        assert said["sha256"] == sha256((tmp_path / "out" / name).read_bytes())
    cast = experts(tensors_of(source))
    assert manifest["summary"]["cast_tensors"] == len(cast)
    zeros = sum(int((packed_codes(tensors_of(source)[name]) == 8).sum()) for name in cast)
    assert manifest["summary"]["negative_zeros"] == zeros


class TestRefused:
    def refused(self, source: Path, output: Path, ranks: int, *words: str, code: int = 3) -> None:
        found, _, err = dsv4("convert", source, output, *MP, ranks)
        assert found == code and all(word in err for word in words), err
        assert not output.exists() or tree(output) == {}

    def test_a_dimension_that_ranks_do_not_divide(self, source: Path, tmp_path: Path) -> None:
        self.refused(source, tmp_path / "out", 3, "3 ranks", "--model-parallel", code=2)

    def test_experts_that_ranks_do_not_share(self, tmp_path: Path) -> None:
        geometry = Geometry(vocab_size=60, compress_ratios=(0,), num_nextn_predict_layers=0, n_routed_experts=4,
                            num_attention_heads=3, o_groups=3, num_hash_layers=0)  # fmt: skip
        make_checkpoint(tmp_path / "source", geometry=geometry)
        self.refused(tmp_path / "source", tmp_path / "out", 3, "4 experts", "3 ranks")

    @pytest.mark.parametrize("name", ["wq_b", "wo_b", "wo_a"])
    def test_blocks_that_ranks_would_cut(self, name: str, tmp_path: Path) -> None:
        """Equal slices and equal slices of the scales, but a scale would belong to two ranks: values would change."""
        geometry = {
            "wq_b": Geometry(compress_ratios=(0,), head_dim=96, num_attention_heads=2, o_groups=1, o_lora_rank=256),
            "wo_b": Geometry(compress_ratios=(0,), o_groups=2, o_lora_rank=96, num_attention_heads=2),
            "wo_a": Geometry(compress_ratios=(0,), o_groups=2, o_lora_rank=96, num_attention_heads=2),
        }[name]
        geometry = Geometry(**(geometry.__dict__ | {"num_nextn_predict_layers": 0, "vocab_size": 64}))
        make_checkpoint(tmp_path / "source", geometry=geometry)
        if name == "wo_b":  # as in checkpoints whose wo_a is BF16 already
            wo_a = "layers.0.attn.wo_a"
            decoded = reference_converter.decode_fp8(
                *(tensors_of(tmp_path / "source")[wo_a + s] for s in (".weight", ".scale"))
            )
            edit_tensors(tmp_path / "source", {wo_a + ".weight": decoded}, drop=(wo_a + ".scale",))
        self.refused(
            tmp_path / "source", tmp_path / "out", 2, f"layers.0.attn.{name}.weight", "would cut its blocks", code=2
        )

    def test_ragged_blocks_on_one_rank_are_fine(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path / "source", geometry=RAGGED)
        convert(tmp_path / "source", tmp_path / "out", *MP, 1)
        old, new = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
        assert all(same_bits(values(name, old), values(name, new)) for name in experts(new))

    def test_names_that_become_one(self, source: Path, tmp_path: Path) -> None:
        folder = VARIANTS["release"](tmp_path / "source")
        edit_tensors(folder, {"model.norm.weight": tensors_of(folder)["norm.weight"]})
        self.refused(folder, tmp_path / "out", 1, "norm.weight", "model.norm.weight")

    def test_a_config_without_the_keys_for_the_engine(self, tmp_path: Path) -> None:
        folder = VARIANTS["release"](tmp_path / "source")
        (folder / "inference" / "config.json").unlink()
        edit_config(folder, q_lora_rank=None)
        self.refused(folder, tmp_path / "out", 1, "config.json", "q_lora_rank")


def inexact_wo_a(folder: Path) -> tuple[Path, Tensors]:
    """wo_a with float32 scales that are no powers of two: decoding it rounds."""
    make_checkpoint(folder, geometry=SMALL, experts="fp8")
    tensors, new = tensors_of(folder), {}
    for name, tensor in tensors.items():
        if name.endswith("wo_a.scale"):
            new[name] = raw("F32", tensor.array() * np.float32(1.1))
    edit_tensors(folder, new)
    return folder, tensors_of(folder)


def test_what_is_kept_is_sliced_too(tmp_path: Path) -> None:
    source, old = inexact_wo_a(tmp_path / "source")
    code, _, err = dsv4("convert", source, tmp_path / "out", *MP, 2)
    assert code == 3 and "layers.0.attn.wo_a.weight" in err
    convert(source, tmp_path / "out", *MP, 2, "--on-inexact", "keep")
    for rank in (0, 1):
        new = read_file(tmp_path / "out" / f"model{rank}-mp2.safetensors")
        for name in ("layers.0.attn.wo_a.weight", "layers.0.attn.wo_a.scale"):
            half = old[name].shape[0] // 2
            assert (new[name].array() == old[name].array()[rank * half : (rank + 1) * half]).all()
    assert json.loads((tmp_path / "out" / "dsv4.json").read_text())["kept_tensors"] == [
        "layers.0.attn.wo_a.weight", "mtp.0.attn.wo_a.weight",
    ]  # fmt: skip


def test_rounded_slices_are_all_counted(tmp_path: Path) -> None:
    source, old = inexact_wo_a(tmp_path / "source")
    convert(source, tmp_path / "out", *MP, 2, "--on-inexact", "round")
    changed = 0
    for rank in (0, 1):
        new = read_file(tmp_path / "out" / f"model{rank}-mp2.safetensors")
        for name in [name for name in new if name.endswith("wo_a.weight")]:
            half = old[name].shape[0] // 2
            changed += int((values(name, new) != values(name, old)[rank * half : (rank + 1) * half]).sum())
    assert scale_of("layers.0.attn.wo_a.weight", new) is None
    assert read_json(tmp_path / "out" / "dsv4.json")["summary"]["changed_elements"] == changed > 0
