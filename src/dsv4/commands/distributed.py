"""The processes that `torchrun` started for one command: which of them this is, and how they exchange values.

They use torch.distributed, whose settings are torchrun's. Ranks exchange small objects at the few points that all must
have reached; only tensor parallelism exchanges more (model/parallel.py). A rank that fails exits with a message that
names it. torchrun then stops the others; ranks that were waiting report that another rank is gone.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from dsv4 import signals
from dsv4.errors import LostRank, UsageError, peer_failures
from dsv4.machine import usable_cores

# Objects and CPU tensors go through gloo, tensors on GPUs through nccl.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
Value = TypeVar("Value")
LONGEST_WAIT = timedelta(days=7)  # a rank may be done hours before the last one


@dataclass(frozen=True)
class Ranks:
    """This process is rank `index` of `count`, and number `local_index` of `local_count` on its machine."""

    index: int
    count: int
    local_index: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that publishes and prints."""
        return self.index == 0

    @property
    def workers(self) -> int:
        """Threads that this process may use: its share of the machine's cores."""
        return max(1, usable_cores() // self.local_count)

    def first(self, make: Callable[[], Value]) -> Value:
        """The value that the first rank makes, in all ranks; the others do not call `make`."""
        value: Value = self.gather(make() if self.is_first else None)[0]
        return value

    def gather(self, value: Any) -> list[Any]:
        """Wait for every rank; the values of all, in the order of ranks."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with peer_failures():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank. Needed at the end too: torchrun kills the others as soon as one exits with another code
        than 0.
        """
        self.gather(None)


def torchrun_rank(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """The rank that torchrun's environment names; None where no launcher started this process."""
    names, known = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR"), ("RANK", "WORLD_SIZE")
    if not any(name in environment for name in names) or not any(name in environment for name in known):
        return None
    try:
        index, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Ranks(
            index, count, int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
        )
    except (KeyError, ValueError):
        raise UsageError("the launcher's RANK and WORLD_SIZE are not numbers", "Start it with torchrun.") from None


@contextmanager
def process_group(ranks: Ranks, device: str = "cpu") -> Iterator[None]:
    """Join the group of all ranks for the length of a with block. Raises MachineError if that fails.

    device: the kind of device on which the tensors are that ranks exchange. The launcher sends a signal to all ranks;
    a rank that lost another to the signal, and received it too, was interrupted and did not fail.
    """
    import torch.distributed as dist

    signals.begin_work()
    signals.token.second_leaves = (
        False  # the launcher forwards the signal that the terminal sent too: two for one Ctrl-C
    )
    backend = BACKENDS.get(device, "gloo")
    with peer_failures():
        dist.init_process_group(backend, timeout=LONGEST_WAIT, rank=ranks.index, world_size=ranks.count)
    try:
        yield
    except LostRank:
        signals.token.check()
        raise
    finally:
        with suppress(RuntimeError):  # the error that ended the work is the one to report
            dist.destroy_process_group()
