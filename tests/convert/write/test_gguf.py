"""`--to gguf` as the library gguf reads it, and GGUF files that others made."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_variants import VARIANTS
from exact_values import convert, dsv4, edit_config, edit_tensors, experts, read_json, tensors_of, values
from raw_safetensors import raw
from tiny import TINY
from tokenizers import Tokenizer

from dsv4.convert import verify
from dsv4.convert.checkpoint.forms.gguf.names import COPIES, DRAFT, EXPERTS, LAYER, ROOT
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.gguf.tokenizer import _splitting
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model import load

pytestmark = pytest.mark.slow  # test_forms.py has this form in the fast loop

SMALL = Geometry(vocab_size=512, compress_ratios=(4, 0, 128, 0), num_hash_layers=1, n_routed_experts=4)
LAYERS = 3
TYPES = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gguf") / "source", seed=11, geometry=SMALL)


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "out"
    convert(source, folder, "--to", "gguf", "--max-shard-size", "2MB")
    return folder


def tensors_by_file(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: {t.name: t for t in gguf.GGUFReader(path).tensors} for path in sorted(folder.glob("*.gguf"))}


def dequantized(tensor: Any) -> np.ndarray:
    if tensor.tensor_type in (TYPES.F32, TYPES.I32):
        return np.asarray(tensor.data, np.float64).reshape(tuple(int(n) for n in tensor.shape[::-1]))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_library_reads_every_value(source: Path, output: Path) -> None:
    """Each weight of the release is in one file, once; -0 is +0 there."""
    before = tensors_of(source)
    found = {name: t for file, tensors in tensors_by_file(output).items() if file.startswith("model") for name, t in
             tensors.items()}  # fmt: skip
    draft = tensors_by_file(output)["mtp-model.gguf"]
    wanted = {new: old for old, new in ROOT.items()}
    for layer in range(LAYERS):
        wanted |= {f"blk.{layer}.{new}": f"layers.{layer}.{old}" for old, new in LAYER.items()}
    drafted = {f"blk.{LAYERS}.{new}": f"mtp.0.{old}" for old, new in (LAYER | DRAFT).items()}
    drafted |= {new: old if old in COPIES else f"mtp.0.{old}" for old, new in ROOT.items()}
    seen = set()
    for tensors, names in ((found, wanted), (draft, drafted)):
        for name, tensor in tensors.items():
            if name in names:
                seen.add(names[name])
                expected = values(names[name], before)
                assert np.array_equal(dequantized(tensor), expected.reshape(dequantized(tensor).shape)), name
    assert seen == {n for n in before if (not n.endswith(".scale") and ".experts." not in n and "_proj" not in n) or
                    "weights_proj.weight" in n}  # fmt: skip
    pair = np.concatenate([values(f"mtp.0.{name}_proj.weight", before) for name in "eh"], axis=1)
    assert np.array_equal(dequantized(draft[f"blk.{LAYERS}.nextn.eh_proj.weight"]), pair)


@pytest.mark.parametrize("block", range(LAYERS + 1))
@pytest.mark.fast_cases(1)
def test_the_library_reads_every_block_of_the_experts(block: int, source: Path, output: Path) -> None:
    before = tensors_of(source)
    tensors = {name: t for tensors in tensors_by_file(output).values() for name, t in tensors.items()}
    prefix = f"layers.{block}." if block < LAYERS else "mtp.0."
    for matrix, name in EXPERTS.items():
        stack = tensors[f"blk.{block}.{name}"]
        assert stack.tensor_type == TYPES.MXFP4
        expected = [values(f"{prefix}ffn.experts.{e}.{matrix}.weight", before) for e in range(4)]
        assert np.array_equal(dequantized(stack), np.stack(expected))


def test_the_keys_say_what_the_config_says(source: Path, output: Path) -> None:
    config = read_json(source / "config.json")
    first, draft = fields(output / "model-00001-of-00003.gguf"), fields(output / "mtp-model.gguf")
    prefix = "deepseek4."
    for keys, blocks in ((first, LAYERS), (draft, LAYERS + 1)):
        assert keys[prefix + "block_count"] == blocks
        assert keys[prefix + "attention.compress_ratios"] == config["compress_ratios"]
        assert keys[prefix + "swiglu_clamp_exp"] == [config["swiglu_limit"]] * blocks
        assert keys[prefix + "hash_layer_count"] == 1 and keys[prefix + "expert_gating_func"] == 4
        assert keys[prefix + "embedding_length_out"] == config["hidden_size"] * config["hc_mult"]
        assert keys[prefix + "rope.scaling.factor"] == config["rope_scaling"]["factor"]
        assert np.float32(keys[prefix + "attention.layer_norm_rms_epsilon"]) == np.float32(config["rms_norm_eps"])
    assert draft[prefix + "nextn_predict_layers"] == 1 and prefix + "nextn_predict_layers" not in first
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokens = first["tokenizer.ggml.tokens"]
    assert tokens[: tokenizer.get_vocab_size()] == [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    assert len(tokens) == config["vocab_size"] == len(first["tokenizer.ggml.token_type"])
    assert first["tokenizer.ggml.pre"] == "gpt-2" and first["tokenizer.ggml.bos_token_id"] == 0
    assert first["tokenizer.ggml.merges"] == [
        " ".join(pair) for pair in json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    ]


def test_splits_are_as_llama_cpp_expects_them(output: Path) -> None:
    names = sorted(path.name for path in output.glob("model*.gguf"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.gguf" for i in range(1, len(names) + 1)] and len(names) == 3
    tensors = tensors_by_file(output)
    for number, name in enumerate(names):
        found = fields(output / name)
        assert (found["split.no"], found["split.count"]) == (number, len(names))
        assert found["split.tensors.count"] == sum(len(tensors[other]) for other in names)


def test_how_text_is_split_is_recognised() -> None:
    split = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in (
        r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    )]  # fmt: skip
    last = {"type": "ByteLevel", "use_regex": False}
    assert _splitting({"type": "Sequence", "pretokenizers": [*split, last]}) == "deepseek-v3"
    assert _splitting({"type": "Sequence", "pretokenizers": [*split[:2], last]}) is None
    assert _splitting({"type": "ByteLevel", "use_regex": True}) == "gpt-2"
    assert _splitting({"type": "ByteLevel", "use_regex": False}) is None and _splitting(None) is None


def test_a_source_without_tokenizer_is_said(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", geometry=SMALL, tokenizer=False)
    assert "no vocabulary" in convert(source, tmp_path / "out", "--to", "gguf")
    assert fields(next((tmp_path / "out").glob("model-00001*")))["tokenizer.ggml.model"] == "none"


class TestQ8:
    """`--dense q8_0` rounds as ggml does, and says and counts it."""

    @pytest.fixture(scope="class")
    @staticmethod
    def rounded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("q8") / "out"
        said = convert(source, folder, "--to", "gguf", "--dense", "q8_0")
        assert "NOT exact" in said and "--dense q8_0" in said
        return folder, read_json(folder / "dsv4.json")["summary"]

    def test_the_bytes_are_ggml_s_and_the_changes_are_counted(
        self, source: Path, rounded: tuple[Path, dict[str, Any]]
    ) -> None:
        before, (folder, summary) = tensors_of(source), rounded
        names = {f"blk.{layer}.{new}": f"layers.{layer}.{old}" for layer in range(LAYERS) for old, new in LAYER.items()}
        names |= {f"blk.{LAYERS}.{new}": f"mtp.0.{old}" for old, new in LAYER.items()}
        tensors = {name: t for tensors in tensors_by_file(folder).values() for name, t in tensors.items()}
        found = [name for name, tensor in tensors.items() if tensor.tensor_type == TYPES.Q8_0]
        changed = 0
        for name in found:
            exact = values(names[name], before)
            blocks = gguf.quants.quantize(exact.astype(np.float32), TYPES.Q8_0)
            assert np.array_equal(tensors[name].data, blocks), name
            changed += int((gguf.quants.dequantize(blocks, TYPES.Q8_0) != exact).sum())
        assert len(found) > 20 and changed == summary["changed_elements"] > 0

    @pytest.mark.slow
    def test_verify_says_how_far_off_each_kind_is(self, source: Path, rounded: tuple[Path, dict[str, Any]]) -> None:
        before, found = tensors_of(source), verify(source, rounded[0])
        different = [result.name for result in found.results if result.status == "*"]
        assert found.exit_code == 1 and not [name for name in different if ".experts." in name]
        gaps = []
        for layer in range(LAYERS):
            exact = values(f"layers.{layer}.attn.wkv.weight", before)
            blocks = gguf.quants.quantize(exact.astype(np.float32), TYPES.Q8_0)
            gaps.append(np.abs(gguf.quants.dequantize(blocks, TYPES.Q8_0).astype(np.float64) - exact))
        said = found.to_json()["errors"]["layers.*.attn.wkv.weight"]
        assert said["tensors"] == LAYERS and said["largest_error"] == np.max(gaps)
        assert said["mean_error"] == pytest.approx(np.mean(gaps), rel=1e-5)  # it is shown to six digits
        _, out, _ = dsv4("verify", source, rounded[0])
        assert re.search(r"layers\.\*\.attn\.wkv\.weight +3 ", out)

    def test_the_way_back_says_that_it_is_none(self, rounded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        assert "were rounded to Q8_0" in convert(rounded[0], tmp_path / "back", "--to", "fp4")
        assert verify(rounded[0], tmp_path / "back").exit_code == 0

    def test_it_goes_with_gguf_only(self, source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", "--dense", "q8_0")
        assert code == 2 and "--to gguf" in err


class TestBadSources:
    @pytest.fixture
    def copy(self, source: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "copy"))

    def refused(self, folder: Path, output: Path) -> str:
        code, _, err = dsv4("convert", folder, output, "--to", "gguf")
        assert code == 3 and not output.exists()
        return err

    def test_a_missing_expert(self, copy: Path, tmp_path: Path) -> None:
        name = "layers.1.ffn.experts.2.w3"
        edit_tensors(copy, {}, (f"{name}.weight", f"{name}.scale"))
        assert f"{name}.weight" in self.refused(copy, tmp_path / "out")

    def test_a_tensor_that_the_architecture_does_not_have(self, copy: Path, tmp_path: Path) -> None:
        edit_tensors(copy, {"layers.1.attn.unheard_of": raw("F32", np.zeros(3, np.float32))})
        assert "layers.1.attn.unheard_of" in self.refused(copy, tmp_path / "out")

    def test_fp8_experts(self, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "base", geometry=SMALL, experts="fp8")
        assert "--to fp4" in self.refused(base, tmp_path / "out")

    def test_another_architecture(self, tmp_path: Path) -> None:
        assert "deepseek_v41" in self.refused(VARIANTS["v41"](tmp_path / "v41"), tmp_path / "out")

    @pytest.mark.parametrize("key", ["num_hash_layers", "n_routed_experts", "compress_ratios", "swiglu_limit"])
    def test_a_key_that_the_config_lacks(self, key: str, copy: Path, tmp_path: Path) -> None:
        edit_config(copy, **{key: None})
        assert key in self.refused(copy, tmp_path / "out")

    def test_vision_is_left_out_and_said(self, copy: Path, tmp_path: Path) -> None:
        edit_tensors(copy, {"vision.blocks.0.norm.weight": raw("F32", np.zeros(3, np.float32))})
        assert "1 tensors of the vision part" in convert(copy, tmp_path / "out", "--to", "gguf")


def rewritten(path: Path, target: Path, dense: TYPES) -> None:
    """A file of another writer: the library's, with dense matrices in another type and no keys of dsv4."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "deepseek4")
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.", "dsv4.")) or key in ("general.architecture", "deepseek4.vocab_size"):
            continue  # llama.cpp's own converter writes no size of the vocabulary
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.tensor_type == TYPES.BF16 and tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            data = gguf.quants.dequantize(tensor.data, TYPES.BF16)
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, dense), raw_dtype=dense)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestOtherPeoplesFiles:
    @pytest.fixture(scope="class")
    @staticmethod
    def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("single") / "out"
        convert(source, folder, "--to", "gguf", "--max-shard-size", "9GB")
        return folder / "model.gguf"

    @pytest.mark.slow
    def test_one_file_without_config(self, single: Path, source: Path, tmp_path: Path) -> None:
        """Its keys are all that is known, and enough to run it: the same logits."""
        (tmp_path / "other").mkdir()
        rewritten(single, tmp_path / "other" / "other.gguf", TYPES.F32)
        ids = torch.randint(0, 512, (1, 20), generator=torch.Generator().manual_seed(3))
        logits = []
        for folder in (source, tmp_path / "other"):
            model = load(folder, simulation=False)
            output = model.forward(ids, model.new_cache(1)).logits
            assert output is not None
            logits.append(output)
        assert torch.equal(*logits)
        found = verify(source, tmp_path / "other", tensor="layers.*")
        assert found.exit_code == 0 and found.counts["*"] == 0

    @pytest.mark.slow
    def test_q8_0_is_seen_as_inexact(self, single: Path, source: Path, tmp_path: Path) -> None:
        """As llama.cpp's own converter writes dense weights. The experts stay exact."""
        (tmp_path / "other").mkdir()
        rewritten(single, tmp_path / "other" / "other.gguf", TYPES.Q8_0)
        found = verify(source, tmp_path / "other", tensor="layers.*")
        different = {result.name for result in found.results if result.status == "*"}
        assert found.exit_code == 1 and "layers.0.attn.wq_a.weight" in different
        assert not [name for name in different if ".experts." in name]
        assert len(experts(tensors_of(source))) > 0 and dsv4("inspect", tmp_path / "other")[0] == 0

    @pytest.mark.slow
    def test_a_draft_block_in_q8_0(self, single: Path, source: Path, tmp_path: Path) -> None:
        """As llama.cpp's own converter writes it: the two projections in common rows, both rounded."""
        (tmp_path / "other").mkdir()
        for name in ("model.gguf", "mtp-model.gguf"):
            rewritten(single.parent / name, tmp_path / "other" / name, TYPES.Q8_0)
        before, found = tensors_of(source), verify(source, tmp_path / "other")
        assert found.counts["-"] == 0 and {problem.severity for problem in found.problems} <= {"note"}
        opened = Checkpoint.open(tmp_path / "other")
        for name in ("mtp.0.e_proj.weight", "mtp.0.h_proj.weight"):
            exact = values(name, before)
            rounded = gguf.quants.dequantize(gguf.quants.quantize(exact.astype(np.float32), TYPES.Q8_0), TYPES.Q8_0)
            gaps = np.abs(rounded.astype(np.float64) - exact)
            assert found.to_json()["errors"][name.replace("0", "*")]["largest_error"] == gaps.max()
            read = np.empty(exact.shape, np.float32)
            opened.read_into(name, read.data.cast("B"))
            assert np.array_equal(read, rounded)
        opened.close()


