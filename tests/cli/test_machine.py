"""How much memory is free, as Linux and a container say it."""

from pathlib import Path

import pytest

from dsv4 import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_meminfo_available", lambda: 1000)
    return tmp_path


def test_what_is_free_with_a_margin(cgroup: Path) -> None:
    assert machine.usable_memory() == 800


def test_a_container_may_have_less(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("700\n")
    (cgroup / "memory.current").write_text("200\n")
    assert machine.usable_memory() == 400
    (cgroup / "memory.current").write_text("900\n")
    assert machine.usable_memory() == 0


def test_a_container_without_a_limit(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    assert machine.usable_memory() == 800


def test_elsewhere_the_physical_memory_counts(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_meminfo_available", lambda: None)
    monkeypatch.setattr(machine, "_physical_memory", lambda: 500)
    assert machine.usable_memory() == 400
    monkeypatch.setattr(machine, "_physical_memory", lambda: None)
    assert machine.usable_memory() is None


def test_this_machine() -> None:
    usable, peak = machine.usable_memory(), machine.peak_memory()
    assert usable is None or usable > 0
    assert peak > 10_000_000  # an interpreter with pytest takes more
