"""`dsv4 run --dry-run`: what a run reads of a checkpoint, and what it fetches, from headers alone.

The dense weights are certain. Of the experts at least those of one token are read, at most all that so many tokens
can choose.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.commands.run.source import Source
from dsv4.errors import EXIT_DONE, EXIT_MACHINE
from dsv4.machine import free_bytes
from dsv4.output import Output
from dsv4.text import human_bytes

if TYPE_CHECKING:
    from dsv4.convert.hub.parts.storage import PartStorage


@dataclass(frozen=True)
class Costs:
    """Bytes of one checkpoint. least, most: of experts. missing: not on disk yet. folder: None for a local folder.

    tokens: at most, of prompts and answers; None for a chat, which has no end.
    """

    label: str
    tokens: int | None
    dense: int
    experts: int
    least: int
    most: int
    rows: int
    dense_missing: int = 0
    experts_missing: int = 0
    folder: Path | None = None

    @property
    def fetch_least(self) -> int:
        """Bytes that are fetched at least."""
        return self.dense_missing + max(0, self.least - (self.experts - self.experts_missing))

    @property
    def fetch_most(self) -> int:
        """Bytes that are fetched at most."""
        if self.folder is None:
            return 0
        return self.dense_missing + min(self.most, self.experts_missing) + self.rows

    @property
    def free(self) -> int | None:
        """Free bytes of the disk that the fetched bytes go to."""
        return None if self.folder is None else free_bytes(self.folder)

    @property
    def fits(self) -> bool:
        """Whether that disk has room for what is fetched at least."""
        return self.free is None or self.fetch_least < self.free

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "checkpoint": self.label,
            "tokens_most": self.tokens,
            "dense_bytes": self.dense,
            "expert_bytes": self.experts,
            "expert_bytes_least": self.least,
            "expert_bytes_most": self.most,
            "row_bytes_most": self.rows,
            "dense_bytes_to_fetch": self.dense_missing,
            "fetch_bytes_least": self.fetch_least,
            "fetch_bytes_most": self.fetch_most,
            "folder": None if self.folder is None else str(self.folder),
            "free_bytes": self.free,
        }


def costs_of(source: Source, tokens: int | None, draft: bool) -> Costs:
    """What running so many tokens costs; `draft`: with the draft stages. Raises InputError for a faulty checkpoint."""
    from dsv4.model.loading import check_loadable
    from dsv4.model.reading.needed import bytes_of, needed_of

    checkpoint = source.checkpoint
    needed = needed_of(check_loadable(checkpoint, draft=draft).weights, source.config)
    rows = needed.row_bytes * (source.config.max_position_embeddings if tokens is None else tokens)
    dense, experts = bytes_of(needed.always), bytes_of(needed.experts)
    sizes = dense, experts, needed.experts_least(), needed.experts_most(tokens)
    storage: PartStorage | None = source.hub
    if storage is None:
        return Costs(checkpoint.storage.label, tokens, *sizes, rows)
    missing = [storage.missing_bytes(checkpoint.extents(spans)) for spans in (needed.always, needed.experts)]
    return Costs(storage.label, tokens, *sizes, rows, missing[0], missing[1], storage.folder)


def _lines(costs: Costs) -> list[str]:
    tokens = "any number of tokens" if costs.tokens is None else f"{costs.tokens} tokens"
    least, most, experts = map(human_bytes, (costs.least, costs.most, costs.experts))
    lines = [
        costs.label,
        f"  dense weights  {human_bytes(costs.dense)}",
        f"  experts        {least} (one token) to {most} ({tokens} at most) of {experts}",
    ]
    if costs.folder is None or costs.free is None:
        return [*lines, "  to fetch       nothing: it is on disk"]
    there = costs.dense - costs.dense_missing + costs.experts - costs.experts_missing
    return [
        *lines,
        f"  to fetch       {human_bytes(costs.fetch_least)} to {human_bytes(costs.fetch_most)}; "
        f"{human_bytes(there)} are on disk",
        f"  disk           {human_bytes(costs.free)} free for {costs.folder}",
    ]


def print_costs(found: list[Costs], out: Output) -> int:
    """Print the costs of the checkpoints of one run; the exit code: 4 if they do not fit on the disk."""
    for costs in found:
        out.lines(_lines(costs))
        if not costs.fits:
            out.warn(f"{costs.folder}: the disk is too small for {human_bytes(costs.fetch_least)}")
    out.result({"dry_run": True, "checkpoints": [costs.to_json() for costs in found]})
    return EXIT_DONE if all(costs.fits for costs in found) else EXIT_MACHINE
