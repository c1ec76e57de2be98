"""The installed program under strace, which kills it or refuses at a system call: what `test_crash.py` does in one
process at every call of `os`, done from outside at some of the calls that the kernel really sees."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exact_values import convert, tree
from fault_lab import GEOMETRY

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.atomic_file import PREFIX

OPTIONS = ("--max-shard-size", "150KB", "--max-workers", "2")
STRACE = shutil.which("strace")
RENAMES = "rename,renameat,renameat2"  # which of them depends on the architecture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STRACE is None, reason="strace is not installed; test_crash.py covers every call"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("strace") / "source", geometry=GEOMETRY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("strace") / "whole"
    convert(source, output, *OPTIONS)
    return tree(output)


def traced(source: Path, output: Path, inject: str) -> subprocess.CompletedProcess[str]:
    calls = inject.split(":")[0]
    command = [str(STRACE), "-f", "-qq", "-o", str(output.parent / "log"), "-e", f"trace={calls}", "-e"]
    # Quiet: lines of progress, which a slow run has, are written by calls too.
    program = [sys.executable, "-m", "dsv4", "convert", str(source), str(output), *OPTIONS, "-q"]
    return subprocess.run([*command, f"inject={inject}", *program], capture_output=True, text=True)


def check_visible(output: Path, whole: dict[str, str]) -> None:
    """Complete files only, the index and the config after all shards."""
    found = tree(output) if output.exists() else {}
    visible = {name: digest for name, digest in found.items() if not Path(name).name.startswith(PREFIX)}
    assert visible.items() <= whole.items()
    if "model.safetensors.index.json" in visible or "config.json" in visible:
        assert {name for name in whole if name.endswith(".safetensors")} <= set(visible)


# strace counts the calls of each thread: the main one writes side files, another the shards.
@pytest.mark.parametrize(
    "inject",
    ["write:signal=KILL:when=1", "write:signal=KILL:when=2", "write:signal=KILL:when=8", "fsync:signal=KILL:when=4",
     "fsync:signal=KILL:when=20", f"{RENAMES}:signal=KILL:when=1", f"{RENAMES}:signal=KILL:when=10"],
)  # fmt: skip
def test_killed(inject: str, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    done = traced(source, tmp_path / "out", inject)
    assert done.returncode in (-9, 137), done.stderr  # strace ends as the program did
    check_visible(tmp_path / "out", whole)
    assert tree(tmp_path / "out") != whole
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("inject", "words"),
    [("fsync:error=EIO:when=5", "disk reports an error"), ("write:error=ENOSPC:when=2", "Free some disk space")],
)
def test_refused(inject: str, words: str, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    done = traced(source, tmp_path / "out", inject)
    assert done.returncode == 4 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    check_visible(tmp_path / "out", whole)
    assert not list((tmp_path / "out").glob(f"{PREFIX}*.part"))
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole
