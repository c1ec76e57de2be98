"""Mistakes that people make on the command line: the message says what, where and what to do, and the code fits.

One row a mistake. `{good}` is a checkpoint, `{llama}` another model, `{out}` a new folder.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from mixed_scales import mix_scales
from safetensors.numpy import save_file
from tiny import RAGGED, TINY

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mistakes")
    good = make_checkpoint(folder / "good", geometry=TINY)
    llama = folder / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"model.embed_tokens.weight": np.zeros((4, 8), np.float32)}, llama / "model.safetensors")
    for name, start in STARTS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / f"model.{name}").write_bytes(start + bytes(60))
    web = make_checkpoint(folder / "web", geometry=TINY)
    (web / "config.json").write_text("<!DOCTYPE html><title>Log in</title>")
    return {"good": str(good), "llama": str(llama), "web": str(web), "root": str(folder)}


STARTS = {"gguf": b"GGUF", "bin": b"PK\x03\x04", "pth": b"PK\x03\x04"}
MISTAKES = [
    ("convert {llama} {out}", 3, ["model_type is 'llama'", "no DeepSeek-V4 checkpoint", "--any-model"]),
    ("inspect demo/sorce", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("convert demo/sorce {out}", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("verify demo/sorce {good}", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("convert {good} {out} --max-shard-size 5", 2, ["5 bytes", "5GB"]),
    ("convert {good} {out} --max-shard-size abc", 2, ["'abc' is not a size", "5GB"]),
    ("convert {good} {out} --to fp16", 2, ["--to", "'fp16' is not one of 'fp8'"]),
    ("convert {good} {out} --layout mp --model-parallel 3", 2, ["cannot be divided by 3 ranks", "1, 2, 4"]),
    ("convert {good} {good}", 2, []),
    ("inspect {good} --tensors layer.0.*", 2, ["no tensor is called 'layer.0.*'", "The first is"]),
    ("verify {good} {good} --tensor layer.0.*", 2, ["layer.0.*"]),
    ("verify {good} --sample 200%", 2, ["'200%' is not a share", "5%"]),
    ("verify {good} {good} --report /nowhere/x.html", 2, ["/nowhere/x.html", "folder does not exist"]),
    ("run {good} --tokens 1,2 --device gpu", 4, ["no device 'gpu' here", "cpu"]),
    ("run {good} --tokens 1,2 --max-memory 10MB", 4, ["too little memory", "Allow at least", "MB"]),
    ("run hf:org/x -p hi", 3, ["hf:org/x", "dsv4 download hf:org/x"]),
    ("run {good} --tokens 1,x", 3, ["'1,x'"]),
    ("run {good} -p a --tokens 1", 2, ["given 2 times"]),
    ("inspect {web}", 3, ["config.json", "a web page"]),
    ("inspect {root}/gguf/model.gguf", 3, ["a GGUF file", "a folder of GGUF files"]),
    ("inspect {root}/bin/model.bin", 3, ["torch.save", "dsv4 reads safetensors"]),
    ("convert {root}/bin {out}", 3, ["model.bin: a zip archive", "dsv4 reads safetensors"]),
    ("doctor {root}/pth --for vllm", 3, ["model.pth: a zip archive", "dsv4 reads safetensors"]),
    ("doctor {good} --for tgi", 2, ["tgi"]),
    ("encode /nowhere", 3, ["/nowhere"]),
    ("convert {root}/none {out}", 3, ["does not exist"]),
]


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_answered(
    line: str, code: int, words: list[str], places: dict[str, str], tmp_path: Path, capfd: Capture
) -> None:
    arguments = [word.format(**places, out=tmp_path / "out") for word in line.split()]
    found = cli.run(arguments)
    streams = capfd.readouterr()
    assert found == code, streams.err
    assert streams.out == "" and "Traceback" not in streams.err and "Value error" not in streams.err
    flat = " ".join(streams.err.split())
    assert [word for word in words if word not in flat] == []
    assert len(streams.err.strip().splitlines()) >= 2, "an error says what to do"
    assert not (tmp_path / "out").exists()


def test_another_model_is_converted_when_asked(places: dict[str, str], tmp_path: Path, capfd: Capture) -> None:
    assert cli.run(["convert", places["llama"], str(tmp_path / "o"), "--any-model"]) == 0
    assert "only the layout changes" in capfd.readouterr().err


def test_a_config_without_a_model_type_is_v4s(places: dict[str, str], tmp_path: Path, capfd: Capture) -> None:
    folder = make_checkpoint(tmp_path / "c", geometry=TINY, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.run(["convert", str(folder), str(tmp_path / "o")]) == 0


def test_an_occupied_output_says_what_made_it(places: dict[str, str], tmp_path: Path, capfd: Capture) -> None:
    output = str(tmp_path / "o")
    assert cli.run(["convert", places["good"], output]) == 0
    assert cli.run(["convert", places["good"], output, "--to", "bf16"]) == 2
    error = capfd.readouterr().err
    assert "made with --to fp8, now bf16" in error and "--overwrite" in error and "sha256" not in error
    other = make_checkpoint(tmp_path / "other", geometry=RAGGED)
    assert cli.run(["convert", str(other), output]) == 2
    error = capfd.readouterr().err
    assert "made from another checkpoint, whose config.json is not this one's" in error and "sha256" not in error


@pytest.mark.parametrize("choice", ["keep", "round"])
@pytest.mark.fast_cases(1)
def test_no_proof_is_offered_where_it_must_fail(choice: str, tmp_path: Path, capfd: Capture) -> None:
    source = make_checkpoint(tmp_path / "c", geometry=TINY, tokenizer=False)
    mix_scales(source)
    assert cli.run(["convert", str(source), str(tmp_path / "o"), "--on-inexact", choice]) == 0
    error = capfd.readouterr().err
    assert "prove it" not in error and "list what is not exact (ends with 1): dsv4 verify" in error
    assert cli.run(["verify", str(source), str(tmp_path / "o")]) == 1


def test_a_dry_run_says_how_much_disk_is_missing(
    places: dict[str, str], tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4.commands.convert.command.free_bytes", lambda folder: 1000)
    arguments = ["convert", places["good"], str(tmp_path / "o"), "--dry-run"]
    assert cli.run(arguments) == 4
    assert " short" in capfd.readouterr().out
    assert cli.run([*arguments, "--json"]) == 4
    found = json.loads(capfd.readouterr().out)
    assert found["short_bytes"] == found["output_bytes"] - 1000
