"""BF16 back to the release's formats: the release's bytes where BF16 shows them, equal values everywhere, and what has
no exact form is found by ml_dtypes as well."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_variants import SMALL
from exact_values import (
    convert,
    different_values,
    dsv4,
    edit_tensors,
    experts,
    packed_codes,
    read_json,
    same_bits,
    tensors_of,
    values,
)
from jobs import job_of
from raw_safetensors import Tensors, raw
from tiny import RAGGED, flipped

from dsv4.convert.plan.recipes.recipe import Piece, Scan
from dsv4.convert.plan.settings import resolve
from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import EDITIONS, AnyGeometry, V41Geometry, make_checkpoint

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times

UNEVEN = replace(RAGGED, vocab_size=64, compress_ratios=(4, 0))
GEOMETRIES: dict[str, AnyGeometry] = {**EDITIONS, "uneven": UNEVEN}
EXPERT = "layers.0.ffn.experts.2.w2.weight"
DENSE = "layers.0.attn.wq_b.weight"


def block_of(geometry: AnyGeometry) -> tuple[int, int]:
    return (32, 32) if isinstance(geometry, V41Geometry) else (128, 128)


def by_the_rule(folder: Path) -> Path:
    """The experts' scales as a release has them: 2**ceil(log2(largest magnitude / 6)), the largest code 3, 4 or 6."""
    tensors, new = tensors_of(folder), dict[str, np.ndarray]()
    for name in experts(tensors):
        codes = packed_codes(tensors[name])
        groups = codes.reshape(len(codes), -1, 32)
        groups[:, :, 1] = 9  # -0.5 in each: twice the scale could not hold it
        groups[:, :, 0] = np.where((groups & 7).max(2) < 5, 6, groups[:, :, 0])  # a 4 in groups of small codes
        codes = groups.reshape(codes.shape)
        new[name] = codes[:, 0::2] | codes[:, 1::2] << 4
    edit_tensors(folder, {name: raw("I8", packed) for name, packed in new.items()})
    return folder


def bf16_by_ml_dtypes(folder: Path, block: tuple[int, int]) -> None:
    """In place, without dsv4: every quantized weight as BF16, no scales, no word of quantization in config.json."""
    tensors = tensors_of(folder)
    scales = [n for n in tensors if n.endswith(".scale") and n.removesuffix("scale") + "weight" in tensors]
    wide = {
        name: values(name, tensors, block).astype(ml_dtypes.bfloat16).view(np.uint16)
        for name in (scale.removesuffix("scale") + "weight" for scale in scales)
    }
    edit_tensors(folder, {name: raw("BF16", bits) for name, bits in wide.items()}, tuple(scales))
    config = read_json(folder / "config.json")
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("edition", GEOMETRIES)
def test_a_release_comes_back(edition: str, tmp_path: Path) -> None:
    """Names, dtypes, shapes, config, and every tensor to the byte."""
    release = by_the_rule(make_checkpoint(tmp_path / "release", geometry=GEOMETRIES[edition]))
    convert(release, tmp_path / "bf16", "--to", "bf16")
    said = convert(tmp_path / "bf16", tmp_path / "back", "--to", "fp4")
    assert "every block exact" in said
    before, after = tensors_of(release), tensors_of(tmp_path / "back")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert different_values(before, after, block_of(GEOMETRIES[edition])) == []
    assert [name for name in before if before[name].data != after[name].data] == []
    assert read_json(tmp_path / "back" / "config.json") == read_json(release / "config.json")
    assert read_json(tmp_path / "back/inference/config.json") == read_json(release / "inference/config.json")
    assert verify(tmp_path / "bf16", tmp_path / "back").exit_code == 0


