"""Every command that opens a checkpoint, against every way to damage one."""

import hashlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import CONTENT, LEFT_OUT, SCALE_NAN, STRUCTURE, TENSOR_NAMES, Case, good_checkpoint

from dsv4.cli import run

SECONDS = 20  # of processor time, which other processes do not lengthen: no damage may make a command compute long

Command = Callable[[Path, Path, Path], list[str]]
# Arguments from (damaged folder, good folder, a folder to write).
COMMANDS: dict[str, Command] = {
    "convert": lambda bad, good, out: ["convert", str(bad), str(out)],
    "convert_dry_run": lambda bad, good, out: ["convert", str(bad), str(out), "--dry-run", "--json"],
    "verify_source": lambda bad, good, out: ["verify", str(bad), str(good)],
    "verify_output": lambda bad, good, out: ["verify", str(good), str(bad)],
    "verify_alone": lambda bad, good, out: ["verify", str(bad)],
    "inspect": lambda bad, good, out: ["inspect", str(bad)],
    "doctor": lambda bad, good, out: ["doctor", str(bad), "--for", "vllm"],
    "run": lambda bad, good, out: ["run", str(bad), "--tokens", "1", "--logits", str(out)],
    "run_compare": lambda bad, good, out: ["run", str(good), "--tokens", "1", "--compare", str(bad)],
}
QUICK = ("inspect",)  # in the fast loop; verify's own reader has the tests of its room

# `run` reads dtypes from the headers, so what a config says beside them is of no weight: the logits are the same.
RUN_MAY_TAKE = {"config_says_fp8", "config_says_nonsense", "config_without_blocks", "config_quantization_list"}

# `verify` is made for other people's conversions, which may lack index or config, and compares tensors of any name,
# as well as entries with further keys. What it must not take is what safetensors' own reader refuses.
VERIFY_MAY_TAKE = {
    *(f"tensor_name_{i}" for i in range(len(TENSOR_NAMES))),
    "header_leading_space", "entry_has_more", "shape_of_high_rank",
    "no_index", "index_is_fifo", "index_is_device", "config_missing", "config_is_fifo", "config_is_device",
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """What is in a folder: content hashes of regular files, kinds of everything else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and path.stat().st_size < 10**7
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else "other"
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "place" / "bad"))


def check_terminal(text: str) -> None:
    raw = {c for c in text if not c.isprintable() and c != "\n"}
    assert not raw, f"raw control characters reached the terminal: {raw!r}"
    assert "Traceback" not in text and "this is a bug" not in text


def spoil(case: Case, bad: Path) -> dict[str, str]:
    case.damage(bad)
    return snapshot(bad.parent)


@pytest.mark.parametrize("case", STRUCTURE + CONTENT, ids=lambda case: case.name)
@pytest.mark.fast_cases(12)
def test_convert_says_what_is_wrong(
    case: Case, good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = spoil(case, bad)
    output = tmp_path / "out"
    started = time.process_time()
    code = run(["convert", str(bad), str(output)])
    assert time.process_time() - started < SECONDS
    out, err = capsys.readouterr()
    check_terminal(out + err)
    assert code == 3, err
    assert re.search(case.words, err.replace("\n", " ")), err
    assert not out
    assert not output.exists() or not list(output.iterdir())
    assert snapshot(bad.parent) == before


@pytest.mark.parametrize("case", STRUCTURE, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in COMMANDS if c != "convert"],
)
@pytest.mark.fast_cases(40)
def test_every_command_refuses(
    command: str, case: Case, good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = spoil(case, bad)
    started = time.process_time()
    code = run(COMMANDS[command](bad, good, tmp_path / "out"))
    assert time.process_time() - started < SECONDS
    out, err = capsys.readouterr()
    check_terminal(out + err)
    lenient = command.startswith("verify") and case.name in VERIFY_MAY_TAKE
    assert code in ((0, 1, 3) if lenient else (1, 3)), (code, out, err)
    assert out + err
    assert not (tmp_path / "out").exists()
    assert snapshot(bad.parent) == before


@pytest.mark.parametrize("case", LEFT_OUT, ids=lambda case: case.name)
@pytest.mark.parametrize("command", ["convert", "inspect", "doctor", "run"])
@pytest.mark.fast_cases(2)
def test_what_the_index_leaves_out_is_named(
    command: str, case: Case, good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = spoil(case, bad)
    code = run(COMMANDS[command](bad, good, tmp_path / "out"))
    out, err = capsys.readouterr()
    check_terminal(out + err)
    assert code == (1 if command == "doctor" else 0), err  # 1: vLLM does not load FP4 experts
    assert re.search(case.words, re.sub(r"\s+", " ", out + err)), out + err
    assert snapshot(bad.parent) == before


@pytest.mark.parametrize("case", [*CONTENT, SCALE_NAN], ids=lambda case: case.name)
@pytest.mark.fast_cases(1)
def test_verify_calls_no_wrong_content_sound(
    case: Case, good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = spoil(case, bad)
    for command in ("verify_source", "verify_output", "verify_alone"):
        code = run(COMMANDS[command](bad, good, tmp_path / "out"))
        out, err = capsys.readouterr()
        check_terminal(out + err)
        assert code in (1, 3) and out, (command, code, err)
    assert snapshot(bad.parent) == before


@pytest.mark.parametrize("case", [*CONTENT, SCALE_NAN], ids=lambda case: case.name)
@pytest.mark.fast_cases(4)
def test_run_computes_nothing_from_wrong_content(
    case: Case, good: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = spoil(case, bad)
    code = run(COMMANDS["run"](bad, good, tmp_path / "out"))
    out, err = capsys.readouterr()
    check_terminal(out + err)
    assert snapshot(bad.parent) == before
    if case.name in RUN_MAY_TAKE:
        assert code == 0 and run(COMMANDS["run"](good, good, tmp_path / "expected")) == 0
        assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()
    else:
        assert code == 3 and err.startswith("error: ") and not (tmp_path / "out").exists(), err


def test_every_command_takes_the_good_checkpoint(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Otherwise refusing everything would pass the tests above.
    for command, arguments in COMMANDS.items():
        expected = (0, 1) if command == "doctor" else (0,)  # 1: vLLM does not load FP4 experts
        assert run(arguments(good, good, tmp_path / command)) in expected, (command, capsys.readouterr())


@pytest.mark.parametrize("arguments", [["--to", "fp8"], ["--to", "bf16"], ["--layout", "mp", "--model-parallel", "1"]])
def test_a_scale_of_byte_255_leaves_no_shard(
    arguments: list[str], bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SCALE_NAN.damage(bad)
    output = tmp_path / "out"
    code = run(["convert", str(bad), str(output), *arguments])
    err = capsys.readouterr().err
    check_terminal(err)
    assert code == 3 and re.search(SCALE_NAN.words, err.replace("\n", " ")), err
    assert not list(output.glob("model-00002*")) and not (output / "config.json").exists()
