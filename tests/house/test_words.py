"""What a stranger reads: help that fits 80 columns, options worded once, real commands as hints, plain English."""

import re
from pathlib import Path

import pytest
import typer
from command_lines import dsv4_commands, parse

from dsv4 import cli
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError

COMMANDS = typer.main.get_command(cli.app).commands
# The same word for another thing on purpose: files, threads; …
DIFFERENT = {
    "--max-workers", "--quiet", "--dry-run", "--report", "--tensor", "--tokens", "--seed", "--edition", "--timeout",
}  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
PROSE = [
    path
    for top in ("quant", "convert", "model", "src/dsv4", "docs", "examples", "benchmarks", ".ci", "tests")
    for path in sorted((ROOT / top).rglob("*"))
    if path.suffix in (".py", ".c", ".h", ".j2", ".md", ".sh") and not path.is_symlink() and path != Path(__file__)
] + [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")]
# Phrases that CONTRIBUTING's rule of words replaces; none has a use of its own.
BANNED = re.compile(
    r"\b(is|are|be|been) told\b|\bhears?\b|\bdress\b|not a yes|what is there\b|behind (the caller's|its|their) backs?\b"
    r"|\bgives? it up\b|\bvouches\b|\bwants to know\b|\bby the by\b|\bwhoever\b|\blets? go of\b|\btakes? apart\b"
    r"|\bunder way\b|\bfor good\b|\bfor want of\b|\ball the same\b|\bnobody has\b|\bwho is asked\b|\bgiven up\b"
    r"|\"\"\"See [A-Z]\w+\b"
)


def test_no_phrase_that_has_to_be_read_twice() -> None:
    found = []
    for path in PROSE:
        text = " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
        found += [(path.name, text[max(0, m.start() - 40) : m.end() + 40]) for m in BANNED.finditer(text)]
    assert found == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("words")
    make_checkpoint(folder / "a source")
    assert cli.run(["convert", str(folder / "a source"), str(folder / "fp8"), "-q"]) == 0
    return folder / "a source", folder / "fp8"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.run([str(a) for a in arguments]) == 0
    streams = capsys.readouterr()
    return streams.out + streams.err


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.fast_cases(2)
def test_help_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, *([name] if name else []), "--help")
    assert [line for line in text.splitlines() if len(line) > 90] == []  # an example to paste stays in one line
    assert not name or ("{" not in text.splitlines()[0] and "[[" not in text.splitlines()[0])
    assert "..." not in text.split("Commands:")[-1] or name
    for arguments in dsv4_commands(text.replace("\n    dsv4 ", "\ndsv4 ").replace("\n    torchrun ", "\ntorchrun ")):
        parse(arguments)


def test_every_command_has_examples() -> None:
    assert all(f"dsv4 {name}" in (command.epilog or "") for name, command in COMMANDS.items())


def test_an_option_says_the_same_everywhere() -> None:
    found: dict[str, set[tuple[str | None, str | None]]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option not in DIFFERENT:
                    found.setdefault(option, set()).add((parameter.metavar, parameter.help))
    assert {option: words for option, words in found.items() if len(words) > 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_options_take_has_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = said(capsys, name, "--help").split("Options:")[1]
    assert not any(kind in options for kind in ("<int", "<float", "<str>", "<path>"))


def hints(text: str) -> list[list[str]]:
    """The commands of lines such as `prove it: dsv4 verify A B`."""
    lines = [line.split(": ", 1)[1] for line in text.splitlines() if ": dsv4 " in line]
    return dsv4_commands("\n".join(lines))


def test_hints_are_commands_that_work(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, output = map(str, pair)
    assert hints(said(capsys, "convert", source, output)) == [["verify", source, output]]
    assert hints(said(capsys, "verify", source, output)) == [["run", source, "-p", "Hello", "--compare", output]]
    [listing] = hints(said(capsys, "inspect", source))
    assert "layers.0.attn_norm.weight" in said(capsys, *listing)


def test_one_file_is_called_by_its_name(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair[1])
    text = said(capsys, "inspect", "model-00001-of-00004.safetensors")
    assert "checkpoint  ./model-00001-of-00004.safetensors" in text and "active per token" not in text
    assert hints(text)[0][:2] == ["inspect", "model-00001-of-00004.safetensors"]


def test_a_report_that_was_not_made_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["verify", str(tmp_path / "nowhere"), "--report", str(page)]) != 0
    assert not page.exists()


def test_rank_files_are_recognised(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = tmp_path / "mp2"
    said(capsys, "convert", pair[0], ranks, "--layout", "mp", "--model-parallel", 2)
    with pytest.raises(InputError) as refused:  # as by `convert` of a repository
        Checkpoint.open(ranks)
    assert "`dsv4 convert` reads the rank files of --layout mp from a folder" in refused.value.hint
