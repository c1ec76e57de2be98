"""Real limits of the machine, and two runs at once: exit code 4 and a message, or the right bytes."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from exact_values import convert, dsv4, tree
from fault_lab import GEOMETRY

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.atomic_file import PREFIX
from dsv4.convert.write.lock import LOCK_NAME

OPTIONS = ("--max-shard-size", "150KB", "--max-workers", "2")
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
# A limit on addresses a little above what is in use once everything is imported.
ADDRESSES = """
import resource, torch, dsv4.cli, dsv4.convert.write.run
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more}, used + {more}))
"""
# The interpreter itself may lie where an unprivileged user cannot read: one conversion before imports all it needs.
UNPRIVILEGED = """
import contextlib, io, os, sys, tempfile, dsv4.cli
if os.getuid() == 0:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        assert dsv4.cli.run(["convert", sys.argv[2], folder, *sys.argv[4:]]) == 0
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""
# The space is checked before anything is written; here the disk fills up behind the program's back.
UNCHECKED = "import dsv4.convert.write.run as conversion; conversion.free_bytes = lambda folder: 2**50; "
UNLOCKED = "import dsv4.convert.write.lock as lock; lock._take_lock = lambda *_: None; "
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


@pytest.mark.slow
def test_a_limit_on_file_size(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    code, err = finish(start(LIMITED.format(size=100_000), source, tmp_path / "out"))
    assert code == 4 and "ulimit -f" in err
    assert not [name for name in visible(tmp_path / "out") if name.endswith((".safetensors", ".json"))]
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole


def test_too_little_memory_allowed(source: Path, tmp_path: Path) -> None:
    code, _, err = dsv4("convert", source, tmp_path / "out", "--max-memory", "1MB")
    assert code == 4 and "too little" in err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [2**20, 64 * 2**20])
def test_a_limit_on_addresses(more: int, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    code, err = finish(start(ADDRESSES.format(more=more), source, tmp_path / "out"))
    assert (code == 4 and "Lower --max-memory" in err) or (code == 0 and more > 2**20), err
    assert not (tmp_path / "out" / "config.json").exists() or code == 0
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of some size in a folder. Only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here ({done.stderr.strip()}); a limit on file size is tested above")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_seen_before_anything_is_written(tiny_disk: Callable[[str], Path], source: Path) -> None:
    disk = tiny_disk("64k")
    code, _, err = dsv4("convert", source, disk / "out", *OPTIONS)
    assert code == 4 and "are free" in err and not list(disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "256k"])
def test_a_disk_that_fills_up_meanwhile(
    size: str, tiny_disk: Callable[[str], Path], source: Path, whole: dict[str, str]
) -> None:
    disk = tiny_disk(size)
    code, err = finish(start(UNCHECKED, source, disk / "out"))
    assert code == 4 and "Free some disk space" in err, err
    assert visible(disk / "out").items() <= whole.items() and not list(disk.rglob("*.part"))
    assert not (disk / "out" / "config.json").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    code, err = finish(start(UNCHECKED, source, disk / "out"))
    assert code == 0 and tree(disk / "out") == whole, err


def test_output_on_another_file_system(source: Path, whole: dict[str, str]) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == source.stat().st_dev:
        pytest.skip("/dev/shm is no other file system than that of the tests")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        convert(source, Path(folder) / "out", *OPTIONS)
        assert tree(Path(folder) / "out") == whole


@pytest.fixture
def anybodys(source: Path) -> Iterator[Path]:
    """A folder that every user can reach (that of the tests is the owner's), with a source nobody may write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(source, folder / "source")
        (folder / "mine").mkdir(mode=0o755)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        for path in [folder / "source", *(folder / "source").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in folder.rglob("*"):
            path.chmod(0o755)


@pytest.mark.slow
def test_an_unprivileged_user_may_read_the_source_only(anybodys: Path, whole: dict[str, str]) -> None:
    before = tree(anybodys / "source")
    code, err = finish(start(UNPRIVILEGED, anybodys / "source", anybodys / "open" / "out"))
    assert code == 0 and tree(anybodys / "open" / "out") == whole, err
    assert tree(anybodys / "source") == before


@pytest.mark.slow
def test_an_unprivileged_user_is_told_what_is_forbidden(anybodys: Path) -> None:
    (anybodys / "mine").chmod(0o555)
    code, err = finish(start(UNPRIVILEGED, anybodys / "source", anybodys / "mine" / "out"))
    assert code == 4 and "Check the permissions" in err and not list((anybodys / "mine").iterdir())
    shard = max((anybodys / "source").glob("*.safetensors"))
    shard.chmod(0o000)
    code, err = finish(start(UNPRIVILEGED, anybodys / "source", anybodys / "open" / "out"))
    assert code == 4 and "Check the permissions" in err and shard.name in err
    assert not list((anybodys / "open").rglob("*.safetensors"))


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


@pytest.mark.slow
def test_two_runs_at_once(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    runs = [start("", source, tmp_path / "out") for _ in range(2)]
    endings = [finish(run) for run in runs]
    assert 0 in [code for code, _ in endings]
    for code, err in endings:
        assert code == 0 or (code == 4 and "in use by process" in err)
    assert tree(tmp_path / "out") == whole


@pytest.mark.slow
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
