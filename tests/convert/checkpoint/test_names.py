"""What follows from the name of a tensor or a file: both spellings, and near misses."""

import pytest

from dsv4.convert.checkpoint import names


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.3.attn.wkv.weight", ("layers", 3, "attn.wkv.weight")),
        ("model.layers.12.self_attn.wkv.weight", ("layers", 12, "self_attn.wkv.weight")),
        ("mtp.0.e_proj.scale", ("mtp", 0, "e_proj.scale")),
        ("embed.weight", None),
        ("vision.layers.3.attn.weight", None),
        ("layers.x.attn.weight", None),
        ("layers.3", None),
    ],
)
def test_blocks(name: str, block: tuple[str, int, str] | None) -> None:
    assert names.block_of(name) == block


@pytest.mark.parametrize(
    ("name", "expert", "routed", "matrix"),
    [
        ("layers.3.ffn.experts.7.w1.weight", ("layers.3.ffn", 7, "w1.weight"), True, True),
        ("model.layers.3.mlp.experts.255.w2.weight", ("model.layers.3.mlp", 255, "w2.weight"), True, True),
        ("mtp.1.ffn.experts.0.w3.weight", ("mtp.1.ffn", 0, "w3.weight"), True, True),
        ("layers.3.ffn.experts.7.w1.scale", ("layers.3.ffn", 7, "w1.scale"), True, False),
        ("layers.3.ffn.experts.7.w4.weight", ("layers.3.ffn", 7, "w4.weight"), True, False),
        ("vision.experts.7.w1.weight", ("vision", 7, "w1.weight"), False, False),
        ("layers.3.ffn.shared_experts.w1.weight", None, False, False),
        ("layers.3.ffn.experts.bias_vl", None, False, False),
    ],
)
def test_experts(name: str, expert: tuple[str, int, str] | None, routed: bool, matrix: bool) -> None:
    assert names.expert_of(name) == expert
    assert (names.is_routed_expert(name), names.is_expert_matrix(name)) == (routed, matrix)


def test_wo_a() -> None:
    assert names.is_wo_a("layers.0.attn.wo_a.weight") and names.is_wo_a("model.layers.0.self_attn.wo_a.weight")
    assert not names.is_wo_a("layers.0.attn.wo_a.scale") and not names.is_wo_a("layers.0.attn.wo_ab.weight")


def test_draft_stages() -> None:
    found = ["mtp.0.a.weight", "mtp.2.b.weight", "layers.5.c.weight", "model.mtp.2.d"]
    assert names.draft_stages(found) == {0, 2} and names.count_draft_stages(found) == 3
    assert names.draft_stages([]) == set() and names.count_draft_stages([]) == 0


def test_scales() -> None:
    tensors = {name: name for name in ("a.scale", "b.weight_scale_inv", "c.scale", "c.weight_scale_inv", "d")}
    assert names.scales_of("a.weight", tensors) == ["a.scale"]
    assert names.scales_of("b.weight", tensors) == ["b.weight_scale_inv"]
    assert names.scales_of("c.weight", tensors) == ["c.scale", "c.weight_scale_inv"]
    assert names.scales_of("d", tensors) == [] and names.scales_of("a", tensors) == []
    assert names.scale_name("a.weight") == "a.scale"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("layers.3.ffn.experts.7.w1.weight", ("layers.3.ffn", "w1.weight", "7")),
        ("a.experts.1.b.experts.22.w1.scale", ("a.experts.1.b", "w1.scale", "22")),
        ("layers.3.ffn.shared_experts.w1.weight", ("layers.3.ffn.shared_experts.w1.weight", "", "")),
        ("layers.3.ffn.experts.bias", ("layers.3.ffn.experts.bias", "", "")),
        ("layers.3.ffn.experts.7", ("layers.3.ffn.experts.7", "", "")),
        ("layers.3.ffn.experts.7.", ("layers.3.ffn.experts.7.", "", "")),
        ("layers.3.ffn.experts.x7.w1.weight", ("layers.3.ffn.experts.x7.w1.weight", "", "")),
        ("experts.7.w1.weight", ("experts.7.w1.weight", "", "")),
    ],
)
def test_a_name_without_the_number_of_its_expert(name: str, parts: tuple[str, str, str]) -> None:
    assert names.without_expert(name) == parts
    module, _, number = parts
    expert = names.expert_of(name)
    assert (expert is not None) == bool(number)
    assert expert is None or (expert.module, str(expert.number)) == (module, number)


@pytest.mark.parametrize(
    ("scale", "weight"),
    [("a.scale", "a.weight"), ("a.weight_scale_inv", "a.weight"), ("a.weight_scale_2", "a.weight"),
     ("a.input_scale", "a.weight")],
)  # fmt: skip
def test_the_weight_of_a_scale(scale: str, weight: str) -> None:
    assert names.is_scale(scale) and names.weight_of_scale(scale) == weight


def test_what_only_looks_like_a_scale() -> None:
    for name in ("hc_head_scale", "layers.0.hc_attn_scale", "layers.0.scale.weight", "scale"):
        assert not names.is_scale(name)
    with pytest.raises(ValueError, match="hc_head_scale"):
        names.weight_of_scale("hc_head_scale")


def test_rank_files() -> None:
    assert names.rank_file(names.rank_file_name(3, 8)) == (3, 8)
    for file in (
        "model-00001-of-00002.safetensors",
        "model0-mp2.bin",
        "model0-mp.safetensors",
        "xmodel0-mp2.safetensors",
    ):
        assert names.rank_file(file) is None


def test_patterns() -> None:
    assert names.pattern_of("layers.3.ffn.experts.7.w1.weight") == "layers.{L}.ffn.experts.{E}.w1.weight"
    assert names.pattern_of("mtp.1.norm.weight") == "mtp.{M}.norm.weight"
