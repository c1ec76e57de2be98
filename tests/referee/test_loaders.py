"""`dsv4 doctor --python`: an honest engine, engines with faults, interpreters that fail, and transformers itself."""

import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from exact_values import edit_config, edit_tensors, merged, read_folder, tensors_of
from patience import LONG
from program import as_program
from raw_safetensors import raw
from release_headers import FLASH, PRO, make_released

from dsv4 import cli, signals
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import find_weights
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError, Interrupted
from dsv4.quant.block_scales import dequantize_fp8
from dsv4.quant.blocks import Block
from dsv4.referee.loaders import loader
from dsv4.referee.loaders.probes.modules import held as held_by
from dsv4.referee.loaders.probes.record import Record
from dsv4.referee.loaders.probes.sglang_probe import SPELLING
from dsv4.referee.loaders.process import Held, run
from dsv4.referee.loaders.sample import cut_of, sample_bytes, write_sample
from dsv4.referee.loaders.values import compare

Capture = pytest.CaptureFixture[str]
Doctor = Callable[..., tuple[str, str]]
SMALL = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)
# One layer of each kind comes first: without compression and hash-routed, CSA, HCA; then twice the same pair.
DEEP = Geometry(compress_ratios=(0, 4, 128, 4, 128, 4, 128, 0), n_routed_experts=12, vocab_size=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loaders")


@pytest.fixture(scope="module")
def release(folder: Path) -> Path:
    return make_checkpoint(folder / "release", geometry=SMALL)


@pytest.fixture(scope="module")
def for_vllm(folder: Path, release: Path) -> Path:
    assert cli.run(["convert", str(release), str(folder / "vllm"), "--target", "vllm", "-q"]) == 0
    return folder / "vllm"


@pytest.fixture(scope="module")
def deep(folder: Path) -> Path:
    return make_checkpoint(folder / "deep", geometry=DEEP)


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> Doctor:
    """`dsv4 doctor FOLDER --for vllm --python …` with the fake engine and a fault in it."""

    def examine(checkpoint: Path, fault: str, code: int, *options: str, version: str = "0.33.0") -> tuple[str, str]:
        package = fake_vllm.write(tmp_path / "packages", version)
        monkeypatch.setenv("PYTHONPATH", str(package))
        monkeypatch.setenv("FAKE_VLLM", fault)
        found = cli.run(["doctor", str(checkpoint), "--for", "vllm", "--python", sys.executable, *options])
        captured = capfd.readouterr()
        assert found == code, captured.out + captured.err
        return captured.out, captured.err

    return examine


@pytest.mark.slow
def test_an_honest_engine(doctor: Doctor, release: Path, for_vllm: Path) -> None:
    for checkpoint in (release, for_vllm):
        found = json.loads(doctor(checkpoint, "", 0, "--json")[0])
        weights = find_weights(Checkpoint.open(checkpoint).tensors, found)
        assert found["loads"] and found["loader"]["right"] and found["loader"]["version"] == "0.33.0"
        assert found["loader"]["equal"] == sum(not weight.is_draft for weight in weights.values())
        assert {one["outcome"] for one in found["loader"]["weights"]} == {"left out"}
        assert found["loader"]["choices"]["config"] == "HfConfig" and found["loader"]["sample"] is None
    out, err = doctor(for_vllm, "", 0)
    assert "no kernel and no forward pass ran." in " ".join(out.split()) and "every value equal" in out
    assert "vllm serve" in err


@pytest.mark.slow
def test_an_engine_that_drops_a_tensor(doctor: Doctor, for_vllm: Path) -> None:
    found = json.loads(doctor(for_vllm, "drops", 1, "--json")[0])
    wrong = [one for one in found["loader"]["weights"] if one["outcome"] != "left out"]
    assert [(one["name"], one["outcome"]) for one in wrong] == [("layers.0.attn_norm.weight", "not loaded")]
    assert "never written" in wrong[0]["text"] and found["loads"] is False


@pytest.mark.slow
def test_an_engine_without_a_parameter(doctor: Doctor, for_vllm: Path) -> None:
    out, _ = doctor(for_vllm, "lacks", 1)
    assert "layers.0.attn.attn_sink (and 2 more like it): the engine has no parameter" in " ".join(out.split())


@pytest.mark.slow
def test_an_engine_that_misreads_a_scale(doctor: Doctor, folder: Path, release: Path) -> None:
    e8m0 = folder / "e8m0"
    assert cli.run(["convert", str(release), str(e8m0), "--target", "transformers", "-q"]) == 0
    found = json.loads(doctor(e8m0, "misreads", 1, "--json")[0])
    wrong = [one["name"] for one in found["loader"]["weights"] if one["outcome"] == "different"]
    names = [name for name in tensors_of(e8m0) if ".experts." in name and name.endswith(".weight")]
    assert sorted(wrong) == sorted(name for name in names if not name.startswith("mtp."))
    # A newer engine that reads these scales refutes the rule, which becomes a note.
    found = json.loads(doctor(e8m0, "", 0, "--json")[0])
    (scales,) = [check for check in found["checks"] if check["rule"] == "expert scales"]
    assert scales["status"] == "note" and "vLLM 0.33.0, checked 2026-11" in scales["text"]


@pytest.mark.slow
def test_an_engine_that_refuses(doctor: Doctor, for_vllm: Path) -> None:
    out, _ = doctor(for_vllm, "refuses", 1)
    assert "refuses  loader" in out and "configuration: ValueError: Unsupported head_dim" in out
    assert "does NOT load" in out and len(out) < 6000


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "version", "words"), [
    ("broken", "0.33.0", "has no vLLM: ModuleNotFoundError: No module named 'no_such_module'"),
    ("crashes", "0.33.0", "crashed (SIGSEGV)"),
    ("memory", "0.33.0", "ran out of memory"),
    ("renamed", "0.99.0", "vLLM 0.99.0 cannot be driven here (configuration): AttributeError"),
])  # fmt: skip
def test_what_says_nothing_about_the_folder(
    fault: str, version: str, words: str, doctor: Doctor, for_vllm: Path
) -> None:
    _, err = doctor(for_vllm, fault, 4, version=version)
    assert words in err and "Traceback" not in err.replace("Traceback (most", "", 1)


