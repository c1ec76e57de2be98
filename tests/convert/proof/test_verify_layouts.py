"""Other people's conversions, whole: what `verify` says about each layout, with the undamaged twin beside it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference_converter
from raw_safetensors import Raw, Tensors, merged, raw, read_folder, write_folder

from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "source"
    make_checkpoint(folder)
    return folder


@pytest.fixture
def tensors(source: Path) -> Tensors:
    return merged(read_folder(source))


def side_files(source: Path, output: Path, **config_edits: object) -> None:
    """Everything beside the tensors, with keys of config.json replaced (None removes)."""
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | config_edits
    config = {key: value for key, value in config.items() if value is not None}
    (output / "config.json").write_text(json.dumps(config))


def fp8_experts(tensors: Tensors) -> Tensors:
    """The experts cast to FP8 by the reference rule, all else as it is."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == "I8":
            scale = name.replace("weight", "scale")
            found[name], found[scale] = reference_converter.cast_to_fp8(tensor, tensors[scale])
    return found


def float_scales(tensors: Tensors) -> Tensors:
    """Every FP8 scale as float32."""
    return {
        name: raw("F32", reference_converter.scale_values(t)) if t.dtype == "F8_E8M0" else t
        for name, t in tensors.items()
    }


def complaints(result: Verification) -> list[str]:
    return [problem.text for problem in result.problems if problem.severity != "note"]


def assert_identical(result: Verification, equal_values: int) -> None:
    assert complaints(result) == []
    assert (result.exit_code, result.counts["≈"]) == (0, equal_values), result.verdict
    assert result.counts["="] == len(result.results) - equal_values


