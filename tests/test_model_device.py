"""The engine on a device that is not the CPU: every tensor it computes with lies there, and the numbers agree."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert.synthetic import make_checkpoint
from dsv4.errors import MachineError
from dsv4.model import load

PROGRAM = Path(__file__).with_name("second_device.py")


def least_memory(folder: Path) -> int:
    """The bytes that `load` says it cannot do without."""
    with pytest.raises(MachineError) as caught:
        load(folder, max_memory=1)
    return int("".join(c for c in str(caught.value.hint) if c.isdigit()))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_checkpoint(tmp_path_factory.mktemp("device") / "c", seed=6, tokenizer=False)
    command = [sys.executable, str(PROGRAM), str(folder), str(least_memory(folder))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_device_tells_when_devices_are_mixed(found: dict[str, Any]) -> None:
    assert found["mixing_is_refused"]


@pytest.mark.parametrize("weights", ["in memory", "streaming"])
def test_logits_agree_with_the_cpu(weights: str, found: dict[str, Any]) -> None:
    # Another order of sums in float32: 2**-24 each, some hundred of them one after the other through the layers.
    assert found[weights] < 1e-5


def test_simulated_quantizations_run_there(found: dict[str, Any]) -> None:
    assert found["simulated"]


def test_greedy_tokens_from_the_command_line(found: dict[str, Any]) -> None:
    assert found["tokens"]["npu"] == found["tokens"]["cpu"]
    assert len(found["tokens"]["cpu"]) > 5