@pytest.mark.slow
def test_a_version_that_was_not_tried_is_named(doctor: Doctor, for_vllm: Path) -> None:
    out, _ = doctor(for_vllm, "", 0, version="0.99.0")
    assert "was tried with vLLM 0.32.0, 0.33.0" in " ".join(out.split())


@pytest.mark.slow
def test_damage_that_the_engine_does_not_see_stays_a_failure(doctor: Doctor, for_vllm: Path, tmp_path: Path) -> None:

    copy = Path(shutil.copytree(for_vllm, tmp_path / "copy"))
    edit_tensors(copy, {}, ("layers.1.ffn.experts.2.w2.scale",))
    found = json.loads(doctor(copy, "", 1, "--json")[0])
    assert {check["rule"] for check in found["checks"] if check["status"] == "wrong"} == {"tensors"}


# Interpreters that fail: small programs in place of a Python.


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


@pytest.mark.parametrize(("body", "words"), [
    ("kill -9 $$", "ran out of memory, or was killed"),
    ("kill -11 $$", "crashed (SIGSEGV)"),
    ("echo what it said >&2; exit 3", "ended with code 3 and no answer"),
    ("exit 0", "ended with code 0 and no answer"),
    ("printf '{' > $3", "not JSON"),
    ("printf '\\377' > $3", "not JSON"),
    ("printf '[]' > $3", "not a probe's answer"),
    ('echo \'{"weights": {"a": 1}, "error": null}\' > $3', "not a probe's answer"),
    ("sleep 1000", "did not finish within 1 s"),
])  # fmt: skip
@pytest.mark.fast_cases(2)
def test_an_interpreter_that_fails(
    body: str, words: str, program: Callable[[str], Path], release: Path, capfd: Capture
) -> None:
    command = ["doctor", str(release), "--for", "vllm", "--python", str(program(body)), "--timeout", "1"]
    if not body.startswith("sleep"):
        command[-1] = f"{LONG:.0f}"
    assert cli.run(command) == 4
    err = capfd.readouterr().err
    assert words in err and ("what it said" in err) == ("what it said" in body)


def test_an_interpreter_is_named_from_the_folder_of_the_user(
    program: Callable[[str], Path], release: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """It is started in another one."""
    python = program("exit 3")
    monkeypatch.chdir(python.parent)
    assert cli.run(["doctor", str(release), "--for", "vllm", "--python", f"./{python.name}"]) == 4
    assert "ended with code 3" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("--for", "vllm", "--python", "no/such/python"), 4, "--python no/such/python does not exist"),
    (("--for", "vllm", "--python", "{}/config.json"), 4, "is no program that can be run"),
    (("--for", "llama.cpp", "--python", sys.executable), 2, "--python is for vllm, sglang, transformers"),
    (("--for", "vllm", "--all"), 2, "--all belongs to --python"),
    (("--for", "vllm", "--timeout", "3"), 2, "--timeout belongs to --python"),
])  # fmt: skip
def test_what_cannot_start(arguments: tuple[str, ...], code: int, words: str, release: Path, capfd: Capture) -> None:
    assert cli.run(["doctor", str(release), *(a.format(release) for a in arguments)]) == code
    assert words in capfd.readouterr().err


