"""`--to nvfp4`: experts as ModelOpt stores them, the room that E4M3 leaves, and NVFP4 that others made."""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from exact_values import E2M1, convert, dsv4, edit_config, edit_tensors, packed_codes, read_json, same_bits, tensors_of
from exact_values import values as source_values
from raw_safetensors import Tensors, raw

from dsv4.convert import verify
from dsv4.convert.proof.files import LocalFiles, RemoteFiles
from dsv4.convert.proof.forms.nvfp4 import join_scales
from dsv4.convert.proof.layout import open_checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

pytestmark = pytest.mark.slow  # test_forms.py has this form in the fast loop

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0, 0), num_hash_layers=1, n_routed_experts=4, index_n_heads=4)
OPTIONS = ("--to", "nvfp4", "--input-scale", "1.0")
EXPERT = "layers.1.ffn.experts.2"


def values(stem: str, tensors: Tensors) -> np.ndarray:
    """float64 values of a matrix of NVFP4: code * scale of 16 * scale of the matrix, by ml_dtypes."""
    codes = packed_codes(tensors[f"{stem}.weight"])
    scale = tensors[f"{stem}.weight_scale"].array().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return E2M1[codes] * scale.repeat(16, axis=1) * float(tensors[f"{stem}.weight_scale_2"].array())


def matrices(tensors: Tensors) -> list[str]:
    return [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("nvfp4")
    source = make_checkpoint(folder / "source", seed=13, geometry=SMALL)
    convert(source, folder / "out", *OPTIONS)
    return source, folder / "out"


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "source"))


@pytest.fixture
def output(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "output"))


def with_exponents(folder: Path, **exponents: np.ndarray) -> None:
    """Give matrices of EXPERT other scale exponents, broadcast over the groups."""
    tensors, new = tensors_of(folder), {}
    for matrix, chosen in exponents.items():
        scale = tensors[f"{EXPERT}.{matrix}.scale"]
        new[f"{EXPERT}.{matrix}.scale"] = scale.like(np.broadcast_to(chosen + 127, scale.shape).astype(np.uint8))
    edit_tensors(folder, new)


def two_groups(folder: Path, matrix: str, low: int) -> np.ndarray:
    """Exponents of a matrix: 0, but `low` in the last group."""
    exponents = np.zeros(tensors_of(folder)[f"{EXPERT}.{matrix}.scale"].shape, np.int16)
    exponents[-1, -1] = low
    return exponents


class TestValues:
    def test_every_matrix_has_the_source_s_values_and_bytes(self, pair: tuple[Path, Path]) -> None:
        before, after = tensors_of(pair[0]), tensors_of(pair[1])
        found = matrices(after)
        assert len(found) == 2 * 4 * 3
        for stem in found:
            assert same_bits(values(stem, after), source_values(f"{stem}.weight", before))
            assert after[f"{stem}.weight"].data == before[f"{stem}.weight"].data
            assert after[f"{stem}.input_scale"].array() == 1
        quantized = {f"{stem}.{last}" for stem in found for last in ("weight", "scale")}
        others = {name: tensor for name, tensor in before.items() if name not in quantized}
        assert {name: after[name] for name in others} == others
        assert any(name.startswith("mtp.") and ".experts." in name for name in others)

    def test_w1_and_w3_share_a_scale(self, copy: Path, tmp_path: Path) -> None:
        with_exponents(copy, w1=np.array(-3), w2=np.array(5), w3=np.array(-12))
        convert(copy, tmp_path / "out", *OPTIONS)
        after = tensors_of(tmp_path / "out")
        second = {matrix: float(after[f"{EXPERT}.{matrix}.weight_scale_2"].array()) for matrix in ("w1", "w2", "w3")}
        assert second == {"w1": 2.0**-11, "w2": 2.0**-3, "w3": 2.0**-11}
        assert same_bits(values(f"{EXPERT}.w3", after), source_values(f"{EXPERT}.w3.weight", tensors_of(copy)))

    @pytest.mark.slow
    def test_compressed_tensors_decompresses_to_the_same_values(self, pair: tuple[Path, Path]) -> None:
        """Its global scale is a divisor: the reciprocal of a power of two is exact."""
        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import preset_name_to_scheme

        before, after = tensors_of(pair[0]), tensors_of(pair[1])
        scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
        compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        for stem in matrices(after)[:6]:
            scale = torch.from_numpy(after[f"{stem}.weight_scale"].array().copy()).view(torch.float8_e4m3fn)
            state = {
                "weight_packed": torch.from_numpy(after[f"{stem}.weight"].array().copy()),
                "weight_scale": scale,
                "weight_global_scale": torch.tensor([1 / float(after[f"{stem}.weight_scale_2"].array())]),
            }
            found = compressor.decompress(state, scheme)["weight"].double().numpy()
            assert same_bits(found, source_values(f"{stem}.weight", before))


