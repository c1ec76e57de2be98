"""The command line itself: help, version, what is imported when, and an exit code for every way to end."""

import ast
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from hostile import good_checkpoint

import dsv4
from dsv4 import cli, endings, output
from dsv4.commands import inspect as command_inspect
from dsv4.errors import InputError, Interrupted, MachineError, UsageError
from dsv4.output import ClosedPipe
from dsv4.text import printable

COMMANDS = sorted(command.callback.__name__ for command in cli.app.registered_commands if command.callback)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, flag)
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +[A-Z]", out, re.MULTILINE), command


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, flag) == (0, f"dsv4 {dsv4.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    examples = out[out.index("Examples:") :].splitlines()[1:]
    assert [line for line in examples if line.strip().startswith(f"dsv4 {command}")], out
    assert run(capsys, command, "-h")[1] == out


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert code == 2 and "convert" in out + err


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["convert"], ["convert", "a", "b", "--to", "fp7"], ["verify", "a", "b", "--shard", "0"], ["--what"]],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err and "Traceback" not in err


IMPORTED = "import sys; from dsv4 import cli; code = cli.run({arguments}); print(sorted(sys.modules), file=sys.stderr)"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["run", "-h"]])
@pytest.mark.fast_cases(1)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-c", IMPORTED.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in ast.literal_eval(done.stderr)}
    assert "typer" in modules
    assert not modules & {
        "torch",
        "numpy",
        "modelscope",
        "huggingface_hub",
        "transformers",
        "tokenizers",
        "safetensors",
    }


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[str]]:
    """Arguments of a command that ends with the exception given."""

    def command(error: BaseException) -> list[str]:
        def raising() -> None:
            raise error

        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command("one")(raising)
        app.command("other")(raising)
        monkeypatch.setattr(cli, "app", app)
        return ["one"]

    return command


def system_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


ENDINGS = [
    (UsageError("two options exclude each other", "Leave out one."), 2, "two options.*\n  Leave out one"),
    (InputError("shard is truncated", "Download it again."), 3, "shard is truncated\n  Download it again"),
    (MachineError("too little disk"), 4, "too little disk"),
    (Interrupted("interrupted", "Run it again."), 130, "interrupted\n  Run it again"),
    (KeyError("x"), 70, "bug in dsv4: KeyError"),
    (system_error(errno.ENOENT, "config.json"), 3, "config.json: No such file"),
    (system_error(errno.ENOSPC, "model.safetensors"), 4, "model.safetensors: No space left.*\n  Free some disk space"),
    (system_error(errno.EACCES, "out"), 4, "out: Permission denied.*\n  Check the permissions"),
    (system_error(errno.EROFS, "out"), 4, "read-only"),
    (system_error(errno.EIO), 4, "Input/output error.*\n  The disk reports an error"),
    (system_error(errno.EFBIG, "out"), 4, "ulimit -f"),
    (system_error(errno.ENOENT, "\x1b[31mred"), 3, r"\\x1b\[31mred"),
    (MemoryError(), 4, "out of memory\n  .*--max-memory"),
    (ValueError("unforeseen \x1b[31m"), 70, r"bug in dsv4: ValueError: unforeseen \\x1b.*\n.*DSV4_DEBUG=1"),
    (AssertionError(), 70, "bug in dsv4: AssertionError"),
    (RecursionError("deep"), 70, "bug in dsv4: RecursionError"),
]


