"""One conversion shared by several processes or machines: who writes which output shard.

Every process makes the same plan from the same headers, so nothing needs to be sent: shards are dealt out by size,
the largest first, each to the part that has least so far. The parts write into one folder, each under a lock and a
journal of its own, and any later run, with another number of parts or with one, takes over what all journals say.
Publishing (manifest, index, config) is one process's job, after everything has been read again: by itself after
`--part`, by all ranks of a torchrun.
"""

import re
from dataclasses import dataclass

from dsv4.errors import UsageError, printable

from .plan import OutputShard, Plan


@dataclass(frozen=True)
class Part:
    """Part `index` (from 0) of `count`."""

    index: int
    count: int

    @property
    def tag(self) -> str:
        """For names of files: `2-of-8`, counted from 1."""
        return f"{self.index + 1}-of-{self.count}"


def parse_part(text: str) -> Part:
    """`2/8` -> the second of eight. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(int(match[1]) - 1, int(match[2])) if match else None
    if part is None or not 0 <= part.index < part.count:
        raise UsageError(f"--part {printable(text)}: not a part", "Write i/n, from 1/n to n/n, such as --part 2/8.")
    return part


def deal(plan: Plan, count: int) -> list[list[OutputShard]]:
    """The shards of each part, in the plan's order: balanced by size, the same whoever computes it."""
    owners: dict[str, int] = {}
    filled = [0] * count
    for shard in sorted(plan.shards, key=lambda s: (-s.size, s.file)):
        owner = min(range(count), key=lambda i: (filled[i], i))
        owners[shard.file] = owner
        filled[owner] += shard.size
    return [[shard for shard in plan.shards if owners[shard.file] == i] for i in range(count)]
