"""Every script of `examples/` with --dry-run, and one of them for real, on a small checkpoint instead of the hub's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import dsv4_commands, parse
from patience import LONG

from dsv4.convert.synthetic.checkpoint import make_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CALLS = {
    "flash_one_machine.sh": [[]],
    "flash_streamed.sh": [[]],
    "pro_one_machine.sh": [[]],
    "pro_torchrun.sh": [[]],
    "pro_parts.sh": [["1/4"], ["finish"]],
    "serve.sh": [["vllm", "out", "8"], ["sglang", "out", "8"]],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "source"
    make_checkpoint(folder)
    return folder


def run(script: str, arguments: list[str], source: Path, folder: Path) -> str:
    """Run a script in `folder` with `dsv4` on the PATH; what it printed on stdout."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "dsv4").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsv4 "$@"\n')
    (tools / "dsv4").chmod(0o755)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SOURCE": str(source), "OUTPUT": "out", "RANKS": "2"}
    environment = os.environ | variables
    command = ["bash", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_is_here() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.sh")}
    assert scripts == {*CALLS, "step.sh"}
    assert all(os.access(EXAMPLES / script, os.X_OK) for script in CALLS)


@pytest.mark.parametrize("script", [script for script, calls in CALLS.items() if calls[0]])
def test_without_arguments_a_script_says_what_it_needs(script: str) -> None:
    done = subprocess.run(["bash", str(EXAMPLES / script)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: examples/{script} ") and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), [(s, a) for s, calls in CALLS.items() for a in calls])
def test_dry_run(script: str, arguments: list[str], source: Path, tmp_path: Path) -> None:
    printed = run(script, [*arguments, "--dry-run"], source, tmp_path)
    commands = dsv4_commands("\n".join(line for line in printed.splitlines() if line.startswith("$ ")))
    assert commands
    for command in commands:
        parse(command)
    assert "shards" in printed or script in ("pro_torchrun.sh", "serve.sh")  # the plan, from headers
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.slow
def test_for_real(source: Path, tmp_path: Path) -> None:
    printed = run("flash_one_machine.sh", [], source, tmp_path)
    for verdict in ("IDENTICAL", "BIT-EQUAL", "The folder fits every rule for vllm"):
        assert verdict in printed
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "out", "proof.html"}