@pytest.mark.parametrize(("error", "code", "words"), ENDINGS, ids=lambda value: type(value).__name__)
def test_every_ending_has_its_code_and_message(
    error: BaseException,
    code: int,
    words: str,
    failing: Callable[[BaseException], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, out, err = run(capsys, *failing(error))
    assert (found, out) == (code, "")
    assert re.search(rf"^error: .*{words}", err, re.DOTALL), err
    assert "Traceback" not in err and printable(err.replace("\n", "")) == err.replace("\n", "")


INPUT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


@pytest.mark.parametrize(
    "number", sorted({*INPUT, *endings.HINTS, errno.EPERM, errno.ENOTCONN}), ids=errno.errorcode.get
)
def test_every_error_of_the_system_has_its_code_and_its_hint(number: int) -> None:
    """A wrong path is wrong input, everything else the machine's doing; only what is known has a hint."""
    error = endings.explain(system_error(number, "some/file"))
    assert error.exit_code == (3 if number in INPUT else 4)
    assert error.message == f"some/file: {os.strerror(number)}"
    assert bool(error.hint) == (number in INPUT or number in endings.HINTS)
    assert str(endings.explain(OSError("no number"))) == "no number"


def test_debug_shows_the_traceback_of_a_bug(
    failing: Callable[[BaseException], list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_DEBUG", "1")
    code, _, err = run(capsys, *failing(KeyError("x")))
    assert code == 70 and "Traceback" in err and "KeyError" in err


def test_a_closed_pipe_is_silent(
    failing: Callable[[BaseException], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *failing(ClosedPipe("gone"))) == (141, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "{folder}"], ["inspect", "{folder}", "--json"]])
def test_stdout_may_close(arguments: list[str], tmp_path: Path) -> None:
    folder = good_checkpoint(tmp_path / "good")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dsv4", *(a.format(folder=folder) for a in arguments)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and "bug" not in done.stderr
    assert done.returncode in (1, 141)  # the help is printed by the command-line library, whose code is 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(("full", "folder", "code"), [("stdout", "good", 4), ("stderr", "missing", 3)])
def test_where_the_words_go_may_be_full(full: str, folder: str, code: int, options: list[str], tmp_path: Path) -> None:
    good_checkpoint(tmp_path / "good")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "dsv4", "inspect", str(tmp_path / folder), *options]
    with open("/dev/full", "w") as sink:
        done = subprocess.run(command, text=True, **(streams | {full: sink}))
    assert done.returncode == code and "Traceback" not in (done.stderr or "")
    assert full == "stderr" or "standard output: No space left on device" in done.stderr


# (command line, its exit code) with the shell's way to close a stream
CLOSED = [
    ("inspect {folder} 2>&-", 0),
    ("inspect {folder}/none 2>&-", 3),
    ("inspect {folder} --json >&-", 0),
    ("encode - <&-", 3),
    ("encode - <&- >&- 2>&-", 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code"), CLOSED)
def test_standard_streams_may_be_closed(line: str, code: int, tmp_path: Path) -> None:
    folder = good_checkpoint(tmp_path / "good")
    done = subprocess.run(f"{sys.executable} -m dsv4 {line.format(folder=folder)}", shell=True, capture_output=True)
    assert done.returncode == code and b"bug" not in done.stderr, done.stderr
    assert bool(done.stderr) == (code == 3 and "2>&-" not in line)


# A command line of every command, without a network, and its exit code with all streams open.
EVERY_COMMAND = {
    "convert {folder} {out}": 0,
    "demo {out}": 0,
    "doctor {folder} --for vllm": 1,  # it cannot load this one
    "download {out}": 2,
    "encode -": 3,
    "env": 0,
    "inspect {folder}": 0,
    "run {folder} --tokens 1,2 --max-new-tokens 1": 0,
    "verify {folder} {folder}": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("line", EVERY_COMMAND)
def test_one_closed_stream_does_not_change_how_a_command_ends(line: str, tmp_path: Path) -> None:
    """Never 70, a bug; and 1 only where it is the answer."""
    assert {one.split()[0] for one in EVERY_COMMAND} == set(typer.main.get_command(cli.app).commands)
    folder = good_checkpoint(tmp_path / "good")
    started = [
        subprocess.Popen(
            f"{sys.executable} -m dsv4 {line.format(folder=folder, out=tmp_path / str(number))} {closing}",
            shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for number, closing in enumerate(("<&-", ">&-", "2>&-"))
    ]  # fmt: skip
    assert [process.wait() for process in started] == [EVERY_COMMAND[line]] * 3


@pytest.mark.slow
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Messages would be written into it."""
    code = """
import os, sys
from dsv4 import cli
cli._open_closed_streams()
assert os.open(os.devnull, os.O_RDONLY) > 2
assert sys.stdin is not None
print("words", file=sys.stderr, flush=True)
"""
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        assert not subprocess.run(f"'{sys.executable}' -c '{code}' {closed}", shell=True).returncode, closed


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["inspect {}", "doctor {} --for vllm", "convert {} out --dry-run", "verify {} {}"])
@pytest.mark.fast_cases(1)
def test_headers_are_read_under_a_bar(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = good_checkpoint(tmp_path / "good")
    words = command.replace("{}", str(folder)).split()
    shown = []
    for seconds, options in ((0, ()), (0.5, ()), (0, ("--json",))):  # at once; after half a second, as always; never
        monkeypatch.setattr(output, "SECONDS_UNTIL_A_PASSING_BAR", seconds)
        monkeypatch.setattr(sys, "stderr", Terminal())
        cli.run([*words, *options])
        shown.append(sys.stderr.getvalue())
        monkeypatch.undo()
    assert "opening" in shown[0]
    assert not any("opening" in text for text in shown[1:])


WRONG_USAGE = [
    (["--json", "--no-such-option"], "--no-such-option|--json"),
    (["nonsense", "--json"], "nonsense"),
    (["convert", "--json"], "Missing argument 'SOURCE'"),
    (["convert", "a", "b", "--to", "fp7", "--json"], "fp7"),
    (["convert", "--json", ".", "b", "--part", "1/2", "--finish"], "--finish"),
    (["doctor", "a", "--json"], "--for"),
    (["verify", "a", "b", "--shard", "0", "--json"], "--shard"),
    (["run", "--json", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
    *(([name, "--json", "--no-such-option"], "No such option") for name in COMMANDS),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_USAGE, ids=lambda value: " ".join(value))
def test_json_wrong_usage_is_one_object(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    found = json.loads(out)
    assert code == found["exit_code"] == 2 and set(found) == {"error", "hint", "exit_code"}
    assert re.search(words, found["error"]) and re.search(words, err)


def test_json_wrong_usage_is_one_object_of_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    for rank in "01":
        for name, value in {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        for arguments in (["convert", "a", "--json"], ["convert", "a", "b", "--finish", "--json"]):
            code, out, err = run(capsys, *arguments)
            assert code == 2 and err
            printed.append(out)
    assert [bool(out) for out in printed] == [True, True, False, False]


def test_json_behind_two_dashes_is_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert", "--to", "fp7", "--", "--json", "b")
    assert (code, out) == (2, "")


EMPTY = [
    ["convert", "", "out"], ["convert", "source", ""], ["verify", ""], ["verify", "source", ""], ["inspect", ""],
    ["run", "", "Hello"], ["run", "source", "Hello", "--compare", ""], ["doctor", "", "--for", "vllm"],
    ["download", ""], ["download", "org/name", ""], ["download", "org/name", "--local-dir", ""],
    ["download", "org/name", "--cache-dir", ""], ["encode", ""], ["demo", ""],
]  # fmt: skip


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
@pytest.mark.fast_cases(3)
def test_an_empty_name_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good_checkpoint(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and "is empty" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_json_errors_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", "/no/such/folder", "--json")
    assert code == 3 and err.startswith("error: ")
    found = json.loads(out)
    assert found["exit_code"] == 3 and found["error"] in err


def test_examples_are_kept_as_they_are() -> None:
    assert command_inspect.EPILOG.startswith("\b\nExamples:\n  dsv4 inspect")
