"""Cores, memory and disk: what the system says, what a container allows, and systems that lack half of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4 import machine


class Groups:
    """Control groups in a folder, and the one that this process is in: "" is the top, which a container sees."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version
        self.enter("")

    def enter(self, path: str) -> None:
        line = f"0::/{path}" if self.version == 2 else f"4:memory:/{path}\n1:cpu,cpuacct:/{path}\n0::/elsewhere"
        (self.folder / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")

    def write(self, controller: str, path: str, files: dict[str, object]) -> None:
        folder = self.folder / "groups" / (controller if self.version == 1 else "") / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")

    def limit(self, most: object, used: int, cached: int = 0, path: str = "") -> None:
        names = ("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        limit, usage, prefix = names[self.version == 1]
        files = f"anon 1\n{prefix}inactive_file {cached - cached // 3}\n{prefix}active_file {cached // 3}"
        self.write("memory", path, {limit: most, usage: used, "memory.stat": files})

    def quota(self, quota: object, period: object, path: str = "") -> None:
        if self.version == 2:
            self.write("cpu", path, {"cpu.max": f"{quota} {period}"})
        else:
            most = -1 if quota == "max" else quota
            self.write("cpu", path, {"cpu.cfs_quota_us": most, "cpu.cfs_period_us": period})


@pytest.fixture(params=[1, 2])
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Groups:
    """Control groups of version 1 and 2 on a machine with 1000 bytes of free memory and eight cores."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "GROUPS_OF_THIS_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=4000))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "to be put back")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return Groups(tmp_path, request.param)


def test_what_is_free_with_a_margin(groups: Groups) -> None:
    assert machine.usable_memory() == 800
    assert (machine.available_memory(), machine.total_memory(), machine.memory_limit()) == (1000, 4000, None)


@pytest.mark.parametrize(("most", "used", "usable"), [(700, 200, 400), (700, 900, 0), (9000, 0, 800)])
def test_a_container_may_have_less(most: int, used: int, usable: int, groups: Groups) -> None:
    groups.limit(most, used)
    assert machine.usable_memory() == usable and machine.memory_limit() == most


def test_what_a_container_has_of_files_in_memory_is_free(groups: Groups) -> None:
    """A container that has read a checkpoint is full of its pages, which the system frees first."""
    groups.limit(700, 699, cached=600)
    assert machine.usable_memory() == int((1 + 600) * machine.MARGIN)
    groups.limit(700, 700, cached=900)  # the counts are of different instants
    assert machine.usable_memory() == int(700 * machine.MARGIN)


def test_limits_of_a_group_inside_others(groups: Groups) -> None:
    """As in a job of a batch system: its own group is somewhere in the tree, and the outer ones have limits, too."""
    groups.enter("slurm/job_1/step_0")
    groups.limit(900, 800, path="slurm")
    groups.limit(600, 100, path="slurm/job_1")
    groups.limit("max" if groups.version == 2 else 2**63 - 4096, 50, path="slurm/job_1/step_0")
    groups.limit(10, 10, path="slurm/job_2")
    assert machine.memory_limit() == 600 and machine.usable_memory() == int(100 * machine.MARGIN)


def test_a_path_that_the_container_does_not_see(groups: Groups) -> None:
    groups.enter("docker/0123")
    groups.limit(700, 200)
    assert machine.usable_memory() == 400


def test_a_container_without_a_limit(groups: Groups) -> None:
    groups.limit("max" if groups.version == 2 else 2**63 - 4096, 200)
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


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("max", 100000, None),
        (200000, 100000, 2),
        (250000, 100000, 3),
        (10000, 100000, 1),
        (150000, 50000, 3),
        (6400000, 100000, None),  # more than the machine has
        ("", "", None),
    ],
)
@pytest.mark.parametrize("path", ["", "user.slice/run-1.scope"])
def test_a_container_may_have_less_processor_time(
    quota: object, period: object, cores: int | None, path: str, groups: Groups
) -> None:
    groups.enter(path)
    groups.quota(400000, 100000)
    groups.quota(quota, period, path)
    expected = min(cores or 8, 4) if path else cores or 8
    assert machine.usable_cores() == expected
    machine.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 8 else str(expected))


def test_the_user_decides_on_threads(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    groups.quota(200000, 100000)
    assert machine.usable_cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    machine.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("cores", [1, 3])
def test_cores_that_may_be_used(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GROUPS_OF_THIS_PROCESS", tmp_path / "cgroup")  # not there, as on other systems
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
