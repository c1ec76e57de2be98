"""Power loss: of everything after the last fsync, any part may be on the disk, in any state.

A conversion is recorded as the file operations it asks for. A simulated disk plays the record up to some moment and
then loses power: data that was fsynced stays, other data is kept, dropped or torn, and so is every name that was made,
moved or removed since its folder was last fsynced. What such a disk may hold after that must still keep the promises.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from exact_values import convert, tree
from fault_lab import GEOMETRY, SlowSha256
from hostile import INDEX

from dsv4 import cli
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write.atomic_file import PREFIX
from dsv4.convert.write.shards import pipeline, sha256

OPTIONS = ("--max-shard-size", "150KB", "--max-workers", "2")
FOUR = ("--max-shard-size", "50KB", "--max-workers", "4")
SEEDS = 40


@dataclass
class Inode:
    """A file's data as the program sees it and as far as fsync made it durable."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""

    def after_loss(self, chance: random.Random) -> bytes:
        """What the disk may hold: blocks of what was not fsynced are there, old, zero or garbage."""
        content = bytearray(self.data if chance.random() < 0.7 else self.durable)
        for start in range(0, len(content), 4096):
            block = slice(start, start + 4096)
            if content[block] == self.durable[block] or chance.random() < 0.5:
                continue
            old = self.durable[block].ljust(len(content[block]), b"\0")
            content[block] = chance.choice([old, bytes(len(old)), chance.randbytes(len(old))])
        return bytes(content)