def test_a_copy_is_the_same(source: Path) -> None:
    assert_identical(verify(source, source), 0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
@pytest.mark.fast_cases(1)
def test_reference_ranks(source: Path, tmp_path: Path, ranks: int, expert_dtype: str, tensors: Tensors) -> None:
    reference_converter.convert(source, tmp_path, ranks, expert_dtype)
    result = verify(source, tmp_path)
    packed = [name for name, t in tensors.items() if t.dtype == "I8"]
    wo_a = [name for name in tensors if name.endswith("wo_a.weight")]
    # wo_a and its folded scale always; experts: the dtype tag alone, or weight and scale.
    assert_identical(result, 2 * len(wo_a) + len(packed) * (2 if expert_dtype == "fp8" else 1))
    negative_zeros = sum(
        int((reference_converter.unpacked(tensors[name]) == 8).sum()) for name in packed if expert_dtype == "fp8"
    )
    assert (result.lost_signs, result.gained_signs) == (negative_zeros, 0)
    assert (expert_dtype == "fp8") == (negative_zeros > 0)


def test_ranks_against_ranks(source: Path, tmp_path: Path) -> None:
    reference_converter.convert(source, tmp_path / "one", 1)
    reference_converter.convert(source, tmp_path / "two", 2)
    assert_identical(verify(tmp_path / "one", tmp_path / "two"), 0)


def test_hugging_face_folder_with_float_scales(source: Path, tmp_path: Path, tensors: Tensors) -> None:
    write_folder(tmp_path, {"model.safetensors": float_scales(fp8_experts(tensors))}, index=False)
    side_files(source, tmp_path, expert_dtype="fp8")
    scaled = sum(t.dtype == "F8_E8M0" for t in tensors.values())
    packed = sum(t.dtype == "I8" for t in tensors.values())
    assert_identical(verify(source, tmp_path), scaled + packed)


def hugging_face_name(name: str) -> str:
    parts = {"attn": "self_attn", "ffn": "mlp", "scale": "weight_scale_inv"}
    name = ".".join(parts.get(part, part) for part in name.split("."))
    return "model." + name.replace("gate.bias", "gate.e_score_correction_bias")


def test_other_names_and_other_shards(source: Path, tmp_path: Path, tensors: Tensors) -> None:
    renamed = [(hugging_face_name(name), tensor) for name, tensor in reversed(tensors.items())]
    assert all(name not in tensors for name, _ in renamed)
    shards = {f"model-{k + 1:05d}-of-00007.safetensors": dict(renamed[k::7]) for k in range(7)}
    write_folder(tmp_path, shards)
    side_files(source, tmp_path)
    assert_identical(verify(source, tmp_path), 0)


@pytest.mark.slow
def test_an_index_that_still_lists_the_dropped_scales(source: Path, tmp_path: Path, tensors: Tensors) -> None:
    """As one published conversion does: wo_a in BF16, its scale gone, the index unchanged."""
    found = fp8_experts(tensors)
    dropped = [name for name in tensors if name.endswith("wo_a.scale")]
    for name in dropped:
        weight = name.replace("scale", "weight")
        found[weight] = reference_converter.decode_fp8(tensors[weight], found.pop(name))
    write_folder(tmp_path, {"model-00001-of-00001.safetensors": found})
    side_files(source, tmp_path, expert_dtype=None)
    assert verify(source, tmp_path).exit_code == 0
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(dict.fromkeys(dropped, "model-00001-of-00001.safetensors"))
    path.write_text(json.dumps(index))
    for result in (verify(source, tmp_path), verify(tmp_path)):
        assert result.exit_code == 0 and complaints(result) == []
        assert result.ignored == {"output": {"absent": sorted(dropped)}}


def to_bf16(tensors: Tensors) -> Tensors:
    """Every quantized weight decoded in float64 and stored as BF16."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}
    for name in [name for name in found if name.replace("weight", "scale") in tensors and name.endswith(".weight")]:
        scale = reference_converter.scale_values(tensors[name.replace("weight", "scale")])
        if tensors[name].dtype == "I8":
            values = reference_converter.FP4_VALUES[reference_converter.unpacked(tensors[name])]
            values = np.where(reference_converter.unpacked(tensors[name]) == 8, np.float32(-0.0), values)
            values = values * scale.repeat(32, axis=1)
            found[name] = raw("BF16", (values.view(np.uint32) >> 16).astype(np.uint16))
        else:
            found[name] = reference_converter.decode_fp8(tensors[name], tensors[name.replace("weight", "scale")])
    return found


@pytest.mark.slow
def test_everything_in_bf16(source: Path, tmp_path: Path, tensors: Tensors) -> None:
    write_folder(tmp_path, {"model.safetensors": to_bf16(tensors)})
    side_files(source, tmp_path, expert_dtype=None, quantization_config=None)
    scaled = sum(name.endswith(".scale") for name in tensors)
    result = verify(source, tmp_path, inverse=True)
    assert_identical(result, 2 * scaled)
    rebuilt = result.to_json()["inverse"]
    assert rebuilt["codes"] and rebuilt["sign"] == rebuilt["wrong"] == 0
    assert_identical(verify(tmp_path, source), 2 * scaled)  # the other way round


def test_float32_instead_of_bf16_norms(source: Path, tmp_path: Path, tensors: Tensors) -> None:
    norms = [name for name in tensors if name.endswith("norm.weight")]
    for name in norms:
        wide = tensors[name].array().astype(np.uint32) << 16
        tensors[name] = Raw("F32", wide.shape, wide.tobytes())
    write_folder(tmp_path, {"model.safetensors": tensors})
    side_files(source, tmp_path)
    assert_identical(verify(source, tmp_path), len(norms))


# Ranks that do not fit together.


@pytest.fixture
def ranks(source: Path, tmp_path: Path) -> tuple[Path, list[Tensors]]:
    """A folder for two ranks, and the ranks' tensors to be harmed and written there."""
    reference_converter.convert(source, tmp_path, 2)
    return tmp_path, list(read_folder(tmp_path).values())


def verify_ranks(source: Path, ranks: tuple[Path, list[Tensors]]) -> Verification:
    folder, tensors = ranks
    write_folder(folder, {f"model{rank}-mp2.safetensors": found for rank, found in enumerate(tensors)}, index=False)
    return verify(source, folder)


@pytest.mark.parametrize("name", ["layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale", "norm.weight"])
@pytest.mark.fast_cases(1)
def test_a_copy_that_one_rank_changed(source: Path, ranks: tuple[Path, list[Tensors]], name: str) -> None:
    second = ranks[1][1]
    second[name] = second[name].like(second[name].array() ^ 1)
    result = verify_ranks(source, ranks)
    found = {r.name: r.reason for r in result.results if r.status == "*"}
    assert result.exit_code == 1
    assert found == {name.replace("scale", "weight"): "ranks hold different copies: model1-mp2.safetensors"}


@pytest.mark.parametrize("name", ["layers.0.attn.wo_b.weight", "embed.weight", "layers.0.attn.attn_sink"])
@pytest.mark.fast_cases(1)
def test_slices_in_the_wrong_order(source: Path, ranks: tuple[Path, list[Tensors]], name: str) -> None:
    first, second = ranks[1]
    first[name], second[name] = second[name], first[name]
    result = verify_ranks(source, ranks)
    assert (result.exit_code, {r.name for r in result.results if r.status == "*"}) == (1, {name})


def test_a_slice_that_is_missing(source: Path, ranks: tuple[Path, list[Tensors]]) -> None:
    del ranks[1][1]["embed.weight"]
    result = verify_ranks(source, ranks)
    assert (result.exit_code, {r.name for r in result.results if r.status == "*"}) == (1, {"embed.weight"})
    assert complaints(result) == ["embed.weight is not in rank 1"]


def test_an_expert_in_the_wrong_rank(source: Path, ranks: tuple[Path, list[Tensors]]) -> None:
    first, second = ranks[1]
    name = next(name for name in first if ".experts.0.w1.weight" in name)
    second[name] = first.pop(name)
    result = verify_ranks(source, ranks)
    assert result.exit_code == 1 and result.counts["*"] == 0
    assert complaints(result) == [f"{name} belongs to rank 0, it is in rank 1"]


def test_an_expert_in_two_ranks(source: Path, ranks: tuple[Path, list[Tensors]]) -> None:
    """Also one that holds the same bytes: the engine reads an expert from its own rank only."""
    first, second = ranks[1]
    name = next(name for name in first if ".experts.0.w1.weight" in name)
    second[name] = first[name]
    result = verify_ranks(source, ranks)
    assert result.exit_code == 1 and result.counts["*"] == 0
    assert complaints(result) == [f"{name} belongs to rank 0, it is in rank 0, 1"]


@pytest.mark.parametrize("at", [(0, 0), (7, 5), (37, 5), (63, 7)])
def test_where_a_tensor_in_column_slices_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    """Compared byte for byte, in bands of eight rows."""
    monkeypatch.setattr("dsv4.convert.proof.compare_tensor.BAND_BYTES", 128)
    name, codes = "layers.0.attn.wo_b.weight", np.arange(512, dtype=np.uint16).reshape(64, 8)
    write_folder(tmp_path / "source", {"model.safetensors": {name: raw("BF16", codes)}}, index=False)
    changed = codes.copy()
    changed[at] ^= 1
    halves = {f"model{i}-mp2.safetensors": {name: raw("BF16", changed[:, 4 * i : 4 * i + 4])} for i in range(2)}
    write_folder(tmp_path / "output", halves, index=False)
    (result,) = verify(tmp_path / "source", tmp_path / "output").results
    assert (result.status, result.tally.different) == ("*", 1)
    (first,) = result.tally.first
    assert first["at"] == list(at)
    assert [first[side]["code"] for side in ("source", "output")] == [f"0x{c[at]:04x}" for c in (codes, changed)]


def test_a_rank_that_is_not_there(source: Path, ranks: tuple[Path, list[Tensors]]) -> None:
    (ranks[0] / "model1-mp2.safetensors").unlink()
    result = verify(source, ranks[0])
    assert result.exit_code == 3 and "model1-mp2.safetensors is not there" in complaints(result)
    assert result.counts["-"] > 0


def test_two_conversions_in_one_folder(ranks: tuple[Path, list[Tensors]]) -> None:
    shutil.copy(ranks[0] / "model0-mp2.safetensors", ranks[0] / "model0-mp4.safetensors")
    with pytest.raises(InputError, match="files of several conversions"):
        verify(ranks[0])


def test_what_only_some_releases_have(tmp_path: Path) -> None:
    """Draft heads and indexer, sliced by rows; 1x32 scales on FP8; experts of an MTP stage."""
    random = np.random.default_rng(5)
    tensors: Tensors = {
        "mtp.2.markov_head.markov_w1.weight": raw("BF16", random.integers(0, 1 << 15, (8, 4), dtype=np.uint16)),
        "layers.2.attn.indexer.weights_proj.weight": raw("BF16", random.integers(0, 99, (4, 4), dtype=np.uint16)),
        "layers.1.engram.embed.weight": raw("F8_E4M3", random.integers(0, 127, (6, 64), dtype=np.uint8)),
        "layers.1.engram.embed.scale": raw("F8_E8M0", random.integers(99, 130, (6, 2), dtype=np.uint8)),
    }
    for expert in range(4):
        tensors[f"mtp.0.ffn.experts.{expert}.w1.weight"] = raw("I8", random.integers(0, 256, (4, 16), dtype=np.uint8))
        tensors[f"mtp.0.ffn.experts.{expert}.w1.scale"] = raw("F8_E8M0", np.full((4, 1), 120 + expert, np.uint8))
    write_folder(tmp_path / "source", {"model.safetensors": tensors}, index=False)
    reference_converter.convert(tmp_path / "source", tmp_path / "output", 2)
    split = read_folder(tmp_path / "output")["model1-mp2.safetensors"]
    assert split["mtp.2.markov_head.markov_w1.weight"].shape == (4, 4)
    assert_identical(verify(tmp_path / "source", tmp_path / "output"), 4)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no safetensors file"):
        verify(tmp_path, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        verify(tmp_path / "absent", tmp_path)
