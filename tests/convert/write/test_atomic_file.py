"""Large files: written past the page cache where the file system can, and the same bytes where it cannot."""

import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_values import convert, tree
from fault_lab import GEOMETRY

from dsv4.convert import api
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.shards.pipeline import ShardPipeline
from dsv4.errors import Interrupted

AT_ONCE = 2**14
SIZES = [2 * AT_ONCE, 2 * AT_ONCE + 1, 5 * AT_ONCE - 1, 7 * AT_ONCE + 4096]
Refusal = Callable[[pytest.MonkeyPatch], None]


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system does whatever it does."""


def no_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on older tmpfs."""
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, flags)

    monkeypatch.setattr(files.fcntl, "fcntl", refuse)


def late_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on disks with blocks larger than ours: agreed to at first, refused at the third write."""
    real, writes = os.write, []

    def refuse(descriptor: int, data: Any) -> int:
        writes.append(len(data))
        if len(writes) > 2 and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data)

    monkeypatch.setattr(files.os, "write", refuse)


def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a write begins where no page does."""
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: real(descriptor, data[: len(data) // 2 + 1]))


@pytest.mark.parametrize("unit", [mmap.PAGESIZE, 1], ids=["pages", "bytes"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refusal", [nothing, no_direct_io, late_refusal, short_writes])
def test_the_bytes_are_those_that_were_given(
    refusal: Refusal, size: int, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole pages but for the last, or in pieces of any length."""
    monkeypatch.setattr(files, "WRITE_BYTES", AT_ONCE)
    monkeypatch.setattr(files, "DIRECT_BYTES", 2 * AT_ONCE)
    refusal(monkeypatch)
    random = np.random.default_rng(size)
    data = random.bytes(size)
    pages = mmap.mmap(-1, size)
    pages[:] = data
    with AtomicFile(tmp_path / "file", size) as file:
        rest = memoryview(pages)
        while rest:
            count = unit * int(random.integers(1, 2 * AT_ONCE // unit))
            file.write(rest[:count])
            rest = rest[count:]
        file.commit()
    assert (tmp_path / "file").read_bytes() == data and list(tree(tmp_path)) == ["file"]


def test_a_large_file_goes_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the last, broken page, if the file system under the test can do that at all."""
    real, direct = os.write, []

    def write(descriptor: int, data: Any) -> int:
        direct.append((len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return real(descriptor, data)

    with (tmp_path / "probe").open("wb") as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, fcntl.fcntl(probe, fcntl.F_GETFL) | os.O_DIRECT)
            able = True
        except OSError:
            able = False
    monkeypatch.setattr(files.os, "write", write)
    size = files.DIRECT_BYTES + 1
    pages = memoryview(mmap.mmap(-1, size))
    with AtomicFile(tmp_path / "file", size) as file:
        file.write(pages[:-1])
        file.write(pages[-1:])
        file.commit()
    sizes = [files.WRITE_BYTES, files.WRITE_BYTES, 1]
    assert direct == list(zip(sizes, [able, able, False], strict=True))


def names(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.fast_cases(1)
def test_an_interrupt_does_not_wait_until_a_huge_file_is_deleted(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left to the same command, which says so, removes it and ends in the same bytes."""
    source, output, whole = (
        make_checkpoint(tmp_path / "source", geometry=GEOMETRY),
        tmp_path / "out",
        tmp_path / "whole",
    )
    options = ("--max-shard-size", "150KB")
    convert(source, whole, *options)
    monkeypatch.setattr(files, "SLOW_TO_DELETE_BYTES", 1 if slow else 2**30)

    finish, all_written = ShardPipeline.finish, threading.Event()

    def finish_late(self: Any) -> str:
        """The second shard stays open, all of it written, until the run stops: `progress` then raises."""
        digest = finish(self)
        while "-00002-of-" in self._file.path.name:
            all_written.set()
            self._progress(0)
            time.sleep(0.001)
        return digest

    def interrupt(count: int) -> None:
        if all_written.is_set() and list(output.glob("*.safetensors")):
            raise Interrupted("interrupted")

    monkeypatch.setattr(ShardPipeline, "finish", finish_late)
    with pytest.raises(Interrupted) as raised:
        api.convert(source, output, max_shard_size=150_000, progress=interrupt)
    monkeypatch.setattr(ShardPipeline, "finish", finish)
    published, parts = names(output, "model-*"), names(output, ".dsv4-*.part")
    assert len(published) == 1 and any("-00002-of-" in name for name in parts) == bool(parts) == slow
    assert ("It removes " in raised.value.hint) == slow
    convert(source, output, *options)
    assert tree(output) == tree(whole)


def test_an_error_of_the_disk_is_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "write", broken)
    size = files.DIRECT_BYTES
    with pytest.raises(OSError, match="Input/output error"), AtomicFile(tmp_path / "file", size) as file:
        file.write(memoryview(bytes(size)))
    assert tree(tmp_path) == {}