@pytest.mark.slow
def test_a_package_that_is_missing(release: Path, capfd: Capture) -> None:
    assert cli.run(["doctor", str(release), "--for", "vllm", "--python", sys.executable]) == 4
    assert "has no vLLM: ModuleNotFoundError" in capfd.readouterr().err


def gone(process: Path) -> bool:
    """Whether a process ends that was killed: the system may take a moment."""
    for _ in range(int(LONG / 0.01)):
        try:
            if process.read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_signal_ends_the_interpreter(program: Callable[[str], Path], tmp_path: Path) -> None:
    """The process that it started is gone, too, when Interrupted arrives."""
    python = program(f"sleep 1000 & echo $! > {tmp_path}/child; wait")

    def interrupt(count: int) -> None:
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip():
            os.kill(os.getpid(), signal.SIGTERM)
        signals.look()

    with as_program(), pytest.raises(Interrupted):
        run(str(python), {}, tmp_path, LONG, interrupt)
    child = int((tmp_path / "child").read_text())
    assert gone(Path(f"/proc/{child}/stat"))


def test_no_memory_for_all_of_it(release: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setattr(loader, "usable_memory", lambda: 1000)
    assert cli.run(["doctor", str(release), "--for", "vllm", "--python", sys.executable, "--all"]) == 4
    assert "Leave out --all" in capfd.readouterr().err


# The sample.


def test_a_sample_has_every_kind_and_the_bytes_of_the_source(deep: Path, tmp_path: Path) -> None:
    with_drafts = Checkpoint.open(deep)
    cut = cut_of(with_drafts)
    assert (cut.layers, cut.experts, cut.tokens, cut.of) == (3, 8, 1024, (7, 12, 2048))
    written: list[int] = []
    write_sample(with_drafts, cut, tmp_path, written.append)
    source, sample = tensors_of(deep), merged(read_folder(tmp_path))
    assert sum(written) == sample_bytes(with_drafts, cut) == sum(len(tensor.data) for tensor in sample.values())
    assert all(source[name].data.startswith(tensor.data) for name, tensor in sample.items())
    cuts = {name for name, tensor in sample.items() if tensor.shape != source[name].shape}
    assert {".".join(name.split(".")[-2:]) for name in cuts} == {
        "embed.weight", "head.weight", "gate.weight", "gate.bias", "gate.tid2eid",
    }  # fmt: skip
    assert any(name.startswith("mtp.0.ffn.experts.7.") for name in sample)
    assert not any(name.startswith("layers.3.") or ".experts.8." in name for name in sample)
    config = json.loads((tmp_path / "config.json").read_text())
    before = json.loads((deep / "config.json").read_text())
    changed = {key for key in before if config[key] != before[key]}
    assert changed == {"num_hidden_layers", "n_routed_experts", "vocab_size", "compress_ratios"}
    assert config["compress_ratios"] == [0, 4, 128, 0]
    assert (tmp_path / "tokenizer.json").read_bytes() == (deep / "tokenizer.json").read_bytes()


def test_a_layer_and_an_expert_of_another_kind_are_in_the_sample(deep: Path, tmp_path: Path) -> None:

    copy = Path(shutil.copytree(deep, tmp_path / "copy"))
    tensors = tensors_of(copy)
    name = "layers.4.ffn.experts.9.w1.weight"
    edit_tensors(copy, {name: raw("U8", tensors[name].array().view("uint8"))})
    cut = cut_of(Checkpoint.open(copy))
    assert (cut.layers, cut.experts) == (5, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "most"), [(FLASH, 2 * 10**9), (PRO, 5 * 10**9)])
def test_a_sample_of_a_release_is_small(geometry: Geometry, most: int, tmp_path: Path) -> None:
    """Of the layers 3 to 60 some are like layer 3, the others like layer 4."""
    checkpoint = Checkpoint.open(make_released(tmp_path / "release", geometry))
    cut = cut_of(checkpoint)
    assert (cut.layers, cut.experts, cut.tokens) == (5, 8, 1024)
    assert most / 2 < sample_bytes(checkpoint, cut) < most


@pytest.mark.parametrize("keys", [{"model_type": "deepseek_v41"}, {"n_routed_experts": None}])
def test_what_cannot_be_sampled(keys: dict[str, Any], deep: Path, tmp_path: Path) -> None:

    copy = Path(shutil.copytree(deep, tmp_path / "copy"))
    edit_config(copy, **keys)
    with pytest.raises(InputError, match="no sample can be made"):
        cut_of(Checkpoint.open(copy))


# Values.


