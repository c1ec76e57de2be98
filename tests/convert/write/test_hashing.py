"""The hash of shards: two files at a time give the digests of hashlib, in order, whichever thread hashes them."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from patience import LONG

from dsv4.convert.write.shards import hashing, sha256
from dsv4.convert.write.shards.hashing import FileHash, Hashing
from dsv4.convert.write.shards.sha256 import Algorithm, CompiledHash

compiled = pytest.mark.skipif(sha256._library() is None, reason="no compiled library, or no SHA instructions")
LENGTHS = [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 1000, 5000]


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@compiled
@pytest.mark.parametrize("length", LENGTHS)
def test_one_file(length: int) -> None:
    """Whole, byte by byte, and cut anywhere; the digest so far is that of the bytes so far."""
    random = np.random.default_rng(length)
    data = random.bytes(length)
    for step in (max(length, 1), 1, 7, 63, 64, 65, 200):
        made = CompiledHash()
        for start in range(0, length, step):
            made.update(memoryview(data)[start : start + step])
            assert made.hexdigest() == digest_of(data[: start + step])
        assert made.hexdigest() == digest_of(data)


@compiled
@pytest.mark.parametrize("length", LENGTHS)
def test_two_files(length: int) -> None:
    """Of every two lengths, after any bytes that do not fill a block."""
    random = np.random.default_rng(length)
    for other_length in LENGTHS:
        first, second = random.bytes(length), random.bytes(other_length)
        begun, other_begun = random.bytes(random.integers(0, 130)), random.bytes(random.integers(0, 130))
        one, two = CompiledHash(), CompiledHash()
        one.update_with(memoryview(begun), two, memoryview(other_begun))
        one.update_with(memoryview(first), two, memoryview(second))
        assert one.hexdigest() == digest_of(begun + first)
        assert two.hexdigest() == digest_of(other_begun + second)


@compiled
def test_files_whose_number_of_bits_needs_more_than_32_bits() -> None:
    block, made, other, expected = memoryview(bytes(2**24)), CompiledHash(), CompiledHash(), hashlib.sha256()
    for _ in range(33):
        made.update_with(block, other, block)
        expected.update(block)
    assert made.hexdigest() == other.hexdigest() == expected.hexdigest()


@pytest.fixture(params=["two at a time", "one at a time"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has, and what every machine has."""
    if request.param == "one at a time":
        monkeypatch.setattr(sha256, "algorithm", lambda: Algorithm(hashlib.sha256))


@pytest.fixture
def hashes() -> Iterator[Callable[[int], Hashing]]:
    made: list[Hashing] = []

    def make(files: int) -> Hashing:
        made.append(Hashing(files))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


@pytest.mark.parametrize("files", [1, 2, 3, 5])
def test_every_file_has_its_own_digests(
    files: int, algorithm: None, hashes: Callable[[int], Hashing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of all sizes of several files, submitted at the same time; tensors end anywhere, also two in one place."""
    monkeypatch.setattr(hashing, "MOST_BYTES", 1000)
    monkeypatch.setattr(hashing, "LEAST_BYTES", 100)
    random, shared = np.random.default_rng(files), hashes(files)
    made = [FileHash(shared) for _ in range(files)]
    contents, expected = [b""] * files, [dict[str, str]() for _ in range(files)]
    last: list[Any] = [None] * files
    for number in range(60 * files):
        at = int(random.integers(files))
        parts: list[hashing.Part] = []
        for size in random.choice([0, 1, 63, 64, 500, 4000], 3):
            data = random.bytes(size)
            contents[at] += data
            parts.append((memoryview(data), f"{number}.{len(parts)}" if random.integers(2) else None))
            if parts[-1][1]:
                expected[at][parts[-1][1]] = digest_of(contents[at])
        last[at] = made[at].submit(parts)
    for at in range(files):
        last[at].result(LONG)
        assert made[at].hexdigest() == digest_of(contents[at]) and made[at].prefixes == expected[at]


class Stopping:
    """A hash that waits in `update` until it is let go."""

    begun, go_on = threading.Event(), threading.Event()

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def update(self, data: memoryview) -> None:
        Stopping.begun.set()
        Stopping.go_on.wait(LONG)
        self.data.append(bytes(data))

    def hexdigest(self) -> str:
        return "".join(map(bytes.decode, self.data))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stopping]]:
    Stopping.begun.clear()
    Stopping.go_on.clear()
    yield Stopping
    Stopping.go_on.set()


def together(calls: list[int]) -> Algorithm:
    """Records how many files each call hashes."""

    class Recorded(Stopping):
        def update(self, data: memoryview) -> None:
            calls.append(1)
            super().update(data)

    def update_two(first: Any, data: memoryview, second: Any, other: memoryview) -> None:
        calls.append(2)
        first.data.append(bytes(data))
        second.data.append(bytes(other))

    return Algorithm(Recorded, update_two)


def test_files_that_wait_are_hashed_by_two(
    stopping: type[Stopping], hashes: Callable[[int], Hashing], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(sha256, "algorithm", lambda: together(calls))
    both = hashes(2)  # one thread
    first, second = FileHash(both), FileHash(both)
    done = [first.submit([(memoryview(b"a"), None)])]
    assert stopping.begun.wait(LONG)
    done += [file.submit([(memoryview(data), None)]) for file, data in ((second, b"x"), (first, b"b"), (second, b"y"))]
    stopping.go_on.set()
    for future in done:
        future.result(LONG)
    assert (first.hexdigest(), second.hexdigest()) == ("ab", "xy")
    assert calls == [1, 2, 1]


def test_stop_waits_for_the_bytes_being_hashed_and_for_no_others(
    stopping: type[Stopping], hashes: Callable[[int], Hashing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sha256, "algorithm", lambda: Algorithm(Stopping))
    some = hashes(2)
    file, other = FileHash(some), FileHash(some)
    futures = [file.submit([(memoryview(data), None)]) for data in (b"a", b"b")]
    assert stopping.begun.wait(LONG)
    thread = threading.Thread(target=file.stop)
    thread.start()
    while not file.is_stopped:
        time.sleep(0.001)
    thread.join(0.1)
    assert thread.is_alive()
    stopping.go_on.set()
    thread.join(LONG)
    assert not thread.is_alive() and futures[0].done() and not futures[1].done()
    other.submit([(memoryview(b"z"), None)]).result(LONG)  # the threads go on
    assert (file.hexdigest(), other.hexdigest()) == ("a", "z")


def test_an_error_is_raised_where_the_result_is_waited_for(
    hashes: Callable[[int], Hashing], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Stopping):
        def update(self, data: memoryview) -> None:
            raise MemoryError("no room")

    monkeypatch.setattr(sha256, "algorithm", lambda: Algorithm(Failing))
    file = FileHash(hashes(1))
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            file.submit([(memoryview(b"a"), None)]).result(LONG)
