"""The work of one run: the whole conversion, one part of its shards, or publishing what all parts have written.

Several processes or machines can share a conversion. Each makes the same plan from the same headers, so they exchange
no messages: shards are assigned by size, the largest first, each to the part with the fewest bytes so far. All parts
write into one folder, each with its own lock and journal. A later run, with any number of parts, reuses the shards that
the journals list. One process publishes (manifest, index, config) after it has read all shards again: `--finish` after
`--part`, or the first rank of a torchrun.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsv4.errors import UsageError

if TYPE_CHECKING:  # they import NumPy, which a mistyped option need not wait for
    from .plan import Plan
    from .shards import OutputShard


@dataclass(frozen=True)
class All:
    """Write every shard and publish. overwrite: remove a former conversion first."""

    overwrite: bool = False


@dataclass(frozen=True)
class Part:
    """Write the shards of part `index` (from 0) of `count`."""

    index: int
    count: int

    @property
    def tag(self) -> str:
        """For names of files: `2-of-8`, counted from 1."""
        return f"{self.index + 1}-of-{self.count}"


@dataclass(frozen=True)
class Publish:
    """Write no shard, check all that parts wrote, and publish.

    confirmed: shards that need not be read again, because another process has just done so.
    """

    confirmed: frozenset[str] = frozenset()


Work = All | Part | Publish


def parse_part(text: str) -> Part:
    """`2/8` -> the second of eight. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(int(match[1]) - 1, int(match[2])) if match else None
    if part is None or not 0 <= part.index < part.count:
        raise UsageError(f"--part {text}: not a part", "Write i/n, from 1/n to n/n, such as --part 2/8.")
    return part


def parse_work(part: str | None, finish: bool, overwrite: bool) -> Work:
    """The work that `--part`, `--finish` and `--overwrite` ask for. Raises UsageError for two ways to share it."""
    if part is not None and finish:
        raise UsageError("--part, --finish and torchrun are three ways to share the work", "Use one of them.")
    if overwrite and (part is not None or finish):
        raise UsageError("--overwrite does not go with parts", "Remove the former output first.")
    if part is not None:
        return parse_part(part)
    return Publish() if finish else All(overwrite)


def assign_shards(plan: "Plan", count: int) -> "list[list[OutputShard]]":
    """The shards of each part, in the plan's order: balanced by size, and equal in every process."""
    owners: dict[str, int] = {}
    filled = [0] * count
    for shard in sorted(plan.shards, key=lambda s: (-s.size, s.file)):
        owner = min(range(count), key=lambda i: (filled[i], i))
        owners[shard.file] = owner
        filled[owner] += shard.size
    return [[shard for shard in plan.shards if owners[shard.file] == i] for i in range(count)]


def shards_of(plan: "Plan", work: Work) -> "Sequence[OutputShard]":
    """The shards that a run must write or find written."""
    return assign_shards(plan, work.count)[work.index] if isinstance(work, Part) else plan.shards


def share_of(plan: "Plan", work: Work) -> "Plan":
    """The plan of a part alone: its shards, and the bytes of the source that they read. Of other work, all of it."""
    if not isinstance(work, Part):
        return plan
    shards = tuple(shards_of(plan, work))
    read = {info.name: info.nbytes for shard in shards for tensor in shard.tensors for info in tensor.reads}
    return replace(plan, shards=shards, source_bytes=sum(read.values()))