class TestSpan:
    """E4M3 has 18 powers of two: exponents of one expert's w1 and w3 may differ by 17."""

    @pytest.mark.slow
    @pytest.mark.parametrize("low", [-17, -18])
    @pytest.mark.parametrize("matrix", ["w1", "w2"])
    @pytest.mark.fast_cases(1)
    def test_the_limit(self, matrix: str, low: int, copy: Path, tmp_path: Path) -> None:
        others = {"w3": np.array(0)} if matrix == "w1" else {}
        with_exponents(copy, **{matrix: two_groups(copy, matrix, low)}, **others)
        code, _, err = dsv4("convert", copy, tmp_path / "out", *OPTIONS)
        if low == -17:
            assert code == 0 and verify(copy, tmp_path / "out").exit_code == 0
        else:
            assert code == 3 and f"{EXPERT}.{matrix}.weight" in err and "span 18" in err
            assert not (tmp_path / "out" / "config.json").exists()

    def test_w1_counts_with_w3(self, copy: Path, tmp_path: Path) -> None:
        with_exponents(copy, w1=np.array(9), w3=np.array(-9))
        code, _, err = dsv4("convert", copy, tmp_path / "out", *OPTIONS)
        assert code == 3 and f"{EXPERT}.w1.weight" in err and f"{EXPERT}.w3.weight" in err

    @pytest.mark.parametrize("exponent", [-60, 60])
    @pytest.mark.fast_cases(1)
    def test_groups_of_zeros_need_no_room(self, exponent: int, copy: Path, tmp_path: Path) -> None:
        weight = tensors_of(copy)[f"{EXPERT}.w2.weight"]
        array = weight.array().copy()
        array[-1, -16:] = 0x80  # 0 and -0
        edit_tensors(copy, {f"{EXPERT}.w2.weight": weight.like(array)})
        with_exponents(copy, w2=two_groups(copy, "w2", exponent))
        convert(copy, tmp_path / "out", *OPTIONS)
        assert verify(copy, tmp_path / "out").exit_code == 0
        convert(tmp_path / "out", tmp_path / "back", "--to", "fp4")
        assert verify(copy, tmp_path / "back").exit_code == 0

    def test_rounding_is_to_the_nearest_and_counted(self, copy: Path, tmp_path: Path) -> None:
        with_exponents(copy, w2=two_groups(copy, "w2", -19))
        _, out, _ = dsv4("convert", copy, tmp_path / "out", *OPTIONS, "--on-inexact", "round", "--json")
        exact, found = source_values(f"{EXPERT}.w2.weight", tensors_of(copy)), tensors_of(tmp_path / "out")
        rounded = values(f"{EXPERT}.w2", found)
        unit = 2.0**-17
        nearest = (exact / unit).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * unit
        assert same_bits(rounded[-1, -32:], nearest[-1, -32:]) and same_bits(rounded[:-1], exact[:-1])
        changed = int(np.count_nonzero(rounded != exact))
        assert json.loads(out)["changed_elements"] == changed > 0 and not json.loads(out)["exact"]
        compared = verify(copy, tmp_path / "out")
        assert sum(result.tally.different for result in compared.results) == changed