class TestDamage:
    @pytest.fixture
    def copy(self, output: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(output, tmp_path / "copy"))

    @pytest.mark.parametrize(
        ("tensor", "at", "named"),
        [
            ("blk.1.ffn_down_exps.weight", 0, "layers.1.ffn.experts.0.w2.scale"),
            ("blk.1.ffn_down_exps.weight", 5, "layers.1.ffn.experts.0.w2.weight"),
            ("blk.1.attn_norm.weight", 2, "layers.1.attn_norm.weight"),
            ("blk.0.ffn_gate_tid2eid.weight", 0, "layers.0.ffn.gate.tid2eid"),
            ("blk.3.nextn.eh_proj.weight", 1, "mtp.0.e_proj.weight"),
        ],
    )
    @pytest.mark.fast_cases(1)
    def test_verify_names_the_tensor(self, tensor: str, at: int, named: str, copy: Path, source: Path) -> None:
        path, offset = next(
            (copy / file, tensors[tensor].data_offset) for file, tensors in tensors_by_file(copy).items()
            if tensor in tensors
        )  # fmt: skip
        content = bytearray(path.read_bytes())
        content[offset + at] ^= 1
        path.write_bytes(content)
        found = verify(source, copy)
        assert found.exit_code == 1 and named in {r.name for r in found.results if r.status == "*"}

    def test_a_copy_in_the_draft_block_s_file(self, copy: Path, source: Path) -> None:
        offset = tensors_by_file(copy)["mtp-model.gguf"]["token_embd.weight"].data_offset
        content = bytearray((copy / "mtp-model.gguf").read_bytes())
        content[offset] ^= 1
        (copy / "mtp-model.gguf").write_bytes(content)
        found = verify(source, copy)
        assert found.exit_code == 1 and [r.name for r in found.results if r.status == "*"] == ["embed.weight"]

    @pytest.mark.parametrize("key", ["hash_layer_count", "attention.sliding_window", "expert_weights_scale"])
    @pytest.mark.fast_cases(1)
    def test_a_key_that_changes_the_model(self, key: str, copy: Path, source: Path) -> None:
        path = copy / "model-00001-of-00003.gguf"
        part = gguf.GGUFReader(path, "r+").fields[f"deepseek4.{key}"]
        part.parts[part.data[0]][0] += 1
        del part
        found = verify(source, copy)
        assert found.exit_code == 1 and found.counts["*"] == 0
        assert [problem.text for problem in found.problems if key in problem.text]

    def test_a_file_that_ends_too_early(self, copy: Path, source: Path, tmp_path: Path) -> None:
        path = copy / "model-00002-of-00003.gguf"
        path.write_bytes(path.read_bytes()[:-64])
        assert verify(source, copy).exit_code == 3
        code, _, err = dsv4("convert", copy, tmp_path / "back", "--to", "fp4")
        assert code == 3 and "truncated" in err and path.name in err

    def test_a_missing_split(self, copy: Path, source: Path, tmp_path: Path) -> None:
        (copy / "model-00002-of-00003.gguf").unlink()
        assert verify(source, copy).exit_code == 3
        code, _, err = dsv4("convert", copy, tmp_path / "back", "--to", "fp4")
        assert code == 3 and "model-00002-of-00003.gguf is missing" in err

    @pytest.mark.parametrize("length", [0, 3, 30, 400, 5000])
    def test_a_header_that_is_cut(self, length: int, copy: Path, tmp_path: Path) -> None:
        for path in copy.glob("*.gguf"):
            path.write_bytes(path.read_bytes()[:length])
        code, _, err = dsv4("inspect", copy)
        assert code == 3 and re.search(r"\.gguf", err) and "Traceback" not in err


