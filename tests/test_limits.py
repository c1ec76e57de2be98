"""Real limits of the machine, and two runs at once: exit code 4 and a message, or the right bytes."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from exact_values import convert, dsv4, tree
from fault_lab import GEOMETRY

from dsv4.convert.files import LOCK_NAME, PREFIX
from dsv4.convert.synthetic import make_checkpoint

OPTIONS = ("--max-shard-size", "150KB", "--max-workers", "2")
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
UNLOCKED = "import dsv4.convert.files as files; files._take_lock = lambda *_: None; "
MAIN = "from dsv4.cli import main; main()"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("limits") / "source", geometry=GEOMETRY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("limits") / "whole"
    convert(source, output, *OPTIONS)
    return tree(output)


def start(before: str, source: Path, output: Path) -> subprocess.Popen[str]:
    """`dsv4 convert` in a process of its own, after some statements."""
    command = [sys.executable, "-c", before + MAIN, "convert", str(source), str(output), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate()
    assert "Traceback" not in err and "this is a bug" not in err
    return process.returncode, err


def visible(output: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(output).items() if not Path(name).name.startswith(PREFIX)}


def test_a_limit_on_file_size(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    code, err = finish(start(LIMITED.format(size=100_000), source, tmp_path / "out"))
    assert code == 4 and "ulimit -f" in err
    assert not [name for name in visible(tmp_path / "out") if name.endswith((".safetensors", ".json"))]
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole


def test_too_little_memory_allowed(source: Path, tmp_path: Path) -> None:
    code, _, err = dsv4("convert", source, tmp_path / "out", "--max-memory", "1MB")
    assert code == 4 and "too little" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_umask_decides_who_may_read(umask: int, source: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "out", *OPTIONS)
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_source_that_cannot_be_written(tmp_path: Path, whole: dict[str, str]) -> None:
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    everything = [source, *source.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(source), [path.stat().st_mtime_ns for path in everything]
    try:
        convert(source, tmp_path / "out", *OPTIONS)
        assert tree(tmp_path / "out") == whole
        assert (tree(source), [path.stat().st_mtime_ns for path in everything]) == before
    finally:
        for path in everything:
            path.chmod(0o755)


def test_two_runs_at_once(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    runs = [start("", source, tmp_path / "out") for _ in range(2)]
    endings = [finish(run) for run in runs]
    assert 0 in [code for code, _ in endings]
    for code, err in endings:
        assert code == 0 or (code == 4 and "in use by process" in err)
    assert tree(tmp_path / "out") == whole


def test_two_runs_at_once_where_locks_do_not_work(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    # As on some network file systems. One may clear away the other's files, and then stops; nothing is mixed.
    runs = [start(UNLOCKED, source, tmp_path / "out") for _ in range(3)]
    for run in runs:
        finish(run)
    for name, digest in visible(tmp_path / "out").items():
        assert whole[name] == digest, name
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole


def test_a_lock_file_that_nobody_holds_is_no_obstacle(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere"}')
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole
