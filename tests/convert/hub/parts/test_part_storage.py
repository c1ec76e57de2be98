"""The parts of shards on disk: fetched once, kept through any end of a run, never other bytes than the hub's.

The hub is an object here; test_hub_run.py has the real libraries and servers.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from folder_hub import COMMIT, FolderHub, part_storage
from full_disk import files_of_at_most
from patience import LONG
from tiny import TINY

from dsv4.convert.checkpoint.forms.tensor import Extent
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.hub import transfers
from dsv4.convert.hub.client import BadFile, NetworkError
from dsv4.convert.hub.parts import storage as module
from dsv4.convert.hub.parts.storage import FOLDER, KEPT, PartStorage
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import InputError, Interrupted, MachineError

PIECE, HEAD = 4096, 1 << 14


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that a small checkpoint has many pieces, and records between them; `close` waits for all of them."""
    monkeypatch.setattr(transfers, "SECONDS_TO_STOP", LONG)
    monkeypatch.setattr(module, "PART_BYTES", PIECE)
    monkeypatch.setattr(module, "HEAD_BYTES", HEAD)
    monkeypatch.setattr(module, "RECORD_BYTES", 8 * PIECE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parts") / "c", geometry=TINY)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> FolderHub:
    return FolderHub(folder, tmp_path / "cache")


@pytest.fixture
def opened(hub: FolderHub) -> Iterator[Callable[..., PartStorage]]:
    """Opens storages of the hub, all closed at the end."""
    storages: list[PartStorage] = []

    def open_one(commit: str = COMMIT, **more: Any) -> PartStorage:
        storages.append(part_storage(hub, commit, **more))
        return storages[-1]

    yield open_one
    for storage in storages:
        storage.close()


Open = Callable[..., PartStorage]
SHARD = "model-00003-of-00005.safetensors"


def everything(storage: PartStorage) -> list[Extent]:
    return [Extent(name, 0, size) for name, size in storage.sizes().items() if name.endswith(".safetensors")]


def assert_same(storage: PartStorage, folder: Path) -> None:
    for name, size in storage.sizes().items():
        assert storage.read(name, 0, size) == (folder / name).read_bytes(), name


def asked_once(hub: FolderHub) -> int:
    """How many bytes were asked for; none of them twice."""
    ranges = sorted(hub.read_ranges)
    for (name, offset, length), (after, begin, _) in pairwise(ranges):
        assert name != after or offset + length <= begin
    return sum(length for _, _, length in ranges)


def test_each_byte_is_fetched_once(hub: FolderHub, opened: Open, folder: Path) -> None:
    storage = opened()
    checkpoint = Checkpoint.open(storage)
    headers = len(hub.read_ranges)
    name = next(name for name in checkpoint.tensors if name.endswith("experts.1.w1.weight"))
    scale = name.removesuffix("weight") + "scale"
    spans = [(each, 0, checkpoint.tensors[each].nbytes) for each in (name, scale)]
    assert storage.missing_bytes(checkpoint.extents([*spans, *spans])) == sum(stop for _, _, stop in spans)
    checkpoint.expect([*spans, *spans])
    assert asked_once(hub) == storage.fetched_bytes and headers < len(hub.read_ranges)
    assert max(length for _, _, length in hub.read_ranges) <= PIECE
    before = len(hub.read_ranges)
    whole = Checkpoint.open(folder)
    assert all(checkpoint.read_bytes(each) == whole.read_bytes(each) for each in (name, scale))
    assert len(hub.read_ranges) == before  # from disk
    assert_same(storage, folder)
    again = opened()
    assert_same(again, folder)
    assert asked_once(hub) == storage.fetched_bytes == sum(extent.nbytes for extent in everything(storage))
    assert again.fetched_bytes == 0
    assert not again.missing_bytes(everything(again))


@pytest.mark.parametrize("number", [1, 2, 9, 30])
def test_a_fault_in_the_middle_keeps_what_has_arrived(hub: FolderHub, opened: Open, folder: Path, number: int) -> None:
    storage = opened()
    pieces = [(name, begin) for name, _, size in everything(storage) for begin in range(0, size, PIECE)]

    def fail(now: int) -> None:
        if pieces.index(hub.read_ranges[now - 1][:2]) >= number - 1:  # whichever thread asks first
            raise NetworkError("the hub does not answer", "")

    hub.before = fail
    with pytest.raises(NetworkError) as caught:
        storage.expect(everything(storage))
    assert caught.value.hint == KEPT
    storage.close()  # transfers that have begun end first
    hub.before = lambda now: None
    again = opened()
    missing, total = again.missing_bytes(everything(again)), sum(extent.nbytes for extent in everything(again))
    assert total - hub.given <= missing <= total - storage.fetched_bytes
    assert (storage.fetched_bytes > 0) == (number > 1)
    hub.read_ranges.clear()
    again.expect(everything(again))
    assert again.fetched_bytes == missing == asked_once(hub)
    assert_same(again, folder)


def test_a_storage_goes_on_after_a_fault(hub: FolderHub, opened: Open, folder: Path) -> None:
    """As a chat does."""

    def fail(now: int) -> None:
        if now == 7:
            raise NetworkError("the hub does not answer", "")

    hub.before = fail
    storage = opened()
    with pytest.raises(NetworkError):
        storage.expect(everything(storage))
    assert_same(storage, folder)


def test_an_interruption_keeps_what_has_arrived(hub: FolderHub, opened: Open, folder: Path) -> None:
    def reached(done: int, total: int) -> None:
        if done >= 5 * PIECE:
            raise Interrupted("interrupted")

    storage = opened(reached=reached)
    with pytest.raises(Interrupted):
        storage.expect(everything(storage))
    storage.close()  # waits for transfers that have begun, and records them
    again = opened()
    total = sum(extent.nbytes for extent in everything(again))
    hub.read_ranges.clear()
    assert again.missing_bytes(everything(again)) <= total - 5 * PIECE
    assert_same(again, folder)


def test_progress_counts_bytes(opened: Open) -> None:
    reached: list[tuple[int, int]] = []
    storage = opened(reached=lambda done, total: reached.append((done, total)))
    storage.expect([Extent(SHARD, 10, 5 * PIECE)])
    assert {total for _, total in reached} == {5 * PIECE} and max(reached)[0] == 5 * PIECE
    assert reached == sorted(reached)


def test_bytes_are_durable_before_the_record_names_them(
    hub: FolderHub, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    record, first_sync = hub.listing()[SHARD].sha256, threading.Event()

    def fsync(descriptor: int) -> None:
        path = hub.cache / FOLDER / f"{record}.parts"
        synced.append(path.stat().st_size if path.exists() else 0)
        first_sync.set()

    def the_last_pieces_come_after_a_record(number: int) -> None:
        if hub.read_ranges[number - 1][1] >= 16 * PIECE:
            assert first_sync.wait(LONG)

    monkeypatch.setattr(os, "fsync", fsync)
    hub.before = the_last_pieces_come_after_a_record
    storage = opened()
    storage.expect([Extent(SHARD, 0, 20 * PIECE)])
    assert synced[0] == 0 < len(synced) - 1  # between pieces too
    assert synced == sorted(set(synced))


@pytest.mark.parametrize("damage", ["torn", "garbage", "other size", "no data", "beyond"])
def test_a_record_that_a_crash_left(hub: FolderHub, opened: Open, folder: Path, damage: str) -> None:
    """What the record names is used only if it is certain; the rest is fetched again."""
    storage = opened()
    storage.expect([Extent(SHARD, 0, 4 * PIECE)])
    storage.close()
    data = hub.cache / FOLDER / str(hub.listing()[SHARD].sha256)
    record = data.with_name(f"{data.name}.parts")
    if damage == "torn":
        record.write_text(record.read_text()[:-3])
    elif damage == "garbage":
        record.write_bytes(record.read_bytes() + b"\n\x00\xff 7\n99999999999999999999 3\n5\n")
    elif damage == "beyond":
        record.write_text(record.read_text() + f"\n0 {storage.sizes()[SHARD] + 1}\n")
    elif damage == "other size":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        data.unlink()
    assert_same(opened(), folder)
    assert_same(opened(), folder)


def test_a_file_without_its_record_is_begun_anew(hub: FolderHub, opened: Open, folder: Path) -> None:
    data = hub.cache / FOLDER / str(hub.listing()[SHARD].sha256)
    data.parent.mkdir(parents=True)
    data.write_bytes(b"\1" * 100)
    assert_same(opened(), folder)


def test_a_whole_shard_is_compared_with_the_hubs_hash(hub: FolderHub, opened: Open, folder: Path) -> None:
    storage = opened()
    hub.damage = True
    with pytest.raises(BadFile, match="not those that the hub lists"):
        storage.expect(everything(storage))
    hub.damage = False
    assert_same(storage, folder)
    assert_same(opened(), folder)
    data = hub.cache / FOLDER / str(hub.listing()[SHARD].sha256)
    record = data.with_name(f"{data.name}.parts")
    assert record.read_text().splitlines()[-1] == "checked"
    data.write_bytes(bytes(len(data.read_bytes())))
    record.write_text(record.read_text().replace("checked", ""))  # as if a crash had come before the comparison
    assert_same(opened(), folder)


def test_a_shard_in_the_librarys_cache_is_read_there(hub: FolderHub, opened: Open, folder: Path) -> None:
    hub.fetch_to_cache("", COMMIT, hub.listing()[SHARD], None, None, False)
    storage = opened()
    assert_same(storage, folder)
    assert SHARD not in {name for name, _, _ in hub.read_ranges}
    assert not (hub.cache / FOLDER / str(hub.listing()[SHARD].sha256)).exists()


def test_a_commit_that_shares_a_shard_shares_its_parts(hub: FolderHub, opened: Open, folder: Path) -> None:
    opened().expect([Extent(SHARD, 0, 4 * PIECE)])
    assert opened(commit="d" * 40).missing_bytes([Extent(SHARD, 0, 5 * PIECE)]) == PIECE


def test_a_branch_that_moved_leaves_nothing(hub: FolderHub, opened: Open, folder: Path, tmp_path: Path) -> None:
    """ModelScope has branches without a commit: their bytes count only if the listing is the same afterwards."""
    newer = make_checkpoint(tmp_path / "newer", geometry=TINY, seed=1)
    storage = opened(commit="master")

    def move(number: int) -> None:
        if number == 1:  # once: a request may still be on its way when the hub has moved back
            hub.folder = newer

    hub.before = move
    with pytest.raises(InputError, match="the branch moved while it was read"):
        storage.expect(everything(storage))
    hub.before, hub.folder = lambda number: None, folder
    assert_same(storage, folder)
    again = opened(commit="master")
    assert not again.missing_bytes(everything(again))


def test_a_disk_that_is_too_small(opened: Open, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    storage = opened()
    monkeypatch.setattr(module, "free_bytes", lambda folder: module.SPARE_BYTES + 10)
    with pytest.raises(MachineError, match=r"must be fetched, 67\.1 MB are free"):
        storage.expect([Extent(SHARD, 0, 11)])
    monkeypatch.undo()
    assert_same(storage, folder)


def test_a_disk_that_becomes_full(hub: FolderHub, opened: Open, folder: Path) -> None:
    storage = opened()
    with files_of_at_most(2 * PIECE), pytest.raises(OSError) as caught:
        storage.expect([Extent(SHARD, 0, 4 * PIECE)])
    assert caught.value.errno == errno.EFBIG and FOLDER in caught.value.filename
    assert_same(storage, folder)
    assert_same(opened(), folder)


def test_what_is_not_there(opened: Open) -> None:
    storage = opened()
    with pytest.raises(InputError, match=r"nothing\.json is missing"):
        storage.read("nothing.json", 0, 1)
    size = storage.sizes()[SHARD]
    with pytest.raises(InputError, match=f"ends at byte {size}"):
        storage.read(SHARD, size - 1, 2)


def test_small_files_lie_in_one_folder(hub: FolderHub, opened: Open, folder: Path) -> None:
    found = opened().small_files(("config.json", "encoding/encoding_dsv4.py", "absent.json"))
    assert found == hub.cache / "snapshots" / COMMIT
    for name in ("config.json", "encoding/encoding_dsv4.py"):
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    (found / "config.json").write_text("{}")
    assert opened().read("config.json", 0, 10) == (folder / "config.json").read_bytes()[:10]  # not what the hub lists