class TestInputScale:
    def test_it_is_not_invented(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        code, _, err = dsv4("convert", pair[0], tmp_path / "out", "--to", "nvfp4")
        assert code == 2 and "--input-scale" in err and "calibration" in err and not (tmp_path / "out").exists()

    def test_a_file_has_one_for_every_matrix(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        names = [f"{stem}.input_scale" for stem in matrices(tensors_of(pair[1]))]
        given = {name: 0.5 + number for number, name in enumerate(names)}
        (tmp_path / "scales.json").write_text(json.dumps(given))
        convert(pair[0], tmp_path / "out", "--to", "nvfp4", "--input-scale", tmp_path / "scales.json")
        after = tensors_of(tmp_path / "out")
        assert {name: float(after[name].array()) for name in names} == given
        (tmp_path / "scales.json").write_text(json.dumps(dict.fromkeys(names[1:], 0.5)))
        code, _, err = dsv4(
            "convert", pair[0], tmp_path / "two", "--to", "nvfp4", "--input-scale", tmp_path / "scales.json"
        )
        assert code == 3 and names[0] in err and not (tmp_path / "two").exists()

    @pytest.mark.parametrize("content", ["[1]", "{}", '{"a": 0}', '{"a": "x"}', '{"a": true}', "nonsense"])
    def test_a_file_that_is_none(self, content: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "scales.json").write_text(content)
        code, _, err = dsv4(
            "convert", pair[0], tmp_path / "out", "--to", "nvfp4", "--input-scale", tmp_path / "scales.json"
        )
        assert code == 3 and "scales.json" in err

    @pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "absent.json"])
    def test_a_number_that_no_engine_can_use(self, number: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
        assert dsv4("convert", pair[0], tmp_path / "out", "--to", "nvfp4", "--input-scale", number)[0] == 2

    def test_it_goes_with_nvfp4_only(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        code, _, err = dsv4("convert", pair[0], tmp_path / "out", "--to", "mxfp4", "--input-scale", "1.0")
        assert code == 2 and "--to nvfp4" in err

    def test_another_one_is_another_conversion(self, output: Path, pair: tuple[Path, Path]) -> None:
        code, _, err = dsv4("convert", pair[0], output, "--to", "nvfp4", "--input-scale", "2.0")
        assert code == 2 and "--input-scale 1.0, now 2.0" in err


class TestConfig:
    def test_it_names_the_experts_and_what_is_left_out(self, pair: tuple[Path, Path]) -> None:
        before, after = (read_json(folder / "config.json") for folder in pair)
        inner = after["quantization_config"]
        assert inner.items() >= before["quantization_config"].items() and inner["moe_quant_algo"] == "NVFP4"
        assert list(inner["quantized_layers"]) == ["layers.0.ffn.experts", "layers.1.ffn.experts"]
        file = read_json(pair[1] / "hf_quant_config.json")["quantization"]
        assert file["quantized_layers"] == inner["quantized_layers"] and file["exclude_modules"] == inner["ignore"]
        assert "hf_quant_config.json" in read_json(pair[1] / "dsv4.json")["files"]

    @pytest.mark.parametrize("damage", ["too few", "too many", "ignored", "file"])
    @pytest.mark.fast_cases(1)
    def test_verify_believes_the_tensors(self, damage: str, pair: tuple[Path, Path], output: Path) -> None:
        inner = read_json(output / "config.json")["quantization_config"]
        if damage == "too few":
            del inner["quantized_layers"]["layers.0.ffn.experts"]
        elif damage == "too many":
            inner["quantized_layers"]["layers.7.ffn.experts"] = {}
        elif damage == "ignored":
            inner["ignore"].append("*.ffn.experts*")
        else:
            (output / "hf_quant_config.json").write_text('{"quantization": {"quantized_layers": {}}}')
        edit_config(output, quantization_config=inner)
        found = verify(pair[0], output)
        assert found.exit_code == 1 and found.counts["*"] == 0
        assert all(problem.area == "config" for problem in found.problems if problem.severity == "difference")


class TestDamage:
    @pytest.mark.parametrize(
        ("last", "change"), [("weight_scale_2", 2.0), ("weight_scale", 0x08), ("weight", 0x01), ("weight_scale", 0x7F)]
    )
    @pytest.mark.fast_cases(1)
    def test_verify_names_the_matrix(self, last: str, change: float, pair: tuple[Path, Path], output: Path) -> None:
        name = f"{EXPERT}.w1.{last}"
        tensor = tensors_of(output)[name]
        array = tensor.array().copy()
        if last == "weight_scale_2":
            array = array * np.float32(change)
        elif change == 0x7F:
            array[3, 1] = change
        else:
            array[3, 1] ^= int(change)
        edit_tensors(output, {name: tensor.like(array)})
        found = verify(pair[0], output)
        different = {result.name for result in found.results if result.status == "*"}
        assert found.exit_code == 1 and f"{EXPERT}.w1.weight" in different
        assert different <= {f"{EXPERT}.w1.weight", f"{EXPERT}.w1.scale"}

    @pytest.mark.parametrize("number", [np.nan, 0, -1, np.inf])
    @pytest.mark.fast_cases(1)
    def test_an_input_scale_that_no_engine_can_use(self, number: float, pair: tuple[Path, Path], output: Path) -> None:
        name = f"{EXPERT}.w1.input_scale"
        edit_tensors(output, {name: raw("F32", np.array(number, np.float32))})
        found = verify(pair[0], output)
        assert found.exit_code == 1 and [problem.text for problem in found.problems if name in problem.text]

    def test_a_repository_s_shards_are_not_fetched_for_them(self, output: Path) -> None:
        """Headers are read before any shard is there: a read of data would fail then."""

        class Repository(LocalFiles):
            def slots(self) -> int:
                return 1

            def bytes_to_fetch(self, name: str) -> int:
                return 0

            def seconds_for(self, count: int) -> float:
                return 0.0

            def listed_sha256(self, name: str) -> str | None:
                return None

            def check_unchanged(self) -> None:
                pass

            def check_needs(self, groups: Sequence[Collection[str]]) -> None:
                pass

            def prepare(self, now: Collection[str], upcoming: Collection[str] = ()) -> None:
                pass

            def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
                assert not only_headers, "reads data"
                super().read_into(name, offset, buffer)

        only_headers = False
        files = Repository(output)
        assert isinstance(files, RemoteFiles)
        checkpoint = open_checkpoint(files, "output")
        only_headers = True
        join_scales(checkpoint)
        assert checkpoint.tensors[f"{EXPERT}.w1.scale"].factor is not None

    def test_a_second_scale_that_is_missing(self, pair: tuple[Path, Path], output: Path, tmp_path: Path) -> None:
        edit_tensors(output, {}, (f"{EXPERT}.w1.weight_scale_2",))
        assert verify(pair[0], output).exit_code == 3
        code, _, err = dsv4("convert", output, tmp_path / "back", "--to", "fp4")
        assert code == 3 and f"{EXPERT}.w1.weight_scale" in err


class TestOtherPeoples:
    """NVFP4 from a calibration: any E4M3 scales, any float32 factor."""

    @pytest.fixture
    def folder(self, output: Path) -> Path:
        rng, name = np.random.default_rng(2), f"{EXPERT}.w2"
        scale = tensors_of(output)[f"{name}.weight_scale"]
        edit_tensors(output, {
            f"{name}.weight_scale": scale.like(rng.integers(1, 0x7F, scale.shape, dtype=np.uint8)),
            f"{name}.weight_scale_2": raw("F32", np.array(0.00123, np.float32)),
        })  # fmt: skip
        (output / "dsv4.json").unlink()
        return output

    def test_verify_gives_its_error(self, folder: Path, pair: tuple[Path, Path]) -> None:
        exact, after = source_values(f"{EXPERT}.w2.weight", tensors_of(pair[0])), tensors_of(folder)
        gaps = np.abs(values(f"{EXPERT}.w2", after) - exact)
        found = verify(pair[0], folder)
        (result,) = [r for r in found.results if r.status == "*" and r.name.endswith("weight")]
        assert result.name == f"{EXPERT}.w2.weight" and result.tally.different == np.count_nonzero(gaps)
        assert result.tally.largest_error == gaps.max()

    def test_zero_is_a_scale(self, pair: tuple[Path, Path], output: Path) -> None:
        name = f"{EXPERT}.w2.weight_scale"
        scale = tensors_of(output)[name]
        array = scale.array().copy()
        array[5, 2] = 0
        edit_tensors(output, {name: scale.like(array)})
        exact = source_values(f"{EXPERT}.w2.weight", tensors_of(pair[0]))[5, 32:48]
        (result,) = [r for r in verify(pair[0], output).results if r.status == "*" and r.name.endswith("weight")]
        assert result.tally.different == np.count_nonzero(exact) and result.tally.largest_error == np.abs(exact).max()

    def test_it_has_no_form_of_a_release(self, folder: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", folder, tmp_path / "back", "--to", "fp4")
        assert code == 3 and f"{EXPERT}.w2.scale" in err and not (tmp_path / "back" / "config.json").exists()

    def test_as_compressed_tensors_stores_it(self, pair: tuple[Path, Path], output: Path) -> None:
        """The factor divides, and inputs have their own name; a divisor that is no power of two is not exact."""
        after, new, dropped = tensors_of(output), {}, []
        for stem in matrices(after):
            second = 1 / after[f"{stem}.weight_scale_2"].array().reshape(1)
            new |= {f"{stem}.weight_packed": after[f"{stem}.weight"], f"{stem}.weight_global_scale": raw("F32", second)}
            new[f"{stem}.input_global_scale"] = raw("F32", np.ones(1, np.float32))
            dropped += [f"{stem}.{last}" for last in ("weight", "weight_scale_2", "input_scale")]
        edit_tensors(output, new, tuple(dropped))
        found = verify(pair[0], output, tensor=f"{EXPERT}.*")
        assert found.counts["*"] == 0 and found.counts["≈"] > 0
        edit_tensors(output, {f"{EXPERT}.w2.weight_global_scale": raw("F32", np.array([3], np.float32))})
        assert verify(pair[0], output, tensor=f"{EXPERT}.w2.*").counts["*"] > 0


class TestBadSources:
    def refused(self, folder: Path, output: Path) -> str:
        code, _, err = dsv4("convert", folder, output, *OPTIONS)
        assert code == 3 and not output.exists()
        return err

    def test_fp8_experts(self, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "base", geometry=SMALL, experts="fp8")
        assert "--to fp4" in self.refused(base, tmp_path / "out")

    def test_a_missing_twin(self, copy: Path, tmp_path: Path) -> None:
        edit_tensors(copy, {}, (f"{EXPERT}.w3.weight", f"{EXPERT}.w3.scale"))
        assert f"{EXPERT}.w3.weight" in self.refused(copy, tmp_path / "out")
