"""Cores, memory and disk: what the system says, what a container allows, and systems that lack half of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4 import machine


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a container's memory limits, on a machine with 1000 bytes of free memory."""
    groups = [("new.max", "new.current"), ("old.limit_in_bytes", "old.usage_in_bytes")]
    paths = [(str(tmp_path / limit), str(tmp_path / used)) for limit, used in groups]
    monkeypatch.setattr(machine, "CONTROL_GROUPS", paths)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=4000))
    return tmp_path


def limit(folder: Path, version: int, most: str, used: int) -> None:
    names = ("new.max", "new.current") if version == 2 else ("old.limit_in_bytes", "old.usage_in_bytes")
    for name, value in zip(names, (most, used), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_what_is_free_with_a_margin(container: Path) -> None:
    assert machine.usable_memory() == 800
    assert (machine.available_memory(), machine.total_memory(), machine.memory_limit()) == (1000, 4000, None)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("most", "used", "usable"), [(700, 200, 400), (700, 900, 0), (9000, 0, 800)])
def test_a_container_may_have_less(version: int, most: int, used: int, usable: int, container: Path) -> None:
    limit(container, version, str(most), used)
    assert machine.usable_memory() == usable and machine.memory_limit() == most


@pytest.mark.parametrize(("version", "most"), [(2, "max"), (1, str(2**63 - 4096))])
def test_a_container_without_a_limit(version: int, most: str, container: Path) -> None:
    limit(container, version, most, 200)
    assert machine.usable_memory() == 800 and machine.memory_limit() is None


def test_this_machine(tmp_path: Path) -> None:
    assert 0 < machine.usable_memory() <= machine.available_memory() <= machine.total_memory()
    assert 10_000_000 < machine.peak_memory() < machine.total_memory()  # an interpreter with pytest takes more
    assert machine.free_bytes(tmp_path) > 0


def test_free_disk_where_a_folder_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on the disk that will hold it: other programs write to this machine's own meanwhile."""
    disks = {tmp_path: SimpleNamespace(free=12345)}
    monkeypatch.setattr(machine.shutil, "disk_usage", disks.__getitem__)
    assert machine.free_bytes(tmp_path / "not" / "there") == machine.free_bytes(tmp_path) == 12345


@pytest.fixture
def processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a container's limits of processor time, on a machine with eight cores; without OMP_NUM_THREADS."""
    files = [(str(tmp_path / "cpu.max"),), (str(tmp_path / "quota"), str(tmp_path / "period"))]
    monkeypatch.setattr(machine, "PROCESSOR_TIME", files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "to be put back")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, None),  # more than the machine has
        ({"quota": "-1\n", "period": "100000\n"}, None),
        ({"quota": "150000\n", "period": "50000\n"}, 3),
        ({"quota": "150000\n"}, None),
    ],
)
def test_a_container_may_have_less_processor_time(
    files: dict[str, str], cores: int | None, processor_time: Path
) -> None:
    for name, content in files.items():
        (processor_time / name).write_text(content)
    assert machine.usable_cores() == (cores or 8)
    machine.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if cores is None else str(cores))


def test_the_user_decides_on_threads(processor_time: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (processor_time / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    machine.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("cores", [1, 3])
def test_cores_that_may_be_used(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROCESSOR_TIME", [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert machine.usable_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * cores)
    assert machine.usable_cores() == 2 * cores


# Modules and functions that another system's Python does not have.
LACKING = {
    "macOS": ((), ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "O_DIRECT")),
    "Windows": (
        ("fcntl", "resource", "termios", "readline", "pwd", "grp", "tty", "pty"),
        ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC",
         "O_NONBLOCK", "preadv", "pread", "pwrite", "statvfs", "sysconf", "fork"),
    ),
}  # fmt: skip
ELSEWHERE = """
import os, signal, sys
import psutil  # has a part for each system
modules, functions, arguments = {lacking}
for name in modules:
    sys.modules[name] = None  # an import raises ImportError
for name in functions:
    delattr(os, name)
if modules:
    for name in ("SIGALRM", "SIGHUP", "setitimer", "pthread_sigmask"):
        delattr(signal, name)
from dsv4 import cli
sys.exit(cli.run(arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", LACKING)
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["run", "--help"]])
def test_the_command_line_starts_on_other_systems(system: str, arguments: list[str]) -> None:
    code = ELSEWHERE.format(lacking=(*LACKING[system], arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_torch_allocates_in_large_pages_unless_the_user_decided(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    machine.use_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


@pytest.mark.parametrize(
    ("given", "rounds"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_of_openmp_sleep_early_unless_the_user_decided(
    given: dict[str, str], rounds: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    machine.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == rounds
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
