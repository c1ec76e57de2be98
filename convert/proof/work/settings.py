"""What to compare, and how: the options of `dsv4 verify` that decide the work."""

from dataclasses import dataclass, field
from pathlib import Path

from dsv4.convert.proof.audit.sample import Sample
from dsv4.convert.proof.plan import Selection
from dsv4.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare and how: see `run.verify`. journals: folder for what an interrupted run has compared, if any."""

    selection: Selection = field(default_factory=Selection)
    sample: Sample | None = None
    strict: bool = False
    inverse: bool = False
    max_workers: int | None = None
    max_memory: int | None = None
    journals: Path | None = None

    def check(self, alone: bool) -> None:
        """Raises UsageError for settings that contradict each other. alone: there is one checkpoint only."""
        if self.inverse and alone:
            raise UsageError("--inverse needs the source too", "Give SOURCE and OUTPUT.")
        if self.inverse and self.sample is not None:
            raise UsageError("--inverse rebuilds every code, --sample compares some", "Leave out one of them.")