@pytest.mark.parametrize("edition", GEOMETRIES)
@pytest.mark.fast_cases(1)
def test_through_fp8_as_well(edition: str, tmp_path: Path) -> None:
    """Also experts whose scales do not follow from their values."""
    release = make_checkpoint(tmp_path / "release", geometry=GEOMETRIES[edition])
    convert(release, tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16", "--to", "bf16")
    convert(tmp_path / "bf16", tmp_path / "back", "--to", "fp4")
    before, after = tensors_of(release), tensors_of(tmp_path / "back")
    assert [name for name in before if before[name].data != after[name].data] == []
    assert verify(release, tmp_path / "back").exit_code == 0


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    """A BF16 checkpoint that dsv4 did not write."""
    folder = by_the_rule(make_checkpoint(tmp_path / "others", geometry=SMALL))
    bf16_by_ml_dtypes(folder, (128, 128))
    return folder


@pytest.mark.parametrize("options", [("--to", "fp4"), (), ("--target", "vllm"), ("--target", "sglang")])
@pytest.mark.fast_cases(1)
def test_folders_of_others(options: tuple[str, ...], bf16: Path, tmp_path: Path) -> None:
    release = by_the_rule(make_checkpoint(tmp_path / "release", geometry=SMALL))
    convert(bf16, tmp_path / "out", *options)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(release)
    assert different_values(wanted, found) == []
    if "fp4" in options:  # by the release's rule: nothing recorded another scale
        assert [n for n in found if ".experts." in n and found[n].data != wanted[n].data] == []
    assert found[EXPERT].dtype == ("I8" if "fp4" in options else "F8_E4M3")
    assert found[EXPERT.replace("weight", "scale")].dtype == ("F8_E8M0" if {"fp4", "sglang"} & {*options} else "F32")
    assert {found[DENSE].dtype, found["layers.0.attn.wo_a.weight"].dtype} == {"F8_E4M3"}
    assert found["layers.0.attn.compressor.wkv.weight"].dtype == "BF16"
    assert verify(bf16, tmp_path / "out").exit_code == verify(release, tmp_path / "out").exit_code == 0
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["weight_block_size"] == [128, 128]


def test_verify_finds_one_bit_of_damage(bf16: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "out", "--to", "fp4")
    for number, name in enumerate((EXPERT, DENSE)):
        for part in (name, name.replace("weight", "scale")):
            found = verify(bf16, flipped(tmp_path / "out", tmp_path / f"damaged{number}{part[-5:]}", part))
            assert found.exit_code == 1
            different = {result.name for result in found.results if result.status == "*"}
            assert different == {name, name.replace("weight", "scale")}, part


def test_scales_are_the_same_where_memory_was_too_short_to_keep_them(bf16: Path, tmp_path: Path) -> None:
    job = job_of(bf16, resolve("fp4"), tmp_path / "out")
    tensors = [t for shard in job.plan.shards for t in shard.tensors if t.made_by_scan_of]
    assert len(tensors) > 10
    by_name = {t.name: t for shard in job.plan.shards for t in shard.tensors}
    for tensor in tensors:
        recipe, weight = tensor.recipe, by_name[tensor.made_by_scan_of]
        scan = recipe.scan(job.checkpoint, Piece(weight, 0, weight.rows))
        piece = Piece(tensor, 0, tensor.rows)
        kept = recipe.compute(job.checkpoint, piece, scan)
        again = recipe.compute(job.checkpoint, piece, Scan(scan.counts))
        assert np.array_equal(kept.data, again.data) and kept.data.size
    job.checkpoint.close()


def test_rank_files_of_a_bf16_folder(bf16: Path, tmp_path: Path) -> None:
    """wo_b is cut into columns, wq_b into rows; wo_a stays BF16 there."""
    convert(bf16, tmp_path / "mp2", "--layout", "mp", "--model-parallel", "2")
    assert verify(bf16, tmp_path / "mp2").exit_code == 0
    release = by_the_rule(make_checkpoint(tmp_path / "release", geometry=SMALL))
    assert verify(release, tmp_path / "mp2").exit_code == 0


def damaged(folder: Path, name: str, places: list[tuple[int, int]], factor: float) -> np.ndarray:
    """Change elements of a BF16 tensor in place. Returns its values."""
    tensor = tensors_of(folder)[name]
    bits = tensor.array().copy()
    exact = bits.view(ml_dtypes.bfloat16)
    for place in places:
        exact[place] = ml_dtypes.bfloat16(float(exact[place]) * factor if exact[place] else 1e-20)
    edit_tensors(folder, {name: raw("BF16", bits)})
    return exact.astype(np.float64)


def has_exact_form(block: np.ndarray, dtype: type) -> bool:
    """Whether any power of two divides all elements into values of the format, by ml_dtypes."""
    exponents = np.arange(-127, 128)
    scaled = np.ldexp(block[None], -exponents.reshape(-1, *[1] * block.ndim))
    largest = float(ml_dtypes.finfo(dtype).max)
    fits = np.abs(scaled) <= largest
    back = np.where(fits, scaled, 0).astype(np.float32).astype(dtype).astype(np.float64)
    return bool((fits & (back == scaled)).reshape(len(exponents), -1).all(1).any())


PLANTED = {
    EXPERT: ([(0, 3), (5, 40), (5, 41)], ml_dtypes.float4_e2m1fn, (1, 32), {(0, 0), (5, 1)}),
    DENSE: ([(2, 2), (130, 4)], ml_dtypes.float8_e4m3fn, (128, 128), {(0, 0), (1, 0)}),
}


class TestPlanted:
    """Elements that no code has, in two experts' groups and two blocks of a dense weight."""

    @pytest.fixture
    def source(self, bf16: Path) -> Path:
        for name, (places, dtype, block, blocks) in PLANTED.items():
            exact = damaged(bf16, name, places, 1.1)
            found = {
                (r // block[0], c // block[1])
                for r in range(0, exact.shape[0], block[0])
                for c in range(0, exact.shape[1], block[1])
                if not has_exact_form(exact[r : r + block[0], c : c + block[1]], dtype)
            }
            assert found == blocks, "planted wrongly"
        return bf16

    def test_they_are_named_and_nothing_is_written(self, source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", "--to", "fp4")
        assert code == 3 and not list((tmp_path / "out").glob("*.safetensors"))
        name, (_, _, _, blocks) = next(iter(PLANTED.items()))
        for block in blocks:
            assert f"{name}: " in err and f"block {block}: " in err
        assert "to zero, by up to" in err

    def test_round_counts_them_and_gives_the_nearest(self, source: Path, tmp_path: Path) -> None:
        said = convert(source, tmp_path / "out", "--to", "fp4", "--on-inexact", "round")
        before, after = tensors_of(source), tensors_of(tmp_path / "out")
        changed = {n: int((values(n, before) != values(n, after)).sum()) for n in PLANTED}
        manifest = read_json(tmp_path / "out" / "dsv4.json")
        assert set(different_values(before, {**before, **after})) == {*PLANTED}
        for name, (_, _, _, blocks) in PLANTED.items():
            entry = manifest["tensors"][name]
            assert (entry["inexact_blocks"], entry["changed_elements"]) == (len(blocks), changed[name])
            assert entry["max_error"] == np.abs(values(name, before) - values(name, after)).max() > 0
        assert manifest["summary"]["changed_elements"] == sum(changed.values()) > 0
        assert "NOT exact" in said
        assert verify(source, tmp_path / "out").exit_code == 1

    def test_keep_leaves_them(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", "--to", "fp4", "--on-inexact", "keep")
        before, after = tensors_of(source), tensors_of(tmp_path / "out")
        assert all(before[name].data == after[name].data for name in PLANTED)
        assert different_values(before, after) == []
        assert read_json(tmp_path / "out" / "dsv4.json")["kept_tensors"] == sorted(PLANTED)


def test_values_that_were_trained_in_bf16(tmp_path: Path) -> None:
    """Rounded to nearest under the rule's scale: no element is further off than half a step of its group."""
    folder = make_checkpoint(tmp_path / "tuned", geometry=SMALL)
    bf16_by_ml_dtypes(folder, (128, 128))
    shape = tensors_of(folder)[EXPERT].shape
    trained = np.random.default_rng(1).standard_normal(shape).astype(ml_dtypes.bfloat16)
    edit_tensors(folder, {EXPERT: raw("BF16", trained.view(np.uint16))})
    convert(folder, tmp_path / "out", "--to", "fp4", "--on-inexact", "round")
    exact = trained.astype(np.float64).reshape(shape[0], -1, 32)
    scale = np.exp2(np.ceil(np.log2(np.abs(exact).max(2) / 6)))[:, :, None]
    nearest = (exact / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    assert same_bits(values(EXPERT, tensors_of(tmp_path / "out")), nearest.reshape(shape))


def test_infinity_is_an_error(bf16: Path, tmp_path: Path) -> None:
    damaged(bf16, EXPERT, [(1, 1)], float("inf"))
    code, _, err = dsv4("convert", bf16, tmp_path / "out", "--to", "fp4", "--on-inexact", "round")
    assert code == 3 and EXPERT in err and "infinity" in err


class TestWoA:
    """SGLang's published folders: FP8 experts, wo_a in BF16."""

    @pytest.fixture
    def sglang(self, tmp_path: Path) -> Path:
        release = make_checkpoint(tmp_path / "release", geometry=SMALL)
        convert(release, tmp_path / "sglang", "--target", "sglang", "--wo-a", "bf16")
        return tmp_path / "sglang"

    @pytest.mark.parametrize("options", [("--target", "vllm"), ("--to", "same", "--wo-a", "fp8")])
    def test_it_returns_to_fp8(self, sglang: Path, options: tuple[str, ...], tmp_path: Path) -> None:
        config = read_json(sglang / "config.json")
        config["quantization_config"]["ignored_layers"] = ["layers.0.attn.wo_a", "head"]
        (sglang / "config.json").write_text(json.dumps(config), encoding="utf-8")
        convert(sglang, tmp_path / "out", *options)
        found = tensors_of(tmp_path / "out")
        scale = "F32" if "vllm" in options else "F8_E8M0"
        for name in (n for n in found if n.endswith("attn.wo_a.weight")):
            assert (found[name].dtype, found[name.replace("weight", "scale")].dtype) == ("F8_E4M3", scale)
        assert different_values(tensors_of(tmp_path / "release"), found) == []
        assert read_json(tmp_path / "out/config.json")["quantization_config"]["ignored_layers"] == ["head"]

    def test_doctor_accepts_the_folder_for_vllm(self, sglang: Path, tmp_path: Path) -> None:
        assert dsv4("doctor", sglang, "--for", "vllm")[0] == 1
        convert(sglang, tmp_path / "out", "--target", "vllm")
        assert dsv4("doctor", tmp_path / "out", "--for", "vllm")[0] == 0

    def test_one_that_is_no_fp8_is_named(self, sglang: Path, tmp_path: Path) -> None:
        name = "layers.0.attn.wo_a.weight"
        damaged(sglang, name, [(0, 1)], 1.01)
        code, _, err = dsv4("convert", sglang, tmp_path / "out", "--target", "vllm")
        assert code == 3 and name in err and "block (0, 0)" in err


def test_experts_of_draft_stages_that_somebody_left_in_bf16_stay(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "release", geometry=SMALL)
    before = tensors_of(folder)
    stems = {n.removesuffix("weight") for n in experts(before) if n.startswith("mtp.")}
    new: Tensors = {
        f"{stem}weight": raw("BF16", values(f"{stem}weight", before).astype(ml_dtypes.bfloat16).view(np.uint16))
        for stem in stems
    }
    edit_tensors(folder, new, tuple(f"{stem}scale" for stem in stems))
    convert(folder, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert stems and {after[f"{stem}weight"].dtype for stem in stems} == {"BF16"}


def test_other_dtypes_of_experts_are_refused(bf16: Path, tmp_path: Path) -> None:
    wide = tensors_of(bf16)[EXPERT].array().view(ml_dtypes.bfloat16).astype(np.float32)
    edit_tensors(bf16, {EXPERT: raw("F32", wide)})
    code, _, err = dsv4("convert", bf16, tmp_path / "out", "--to", "fp4")
    assert code == 3 and EXPERT in err and "F32" in err


def test_inspect_says_what_size_it_would_be(bf16: Path, tmp_path: Path) -> None:
    code, out, _ = dsv4("inspect", bf16, "--json")
    sizes = json.loads(out)["converted_bytes"]
    for option in ("--to fp4", "--to fp8"):
        convert(bf16, tmp_path / option[-3:], *option.split())
        total = read_json(tmp_path / option[-3:] / "model.safetensors.index.json")["metadata"]["total_size"]
        assert sizes[option] == total
    assert code == 0
