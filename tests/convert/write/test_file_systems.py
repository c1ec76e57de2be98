"""Systems and file systems that lack an operation: the same bytes, and a word where that costs a promise."""

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exact_values import convert, dsv4, tree
from fault_lab import GEOMETRY

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import atomic_file as files

OPTIONS = ("--max-shard-size", "150KB", "--max-workers", "2")
PROMISE = "after a power loss a file may be incomplete"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("systems") / "source", geometry=GEOMETRY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("systems") / "whole"
    convert(source, output, *OPTIONS)
    return tree(output)


# What another system's Python lacks is taken away before dsv4 is imported.
ELSEWHERE = """
import ctypes, os, sys
import psutil  # has a part for each system
for name in {modules}:
    sys.modules[name] = None  # an import raises ImportError
for name in {functions}:
    delattr(os, name)
from dsv4 import cli
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("modules", [(), ("fcntl",)], ids=["macOS", "without locks"])
def test_a_system_that_lacks_functions(modules: tuple[str, ...], source: Path, whole: Any, tmp_path: Path) -> None:
    lacking = ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "O_DIRECT")
    code = ELSEWHERE.format(modules=modules, functions=lacking)
    command = [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out"), "--max-shard-size", "150KB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and tree(tmp_path / "out") == whole, done.stderr


class FakeLibrary:
    """A C library with a `fallocate` that fails, or without one."""

    def __init__(self, number: int | None) -> None:
        self.calls: list[int] = []
        if number is not None:
            self.fallocate = lambda descriptor, mode, offset, size: self._fail(number, size.value)

    def _fail(self, number: int, size: int) -> int:
        self.calls.append(size)
        ctypes.set_errno(number)
        return -1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_space_that_cannot_be_asked_for_ahead(
    number: int | None, source: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written in its place: posix_fallocate of glibc would write a byte into each block."""
    library = FakeLibrary(number)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("posix_fallocate"))
    convert(source, tmp_path / "out", *OPTIONS)
    assert tree(tmp_path / "out") == whole
    assert bool(library.calls) == (number is not None)


def test_space_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: FakeLibrary(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as raised:
        files.AtomicFile(tmp_path / "file", 10**6)
    assert raised.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_an_interrupted_call_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([errno.EINTR, errno.EINTR, 0])

    class Library:
        def fallocate(self, *_: Any) -> int:
            ctypes.set_errno(number := next(numbers))
            return -1 if number else 0

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: Library())
    with files.AtomicFile(tmp_path / "file", 3) as file:
        file.write(memoryview(b"abc"))
        file.commit()
    assert next(numbers, None) is None and (tmp_path / "file").read_bytes() == b"abc"


def test_space_is_set_aside_where_it_can_be(tmp_path: Path) -> None:
    with files.AtomicFile(tmp_path / "file", 10**6):
        (part,) = tmp_path.iterdir()
        assert part.stat().st_size == 10**6 and 512 * part.stat().st_blocks >= 10**6


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
@pytest.mark.parametrize("of", ["files and folders", "folders"])
@pytest.mark.fast_cases(1)
def test_an_fsync_that_is_not_supported_is_said_once(
    number: int, of: str, source: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def cannot(descriptor: int) -> None:
        if of == "folders" and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return real(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", cannot)
    said = convert(source, tmp_path / "out", *OPTIONS)
    assert said.count(PROMISE) == 1 and tree(tmp_path / "out") == whole
    code, out, _ = dsv4("convert", source, tmp_path / "again", *OPTIONS, "--json")
    assert code == 0 and [PROMISE in note for note in json.loads(out)["notes"]] == [True]


def test_an_fsync_that_works_is_not_spoken_of(source: Path, tmp_path: Path) -> None:
    assert PROMISE not in convert(source, tmp_path / "out", *OPTIONS)


@pytest.mark.parametrize("of", ["file", "folder"])
def test_an_fsync_that_fails_names_what_it_was_of(
    of: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def broken(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if (path == str(tmp_path / "out")) == (of == "folder") and path.startswith(str(tmp_path / "out")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", broken)
    code, _, err = dsv4("convert", source, tmp_path / "out", *OPTIONS)
    assert code == 4 and f"error: {tmp_path / 'out'}" in err and "Input/output error" in err
