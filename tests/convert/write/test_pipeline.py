"""Bytes of a shard on their way to its file and its hash: all of them, in order, and no more after a failure."""

import hashlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_values import dsv4
from fault_lab import GEOMETRY
from patience import LONG

from dsv4.convert.plan.recipes import copy, recipe
from dsv4.convert.plan.recipes.rows import placed
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.shards import pipeline as pipeline_module
from dsv4.convert.write.shards.hashing import FileHash, Hashing
from dsv4.convert.write.shards.pipeline import Blocks, ShardPipeline
from dsv4.errors import InputError

BLOCK = 2**13


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two pages; pieces as long are not copied."""
    monkeypatch.setattr(pipeline_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(pipeline_module, "TAKEN_BYTES", BLOCK)
    monkeypatch.setattr(files, "DIRECT_BYTES", BLOCK)


def pipeline_of(
    file: Any, progress: Callable[[int], object] = lambda count: None, blocks: Blocks | None = None
) -> ShardPipeline:
    return ShardPipeline(file, FileHash(Hashing(1)), blocks or Blocks(), progress, lambda: None)


class Recorder:
    """In place of a file: what was written, and a failure at one of the writes."""

    def __init__(self, fails_at: int = -1) -> None:
        self.written: list[bytes] = []
        self.fails_at = fails_at
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def write(self, data: memoryview) -> None:
        content = bytes(data)
        self.begun.set()
        self.may_go_on.wait(LONG)
        if len(self.written) == self.fails_at:
            raise OSError(28, "No space left on device")
        self.written.append(content)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 8, BLOCK, 20 * BLOCK, 9 * BLOCK + 4095])
@pytest.mark.parametrize("lies_as_in_the_file", [0, 1, 0.5])
def test_every_byte_in_order(lies_as_in_the_file: float, size: int, small_blocks: None, tmp_path: Path) -> None:
    random = np.random.default_rng(size)
    header, data, told, prefixes = b"12345678", random.bytes(size), [], {}
    with AtomicFile(tmp_path / "file", len(header) + size) as file:
        pipeline = pipeline_of(file, told.append)
        pipeline.begin(header)
        rest = memoryview(data)
        while rest:
            count = int(random.integers(1, 3 * BLOCK))
            place = len(header) + size - len(rest)
            room = placed(len(rest[:count]), place if random.random() < lies_as_in_the_file else place + 8)
            room[:] = np.frombuffer(rest[:count], np.uint8)
            pipeline.put(room.data)
            rest = rest[count:]
            pipeline.mark(f"{len(rest)}")
            prefixes[f"{len(rest)}"] = hashlib.sha256(header + data[: size - len(rest)]).hexdigest()
        sha256 = pipeline.finish()
        file.commit()
    assert (tmp_path / "file").read_bytes() == header + data
    assert sha256 == hashlib.sha256(header + data).hexdigest()
    assert pipeline.prefix_sha256 == prefixes
    assert sum(told) == size and all(0 <= count <= 4 * BLOCK for count in told)


def test_whole_pages_of_a_piece_that_lies_as_in_the_file_are_written_from_where_they_are(small_blocks: None) -> None:
    file, places = Recorder(), []
    real = file.write

    def write(data: memoryview) -> None:
        places.append((np.frombuffer(data, np.uint8).ctypes.data, len(data)))
        real(data)

    file.write = write
    pipeline = pipeline_of(file)
    pipeline.begin(b"12345678")
    piece, header = placed(3 * BLOCK, 8), len(b"12345678")
    piece[:] = 7
    pipeline.put(piece.data)
    pipeline.finish()
    page = mmap.PAGESIZE
    assert [length for _, length in places] == [page, 3 * BLOCK - page, header]
    assert places[1][0] == piece.ctypes.data + page - header and places[1][0] % page == 0
    assert b"".join(file.written) == b"12345678" + bytes(piece)


def test_a_long_piece_does_not_stay_in_memory(small_blocks: None) -> None:
    """It is free when it is written, although the file goes on."""
    pipeline = pipeline_of(Recorder())
    piece = placed(2 * BLOCK, 0)
    gone = weakref.ref(piece)
    pipeline.put(piece.data)
    del piece
    for _ in range(pipeline_module.BLOCKS):
        pipeline.put(placed(2 * BLOCK, 0).data)
    assert gone() is None
    pipeline.stop()


def test_a_header_longer_than_a_block_is_not_progress(small_blocks: None) -> None:
    told: list[int] = []
    pipeline = pipeline_of(Recorder(), told.append)
    pipeline.begin(bytes(2 * BLOCK + 5))
    pipeline.put(memoryview(bytes(BLOCK)))
    pipeline.finish()
    assert told == [0, 0, BLOCK - 5, 5]


def test_nothing_is_written_after_a_failure(small_blocks: None) -> None:
    file = Recorder(fails_at=2)
    pipeline = pipeline_of(file)
    with pytest.raises(OSError, match="No space"):
        pipeline.put(memoryview(bytes(20 * BLOCK)))
    pipeline.stop()
    assert len(file.written) == 2


@pytest.mark.parametrize("fails_at", range(6))
def test_the_failure_of_one_file_leaves_the_bytes_of_the_others(fails_at: int, small_blocks: None) -> None:
    """Its blocks serve the next files, and none serves twice at a time."""
    blocks, data = Blocks(), np.random.default_rng(fails_at).bytes(20 * BLOCK + 5)
    failing = pipeline_of(Recorder(fails_at), blocks=blocks)
    with pytest.raises(OSError, match="No space"):
        failing.put(memoryview(bytes(20 * BLOCK)))
    failing.stop()
    file = Recorder()
    other = pipeline_of(file, blocks=blocks)
    other.put(memoryview(data))
    assert other.finish() == hashlib.sha256(data).hexdigest()
    assert b"".join(file.written) == data


def test_stop_waits_for_the_write_under_way_and_for_no_other(small_blocks: None) -> None:
    file = Recorder()
    pipeline = pipeline_of(file)
    file.may_go_on.clear()
    pipeline.put(memoryview(bytes(3 * BLOCK)))
    file.begun.wait(LONG)
    stopping = threading.Thread(target=pipeline.stop)
    stopping.start()
    while not pipeline._stopped:
        time.sleep(0.001)
    stopping.join(0.2)
    assert stopping.is_alive()
    file.may_go_on.set()
    stopping.join(LONG)
    assert not stopping.is_alive() and len(file.written) == 1


def test_no_write_is_under_way_when_a_shard_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece fails while the disk is slow: the file is closed only after the write."""
    source, real, same = make_checkpoint(tmp_path / "source", geometry=GEOMETRY), os.write, []
    writing = threading.Event()

    def slow(descriptor: int, data: memoryview) -> int:
        path = f"/proc/self/fd/{descriptor}"
        before = os.readlink(path)
        if ".safetensors." not in before:
            return real(descriptor, data)
        writing.set()
        for _ in range(30):
            time.sleep(0.01)
            same.append(os.path.lexists(path) and os.readlink(path) == before)
        return real(descriptor, data) if same[-1] else len(data)

    def fail(*arguments: Any) -> Any:
        if writing.is_set():
            raise InputError("a piece that fails")
        return compute(*arguments)

    compute = copy.Copy.compute
    monkeypatch.setattr(pipeline_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(recipe, "TASK_BYTES", 1)
    monkeypatch.setattr(files.os, "write", slow)
    monkeypatch.setattr(copy.Copy, "compute", fail)
    code, _, err = dsv4("convert", source, tmp_path / "out", "--max-workers", "1")
    assert code == 3 and "a piece that fails" in err and same and all(same)
    assert not list((tmp_path / "out").glob("*.part"))


def test_blocks_are_used_again(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], mmap.mmap

    def counted(*arguments: Any) -> mmap.mmap:
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(pipeline_module.mmap, "mmap", counted)
    blocks = Blocks()
    for ends in ("finish", "stop", "finish"):  # also by the next file
        file = Recorder()
        pipeline = pipeline_of(file, blocks=blocks)
        pipeline.put(memoryview(bytes(50 * BLOCK)))
        getattr(pipeline, ends)()
        assert ends == "stop" or sum(map(len, file.written)) == 50 * BLOCK
    assert len(made) == pipeline_module.BLOCKS