class TestHostile:
    """Whatever a header says, a command ends with a verdict or an error, never with a traceback (exit code 70)."""

    @pytest.fixture(scope="class")
    @staticmethod
    def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
        source = make_checkpoint(tmp_path_factory.mktemp("hostile") / "source", geometry=TINY, tokenizer=False)
        convert(source, source.parent / "out", "--to", "gguf")
        return source.parent / "out"

    def judged(self, folder: Path) -> None:
        for command in ("inspect", "verify"):
            code, _, err = dsv4(command, folder)
            assert code in (0, 1, 3), err

    @pytest.mark.parametrize("seed", range(30))
    @pytest.mark.fast_cases(6)
    def test_other_bytes_in_a_header(self, seed: int, small: Path, tmp_path: Path) -> None:
        random = np.random.default_rng(seed)
        copy = Path(shutil.copytree(small, tmp_path / "copy"))
        (copy / "config.json").unlink()
        path = random.choice(sorted(copy.glob("*.gguf")))
        raw = bytearray(path.read_bytes())
        for _ in range(3):
            raw[random.integers(0, 6000)] = random.choice([0, 1, 9, 0x7F, 0xFF, random.integers(256)])
        path.write_bytes(raw)
        self.judged(copy)

    @pytest.mark.parametrize("kind", [4, 8, 9])
    @pytest.mark.parametrize("count", [2**63, 2**40, 2**20])
    def test_an_array_that_is_too_long(self, kind: int, count: int, tmp_path: Path) -> None:
        header = (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count)
        )
        (tmp_path / "model.gguf").write_bytes(header + bytes(100))
        self.judged(tmp_path)

    def test_arrays_in_arrays(self, tmp_path: Path) -> None:
        header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
        (tmp_path / "model.gguf").write_bytes(header + struct.pack("<IQ", 9, 1) * 50_000)
        self.judged(tmp_path)


def test_doctor_says_what_llama_cpp_computes_with(output: Path, tmp_path: Path) -> None:
    code, out, _ = dsv4("doctor", output, "--for", "llama.cpp", "--tensor-parallel", "1", "--json")
    assert code == 0 and json.loads(out)["loads"] is True
    first = next(path for path in output.iterdir() if re.fullmatch(r"model-00001-of-\d+\.gguf", path.name))
    assert json.loads(out)["start"] == f"llama-server -m {first}"
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    config = read_json(copy / "config.json") | {"hc_mult": 2}
    (copy / "config.json").write_text(json.dumps(config))
    code, out, _ = dsv4("doctor", copy, "--for", "llama.cpp", "--json")
    assert code == 1 and any("hc_mult is 2" in check["text"] for check in json.loads(out)["checks"])
