"""`dsv4` command lines as several ranks: in forks of a warm process, or by torchrun itself."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """Exit codes and output of the ranks of one command."""

    codes: list[int]
    out: list[str]
    err: list[str]


@functools.cache
def _runner() -> subprocess.Popen[str]:
    """See warm_ranks.py. It ends with this process, which holds its stdin."""
    script = Path(__file__).with_name("warm_ranks.py")
    return subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


Kill = tuple[str, str, int]  # module, function, number of the call


def run_ranks(
    count: int,
    folder: Path,
    *arguments: object,
    kill: dict[int, Kill] | None = None,
    environment: dict[str, str] | None = None,
    weights_bytes: int | None = None,
) -> Ended:
    """The command as `count` ranks, started in `folder`, some of them killed; by default in this environment.

    weights_bytes: of `dsv4 run`, how many bytes of weights stay in memory.
    """
    runner = _runner()
    job = {
        "arguments": [str(a) for a in arguments], "ranks": count, "folder": str(folder), "kill": kill or {},
        "environment": dict(os.environ) if environment is None else environment, "weights_bytes": weights_bytes,
    }  # fmt: skip
    assert runner.stdin is not None and runner.stdout is not None
    print(json.dumps(job), file=runner.stdin, flush=True)
    codes = json.loads(runner.stdout.readline())
    out, err = ([(folder / f"{name}.{i}").read_text() for i in range(count)] for name in ("stdout", "stderr"))
    return Ended(codes, out, err)


def torchrun(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command under PyTorch's own launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dsv4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment)