def held(values: torch.Tensor, loaded: bool = True) -> Held:
    import hashlib

    digest = hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    flat = values.flatten()
    elements = (float(flat[0]), float(flat[-1]))
    return Held(str(values.dtype).removeprefix("torch."), tuple(values.shape), digest, elements, loaded)


@pytest.mark.parametrize(("theirs", "outcome"), [
    (lambda v: v, "equal"),
    (lambda v: v.bfloat16(), "rounded"),
    (lambda v: v.double(), "equal"),
    (lambda v: v.reshape(2, -1), "shape"),
    (lambda v: v * 2, "different"),
    (lambda v: torch.where(v == 0, -v, v), "different"),  # the sign of zero
    (lambda v: v.flip(0), "different"),
])  # fmt: skip
def test_outcomes(theirs: Callable[[torch.Tensor], torch.Tensor], outcome: str) -> None:
    values = torch.tensor([1 / 3, 0.0, -2.5, 7.0])
    assert compare("x", values, held(theirs(values))).outcome == outcome


def test_tables_and_vision_as_sglang_keeps_them() -> None:
    """A table's scales are a parameter of their own, one per 32 elements; below `vision.` other names are changed."""
    codes = torch.arange(256, dtype=torch.uint8).where(torch.arange(256) % 128 != 127, 0).view(torch.float8_e4m3fn)
    table = {"weight": codes.view(4, 64), "scale": torch.tensor([[120, 127], [1, 2], [3, 254], [9, 99]]).byte()}
    parameters = {"model.layers.1.engram.embed": table | {"scale": table["scale"].view(torch.float8_e8m0fnu)}}
    parameters |= {f"vision.blocks.0.{n}": {"bias": torch.ones(3)} for n in ("attn.qkv_proj", "attn.proj", "mlp.w1")}
    model = torch.nn.Module()
    for path, owned in parameters.items():
        owner = model
        for part in path.split("."):
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        for name, values in owned.items():
            owner.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    found = dict(held_by(model, SPELLING, Record({"shapes": {}, "block": (32, 32)})))
    names = {f"vision.blocks.0.{n}.bias" for n in ("attn.wqkv", "attn.wo", "mlp.w1")}
    assert set(found) == {"layers.1.engram.embed.weight"} | names
    exact = dequantize_fp8(table["weight"], table["scale"].view(torch.float8_e8m0fnu), Block(1, 32))
    assert torch.equal(found["layers.1.engram.embed.weight"], exact)


def test_what_was_never_written() -> None:
    assert compare("x", torch.ones(4), held(torch.full((4,), 3.0), loaded=False)).outcome == "not loaded"


# transformers itself, whose package is in the test extra.


@pytest.mark.slow
def test_transformers_holds_every_value(for_vllm: Path, release: Path, capfd: Capture) -> None:
    for checkpoint in (release, for_vllm):
        command = ["doctor", str(checkpoint), "--for", "transformers", "--python", sys.executable, "--json"]
        assert cli.run(command) == 0
        found = json.loads(capfd.readouterr().out)["loader"]
        assert found["right"] and found["engine"] == "transformers"
        assert found["choices"]["config"] == "DeepseekV4Config"
        assert {one["outcome"] for one in found["weights"]} == {"left out"} and found["equal"] > 100


@pytest.mark.slow
def test_transformers_over_a_sample(deep: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setattr(loader, "WHOLE_BYTES", 1000)
    command = ["doctor", str(deep), "--for", "transformers", "--python", sys.executable]
    assert cli.run(command) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "a sample, 3 of 7 layers, 8 of 12 experts in each, 1024 of 2048 tokens" in out


@pytest.mark.slow
def test_transformers_makes_up_a_tensor_that_is_missing(for_vllm: Path, tmp_path: Path, capfd: Capture) -> None:
    copy = Path(shutil.copytree(for_vllm, tmp_path / "copy"))
    edit_tensors(copy, {}, ("norm.weight",))
    assert cli.run(["doctor", str(copy), "--for", "transformers", "--python", sys.executable, "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert ("norm.weight", "not in the folder") in {(w["name"], w["outcome"]) for w in found["loader"]["weights"]}


def test_a_scale_that_is_no_number(for_vllm: Path, tmp_path: Path) -> None:

    from dsv4.referee.loaders.values import values_of

    copy = Path(shutil.copytree(for_vllm, tmp_path / "copy"))
    name = "layers.0.attn.wkv.scale"
    scale = tensors_of(copy)[name]
    edit_tensors(copy, {name: scale.like(scale.array() * float("nan"))})
    checkpoint = Checkpoint.open(copy)
    weights = find_weights(checkpoint.tensors, checkpoint.config)
    with pytest.raises(InputError, match="wkv"):
        values_of(checkpoint, weights["layers.0.attn.wkv.weight"])
