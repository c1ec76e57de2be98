"""`--to mxfp8` and `--to mxfp4` as the library compressed-tensors reads them, and folders that others made."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_variants import VARIANTS
from compressed_tensors_reader import compressed_anew, decompressed, linear_modules, quantization_of, scheme_of
from exact_values import convert, dsv4, edit_config, edit_tensors, experts, read_json, same_bits, tensors_of, values
from raw_safetensors import raw
from tiny import RAGGED

from dsv4.convert import verify
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

pytestmark = pytest.mark.slow  # the library alone takes seconds to import

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0, 0), num_hash_layers=1, n_routed_experts=4, index_n_heads=4)
FORMATS = {"mxfp8": {"mxfp8-quantized"}, "mxfp4": {"mxfp4-pack-quantized", "mxfp8-quantized"}}


@pytest.fixture(scope="module", params=["small", "ragged", "fp8 experts"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "source"
    kind = "fp8" if request.param == "fp8 experts" else "fp4"
    return make_checkpoint(folder, seed=7, geometry=RAGGED if request.param == "ragged" else SMALL, experts=kind)


@pytest.mark.parametrize("to", FORMATS)
def test_the_library_decompresses_to_the_exact_values(to: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "--to", to)
    before = tensors_of(source)
    quantized = {name for name in before if name.removesuffix("weight") + "scale" in before}
    found = decompressed(tmp_path / "out")
    assert set(found) == quantized and quantized
    assert [name for name in found if not same_bits(found[name], values(name, before))] == []


@pytest.mark.parametrize("to", FORMATS)
def test_the_library_takes_no_other_module_for_quantized(to: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "--to", to)
    config = quantization_of(tmp_path / "out")
    others = linear_modules(tmp_path / "out")
    assert others and not [module for module in others if scheme_of(config, module) is not None]
    has_fp4 = any(tensor.dtype == "I8" for tensor in tensors_of(source).values())
    formats = FORMATS[to] if has_fp4 else {"mxfp8-quantized"}
    assert {scheme.format for scheme in config.config_groups.values()} == formats
    assert config.format == (next(iter(formats)) if len(formats) == 1 else "mixed-precision")


@pytest.mark.parametrize("to", FORMATS)
def test_what_the_library_itself_compresses(to: str, source: Path, tmp_path: Path) -> None:
    """It chooses scales by the largest value of a group: verify finds the values that the library decompresses."""
    out, before = tmp_path / "out", tensors_of(source)
    convert(source, out, "--to", to)
    exact = {name: values(name, before) for name in before if name.removesuffix("weight") + "scale" in before}
    edit_tensors(out, compressed_anew(out, exact))
    (out / "dsv4.json").unlink()
    theirs, found = decompressed(out), verify(source, out)
    changed = {name for name, array in exact.items() if not np.array_equal(theirs[name], array)}
    assert {r.name for r in found.results if r.status == "*" and r.name.endswith(".weight")} == changed
    assert found.exit_code == bool(changed) and not changed & set(experts(before)) and found.counts["≈"] > 0


def test_layers_that_are_stored_in_different_ways_are_named(tmp_path: Path) -> None:
    """No expression fits `wkv` of one layer and not of the other: the config has to name modules."""
    source = make_checkpoint(tmp_path / "source", geometry=SMALL)
    before = tensors_of(source)
    plain = raw("BF16", np.zeros(before["layers.0.attn.wkv.weight"].shape, np.uint16))
    edit_tensors(source, {"layers.0.attn.wkv.weight": plain}, ("layers.0.attn.wkv.scale",))
    convert(source, tmp_path / "out", "--to", "mxfp8")
    config = quantization_of(tmp_path / "out")
    assert scheme_of(config, "layers.0.attn.wkv") is None and scheme_of(config, "layers.1.attn.wkv") is not None
    assert verify(source, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["v41", "base", "strangers", "early"])
def test_every_edition_goes_there_and_back(kind: str, to: str, tmp_path: Path) -> None:
    """V4.1's table of n-grams is no Linear module, and its config has the keys in other places."""
    source = VARIANTS[kind](tmp_path / "source")
    convert(source, tmp_path / "out", "--to", to)
    assert verify(source, tmp_path / "out").exit_code == 0
    if kind == "base":  # its experts are FP8 that never was FP4
        return
    convert(tmp_path / "out", tmp_path / "back", "--to", "fp4")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    expected = read_json(source / "config.json")
    added = {"expert_dtype": "fp4"} if kind == "early" else {}  # which it lacks, and --to fp4 always says
    assert read_json(tmp_path / "back" / "config.json") == expected | added


