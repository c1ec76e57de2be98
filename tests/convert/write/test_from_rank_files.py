"""From the reference engine's rank files back to a Hugging Face folder: names, merged slices, dtypes and config."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_variants import SMALL
from exact_values import convert, different_values, dsv4, edit_config, read_json, tensors_of

from dsv4.convert.proof.run import verify
from dsv4.convert.synthetic.checkpoint import DSpark, make_checkpoint

pytestmark = pytest.mark.slow  # test_rank_files.py reads such files in the fast loop

SPARK = replace(SMALL, compress_ratios=(4, 0, 0, 0), dspark=DSpark(noise_token_id=61, target_layer_ids=(0,)))
GEOMETRIES = {"v4": SMALL, "0731": SPARK, "vision-exp": replace(SPARK, vision=True, rms_norm_eps=1e-20)}


@pytest.fixture(scope="module", params=GEOMETRIES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "release"
    make_checkpoint(folder, geometry=GEOMETRIES[request.param])
    config = read_json(folder / "config.json")
    if any(key.startswith("vision_") for key in config):  # both of this edition's configs have them
        engine = read_json(folder / "inference" / "config.json")
        engine |= {key: value for key, value in config.items() if key.startswith("vision_")}
        engine |= {"norm_eps": config["rms_norm_eps"], "n_mtp_layers": config["num_nextn_predict_layers"]}
        (folder / "inference" / "config.json").write_text(json.dumps(engine), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rank_files(release: Path) -> Callable[..., Path]:
    def made(ranks: int, *options: str) -> Path:
        folder = release.parent / f"mp{ranks}{'-'.join(options)}"
        if not folder.exists():
            convert(release, folder, "--layout", "mp", "--model-parallel", ranks, *options)
        return folder

    return made


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_release_comes_back(ranks: int, release: Path, rank_files: Callable[..., Path], tmp_path: Path) -> None:
    convert(rank_files(ranks, "--to", "same"), tmp_path / "back", "--to", "fp4")
    before, after = tensors_of(release), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert different_values(before, after) == []
    config, released = read_json(tmp_path / "back" / "config.json"), read_json(release / "config.json")
    assert released.pop("transformers_version") and config == released


def test_without_the_manifest_values_are_equal(release: Path, rank_files: Callable[..., Path], tmp_path: Path) -> None:
    """As of the reference converter's files: nothing says which of two scales that fit wo_a had."""
    copy = shutil.copytree(rank_files(2, "--to", "same"), tmp_path / "ranks")
    (copy / "dsv4.json").unlink()
    convert(copy, tmp_path / "back", "--to", "fp4")
    before, after = tensors_of(release), tensors_of(tmp_path / "back")
    different = {name for name in before if before[name] != after[name]}
    assert different and all(".attn.wo_a." in name for name in different)
    assert different_values(before, after) == []


def test_verify_finds_every_tensor_equal(release: Path, rank_files: Callable[..., Path], tmp_path: Path) -> None:
    """What the rank files lack is copied from the release: files of kilobytes."""
    code, _, err = dsv4("convert", rank_files(2, "--to", "same"), tmp_path / "back", "--to", "fp4")
    assert code == 0 and "note: not beside rank files: encoding/encoding_dsv4.py, generation_config.json; copy" in err
    found = verify(rank_files(2, "--to", "same"), tmp_path / "back")
    assert {result.status for result in found.results} <= {"=", "≈"}
    shutil.copy(release / "generation_config.json", tmp_path / "back")
    shutil.copytree(release / "encoding", tmp_path / "back" / "encoding")
    assert verify(release, tmp_path / "back").exit_code == 0


def test_fp8_experts(release: Path, rank_files: Callable[..., Path], tmp_path: Path) -> None:
    """The same folder as from the release itself."""
    convert(rank_files(2, "--to", "fp8"), tmp_path / "back", "--target", "vllm")
    convert(release, tmp_path / "vllm", "--target", "vllm")
    direct, after = tensors_of(tmp_path / "vllm"), tensors_of(tmp_path / "back")
    assert direct.keys() == after.keys()
    assert [name for name in direct if direct[name] != after[name]] == []
    assert different_values(direct, after) == []
    assert read_json(tmp_path / "back" / "config.json")["expert_dtype"] == "fp8"


def test_other_ranks(rank_files: Callable[..., Path], release: Path, tmp_path: Path) -> None:
    """From 2 rank files to 4: the same files as from the release."""
    convert(rank_files(2, "--to", "same"), tmp_path / "mp4", "--to", "same", "--layout", "mp", "--model-parallel", 4)
    for file in rank_files(4, "--to", "same").glob("*.safetensors"):
        assert (tmp_path / "mp4" / file.name).read_bytes() == file.read_bytes()


class TestBadSources:
    @pytest.fixture
    def copy(self, rank_files: Callable[..., Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(rank_files(2, "--to", "same"), tmp_path / "copy"))

    def test_a_missing_rank(self, copy: Path, tmp_path: Path) -> None:
        (copy / "model1-mp2.safetensors").unlink()
        code, _, err = dsv4("convert", copy, tmp_path / "out", "--to", "fp4")
        assert code == 3 and "model1-mp2.safetensors is missing" in err and not (tmp_path / "out").exists()

    def test_a_key_that_the_config_lacks(self, copy: Path, tmp_path: Path) -> None:
        edit_config(copy, rope_factor=None)
        code, _, err = dsv4("convert", copy, tmp_path / "out", "--to", "fp4")
        assert code == 3 and "rope_factor" in err and not (tmp_path / "out").exists()
