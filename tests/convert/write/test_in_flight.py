"""Several shards in flight: as many as keep the workers busy, published in order, stopped together."""

import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exact_values import convert, dsv4, tree
from fault_lab import GEOMETRY
from jobs import job_of
from mixed_scales import mix_scales
from patience import LONG

from dsv4.convert.plan.settings import resolve
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.run import run_conversion
from dsv4.convert.write.shards import in_flight, pipeline, sha256
from dsv4.convert.write.shards.resources import Resources
from dsv4.convert.write.shards.scan import bytes_to_scan, scan_shard
from dsv4.convert.write.shards.workers import Workers
from dsv4.errors import InputError

OPTIONS = ("--max-shard-size", "40KB", "--max-workers")
BLOCK = 2**12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("in_flight") / "source", geometry=GEOMETRY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("in_flight") / "whole"
    convert(source, output, *OPTIONS, "1")
    return tree(output)


class Watched:
    """SHA-256 of shards that counts how many of them are hashed at a time, and takes its time.

    Until `wanted` of them were hashed at a time, each block waits for the others.
    """

    seconds = 0.0
    now, most, wanted = 0, 0, 0
    changed = threading.Condition()

    def __init__(self) -> None:
        self._real = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        with self.changed:
            Watched.now += 1
            Watched.most = max(Watched.most, Watched.now)
            self.changed.notify_all()
            self.changed.wait_for(lambda: Watched.most >= Watched.wanted, LONG)
        time.sleep(self.seconds)  # one too many has time to begin
        self._real.update(data)
        with self.changed:
            Watched.now -= 1

    def hexdigest(self) -> str:
        return self._real.hexdigest()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watched]]:
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(sha256, "algorithm", lambda: sha256.Algorithm(Watched))
    Watched.now = Watched.most = Watched.wanted = 0
    Watched.seconds = 0.0
    yield Watched


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.fast_cases(1)
def test_a_slow_hash_has_as_many_shards_in_flight_as_there_are_workers(
    workers: int, source: Path, whole: dict[str, str], watched: type[Watched], tmp_path: Path
) -> None:
    watched.seconds, watched.wanted = 0.002, workers
    convert(source, tmp_path / "out", *OPTIONS, workers)
    assert watched.most == workers
    assert tree(tmp_path / "out") == whole


