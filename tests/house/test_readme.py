"""The README is true of the program: commands parse, the transcript is what the demo prints, tables are facts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import blocks, dsv4_commands, parse

from dsv4 import cli, errors, output
from dsv4.convert.plan.engines import TARGETS
from dsv4.convert.synthetic.checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TRANSCRIPT = next(block for block in blocks(README, "text") if "$ dsv4" in block)
COMMANDS = [
    command
    for page in dict.fromkeys(PAGES)
    for language in ("text", "sh")
    for block in blocks(page.read_text(encoding="utf-8"), language)
    for command in dsv4_commands(block)
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
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


def test_the_transcript_is_what_the_demo_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "demo", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
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


@pytest.mark.parametrize("page", dict.fromkeys(PAGES), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_exit_codes() -> None:
    section = README.split("## Exit codes\n")[1].split("\n## ")[0]
    listed = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in row.split(",")}
    assert listed == {v for k, v in vars(errors).items() if k.startswith("EXIT_")} | {output.ClosedPipe.exit_code}


def test_targets() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(default\))? \| (\w+) \|", README, re.MULTILINE))
    scale = {"f32": "float32", "e8m0": "E8M0"}
    assert rows == {name: scale[target.scale_dtype] for name, target in TARGETS.items()}


def test_the_tree_is_the_tree() -> None:
    """Every name is that of a file, every file is named, and every line says what its files are."""
    tree = next(block for block in blocks(README, "text") if block.startswith("quant/"))
    folder, named = ROOT, set()
    for line in tree.splitlines():
        names, words = re.split(r"  +", line.strip(), maxsplit=1)
        assert words
        if not line.startswith(" "):
            folder = ROOT / names
            assert folder.is_dir()
            continue
        for name in names.split():
            assert (folder / name).is_dir() or (folder / f"{name}.py").is_file(), name
            named.add(folder / name)
    tops = [ROOT / top for top in ("quant", "convert", "model", "src/dsv4")]
    there = {path.with_suffix("") for top in tops for path in top.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {path for path in there if not path.name.startswith("__") and not path.is_symlink()} == named


@pytest.mark.parametrize("code", blocks(README, "python"), ids=["conversion", "numbers"])
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "DeepSeek-V4-Flash")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_first_two_blocks_are_what_ci_runs() -> None:
    demo, tests = blocks(README, "sh")[:2]
    assert "dsv4 demo" in demo and "pytest" in tests
    assert demo.count("\n") == tests.count("\n") == 1
