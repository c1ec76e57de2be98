"""`--to mlx`: names, stacks and config as mlx-lm has them, other people's folders, damage and bad sources.

.ci/mlx_values.py has MLX itself read every value; here the words are decoded by ml_dtypes.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_variants import VARIANTS
from exact_values import E2M1, convert, dsv4, edit_config, edit_tensors, read_json, same_bits, tensors_of, values
from raw_safetensors import Raw, Tensors, raw, read_folder, write_folder

from dsv4.convert import verify
from dsv4.convert.checkpoint.forms.mlx_names import mlx_name, released_name
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.v41 import V41Geometry

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0, 0), num_hash_layers=1, n_routed_experts=4, index_n_heads=4)
# From mlx-lm's table of renamings, one tensor of each kind.
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head_fn",
    "layers.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "layers.0.hc_attn_fn": "model.layers.0.attn_hc.fn",
    "layers.0.hc_ffn_scale": "model.layers.0.ffn_hc.scale",
    "layers.0.attn.attn_sink": "model.layers.0.self_attn.sinks",
    "layers.0.attn.wq_a.weight": "model.layers.0.self_attn.q_a_proj.weight",
    "layers.0.attn.q_norm.weight": "model.layers.0.self_attn.q_a_norm.weight",
    "layers.0.attn.kv_norm.weight": "model.layers.0.self_attn.kv_norm.weight",
    "layers.0.attn.wkv.weight": "model.layers.0.self_attn.kv_proj.weight",
    "layers.0.attn.wo_a.weight": "model.layers.0.self_attn.o_a_proj.weight",
    "layers.0.attn.wo_b.weight": "model.layers.0.self_attn.o_b_proj.weight",
    "layers.0.attn.compressor.norm.weight": "model.layers.0.self_attn.compressor.kv_norm.weight",
    "layers.0.attn.compressor.wgate.weight": "model.layers.0.self_attn.compressor.gate_proj.weight",
    "layers.0.attn.indexer.wq_b.weight": "model.layers.0.self_attn.indexer.q_b_proj.weight",
    "layers.0.attn.indexer.wk.weight": "model.layers.0.self_attn.indexer.k_proj.weight",
    "layers.1.ffn.gate.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "layers.0.ffn.shared_experts.w2.weight": "model.layers.0.mlp.shared_experts.down_proj.weight",
    "layers.0.ffn.experts.0.w1.weight": "model.layers.0.mlp.experts.switch_mlp.gate_proj.weight",
    "layers.0.ffn.experts.0.w2.weight": "model.layers.0.mlp.experts.switch_mlp.down_proj.weight",
    "layers.0.ffn.experts.0.w3.weight": "model.layers.0.mlp.experts.switch_mlp.up_proj.weight",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mlx")
    source = make_checkpoint(folder / "source", seed=11, geometry=SMALL)
    convert(source, folder / "out", "--to", "mlx")
    return source, folder / "out"


@pytest.fixture
def output(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def decoded(name: str, tensors: Tensors) -> np.ndarray:
    """float64 values of a tensor of words beside its scales, in the shape that it has in MLX."""
    weight, scales = tensors[name], tensors[name.removesuffix("weight") + "scales"]
    data = np.frombuffer(weight.data, np.uint8).reshape(*weight.shape[:-1], -1)
    factors = scales.array().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, axis=-1)
    if data.shape[-1] == factors.shape[-1]:
        return data.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * factors
    return E2M1[np.stack((data & 15, data >> 4), axis=-1).reshape(factors.shape)] * factors


def test_every_value_is_there_in_the_shape_that_mlx_has(pair: tuple[Path, Path]) -> None:
    before, after = tensors_of(pair[0]), tensors_of(pair[1])
    found = {name: decoded(name, after) for name in after if name.removesuffix("weight") + "scales" in after}
    stacks = [name for name in found if ".switch_mlp." in name]
    assert len(stacks) == 3 * 3 and all(found[name].shape[0] == 4 for name in stacks)
    for name, array in found.items():
        if ".o_a_proj." in name:
            assert array.shape[0] == SMALL.o_groups
        for number, part in enumerate(array if name in stacks else [array.reshape(-1, array.shape[-1])]):
            assert same_bits(part, values(released_name(name, number), before)), name


def test_names_are_those_of_mlx_lm(pair: tuple[Path, Path]) -> None:
    assert {old: mlx_name(old) for old in NAMES} == NAMES
    assert {released_name(new): new for new in NAMES.values()} == NAMES
    assert set(NAMES.values()) - {"model.layers.0.self_attn.indexer.k_proj.weight"} <= set(tensors_of(pair[1]))


def test_mlx_lm_opens_no_tensor_that_it_does_not_have(tmp_path: Path) -> None:
    """It reads `model*.safetensors` and stops at a tensor too many; the index names the other files, too."""
    source = make_checkpoint(tmp_path / "source", geometry=SMALL)
    edit_tensors(source, {"vision.blocks.0.mlp.w1.weight": raw("F32", np.ones((3, 3), np.float32))})
    assert "mlx-lm's text model does not have" in convert(source, tmp_path / "out", "--to", "mlx")
    shards = read_folder(tmp_path / "out")
    own = {name for file, tensors in shards.items() if file.startswith("model") for name in tensors}
    others = {name for file, tensors in shards.items() if not file.startswith("model") for name in tensors}
    assert own and not [name for name in own if re.search("mtp|vision|engram", name)]
    assert "vision.blocks.0.mlp.w1.weight" in others
    assert verify(source, tmp_path / "out").exit_code == 0


def test_the_config_has_a_mode_for_each_module(pair: tuple[Path, Path]) -> None:
    config, tensors = read_json(pair[1] / "config.json"), tensors_of(pair[1])
    mode = {module: said for module, said in config["quantization"].items() if isinstance(said, dict)}
    dense = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales") and "switch" not in name}
    assert config["quantization"]["mode"] == "mxfp4" and mode.keys() == dense
    assert {said["mode"] for said in mode.values()} == {"mxfp8"} and "quantization_config" not in config


@pytest.mark.parametrize("kind", ["v41", "base", "strangers", "early"])
@pytest.mark.fast_cases(1)
def test_every_edition_goes_there_and_back(kind: str, tmp_path: Path) -> None:
    source = VARIANTS[kind](tmp_path / "source")
    convert(source, tmp_path / "out", "--to", "mlx")
    assert verify(source, tmp_path / "out").exit_code == 0
    if kind == "base":  # its experts are FP8 that never was FP4
        return
    convert(tmp_path / "out", tmp_path / "back", "--to", "fp4")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    added = {"expert_dtype": "fp4"} if kind == "early" else {}
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json") | added


class TestOtherPeoplesFolders:
    def test_without_the_keys_of_dsv4(self, pair: tuple[Path, Path], output: Path, tmp_path: Path) -> None:
        """As mlx-lm saves it: `quantization_config` repeats `quantization`, stacks lie under `mlp.switch_mlp`."""
        (output / "dsv4.json").unlink()
        quantization = read_json(output / "config.json")["quantization"]
        edit_config(output, released_quantization=None, quantization_config=quantization)
        for file, tensors in (shards := read_folder(output)).items():
            shards[file] = {name.replace("mlp.experts.switch", "mlp.switch"): t for name, t in tensors.items()}
        write_folder(output, shards)
        found = verify(pair[0], output)
        assert found.exit_code == 0 and not any(found.counts[status] for status in "*-+!")
        convert(output, tmp_path / "back", "--to", "fp4")
        assert tensors_of(tmp_path / "back") == tensors_of(pair[0])
        assert read_json(tmp_path / "back" / "config.json") == read_json(pair[0] / "config.json")

    @pytest.mark.parametrize("kind", ["groups of 16", "bf16 scales", "no scales", "scales alone"])
    def test_other_quantizations_are_refused_by_name(self, kind: str, output: Path, tmp_path: Path) -> None:
        stem = "model.layers.0.self_attn.kv_proj"
        scales = tensors_of(output)[f"{stem}.scales"]
        rows, groups = scales.shape
        wide: dict[str, Any] = {
            "groups of 16": {f"{stem}.scales": raw("U8", np.zeros((rows, 4 * groups), np.uint8))},
            "bf16 scales": {f"{stem}.scales": raw("BF16", np.zeros((rows, groups), np.uint16))},
        }
        dropped = {"no scales": (f"{stem}.scales",), "scales alone": (f"{stem}.weight",)}
        edit_tensors(output, wide.get(kind, {}), dropped.get(kind, ()))
        code, _, err = dsv4("convert", output, tmp_path / "back", "--to", "fp4")
        assert code == 3 and stem in err and not (tmp_path / "back").exists()

    def test_verify_says_what_it_cannot_read(self, pair: tuple[Path, Path], output: Path) -> None:
        name = "model.layers.0.self_attn.kv_proj.scales"
        rows, groups = tensors_of(output)[name].shape
        edit_tensors(output, {name: raw("U8", np.zeros((rows, 4 * groups), np.uint8))})
        found = verify(pair[0], output)
        assert found.exit_code == 3 and "layers.0.attn.wkv.weight" in {r.name for r in found.results if r.status == "!"}

    def test_two_names_for_one_tensor(self, pair: tuple[Path, Path], output: Path, tmp_path: Path) -> None:
        norm = tensors_of(output)["model.norm.weight"]
        edit_tensors(output, {"norm.weight": norm})
        code, _, err = dsv4("convert", output, tmp_path / "back", "--to", "fp4")
        assert code == 3 and "both stand for 'norm.weight'" in err
        assert verify(pair[0], output).exit_code == 3


class TestDamage:
    @pytest.mark.parametrize(
        ("tensor", "place", "named"),
        [
            ("model.layers.1.mlp.experts.switch_mlp.up_proj.weight", (2, 0, 0), "layers.1.ffn.experts.2.w3.weight"),
            ("model.layers.1.mlp.experts.switch_mlp.down_proj.scales", (3, 5, 1), "layers.1.ffn.experts.3.w2.scale"),
            ("model.layers.0.self_attn.o_a_proj.weight", (1, 0, 0), "layers.0.attn.wo_a.weight"),
            ("model.layers.0.self_attn.compressor.kv_norm.weight", (3,), "layers.0.attn.compressor.norm.weight"),
        ],
    )
    @pytest.mark.fast_cases(1)
    def test_verify_names_the_tensor(
        self, tensor: str, place: tuple[int, ...], named: str, pair: tuple[Path, Path], output: Path
    ) -> None:
        array = tensors_of(output)[tensor].array().copy()
        array[place] ^= np.asarray(64, array.dtype)
        edit_tensors(output, {tensor: tensors_of(output)[tensor].like(array)})
        found = verify(pair[0], output)
        different = {result.name for result in found.results if result.status == "*"}
        stem = named.rpartition(".")[0]
        assert found.exit_code == 1 and named in different and different <= {f"{stem}.weight", f"{stem}.scale"}

    def test_experts_in_another_order(self, pair: tuple[Path, Path], output: Path) -> None:
        name = "model.layers.1.mlp.experts.switch_mlp.gate_proj.weight"
        tensor = tensors_of(output)[name]
        edit_tensors(output, {name: tensor.like(tensor.array()[[1, 0, 2, 3]])})
        found = verify(pair[0], output)
        different = {result.name for result in found.results if result.status == "*"}
        assert {f"layers.1.ffn.experts.{number}.w1.weight" for number in (0, 1)} <= different and found.exit_code == 1

    @pytest.mark.parametrize("damage", ["mode", "a module too few", "a module too many"])
    def test_a_config_that_says_something_else(self, damage: str, pair: tuple[Path, Path], output: Path) -> None:
        quantization = read_json(output / "config.json")["quantization"]
        module = "model.layers.0.self_attn.kv_proj"
        if damage == "mode":
            quantization[module]["bits"] = 4
        elif damage == "a module too few":
            del quantization[module]
        else:
            module = "model.layers.0.mlp.gate"
            quantization[module] = {"bits": 8, "group_size": 32, "mode": "mxfp8"}
        edit_config(output, quantization=quantization)
        found = verify(pair[0], output)
        assert found.exit_code == 1 and found.counts["*"] == 0
        assert [problem.text for problem in found.problems if module in problem.text]

    def test_a_byte_of_the_file_is_found_without_the_source(self, output: Path) -> None:
        shard = min(output.glob("model-*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
        assert verify(output).exit_code == 1


class TestBadSources:
    @pytest.fixture
    def copy(self, pair: tuple[Path, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(pair[0], tmp_path / "source"))

    def refused(self, folder: Path, output: Path) -> str:
        code, _, err = dsv4("convert", folder, output, "--to", "mlx")
        assert code == 3 and not output.exists()
        return err

    def test_a_missing_expert(self, copy: Path, tmp_path: Path) -> None:
        name = "layers.1.ffn.experts.3.w3"
        edit_tensors(copy, {}, (f"{name}.weight", f"{name}.scale"))
        assert f"{name}.weight" in self.refused(copy, tmp_path / "out")

    def test_an_expert_of_another_shape(self, copy: Path, tmp_path: Path) -> None:
        stem = "layers.1.ffn.experts.2.w2"
        edit_tensors(copy, {
            f"{stem}.weight": raw("I8", np.zeros((4, 16), np.uint8)),
            f"{stem}.scale": raw("F8_E8M0", np.full((4, 1), 127, np.uint8)),
        })  # fmt: skip
        assert f"{stem}.weight" in self.refused(copy, tmp_path / "out")

    @pytest.mark.parametrize("key", ["o_groups", "n_routed_experts"])
    def test_a_key_that_the_config_lacks(self, key: str, copy: Path, tmp_path: Path) -> None:
        edit_config(copy, **{key: None})
        assert key in self.refused(copy, tmp_path / "out")

    def test_an_expert_too_many(self, copy: Path, tmp_path: Path) -> None:
        stem = "layers.1.ffn.experts"
        extra = {f"{stem}.4.w1.{last}": tensors_of(copy)[f"{stem}.0.w1.{last}"] for last in ("weight", "scale")}
        edit_tensors(copy, extra)
        assert f"{stem}.4.w1.weight" in self.refused(copy, tmp_path / "out")

    def test_two_tensors_of_one_name(self, copy: Path, tmp_path: Path) -> None:
        twin: Raw = tensors_of(copy)["layers.1.attn.attn_sink"]
        edit_tensors(copy, {"layers.1.attn.sinks": twin})
        assert "layers.1.attn.sinks" in self.refused(copy, tmp_path / "out")


def test_doctor_says_which_models_mlx_lm_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = dsv4("doctor", pair[1], "--for", "mlx-lm")
    assert code == 1 and "deepseek_v41" in out
    convert(make_checkpoint(tmp_path / "v41", geometry=V41Geometry()), tmp_path / "out", "--to", "mlx")
    code, out, _ = dsv4("doctor", tmp_path / "out", "--for", "mlx-lm")
    assert code == 1 and "engram_layer_ids" in out
    config = read_json(tmp_path / "out" / "config.json")
    edit_config(tmp_path / "out", text_config=config["text_config"] | {"engram_layer_ids": []})
    code, out, err = dsv4("doctor", tmp_path / "out", "--for", "mlx-lm")
    assert "experts fp4; mlx-lm loads each type" in out, err
