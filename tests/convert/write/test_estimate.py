"""The time that a dry run prints: from rates that were measured, and by arithmetic that can be done by hand."""

import json
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exact_values import dsv4, tree
from fault_lab import GEOMETRY
from jobs import job_of

from dsv4.convert.api import convert
from dsv4.convert.plan.settings import resolve
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write import estimate
from dsv4.convert.write.estimate import Rates, estimated_seconds, measure

PLAN: Any = SimpleNamespace(source_bytes=100, output_bytes=200)


@pytest.mark.parametrize(
    ("rates", "cores", "seconds"),
    [
        (Rates(10, 10, 1e9, same_disk=True), 1, 10 + 20),
        (Rates(10, 10, 1e9, same_disk=False), 1, 20),
        (Rates(1, 10, 1e9, same_disk=False), 1, 100),
        (Rates(None, 10, 1e9, same_disk=False), 1, 20),
        (Rates(1e9, 1e9, 2, same_disk=True), 1, 200 / 2),
        (Rates(1e9, 1e9, 2, same_disk=True), 4, 200 / 2 / 4),
        (Rates(None, None, 2, same_disk=False), 1, 200 / 2),
    ],
)
def test_the_longer_of_disks_and_hashes(rates: Rates, cores: int, seconds: float) -> None:
    assert estimated_seconds(PLAN, rates, cores) == pytest.approx(seconds)


def test_a_small_checkpoint_is_not_measured_for_longer_than_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left on the disk, nor made: the output's folder is not there yet."""
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    monkeypatch.setattr(estimate, "SECONDS", 60)
    before = tree(tmp_path)
    job = job_of(source, resolve(), tmp_path / "a" / "b")
    rates = measure(job.checkpoint, job.plan, job.output)
    assert rates.read and rates.write and rates.sha256 > 0 and rates.same_disk
    assert tree(tmp_path) == before


def test_a_disk_that_cannot_be_written_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(estimate.tempfile, "TemporaryFile", refuse)
    job = job_of(make_checkpoint(tmp_path / "source", geometry=GEOMETRY), resolve(), tmp_path / "out")
    assert measure(job.checkpoint, job.plan, job.output).write is None


def test_a_dry_run_prints_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)
    code, out, _ = dsv4("convert", source, tmp_path / "out", "--dry-run")
    (line,) = [line for line in out.splitlines() if line.startswith("time ")]
    assert code == 0 and "/s read, " in line and "/s written, " in line and "/s hashed" in line
    code, out, _ = dsv4("convert", source, tmp_path / "out", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["estimated_seconds"] >= 0


def test_a_dry_run_of_a_part_prints_that_part(tmp_path: Path) -> None:
    """All parts together write what the whole writes, and read what it reads; no shard is in two parts."""
    source = make_checkpoint(tmp_path / "source", geometry=GEOMETRY)

    def planned(*more: str) -> dict[str, Any]:
        code, out, _ = dsv4(
            "convert", source, tmp_path / "out", "--max-shard-size", "60KB", "--dry-run", "--json", *more
        )
        assert code == 0
        return dict(json.loads(out))

    whole, parts = planned(), [planned("--part", f"{i}/3") for i in (1, 2, 3)]
    for key in ("output_bytes", "shards", "tensors"):
        assert sum(part[key] for part in parts) == whole[key] and min(part[key] for part in parts) > 0
    assert sorted(file for part in parts for file in part["files"]) == sorted(whole["files"])
    data = sum(info.nbytes for info in job_of(source, resolve(), tmp_path / "out").checkpoint.tensors.values())
    assert sum(part["source_bytes"] for part in parts) == data
    assert [(part["part"], part["parts"]) for part in parts] == [(1, 3), (2, 3), (3, 3)] and "part" not in whole
    dry = convert(source, tmp_path / "out", max_shard_size="60KB", part="2/3", dry_run=True)
    assert dry.output_bytes == parts[1]["output_bytes"]


@pytest.mark.parametrize("is_direct", [True, False])
def test_no_step_leaves_more_than_a_block_to_a_later_fsync(
    is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cache takes in a third of a second, a busy disk may need a minute for."""
    waiting, most = 0, 0

    def write(descriptor: int, data: mmap.mmap) -> int:
        nonlocal waiting, most
        waiting += 0 if is_direct else len(data)
        most = max(most, waiting)
        return len(data)

    def fsync(descriptor: int) -> None:
        nonlocal waiting
        waiting = 0

    job = job_of(make_checkpoint(tmp_path / "source", geometry=GEOMETRY), resolve(), tmp_path / "out")
    monkeypatch.setattr(estimate, "BLOCK_BYTES", 4 * mmap.PAGESIZE)
    monkeypatch.setattr(estimate, "set_direct", lambda descriptor, on: is_direct)
    monkeypatch.setattr(estimate.os, "write", write)
    monkeypatch.setattr(estimate.os, "fsync", fsync)
    assert job.plan.output_bytes > 2 * estimate.BLOCK_BYTES
    assert measure(job.checkpoint, job.plan, job.output).write
    assert waiting == 0 and most == (0 if is_direct else estimate.BLOCK_BYTES)
