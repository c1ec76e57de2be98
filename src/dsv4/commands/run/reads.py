"""Weights that were read from files or fetched from a hub during a run, for `run -v` and `--json`."""

from typing import TYPE_CHECKING, Any

from dsv4.output import Output
from dsv4.text import human_bytes

from .hub.fetches import fetched_json, say_fetched

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer


def _from_files(model: "Transformer") -> dict[str, Any] | None:
    """Reads since loading; None if every weight that was used stays in memory."""
    found = model.store.statistics
    if not found.used:
        return None
    return {
        "matrices_used": found.used,
        "matrices_read": found.read,
        "matrices_unneeded": found.unneeded,
        "hit_rate": found.hit_rate,
        "bytes_read": found.bytes_read,
        "bytes_per_second": found.bytes_per_second,
    }


def reads_json(model: "Transformer") -> dict[str, Any]:
    """What was read from files since loading, and what was fetched; None for what was not."""
    return {"from_files": _from_files(model), "from_hub": fetched_json(model)}


def say_reads(model: "Transformer", out: Output) -> None:
    """The same as lines; what was read from files with `-v` only."""
    say_fetched(model, out)
    found = model.store.statistics
    if found.hit_rate is not None:
        line = f"weights from the files: {found.used} matrices used, {100 * found.hit_rate:.0f}% of them in memory"
        rate = f" at {human_bytes(found.bytes_per_second)}/s" if found.bytes_per_second else ""
        out.detail(f"{line}; {human_bytes(found.bytes_read)} read{rate}")
