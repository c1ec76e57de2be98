"""Whatever happens to `dsv4 convert` at whichever system call: nothing half done is visible, and it can go on.

The runs are made by `fault_lab.py`, one process for each sweep.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each test is a sweep over all system calls of a run

LAB = Path(__file__).parents[2] / "lab" / "fault_lab.py"
HF = ["--max-shard-size", "150KB", "--max-workers"]
SMALL = ["--max-shard-size", "50KB", "--max-workers"]
MP = ["--layout", "mp", "--model-parallel", "1", "--max-workers"]


def sweep(work: Path, name: str, options: list[str], in_flight: int = 1) -> int:
    """Run one sweep and return how many points it had. Fails with the list of what went wrong.

    in_flight: so many shards at least must have been begun and not published at some moment.
    """
    done = subprocess.run([sys.executable, str(LAB), str(work), name, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["violations"] == []
    assert report["in_flight"] >= in_flight
    return int(report["points"])


@pytest.mark.parametrize(("layout", "workers"), [(HF, "1"), (MP, "4")], ids=["hf-1", "mp-4"])
def test_killed_at_every_call_that_changes_a_file(tmp_path: Path, layout: list[str], workers: str) -> None:
    """Shards of the Hugging Face layout with four workers: below, while four of them are open."""
    assert sweep(tmp_path, "kill", [*layout, workers]) >= 70


def test_killed_at_every_call_of_a_conversion_shared_by_parts(tmp_path: Path) -> None:
    assert sweep(tmp_path, "kill", [*HF, "2", "--shared"]) >= 100


def test_killed_in_the_middle_of_every_write(tmp_path: Path) -> None:
    assert sweep(tmp_path, "torn", [*HF, "2"]) >= 40


def test_killed_while_replacing_an_older_output(tmp_path: Path) -> None:
    assert sweep(tmp_path, "kill", [*HF, "2", "--overwrite", "--before", "--to", "bf16"]) >= 80


@pytest.mark.parametrize(("name", "least"), [("kill", 70), ("torn", 40), ("disk_full", 60), ("short", 1)])
def test_shards_that_are_written_past_the_page_cache(tmp_path: Path, name: str, least: int) -> None:
    assert sweep(tmp_path, name, [*HF, "2", "--direct"]) >= least


@pytest.mark.parametrize(("name", "least"), [("disk_full", 60), ("bad_disk", 20), ("forbidden", 15)])
def test_every_call_refused(tmp_path: Path, name: str, least: int) -> None:
    assert sweep(tmp_path, name, [*HF, "2"]) >= least


@pytest.mark.parametrize(("name", "least"), [("interrupt", 70), ("terminate", 8)])
def test_a_signal_at_every_call(tmp_path: Path, name: str, least: int) -> None:
    assert sweep(tmp_path, name, [*HF, "2"]) >= least


@pytest.mark.parametrize(("name", "least"), [("kill", 70), ("disk_full", 60), ("bad_disk", 15), ("interrupt", 70)])
def test_while_four_shards_are_open(tmp_path: Path, name: str, least: int) -> None:
    assert sweep(tmp_path, name, [*SMALL, "4", "--slow-hash"], in_flight=4) >= least


def test_short_writes_change_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path, "short", [*HF, "2"]) == 1
