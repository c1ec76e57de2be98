"""README and docs are true of the program: commands parse, the demo prints its transcript, tables are facts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import blocks, dsv4_commands, inline_commands, parse
from patience import LONG

from dsv4 import cli, errors, output
from dsv4.convert.plan.engines import TARGETS
from dsv4.convert.synthetic.checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOPS = {"quant", "convert", "model", "src", "tests", "benchmarks", "docs", "examples", ".ci"}
PAGES = [*sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


README, ARCHITECTURE = page("README.md"), page("docs/architecture.md")
TRANSCRIPT = next(block for block in blocks(page("docs/demo.md"), "text") if "$ dsv4" in block)
COMMANDS = [
    command
    for path in PAGES
    for language in ("text", "sh")
    for block in blocks(path.read_text(encoding="utf-8"), language)
    for command in dsv4_commands(block)
]
INLINE = [command for path in PAGES for command in inline_commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("arguments", [*COMMANDS, *INLINE], ids=" ".join)
@pytest.mark.fast_cases(16)
def test_commands_parse(arguments: list[str]) -> None:
    parse(arguments)


def test_there_are_commands_of_every_kind() -> None:
    from typer.main import get_command

    assert {arguments[0] for arguments in COMMANDS} | {"demo"} == set(get_command(cli.app).commands)


def _stable(line: str) -> str:
    """A line of the demo without what depends on the machine: times, rates, memory."""
    line = re.sub(r"[\d.:]+( s)?, [\d.]+ [kMGT]?B/s", "TIME, RATE", line)
    line = re.sub(r"[\d.]+ tokens/s", "RATE", line)
    line = re.sub(r"first token after [\d.:]+( s)?", "first token after TIME", line)
    return re.sub(r"peak memory [\d.]+ [kMGT]?B", "peak memory SIZE", line)


@pytest.mark.slow
def test_the_transcript_is_what_the_demo_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "demo", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stdout
    printed = [_stable(line) for line in done.stdout.splitlines()]
    written = [_stable(line) for line in TRANSCRIPT.splitlines()]
    gap = written.index("[…]")
    end = len(written) - gap - 1
    assert printed[:gap] == written[:gap]
    assert printed[-end:] == written[-end:]
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert (tmp_path / "demo" / "report.html").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not broken


def test_the_readme_is_about_a_screen_long() -> None:
    """What it is, for whom and what to type, before the table of contents."""
    before, _, contents = README.partition("## Read on")
    assert before.count("\n") <= 60 and contents


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link}
    assert {path for path in PAGES if path.name != "README.md"} <= linked


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    """Files of the project by their path from the top, and tests by their name."""
    names = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|test_\w+\.py)`", path.read_text(encoding="utf-8"))
    ours = [name for name in names if name.split("/")[0] in TOPS or name.startswith("test_")]
    missing = [name for name in ours if not (ROOT / name).exists() and not list((ROOT / "tests").rglob(name))]
    assert not missing


def test_exit_codes() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", page("docs/exit_codes.md"), re.MULTILINE)
    listed = {int(code) for row in rows for code in row.split(",")}
    assert listed == {v for k, v in vars(errors).items() if k.startswith("EXIT_")} | {output.ClosedPipe.exit_code}


def test_targets() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(default\))? \| (\w+) \|", page("docs/convert.md"), re.MULTILINE))
    scale = {"f32": "float32", "e8m0": "E8M0"}
    assert rows == {name: scale[target.scale_dtype] for name, target in TARGETS.items()}


def test_every_room_is_in_the_architecture() -> None:
    """Rooms inside rooms, such as `convert/proof/values/`, are the business of the room that they are in."""
    tops = ("quant", "convert", "model", "src/dsv4")
    rooms = {
        f"{top}/{path.name}/" for top in tops for path in (ROOT / top).iterdir() if (path / "__init__.py").is_file()
    }
    links = {"src/dsv4/quant/", "src/dsv4/convert/", "src/dsv4/model/"}
    named = set(re.findall(r"`([\w/]+/)`", ARCHITECTURE))
    assert rooms - links <= named and {f"{top}/" for top in tops} <= named


@pytest.mark.parametrize(
    "code", blocks(page("docs/python.md"), "python"), ids=["conversion", "answer", "threads", "numbers"]
)
@pytest.mark.fast_cases(1)
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "DeepSeek-V4-Flash")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    exec(compile(code, "docs/python.md", "exec"), {})


def test_the_first_two_blocks_are_what_ci_runs() -> None:
    demo, tests = blocks(README, "sh")[:2]
    assert "dsv4 demo" in demo and "pytest" in tests
    assert demo.count("\n") == tests.count("\n") == 1
