"""Numbers and engine on a device that is not the CPU: all that they compute with lies there, and results agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.commands.distributed import Ranks
from dsv4.commands.run.placement import device_of, place
from dsv4.convert.synthetic.checkpoint import EDITIONS, make_checkpoint
from dsv4.errors import MachineError
from dsv4.model import load
from dsv4.model.loading import devices, find_device

PROGRAM = str(Path(__file__).parents[1] / "lab" / "second_device.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
GREEDY = (
    "--tokens", "3,1,4,1,5", "--no-simulation", "--temperature", "0", "--max-new-tokens", "12", "--json",
)  # fmt: skip


def output_of(*command: object) -> dict[str, Any]:
    """The JSON object that a program prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("device") / "c", seed=6, tokenizer=False)


def least_memory(folder: Path) -> int:
    """The bytes that `load` says it cannot do without."""
    with pytest.raises(MachineError) as caught:
        load(folder, max_memory=1)
    return int("".join(c for c in str(caught.value.hint) if c.isdigit()))


@pytest.fixture(scope="module", params=["v4", "0731", "v4.1"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_checkpoint(tmp_path_factory.mktemp("compare") / "c", seed=6, geometry=EDITIONS[request.param])
    return output_of(PROGRAM, "compare", folder, least_memory(folder))


@pytest.mark.parametrize(("device", "there", "place"), [
    ("cpu", 1, "cpu"), ("npu", 1, "npu"), ("npu", 4, "npu:1"), ("cuda", 4, "cuda:1"), ("npu:3", 4, "npu:3"),
])  # fmt: skip
def test_each_rank_has_a_device_of_its_own(
    device: str, there: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("npu", "cuda"):
        monkeypatch.setattr(torch, kind, SimpleNamespace(device_count=lambda: there), raising=False)
    assert device_of(device, Ranks(5, 8, local_index=1, local_count=4)) == place
    assert device_of(device, None) == device


@pytest.mark.parametrize("name", ["gpu", "xla", "cuda:99", "meta", "", "cpu:x", "a\x1b[1m"])
def test_what_is_not_there_is_an_error_that_says_what_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for call in (find_device, lambda name: place(name, True, None, None, 0)):
        with pytest.raises(MachineError) as caught:
            call(name)
        assert f"there is no device '{name.encode('unicode_escape').decode()}' here" in str(caught.value)
        assert caught.value.hint == f"Devices that torch {torch.__version__} finds here: cpu."
        assert len(caught.value.message) < 120


def test_devices_are_listed_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for count, listed in ((1, ["cpu", "cuda"]), (3, ["cpu", "cuda:0", "cuda:1", "cuda:2"])):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        assert devices() == listed
    with pytest.raises(MachineError, match=r"no device 'cuda:9' here that works: \w"):  # torch's reason, as it may help
        find_device("cuda:9")


@pytest.mark.slow
def test_the_numbers_are_the_same_bits_there() -> None:
    found = output_of(PROGRAM, "quant")
    assert len(found) > 20 and [name for name, same in found.items() if not same] == []


@pytest.mark.slow
def test_the_device_tells_when_devices_are_mixed(found: dict[str, Any]) -> None:
    assert found["mixing_is_refused"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["in memory", "streaming"])
def test_logits_agree_with_the_cpu(weights: str, found: dict[str, Any]) -> None:
    # Another order of sums in float32: 2**-24 each, some hundred of them one after the other through the layers.
    assert found[weights] < 1e-5


@pytest.mark.slow
def test_simulated_quantizations_run_there(found: dict[str, Any]) -> None:
    assert found["simulated"]


@pytest.mark.slow
def test_greedy_tokens_from_the_command_line_alone_and_as_two_ranks(folder: Path) -> None:
    """The ranks exchange by way of the CPU, or directly, as GPUs do over nccl."""
    on_the_cpu = output_of("-m", "dsv4", "run", folder, *GREEDY)["answers"]
    there = (folder, *GREEDY, "--device", "npu")
    assert output_of(PROGRAM, "run", *there)["answers"] == on_the_cpu
    assert output_of(*TORCHRUN, PROGRAM, "run", *there)["answers"] == on_the_cpu
    assert output_of(*TORCHRUN, PROGRAM, "reached", *there)["answers"] == on_the_cpu
    assert len(on_the_cpu[0]["tokens"]) > 5
