"""Memory of the whole process, as the system counts it from outside: beside the weights, and against --max-memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint

# 180 MB of weights, nine tenths of them experts.
LARGE = Geometry(
    vocab_size=2048, hidden_size=1024, compress_ratios=(0, 4, 128, 0), n_routed_experts=24, num_experts_per_tok=4,
    moe_intermediate_size=1024, num_attention_heads=16, head_dim=256, q_lora_rank=512, o_lora_rank=512, index_topk=64,
)  # fmt: skip
# Its own memory is small: the most that a child used is what counts.
PEAK_OF_CHILD = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(done.returncode)
"""
ABOVE_THE_WEIGHTS = """
import sys
from dsv4.model import load

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

small, large = sys.argv[1:]
load(small)  # what torch and the interpreter take once
before = anonymous()
model = load(large)
print((anonymous() - before) / model.store.resident_bytes)
"""
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("large") / "c", geometry=LARGE, tokenizer=False)


def test_loading_takes_the_memory_of_the_weights(large: Path, tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "small", geometry=Geometry(), tokenizer=False)
    command = [sys.executable, "-c", ABOVE_THE_WEIGHTS, str(small), str(large)]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=True)
    assert 0.9 <= float(done.stdout) <= 1.05


def run_peak(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Most bytes that `dsv4 run` had, and what it printed."""
    command = [
        sys.executable,
        "-c",
        PEAK_OF_CHILD,
        sys.executable,
        "-m",
        "dsv4",
        "run",
        str(folder),
        "--json",
        *options,
    ]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
    return int(done.stderr.split()[-1]), dict(json.loads(done.stdout))


@pytest.mark.parametrize("more", [0, 60])
def test_max_memory_is_kept(large: Path, more: int) -> None:
    """From the least that the command asks for, up to room for half of the experts."""
    tokens = ("--tokens", ",".join(str(i * 37 % 2000) for i in range(200)), "--max-new-tokens", "8", "--seed", "0")
    refused = run_peak(large, *tokens, "--max-memory", "100MB")[1]
    assert refused["exit_code"] == 4 and "too little memory" in refused["error"]
    needed = re.search(r"Allow at least ([\d.]+) MB", refused["hint"])
    assert needed is not None
    limit = int(float(needed[1]) * 10**6) + more * 10**6
    peak, found = run_peak(large, *tokens, "--max-memory", str(limit))
    statistics = found["statistics"]["from_files"]
    assert peak <= limit and statistics["matrices_read"] > 0
    assert more == 0 or statistics["hit_rate"] > 0
    assert found["answers"] == run_peak(large, *tokens)[1]["answers"]
