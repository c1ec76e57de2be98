"""The file of DSpark's stages that `--to gguf` writes: as the library gguf reads it, and the way back."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from drafting import SMALL, STAGES, random_drafts
from exact_values import convert, dsv4, edit_config, edit_tensors, experts, read_json, same_bits, tensors_of, values
from raw_safetensors import raw

from dsv4.convert import verify
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.model import load
from dsv4.model.evaluate.logits import teacher_forced

FILE = "dspark-model.gguf"
TYPES = gguf.GGMLQuantizationType
# The tensors that llama.cpp's loader of `dflash` asks for where the file has hyper-connections (src/models/dflash.cpp),
# beside the experts: outside of blocks, and in each block.
OUTSIDE = {
    "fc": "mtp.0.main_proj.weight", "enc.output_norm": "mtp.0.main_norm.weight", "output_norm": "mtp.2.norm.weight",
    "output_hc_fn": "mtp.2.hc_head_fn", "output_hc_base": "mtp.2.hc_head_base",
    "output_hc_scale": "mtp.2.hc_head_scale", "markov_w1": "mtp.2.markov_head.markov_w1.weight",
    "markov_w2": "mtp.2.markov_head.markov_w2.weight", "conf_proj": "mtp.2.confidence_head.proj.weight",
}  # fmt: skip
INSIDE = {
    "attn_norm": "attn_norm.weight", "attn_sinks": "attn.attn_sink", "attn_q_a": "attn.wq_a.weight",
    "attn_q_a_norm": "attn.q_norm.weight", "attn_q_b": "attn.wq_b.weight", "attn_kv": "attn.wkv.weight",
    "attn_kv_a_norm": "attn.kv_norm.weight", "attn_output_a": "attn.wo_a.weight", "attn_output_b": "attn.wo_b.weight",
    "hc_attn_fn": "hc_attn_fn", "hc_attn_base": "hc_attn_base", "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn", "hc_ffn_base": "hc_ffn_base", "hc_ffn_scale": "hc_ffn_scale",
    "ffn_gate_inp": "ffn.gate.weight", "ffn_norm": "ffn_norm.weight", "ffn_gate_shexp": "ffn.shared_experts.w1.weight",
    "ffn_down_shexp": "ffn.shared_experts.w2.weight", "ffn_up_shexp": "ffn.shared_experts.w3.weight",
}  # fmt: skip
STACKS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_drafts(tmp_path_factory.mktemp("dspark") / "source")


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dspark") / "out"
    assert "left out" not in convert(source, folder, "--to", "gguf")
    return folder


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "copy"))


def dequantized(tensor: Any) -> np.ndarray:
    if tensor.tensor_type == TYPES.F32:
        return np.asarray(tensor.data, np.float64).reshape(tuple(int(n) for n in tensor.shape[::-1]))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def test_the_file_has_every_tensor_that_llama_cpp_loads_and_its_values(source: Path, output: Path) -> None:
    before, tensors = tensors_of(source), {t.name: t for t in gguf.GGUFReader(output / FILE).tensors}
    wanted = {f"{new}.weight": old for new, old in OUTSIDE.items()}
    for stage in range(STAGES.stages):
        wanted |= {f"blk.{stage}.{new}.weight": f"mtp.{stage}.{old}" for new, old in INSIDE.items()}
        wanted[f"blk.{stage}.exp_probs_b.bias"] = f"mtp.{stage}.ffn.gate.bias"
    stacks = {f"blk.{stage}.{name}.weight" for stage in range(STAGES.stages) for name in STACKS}
    assert tensors.keys() == wanted.keys() | stacks
    for name, old in wanted.items():
        found = dequantized(tensors[name])
        assert np.array_equal(found, values(old, before).reshape(found.shape)), name
    for name in stacks:
        _, stage, inner, _ = name.split(".")
        prefix = f"mtp.{stage}.ffn.experts"
        expected = [values(f"{prefix}.{e}.{STACKS[inner]}.weight", before) for e in range(SMALL.n_routed_experts)]
        assert np.array_equal(dequantized(tensors[name]), np.stack(expected)), name


def test_the_keys_are_those_that_llama_cpp_reads(source: Path, output: Path) -> None:
    config = read_json(source / "config.json")
    keys = {key: field.contents() for key, field in gguf.GGUFReader(output / FILE).fields.items()}
    assert keys["general.architecture"] == "dflash" and keys["dflash.block_count"] == STAGES.stages
    assert keys["dflash.block_size"] == config["dspark_block_size"]
    # llama.cpp reads the input of a layer: that of the next one is the output that the release names.
    assert keys["dflash.target_layers"] == [layer + 1 for layer in config["dspark_target_layer_ids"]]
    assert keys["tokenizer.ggml.mask_token_id"] == config["dspark_noise_token_id"]
    assert keys["dflash.attention.compress_ratios"] == [0] * STAGES.stages and keys["dflash.expert_gating_func"] == 4
    assert keys["dflash.hyper_connection.count"] == config["hc_mult"]
    assert keys["dflash.attention.sliding_window"] == config["sliding_window"]


def test_there_and_back(source: Path, output: Path, tmp_path: Path) -> None:
    assert verify(source, output).exit_code == 0
    convert(output, tmp_path / "back", "--to", "fp4")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in after:
        assert before[name].dtype == after[name].dtype
        if name in experts(before):
            assert before[name] == after[name], name
        elif not name.endswith(".scale"):
            assert same_bits(values(name, before), values(name, after)), name


@pytest.mark.parametrize("config", [True, False], ids=["config.json", "keys alone"])
def test_the_same_drafts(config: bool, source: Path, copy: Path) -> None:
    """Without config.json the keys of both files are all that is known of the model."""
    if not config:
        (copy / "config.json").unlink()
    tokens = np.random.default_rng(5).integers(0, 60, 12).tolist()
    one, other = (teacher_forced(load(folder, simulation=False), tokens).drafts for folder in (source, copy))
    assert one is not None and other is not None
    assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(one, other, strict=True))


def test_a_file_of_others_may_repeat_embedding_and_head(source: Path, output: Path, copy: Path) -> None:
    """As llama.cpp allows it, so that the stages can run on a device of their own."""
    reader, writer = gguf.GGUFReader(output / FILE), gguf.GGUFWriter(copy / FILE, "dflash")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "dsv4.", "general.architecture")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    main = {t.name: t for path in output.glob("model*.gguf") for t in gguf.GGUFReader(path).tensors}
    for tensor in (*reader.tensors, main["token_embd.weight"], main["output.weight"]):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert verify(source, copy).exit_code == 0
    assert Checkpoint.open(copy).tensors.keys() == Checkpoint.open(output).tensors.keys()


@pytest.mark.parametrize(
    ("tensor", "at", "named"),
    [
        ("fc.weight", 1, "mtp.0.main_proj.weight"),
        ("markov_w1.weight", 0, "mtp.2.markov_head.markov_w1.weight"),
        ("output_norm.weight", 2, "mtp.2.norm.weight"),
        ("blk.1.ffn_down_exps.weight", 0, "mtp.1.ffn.experts.0.w2.scale"),
        ("blk.1.attn_kv.weight", 1, "mtp.1.attn.wkv.weight"),
    ],
)
def test_verify_names_the_tensor(tensor: str, at: int, named: str, copy: Path, source: Path) -> None:
    offset = next(t.data_offset for t in gguf.GGUFReader(copy / FILE).tensors if t.name == tensor)
    content = bytearray((copy / FILE).read_bytes())
    content[offset + at] ^= 1
    (copy / FILE).write_bytes(content)
    found = verify(source, copy)
    # A weight that has a scale is named together with it.
    assert found.exit_code == 1 and named in (different := {r.name for r in found.results if r.status == "*"})
    assert len({name.rpartition(".")[0] for name in different}) == 1


@pytest.mark.parametrize(
    "key",
    ["dflash.target_layers", "dflash.block_size", "tokenizer.ggml.mask_token_id", "dflash.hyper_connection.count"],
)
def test_a_key_that_changes_the_drafts(key: str, copy: Path, source: Path) -> None:
    part = gguf.GGUFReader(copy / FILE, "r+").fields[key]
    part.parts[part.data[0]][0] += 1
    del part
    found = verify(source, copy)
    assert found.exit_code == 1 and found.counts["*"] == 0
    assert [problem.text for problem in found.problems if key in problem.text]


class TestRefused:
    @pytest.fixture
    def changed(self, source: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "changed"))

    def refused(self, folder: Path, *options: str) -> str:
        code, _, err = dsv4("convert", folder, folder.parent / "refused", *options)
        assert code == 3 and not (folder.parent / "refused").exists()
        return err

    def test_a_stage_that_is_missing(self, changed: Path) -> None:
        edit_tensors(changed, {}, tuple(name for name in tensors_of(changed) if name.startswith("mtp.1.")))
        assert "draft stages 0, 2" in self.refused(changed, "--to", "gguf")

    def test_a_tensor_that_stages_do_not_have(self, changed: Path) -> None:
        edit_tensors(changed, {"mtp.0.unheard_of": raw("F32", np.zeros(3, np.float32))})
        assert "mtp.0.unheard_of" in self.refused(changed, "--to", "gguf")

    def test_targets_that_are_no_list(self, changed: Path) -> None:
        edit_config(changed, dspark_target_layer_ids=3)
        assert "dspark_target_layer_ids" in self.refused(changed, "--to", "gguf")

    def test_two_files_of_drafts(self, copy: Path) -> None:
        shutil.copy(copy / FILE, copy / "other.gguf")
        assert "2 files of drafts" in self.refused(copy, "--to", "fp4")

    def test_a_count_of_stages_that_is_none(self, copy: Path) -> None:
        part = gguf.GGUFReader(copy / FILE, "r+").fields["dflash.block_count"]
        part.parts[part.data[0]][0] = 2**31
        del part
        assert "dflash.block_count" in self.refused(copy, "--to", "fp4")


def test_biases_for_images_are_said(source: Path, tmp_path: Path) -> None:
    """llama.cpp has them in the model's files; its draft stages have none."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    bias = raw("F32", np.arange(SMALL.n_routed_experts, dtype=np.float32))
    edit_tensors(copy, {"layers.1.ffn.gate.bias_vl": bias, "mtp.1.ffn.gate.bias_vl": bias})
    assert "1 router biases for images of draft stages are left out" in convert(copy, tmp_path / "out", "--to", "gguf")
    names = {t.name for path in (tmp_path / "out").glob("*.gguf") for t in gguf.GGUFReader(path).tensors}
    assert "blk.1.exp_probs_b_vl.bias" in names
    missing = json.loads(dsv4("verify", copy, tmp_path / "out", "--json")[1])["tensors"]
    assert [name for name, found in missing.items() if found["status"] == "-"] == ["mtp.1.ffn.gate.bias_vl"]
