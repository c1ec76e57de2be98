"""Mistakes that people make on the command line: the message says what, where and what to do, and the code fits.

One row a mistake. `tests/lab/damaged_folders.py` makes what the commands are tried on.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from damaged_folders import make_folders
from tiny import RAGGED, TINY, flipped

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    make_folders(folder)
    assert cli.run(["convert", str(folder / "good"), str(folder / "fp8"), "-q"]) == 0
    return folder


# Command line, exit code, words of the message. A word in braces is a folder of `damaged_folders`, {out} a new one.
MISTAKES = [
    # names of what is not there
    ("inspect /nowhere", 3, ["/nowhere: does not exist", "config.json and the shards"]),
    ("inspect nowhere", 2, ["'nowhere' is neither a folder that exists nor a repository", "hf:org/name"]),
    ("inspect demo/sorce", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("convert demo/sorce {out}", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("convert nowhere {out}", 2, ["'nowhere' is neither", "hf:org/name"]),
    ("convert {none} {out}", 3, ["none: does not exist"]),
    ("verify demo/sorce {good}", 3, ["demo/sorce: does not exist", "hf:demo/sorce"]),
    ("verify nowhere", 2, ["'nowhere' is neither", "hf:org/name"]),
    ("verify {good} nowhere", 3, ["nowhere: does not exist"]),
    ("run nowhere", 3, ["nowhere: does not exist"]),
    ("run {good} --tokens 1,2 --compare nowhere", 3, ["nowhere: does not exist"]),
    ("run {good} --tokens 1,2 --compare localhost:8000 --server vllm", 2, ["server is http://localhost:8000"]),
    ("run {good} --tokens 1,2 --compare 127.0.0.1:80/v1", 2, ["no checkpoint", "is http://127.0.0.1:80/v1."]),
    ("run {good} --file /nowhere", 3, ["/nowhere: No such file"]),
    ("run {good} --messages {half.json}", 3, ["half.json", "not valid JSON"]),
    ("doctor nowhere --for vllm", 3, ["nowhere: does not exist"]),
    ("encode /nowhere", 3, ["/nowhere: No such file"]),
    ("encode {half.json}", 3, ["half.json", "not valid JSON"]),
    ("encode {good}/config.json", 3, ["expected a JSON list of messages", '"role": "user"']),
    ("download nowhere {out}", 2, ["'nowhere' is neither", "hf:org/name"]),
    ("download {good} {out}", 2, ["is a local folder", "hf:org/name"]),
    ("inspect {good}/config.json", 3, ["config.json: not a .safetensors file", "one shard"]),
    ("inspect {good}/none.safetensors", 3, ["none.safetensors: does not exist"]),
    # repositories
    ("inspect hf:demo", 2, ["'demo' is not org/name", "hf:org/name"]),
    ("inspect xx:demo/source", 2, ["no hub called 'xx'", "ms:org/name"]),
    ("inspect https://example.com/a/b", 2, ["example.com is no hub", "HF_ENDPOINT"]),
    ("inspect https://huggingface.co/datasets/a/b", 2, ["is not the address of a model"]),
    ("inspect hf:a/b@..", 2, ["'..' is not a branch, tag or commit"]),
    ("inspect hf:a/b@main --revision dev", 2, ["two revisions: @main and --revision dev", "Give one"]),
    ("inspect {good} --revision main", 2, ["is a folder, which has no revisions", "Leave it out"]),
    ("inspect hf:a/b", 4, ["hf:a/b", "does not answer", "Check the network"]),
    ("convert hf:a/b {out}", 4, ["hf:a/b", "does not answer", "Check the network"]),
    ("download hf:a/b {out}", 4, ["hf:a/b", "does not answer", "--fallback"]),
    ("inspect hf:a/b --fallback", 2, ["No such option: --fallback"]),
    # folders in each other's place
    ("convert {good} {good}", 2, ["is the source", "Choose one elsewhere"]),
    ("convert {good} {good}/out", 2, ["lies inside the source", "Choose one elsewhere"]),
    ("convert {good} {other}", 2, ["is not empty (it holds notes.txt)", "new or empty folder"]),
    ("convert {good} {good}/config.json", 2, ["lies inside the source"]),
    ("convert {good} {fp8} --to bf16", 2, ["made with --to fp8, now bf16", "--overwrite"]),
    ("demo {other}", 2, ["is not an empty folder", "new folder"]),
    ("demo {good}/config.json", 2, ["is not an empty folder", "new folder"]),
    # what is missing or damaged in a folder
    ("convert {empty} {out}", 3, ["neither model.safetensors.index.json nor", "complete checkpoint"]),
    ("convert {no-config} {out}", 3, ["config.json is missing", "Copy it from the release"]),
    ("convert {no-index} {out}", 3, ["neither model.safetensors.index.json nor", "5 other .safetensors"]),
    ("convert {no-shard} {out}", 3, ["1 of 5 shards are missing", "Finish the download"]),
    ("run {no-shard} -p hi", 3, ["1 of 5 shards are missing", "Finish the download"]),
    ("convert {cut} {out}", 3, ["truncated", "Download the file again"]),
    ("run {cut} --tokens 1,2", 3, ["truncated", "Download the file again"]),
    ("convert {zeros} {out}", 3, ["the header is empty", "Download the file again"]),
    ("convert {nothing} {out}", 3, ["0 bytes are too few", "Download the file again"]),
    ("convert {swapped} {out}", 3, ["names 42 tensors that are not in their shard", "Download the index"]),
    ("convert {half-config} {out}", 3, ["config.json: not valid JSON", "Download the file again"]),
    ("convert {list-config} {out}", 3, ["config.json: a JSON object is expected", "Download the file again"]),
    ("run {wide} --tokens 1,2", 3, ["config.json asks for [512, 7168]", "another checkpoint"]),
    ("run {no-tokenizer} -p hi", 3, ["tokenizer.json does not exist", "--tokens"]),
    ("run {empty} -p hi", 3, ["neither model.safetensors.index.json nor", "complete checkpoint"]),
    ("verify {empty}", 3, ["holds no safetensors file", "holds the shards"]),
    ("doctor {empty} --for vllm", 3, ["holds no .safetensors file", "folder of a checkpoint"]),
    # other kinds of files
    ("convert {lfs-shard} {out}", 3, ["00001-of-00005.safetensors: a git-LFS pointer", "git lfs pull"]),
    ("convert {lfs-config} {out}", 3, ["config.json: a git-LFS pointer", "git lfs pull"]),
    ("convert {lfs-tokenizer} {out}", 3, ["tokenizer.json: a git-LFS pointer", "git lfs pull"]),
    ("run {lfs-shard} --tokens 1", 3, ["00001-of-00005.safetensors: a git-LFS pointer", "git lfs pull"]),
    ("convert {web-shard} {out}", 3, ["00001-of-00005.safetensors: a web page", "Download the file again"]),
    ("convert {web-config} {out}", 3, ["config.json: a web page", "Download the file again"]),
    ("convert {web-tokenizer} {out}", 3, ["tokenizer.json: a web page", "Download the file again"]),
    ("convert {web-index} {out}", 3, ["index.json: a web page", "Download the file again"]),
    ("inspect {web-config}", 3, ["config.json: a web page", "Download the file again"]),
    ("run {web-tokenizer} -p hi", 3, ["tokenizer.json: a web page", "Download the file again"]),
    ("inspect {gguf}/model.gguf", 3, ["a GGUF file", "a folder of GGUF files"]),
    ("convert {gguf} {out}", 3, ["model.gguf: GGUF version 0", "download it again"]),
    ("inspect {bin}/model.bin", 3, ["torch.save", "dsv4 reads safetensors"]),
    ("convert {bin} {out}", 3, ["model.bin: a zip archive", "dsv4 reads safetensors"]),
    ("verify {bin}", 3, ["model.bin: a zip archive", "dsv4 reads safetensors"]),
    ("run {bin} -p hi", 3, ["model.bin: a zip archive", "dsv4 reads safetensors"]),
    ("doctor {pth} --for vllm", 3, ["model.pth: a zip archive", "dsv4 reads safetensors"]),
    # other models
    ("convert {llama} {out}", 3, ["model_type is 'llama'", "no DeepSeek-V4 checkpoint", "--any-model"]),
    ("convert {v3} {out}", 3, ["model_type is 'deepseek_v3'", "--any-model"]),
    ("convert {awq} {out}", 3, ["quantized as AWQ", "take the release"]),
    ("run {llama} -p hi", 3, ["model_type is 'llama'", "dsv4 convert"]),
    ("run {good} --tokens 1,2 --compare {llama}", 3, ["model_type is 'llama'"]),
    # options of convert
    ("convert {good}", 2, ["Missing argument 'OUTPUT'"]),
    ("convert {good} {out} --to fp16", 2, ["--to", "'fp16' is not one of 'fp8'"]),
    ("convert {good} {out} --target vlm", 2, ["--target", "'vlm' is not one of", "vllm"]),
    ("convert {good} {out} --scale-dtype f16", 2, ["'f16' is not one of 'e8m0', 'f32'"]),
    ("convert {good} {out} --wo-a fp4", 2, ["'fp4' is not one of 'fp8', 'bf16'"]),
    ("convert {good} {out} --on-inexact ignore", 2, ["'ignore' is not one of 'error', 'keep', 'round'"]),
    ("convert {good} {out} --layout mp", 2, ["needs --model-parallel N", "ranks"]),
    ("convert {good} {out} --layout mp --model-parallel 3", 2, ["cannot be divided by 3 ranks", "1, 2, 4"]),
    ("convert {good} {out} --layout mp --model-parallel 2 --target vllm", 2, ["does not go with", "Leave out"]),
    ("convert {good} {out} --model-parallel 2", 2, ["goes with --layout mp", "leave out"]),
    ("convert {good} {out} --max-shard-size 5", 2, ["5 bytes", "5GB"]),
    ("convert {good} {out} --max-shard-size abc", 2, ["'abc' is not a size", "5GB"]),
    ("convert {good} {out} --max-shard-size -1GB", 2, ["'-1GB' is not a size", "5GB"]),
    ("convert {good} {out} --max-memory lots", 2, ["'lots' is not a size", "5GB"]),
    ("convert {good} {out} --max-memory 10MB", 4, ["10.0 MB is too little", "or more"]),
    ("convert {good} {out} --max-workers 0", 2, ["--max-workers", "greater than or equal to 1"]),
    ("convert {good} {out} --part 5/4", 2, ["--part 5/4: not a part", "--part 2/8"]),
    ("convert {good} {out} --part 1/4 --finish", 2, ["three ways to share the work", "one of them"]),
    ("convert {good} {out} --to nvfp4", 2, ["--to nvfp4 needs --input-scale", "1.0"]),
    ("convert {good} {out} --to nvfp4 --input-scale x", 2, ["neither a positive number nor a file", "1.0"]),
    # of the others
    ("frobnicate {good}", 2, ["No such command 'frobnicate'"]),
    ("inspect {good} --tensors layer.0.*", 2, ["no tensor is called 'layer.0.*'", "The first is"]),
    ("inspect {good} layers.0.*", 2, ["'layers.0.*' needs --tensors"]),
    ("inspect {good} --tensor layers.9.norm", 3, ["there is no tensor 'layers.9.norm'", "--tensors"]),
    ("inspect {good} --tensors --tensor embed.weight", 2, ["exclude each other"]),
    ("verify {good} {fp8} --tensor layer.0.*", 2, ["no tensor called 'layer.0.*'", "Check --tensor"]),
    ("verify {good} {fp8} --shard 99", 2, ["--shard 99: the output has 3 shards", "1 to 3"]),
    ("verify {good} --sample 200%", 2, ["'200%' is not a share", "5%"]),
    ("verify {good} --inverse", 2, ["needs the source too", "SOURCE and OUTPUT"]),
    ("verify {good} {fp8} --inverse --sample 5%", 2, ["Leave out one of them"]),
    ("verify {good} {fp8} --report /nowhere/x.html", 2, ["/nowhere/x.html", "folder does not exist"]),
    ("verify {good} {fp8} {fp8}", 2, ["unexpected extra argument"]),
    ("run {good} --tokens 1,x", 3, ["'1,x' is neither a list of token ids nor a file", "0,17,4"]),
    ("run {good} --tokens 1,999999", 3, ["token 1 is 999999", "this checkpoint's tokenizer"]),
    ("run {good} --tokens 1,2 --device gpu", 4, ["no device 'gpu' here", "cpu"]),
    ("run {good} --tokens 1,2 --device mps", 4, ["no device 'mps' here", "cpu"]),
    ("run {good} --tokens 1,2 --max-memory 10MB", 4, ["too little memory", "Allow at least", "MB"]),
    ("run {good} --tokens 1,2 --logits /nowhere/x.safetensors", 2, ["/nowhere/x.safetensors", "Create it first"]),
    ("run {good} -p a --tokens 1", 2, ["given 2 times"]),
    ("run {good} a -p b", 2, ["given twice", "either PROMPT or -p"]),
    ("run {good} --tokens 1 --max-new-tokens 0", 2, ["--max-new-tokens", "greater than or equal to 1"]),
    ("run {good} --tokens 1 --suite", 2, ["given 2 times"]),
    ("run {good} -p a --raw --mode think", 2, ["--raw sends the text as it is", "Leave out --mode"]),
    ("run {good} -p a --mode fast", 2, ["'fast' is not one of 'chat', 'think'"]),
    ("doctor {good}", 2, ["Missing option '--for'", "vllm"]),
    ("doctor {good} --for tgi", 2, ["'tgi' is not one of 'vllm'"]),
]


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_answered(
    line: str,
    code: int,
    words: list[str],
    root: Path,
    tmp_path: Path,
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no hub answers there
    line = line.replace("{out}", str(tmp_path / "out"))
    arguments = re.sub(r"\{(.+?)\}", lambda match: str(root / match[1]), line).split()
    found = cli.run(arguments)
    streams = capfd.readouterr()
    assert found == code, streams.err
    assert streams.out == "" and "Traceback" not in streams.err and "Value error" not in streams.err
    flat = " ".join(streams.err.split())
    assert [word for word in words if word not in flat] == []
    assert len(streams.err.strip().splitlines()) >= 2, "an error says what to do"
    assert not (tmp_path / "out").exists()


def test_another_model_is_converted_when_asked(root: Path, tmp_path: Path, capfd: Capture) -> None:
    assert cli.run(["convert", str(root / "llama"), str(tmp_path / "o"), "--any-model"]) == 0
    assert "only the layout changes" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "refused"), [("llama", True), ("v3", True), ("good", False)])
def test_sizes_of_another_model_say_what_convert_asks_for(
    name: str, refused: bool, root: Path, tmp_path: Path, capfd: Capture
) -> None:
    """`inspect` lists conversions; it names the option without which `convert` refuses them."""
    assert cli.run(["convert", str(root / name), str(tmp_path / "o"), "--dry-run"]) == (3 if refused else 0)
    capfd.readouterr()
    assert cli.run(["inspect", str(root / name)]) == 0
    said = capfd.readouterr().out
    assert "What dsv4 convert would make of it" in said and ("only with --any-model" in said) == refused


def test_a_config_without_a_model_type_is_v4s(root: Path, tmp_path: Path, capfd: Capture) -> None:
    folder = make_checkpoint(tmp_path / "c", geometry=TINY, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.run(["convert", str(folder), str(tmp_path / "o")]) == 0


def test_an_occupied_output_says_what_made_it(root: Path, tmp_path: Path, capfd: Capture) -> None:
    output = str(tmp_path / "o")
    assert cli.run(["convert", str(root / "good"), output]) == 0
    assert cli.run(["convert", str(root / "good"), output, "--to", "bf16"]) == 2
    error = capfd.readouterr().err
    assert "made with --to fp8, now bf16\n" in error and "--overwrite" in error and "sha256" not in error
    other = make_checkpoint(tmp_path / "other", geometry=RAGGED)
    assert cli.run(["convert", str(other), output]) == 2
    error = capfd.readouterr().err
    assert "made from another checkpoint (5 shards, " in error and "; this one has " in error and "sha256" not in error


RANKS = ("--layout", "mp", "--model-parallel", "1")


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--on-inexact", "keep"), "config.json is at fault (ends with 1)", 1),
        (("--on-inexact", "round"), "list what is not exact (ends with 1)", 1),
        (("--on-inexact", "keep", *RANKS), "next", 0),  # the reference engine's config names no format
    ],
)
@pytest.mark.fast_cases(1)
def test_no_proof_is_offered_where_it_must_fail(
    options: tuple[str, ...], words: str, code: int, root: Path, tmp_path: Path, capfd: Capture
) -> None:
    assert cli.run(["convert", str(root / "mixed"), str(tmp_path / "o"), *options]) == 0
    step = capfd.readouterr().err.splitlines()[-1]
    assert step.startswith(words) or f", {words}: dsv4" in step
    assert ("next: dsv4" in step) == (code == 0)
    assert cli.run(shlex.split(step.partition("dsv4 ")[2])) == code


def test_a_choice_is_offered_only_where_it_exists(root: Path, tmp_path: Path, capfd: Capture) -> None:
    """A form of another tool has no place for a tensor in another format."""
    assert cli.run(["convert", str(root / "mixed"), str(tmp_path / "o")]) == 3
    assert "--on-inexact keep" in capfd.readouterr().err
    arguments = ["convert", str(root / "mixed"), str(tmp_path / "o"), "--to", "nvfp4", "--input-scale", "1.0"]
    assert cli.run(arguments) == 3
    said = capfd.readouterr().err
    assert "--on-inexact round" in said and "keep" not in said
    assert cli.run([*arguments, "--on-inexact", "keep"]) == 2


def test_steps_from_rank_files_and_without_a_tokenizer(root: Path, tmp_path: Path, capfd: Capture) -> None:
    """To rank files and back, and each printed step as it stands."""
    ranks, back = str(tmp_path / "ranks"), str(tmp_path / "back")
    assert cli.run(["convert", str(root / "no-tokenizer"), ranks, *RANKS]) == 0
    assert cli.run(["convert", ranks, back]) == 0
    said = capfd.readouterr().err
    assert "note: no routed expert is FP4" in said and "warning" not in said
    for _ in range(2):  # the proof, and after it a run
        step = said.splitlines()[-1]
        assert step.startswith("next: dsv4 "), said
        assert cli.run(shlex.split(step.partition("dsv4 ")[2])) == 0
        said = capfd.readouterr().err


def test_a_dry_run_says_how_much_disk_is_missing(
    root: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4.commands.convert.command.free_bytes", lambda folder: 1000)
    arguments = ["convert", str(root / "good"), str(tmp_path / "o"), "--dry-run"]
    assert cli.run(arguments) == 4
    assert " short" in capfd.readouterr().out
    assert cli.run([*arguments, "--json"]) == 4
    found = json.loads(capfd.readouterr().out)
    assert found["short_bytes"] == found["output_bytes"] - 1000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lfs-shard", "00001-of-00005.safetensors cannot be read: it is a git-LFS pointer"),
        ("web-shard", "00001-of-00005.safetensors cannot be read: it is a web page"),
        ("web-config", "config.json cannot be used: it is a web page"),
        ("web-index", "index.json cannot be used: it is a web page"),
        ("web-tokenizer", "tokenizer.json is a web page"),
        ("half-config", "config.json cannot be used: not JSON"),
    ],
)
def test_verify_tells_other_kinds_of_files(name: str, words: str, root: Path, capfd: Capture) -> None:
    assert cli.run(["verify", str(root / "good"), str(root / name)]) == 3
    found = capfd.readouterr().out
    assert words in found and "config.json is missing" not in found


def test_doctor_says_what_to_do_once(root: Path, capfd: Capture) -> None:
    assert cli.run(["doctor", str(root / "web-shard"), "--for", "vllm"]) == 1
    found = " ".join(capfd.readouterr().out.split())
    assert found.count("Download the file again.") == 1 and "\\n" not in found


def test_no_next_step_for_another_model(root: Path, capfd: Capture) -> None:
    assert cli.run(["verify", str(root / "llama")]) == 0
    streams = capfd.readouterr()
    assert "no DeepSeek-V4: shapes were not checked" in streams.out and "dsv4 run" not in streams.err
    assert cli.run(["inspect", str(root / "llama")]) == 0
    step = capfd.readouterr().err.strip().partition("dsv4 ")[2]
    assert cli.run(shlex.split(step)) == 0


def test_the_verdict_counts_scales_and_problems(root: Path, tmp_path: Path, capfd: Capture) -> None:
    name = "layers.0.ffn.experts.0.w1.weight"
    damaged = flipped(root / "fp8", tmp_path / "damaged", name)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    assert cli.run(["verify", str(root / "good"), str(damaged)]) == 1
    found = capfd.readouterr().out
    assert "DIFFERENT: 2 tensors differ (1 of them scales), 1 problem beside the values" in found
    assert f"num_experts_per_tok = 9 (source's config.json: {config['num_experts_per_tok']})" in found
