"""The lock of an output folder, where two runs meet."""

import os
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert.write import lock
from dsv4.convert.write.lock import LOCK_NAME, locked
from dsv4.errors import MachineError


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(MachineError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["", "1-of-2"])
def test_a_file_that_its_holder_removes_before_we_lock_it_is_no_lock(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was opened has no name any more: the next run would create and lock another one."""
    real, removed = os.open, []

    def open_and_lose(path: Any, *arguments: Any) -> int:
        descriptor = real(path, *arguments)
        if not removed:
            removed.append(path)
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(lock.os, "open", open_and_lose)
    with locked(tmp_path, part):
        assert removed
        with pytest.raises(MachineError, match="in use"), locked(tmp_path, part):
            pass
