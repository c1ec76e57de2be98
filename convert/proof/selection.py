"""Which tensors of a comparison are looked at: all of them, or what `--tensor`, `--shard` and `--sample` leave."""

import fnmatch
import hashlib
from dataclasses import dataclass

from dsv4.errors import UsageError, printable

from .layout import Checkpoint
from .plan import Unit


@dataclass(frozen=True)
class Selection:
    """Which tensors to compare: a glob of names, one output shard (counted from 1), a share drawn by `seed`."""

    tensor: str | None = None
    shard: int | None = None
    sample: float | None = None
    seed: int = 0

    def describe(self) -> str:
        """What was left out, in words, for the verdict."""
        words = []
        if self.tensor:
            words.append(f"only tensors named '{printable(self.tensor)}'")
        if self.shard:
            words.append(f"only shard {self.shard}")
        if self.sample is not None:
            words.append(f"only a sample of {100 * self.sample:g}% of the tensors, seed {self.seed}")
        return ", ".join(words)

    def _drawn(self, name: str) -> bool:
        if self.sample is None:
            return True
        digest = hashlib.sha256(f"{self.seed}:{name}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.sample * 2**64

    def takes(self, unit: Unit, shard: str | None) -> bool:
        """Whether the unit is to be compared."""
        stored = {part.name for _, tensor in unit.tensors() for part in tensor.parts}  # `model.layers…` works too
        names = {unit.name, unit.scale_name, *stored}
        if self.tensor and not any(fnmatch.fnmatchcase(name, self.tensor) for name in names):
            return False
        if shard is not None and not any(side == "output" and shard in t.shards for side, t in unit.tensors()):
            return False
        return self._drawn(unit.name)


def select(units: list[Unit], selection: Selection, output: Checkpoint) -> tuple[list[Unit], list[str]]:
    shard = None
    if selection.shard is not None:
        if selection.shard > len(output.shards):
            raise UsageError(f"--shard {selection.shard}: the output has {len(output.shards)} shards")
        shard = output.shards[selection.shard - 1]
    taken = [unit for unit in units if selection.takes(unit, shard)]
    if not taken:
        raise UsageError("no tensor is selected", "Check --tensor, --shard and --sample.")
    kept = {unit.name for unit in taken}
    return taken, [unit.name for unit in units if unit.name not in kept]