@dataclass
class Disk:
    """Folders as name -> inode, in memory and durably, changed by recorded operations."""

    names: dict[str, Inode] = field(default_factory=dict)
    durable: dict[str, Inode] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)  # folders, not yet durably

    @classmethod
    def holding(cls, folder: Path) -> "Disk":
        """A disk on which a folder is durable."""
        files = {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        inodes = {name: Inode(bytearray(data), data) for name, data in files.items()}
        return cls(dict(inodes), dict(inodes))

    def restore(self, chance: random.Random, folder: Path, to: Path) -> None:
        """Write what may be left of `folder` when the power is back into another folder."""
        to.mkdir()
        for name, data in self.after_loss(chance).items():
            path = to / Path(name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def play(self, operation: tuple[Any, ...]) -> None:
        kind, path, *rest = operation
        if kind == "create":
            self.names.setdefault(path, Inode())
        elif kind == "write":
            offset, data = rest
            content = self.names[path].data
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        elif kind == "truncate":
            del self.names[path].data[rest[0] :]
        elif kind == "fsync":
            self.names[path].durable = bytes(self.names[path].data)
        elif kind == "replace":
            self.names[rest[0]] = self.names.pop(path)
        elif kind == "unlink":
            self.names.pop(path, None)
        elif kind == "rmdir":
            self.removed.add(path)
        elif kind == "fsync_folder":
            self._fsync_folder(path)

    def _fsync_folder(self, folder: str) -> None:
        for gone in [path for path in self.removed if os.path.dirname(path) == folder]:
            self.removed.remove(gone)
            for name in [name for name in self.durable if os.path.dirname(name) == gone]:
                del self.durable[name]
        for name in {*self.names, *self.durable}:
            if os.path.dirname(name) == folder:
                if name in self.names:
                    self.durable[name] = self.names[name]
                else:
                    self.durable.pop(name, None)

    def after_loss(self, chance: random.Random) -> dict[str, bytes]:
        """Files that may be there when the power is back."""
        found = {}
        for name in sorted({*self.names, *self.durable}):
            old, new = self.durable.get(name), self.names.get(name)
            inode = new if old is new or chance.random() < 0.5 else old
            if inode is not None:
                found[name] = inode.after_loss(chance)
        return found


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Every operation on files that goes through `os`, in order, with paths instead of descriptors."""
    operations: list[tuple[Any, ...]] = []
    paths: dict[int, str] = {}
    ends: dict[int, int] = {}

    def wrap(name: str, note: Callable[..., None]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = real(*arguments, **keywords)
            note(result, *arguments)
            return result

        monkeypatch.setattr(os, name, call)

    def opened(descriptor: int, path: Any, flags: int, *_: Any, **__: Any) -> None:
        paths[descriptor], ends[descriptor] = str(path), 0
        if flags & os.O_CREAT:
            operations.append(("create", str(path)))
            if most_open(operations) >= 4:
                SlowSha256.reached.set()

    def wrote(count: int, descriptor: int, data: Any) -> None:
        operations.append(("write", paths[descriptor], ends[descriptor], bytes(data[:count])))
        ends[descriptor] += count

    wrap("open", opened)
    wrap("write", wrote)
    wrap("pwrite", lambda n, fd, data, at: operations.append(("write", paths[fd], at, bytes(data[:n]))))
    wrap("ftruncate", lambda _, fd, size: operations.append(("truncate", paths[fd], size)))
    wrap("rmdir", lambda _, path: operations.append(("rmdir", str(path))))
    wrap("mkdir", lambda _, path, *__: operations.append(("mkdir", str(path))))
    wrap("replace", lambda _, old, new: operations.append(("replace", str(old), str(new))))
    wrap("unlink", lambda _, path, **__: operations.append(("unlink", str(path))))
    wrap(
        "fsync",
        lambda _, fd: operations.append(("fsync_folder" if Path(paths[fd]).is_dir() else "fsync", paths[fd])),
    )
    yield operations


def most_open(operations: list[tuple[Any, ...]]) -> int:
    """How many shards were begun and not published, at most."""
    change = {"create": 1, "replace": -1}
    steps = [change.get(kind, 0) for kind, path, *_ in operations if ".safetensors." in path]
    return max(accumulate(steps), default=0)


def check_promises(output: Path, whole: dict[str, str]) -> None:
    """Whatever has a final name is whole; what loaders look for is there only with all the rest."""
    found = {name: data for name, data in tree(output).items() if not Path(name).name.startswith(PREFIX)}
    for name, data in found.items():
        assert data == whole[name], f"{name} is not what was written"
    if INDEX in found:
        assert {name for name in whole if name.endswith(".safetensors")} <= found.keys()
    if "config.json" in found:
        assert found.keys() == whole.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direct", "options"),
    [(False, OPTIONS), (True, OPTIONS), (True, FOUR)],
    ids=["through the page cache", "past it", "while four shards are open"],
)
def test_promises_hold_after_power_loss_at_any_moment(
    direct: bool,
    options: tuple[str, ...],
    record: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 2**13)  # the shards are small: many writes in spite of that
    if direct:  # as large shards are written
        monkeypatch.setattr(files, "WRITE_BYTES", 2**13)
        monkeypatch.setattr(files, "DIRECT_BYTES", 2**13)
    if options == FOUR:
        monkeypatch.setattr(sha256, "algorithm", lambda: sha256.Algorithm(SlowSha256))
        monkeypatch.setattr(SlowSha256, "reached", threading.Event())
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    output = tmp_path / "output"
    record.clear()
    assert cli.run(["convert", str(source), str(output), *options, "-q"]) == 0
    monkeypatch.undo()
    operations = [operation for operation in record if operation[1].startswith(str(output))]
    whole = tree(output)
    assert sum(operation[0] == "fsync" for operation in operations) > 10
    assert options != FOUR or most_open(operations) >= 4
    for seed in range(SEEDS):
        chance = random.Random(seed)
        disk = Disk()
        for operation in operations[: chance.randrange(len(operations) + 1)]:
            disk.play(operation)
        restored = tmp_path / f"restored-{seed}"
        disk.restore(chance, output, restored)
        check_promises(restored, whole)
        convert(source, restored, *options)
        assert tree(restored) == whole, f"seed {seed}"


@pytest.mark.slow
def test_an_older_output_is_ours_until_it_is_gone(
    record: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Power is lost while `--overwrite` removes it: what may come back is still ours, and the same command goes on."""
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    output, older = tmp_path / "output", ("--to", "bf16", "--max-shard-size", "150KB")
    convert(source, output, *older)
    before = Disk.holding(output)
    record.clear()
    assert cli.run(["convert", str(source), str(output), *OPTIONS, "--overwrite", "-q"]) == 0
    monkeypatch.undo()
    operations = [operation for operation in record if operation[1].startswith(str(output))]
    whole, first = tree(output), next(i for i, operation in enumerate(operations) if operation[0] == "replace")
    for seed in range(SEEDS):
        chance = random.Random(seed)
        disk = Disk(dict(before.names), dict(before.durable))
        for operation in operations[: chance.randrange(first)]:
            disk.play(operation)
        restored = tmp_path / f"restored-{seed}"
        disk.restore(chance, output, restored)
        convert(source, restored, *OPTIONS, "--overwrite")
        assert tree(restored) == whole, f"seed {seed}"


def test_a_new_folder_is_durable_before_a_file_appears_in_it(
    record: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own name too: it could be lost with everything in it."""
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    record.clear()
    assert cli.run(["convert", str(source), str(tmp_path / "a" / "b" / "out"), *OPTIONS, "-q"]) == 0
    monkeypatch.undo()
    made = [path for kind, path, *_ in record if kind == "mkdir"]
    assert {str(tmp_path / name) for name in ("a", "a/b", "a/b/out", "a/b/out/encoding")} <= set(made)
    for folder in made:
        begun = record.index(("mkdir", folder))
        durable = record.index(("fsync_folder", os.path.dirname(folder)), begun)
        named = [i for i, (kind, _, *to) in enumerate(record) if kind == "replace" and to[0].startswith(folder + "/")]
        assert not named or durable < min(named), folder