class TestTheConfigIsChecked:
    """A config that says another thing than the tensors is a difference: a loader would believe it."""

    @pytest.fixture(scope="class")
    @staticmethod
    def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("config")
        source = make_checkpoint(folder / "source", geometry=SMALL)
        convert(source, folder / "out", "--to", "mxfp4")
        return source, folder / "out"

    @pytest.mark.parametrize("damage", ["ignore", "bits", "group size", "targets"])
    def test_damage(self, damage: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
        source, output = pair[0], Path(shutil.copytree(pair[1], tmp_path / "copy"))
        quantization = read_json(output / "config.json")["quantization_config"]
        if damage == "ignore":
            quantization["ignore"] = [name for name in quantization["ignore"] if "gate" not in name]
        elif damage == "targets":
            quantization["config_groups"]["group_0"]["targets"] = ["re:nothing"]
        else:
            key, value = ("num_bits", 6) if damage == "bits" else ("group_size", 16)
            quantization["config_groups"]["group_1"]["weights"][key] = value
        edit_config(output, quantization_config=quantization)
        found = verify(source, output)
        assert found.exit_code == 1 and found.counts["*"] == 0
        assert all("config_groups say of" in problem.text for problem in found.problems)


class TestOtherPeoplesFolders:
    """Without the keys that dsv4 writes for itself; with scales that no release has."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        source = make_checkpoint(tmp_path / "source", geometry=SMALL)
        convert(source, tmp_path / "other", "--to", "mxfp4")
        (tmp_path / "other" / "dsv4.json").unlink()
        quantization = read_json(tmp_path / "other" / "config.json")["quantization_config"]
        del quantization["released"]
        edit_config(tmp_path / "other", quantization_config=quantization, expert_dtype=None)
        return tmp_path / "other"

    def test_it_goes_back(self, folder: Path, tmp_path: Path) -> None:
        convert(folder, tmp_path / "back", "--to", "fp4")
        assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "source")
        assert read_json(tmp_path / "back" / "config.json") == read_json(tmp_path / "source" / "config.json")

    def test_scales_that_differ_within_a_block(self, folder: Path, tmp_path: Path) -> None:
        name = "layers.1.attn.wkv.weight_scale"
        scale = tensors_of(folder)[name]
        array = scale.array().copy()
        array[5, 1] += 1
        edit_tensors(folder, {name: scale.like(array)})
        code, _, err = dsv4("convert", folder, tmp_path / "back", "--to", "fp4")
        assert code == 3 and "layers.1.attn.wkv.scale" in err and "--to bf16" in err
        convert(folder, tmp_path / "bf16", "--to", "bf16")
        assert verify(folder, tmp_path / "bf16").exit_code == 0

    def test_same_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """It would write neither this form nor the release's."""
        code, _, err = dsv4("convert", folder, tmp_path / "same", "--to", "same")
        assert code == 3 and "compressed-tensors" in err and "--to fp4" in err

    def test_a_tensor_under_both_names_is_refused(self, folder: Path, tmp_path: Path) -> None:
        name = experts(tensors_of(tmp_path / "source"))[0]
        edit_tensors(folder, {name: tensors_of(tmp_path / "source")[name]})
        code, _, err = dsv4("convert", folder, tmp_path / "back", "--to", "fp4")
        assert code == 3 and f"both stand for '{name}'" in err