def test_shards_are_begun_while_the_file_system_allocates_another(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocating a file may take as long as writing it (tmpfs clears its pages); idle workers take the next shard."""
    together, real = threading.Barrier(3), AtomicFile._allocate
    begun: set[str] = set()

    def allocate(file: AtomicFile) -> None:
        begun.add(file.path.name)
        if "model-00001" <= file.path.name < "model-00004":
            together.wait(LONG)  # raises if the others do not come
        real(file)

    monkeypatch.setattr(AtomicFile, "_allocate", allocate)
    convert(source, tmp_path / "out", *OPTIONS, "3")
    assert {f"model-0000{number}" for number in (1, 2, 3)} <= {name[:11] for name in begun}
    assert tree(tmp_path / "out") == whole


def test_no_shard_begins_before_it_may() -> None:
    """A killed run loses the shards in flight: only a shard that does not keep the workers busy lets the next begin."""
    shards: list[Any] = [SimpleNamespace(file=str(number), source_shards=()) for number in range(4)]
    storage: Any = SimpleNamespace(prepare=lambda *names: None, is_ready=lambda names: True)
    begun: list[str] = []
    at_calls: list[int] = []
    looked_often = threading.Event()

    def write(written: Any, flight: in_flight.Flight) -> Any:
        begun.append(written.file)
        if written is shards[0]:
            assert looked_often.wait(LONG)  # several calls of `progress`: no other shard has begun
            flight.let_next_begin()
            while len(begun) < 2:
                flight.advance(0)
                time.sleep(0.001)
        return written.file

    def look(count: int) -> None:
        if begun and not looked_often.is_set():
            at_calls.append(len(begun))
            if len(at_calls) == 3:
                looked_often.set()

    with in_flight.InFlight(write, storage, 2, look) as some:
        assert list(some.written(shards)) == ["0", "1", "2", "3"]
    assert at_calls == [1, 1, 1] and begun == ["0", "1", "2", "3"]


def test_an_error_of_one_while_three_write(
    source: Path, whole: dict[str, str], watched: type[Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it are finished and kept, as if they were written one after the other; of the others nothing is."""
    output, real = tmp_path / "out", pipeline.ShardPipeline.finish
    watched.seconds = 0.02
    opened: list[int] = []

    def finish(self: Any) -> str:
        if "-00003-" not in self._file.path.name:
            return real(self)
        while not opened or opened[-1] < 4:
            opened.append(len(list(output.glob("*.part"))))
        raise InputError("a piece of the third that fails")

    monkeypatch.setattr(pipeline.ShardPipeline, "finish", finish)
    code, _, err = dsv4("convert", source, output, *OPTIONS, "4")
    assert code == 3 and "a piece of the third that fails" in err and opened[-1] >= 4
    found = {name: data for name, data in tree(output).items() if not name.startswith(".")}
    assert len(found) == 2 and found.items() <= whole.items()
    assert not list(output.glob("*.part"))
    monkeypatch.undo()
    assert f"{len(found)} shards were there already" in convert(source, output, *OPTIONS, "4")
    assert tree(output) == whole


def resources(workers: int, window: int) -> Resources:
    return Resources(workers, 4, window, 1, 100, 0)


class TestWindow:
    def test_is_never_exceeded_and_shared_by_all(self) -> None:
        alive, most, lock = 0, 0, threading.Lock()
        done: list[int] = []

        def compute(item: int) -> int:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return item

        def consume(number: int) -> None:
            nonlocal alive
            for item, result in workers.map(compute, range(200), lambda count: None):
                assert item == result
                time.sleep(0.0002)
                with lock:
                    alive -= 1
            done.append(number)

        with Workers(resources(3, 8)) as workers, ThreadPoolExecutor(4) as threads:
            list(threads.map(consume, range(4)))
        assert sorted(done) == [0, 1, 2, 3] and alive == 0
        assert most <= 8 + 4  # each of the four has taken one out of the window that it has not counted yet

    def test_what_was_not_taken_is_free_again(self) -> None:
        with Workers(resources(1, 4)) as workers:
            with closing(workers.map(lambda item: item, range(100), lambda count: None)) as some:
                next(some)
            assert len(list(workers.map(lambda item: item, range(9), lambda count: None))) == 9
            assert workers.has_free

    def test_tells_when_all_is_submitted(self) -> None:
        told: list[int] = []
        taken: list[int] = []
        with Workers(resources(1, 4)) as workers:
            for item, _ in workers.map(int, range(9), lambda count: None, lambda: told.append(len(taken))):
                taken.append(item)
        assert told == [9 - 4]

    def test_an_error_is_raised_where_it_is_waited_for(self) -> None:
        def fail(item: int) -> int:
            if item == 5:
                raise InputError("five")
            return item

        got: list[int] = []
        with Workers(resources(2, 4)) as workers, pytest.raises(InputError, match="five"):
            for item, _ in workers.map(fail, range(9), lambda count: None):
                got.append(item)
        assert got == [0, 1, 2, 3, 4]


def test_what_a_scan_may_keep_is_counted_over_all_shards() -> None:
    with Workers(resources(1, 4)) as workers:
        assert workers.spare(60) and not workers.spare(60) and workers.spare(40)
        workers.give_back(60)
        assert workers.spare(60)


@pytest.mark.parametrize("kind", ["exact", "kept"])
def test_the_scan_counts_as_half_of_the_work(kind: str, source: Path, tmp_path: Path) -> None:
    """All steps add up to the data, also where tensors are kept in fewer bytes than the plan has for them."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    if kind == "kept":
        mix_scales(folder)
    job = job_of(folder, resolve("fp8", on_inexact="keep"), tmp_path / "out", workers=2)
    (shard, *_), steps = job.plan.shards, list[int]()
    with Workers(job.resources) as workers:
        scan_shard(job.checkpoint, shard, job.plan.settings, workers, steps.append, lambda: None)
    assert sum(steps) == bytes_to_scan(shard) > 0
    steps.clear()
    run_conversion(job, progress=steps.append)
    assert sum(steps) == sum(shard.data_bytes for shard in job.plan.shards)
