"""The processes that `torchrun` started for one command: who am I, and meet the others.

Plain gloo over PyTorch's own launcher, nothing of ours to configure. Ranks exchange only small objects at the few
points where all must have arrived; the work itself needs no messages. A rank that fails exits with its message, which
names it; torchrun stops the others, and those that were waiting for it say that they did not fail by themselves.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from dsv4 import signals
from dsv4.errors import LostRank, UsageError, lost_rank
from dsv4.machine import usable_cores

# Objects and CPU tensors go through gloo, tensors on GPUs through nccl.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
Value = TypeVar("Value")
LONGEST_WAIT = timedelta(days=7)  # a rank may be done hours before the last one


@contextmanager
def explained() -> Iterator[None]:
    """Messages between ranks that fail become LostRank: another rank is gone, or cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise lost_rank(error) from None


@dataclass(frozen=True)
class Ranks:
    """This process is rank `index` of `count`, and number `local_index` of `local_count` on its machine."""

    index: int
    count: int
    local_index: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that publishes and speaks."""
        return self.index == 0

    @property
    def workers(self) -> int:
        """Threads that this process may use: its share of the machine's cores."""
        return max(1, usable_cores() // self.local_count)

    def first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, for all: the others do not call `make`."""
        value: Value = self.gather(make() if self.is_first else None)[0]
        return value

    def gather(self, value: Any) -> list[Any]:
        """Wait for every rank, and get what each has brought, in the order of ranks."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with explained():
            dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Wait until all are done, at the very end: the first to end with another code than 0 stops the others."""
        self.gather(None)


def launched(environment: Mapping[str, str] = os.environ) -> Ranks | None:
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
def joined(ranks: Ranks, device: str = "cpu") -> Iterator[None]:
    """Take part in the group of all ranks for the length of a with block. Raises MachineError if they do not meet.

    device: the kind of device on which the tensors are that ranks exchange. The launcher sends a signal to all ranks;
    one that has lost another rank to a signal, and has it too, was interrupted and did not fail.
    """
    import torch.distributed as dist

    signals.begin_work()
    signals.token.second_leaves = False  # the launcher passes on what the terminal sent already: two for one Ctrl-C
    backend = BACKENDS.get(device, "gloo")
    with explained():
        dist.init_process_group(backend, timeout=LONGEST_WAIT, rank=ranks.index, world_size=ranks.count)
    try:
        yield
    except LostRank:
        signals.token.check()
        raise
    finally:
        with suppress(RuntimeError):  # the error that ended the work is the one to report
            dist.destroy_process_group()
