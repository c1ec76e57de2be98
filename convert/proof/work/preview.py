"""`verify --dry-run`: what the headers, configs and side files say already, and how much there is to read.

No weights are fetched. Where both sides are folders, blocks are compared for a second, to say how long all will take.
"""

import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from dsv4.convert.proof.audit.draw import draw
from dsv4.convert.proof.audit.sample import Sample
from dsv4.convert.proof.compare_tensor import Piece, PieceComparison, Reader
from dsv4.convert.proof.files import Files
from dsv4.convert.proof.manifest import listed_hashes
from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.schedule import UNSHARED, in_order, one_torch_thread
from dsv4.convert.proof.tally import Tally
from dsv4.errors import EXIT_DONE, EXIT_SAMPLE
from dsv4.progress import Reached, ignore

from .conclude import conclude
from .fetches import Fetch, fetches
from .findings import Findings
from .order import Run
from .prepare import Work, prepare
from .settings import Settings

MEASURED_SECONDS = 1.0
_LEAST = Sample(1e-9)  # one row of blocks of every tensor


@dataclass(frozen=True)
class Side:
    """A checkpoint: its name, shards, and bytes of their tensors."""

    label: str
    shards: int
    size: int


@dataclass(frozen=True)
class Preview:
    """The plan of a verification. known: the result if all that was not read were equal. seconds: None if unknown."""

    sides: dict[str, Side]
    tensors: int
    read_bytes: int
    continued_bytes: int  # of read_bytes: compared by an interrupted run
    fetches: list[Fetch]
    seconds: float | None
    known: Verification

    @property
    def exit_code(self) -> int:
        """0 if nothing is known that differs; 1 and 3 as for the comparison."""
        return EXIT_DONE if self.known.exit_code == EXIT_SAMPLE else self.known.exit_code

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.exit_code:
            return self.known.verdict
        listed = ", and the hub lists the hashes of dsv4.json" if self.known.hashed else ""
        return f"NOT COMPARED: headers, configs and side files show no difference{listed}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        known = self.known.to_json()
        kept = ("source", "output", "identity", "ignored", "selection", "problems", "audit")
        unequal = "-+!*"
        return {
            "dry_run": True,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "tensors": self.tensors,
            "read_bytes": self.read_bytes,
            "continued_bytes": self.continued_bytes,
            "fetch": [fetch.to_json() for fetch in self.fetches],
            "seconds": self.seconds,
            **{key: known[key] for key in kept if key in known},
            "counts": {status: known["counts"][status] for status in unequal},
            "differences": known["differences"],
        }


def _seconds(work: Work, size: int) -> float | None:
    """How long `size` bytes take, by comparing for a second; None if there is nothing to compare."""
    pieces, _ = draw(work.findings.compared, _LEAST)
    pieces.sort(key=lambda piece: piece.tensor * 7919 % len(work.findings.compared))  # from all over the files
    stopped, files = threading.Event(), work.files
    reader = Reader(files.get("source"), files["output"])

    def compare(piece: Piece) -> Tally:
        return PieceComparison(work.findings.compared[piece.tensor], piece, reader, work.band, False, stopped).run()

    done, started = 0, time.monotonic()
    run = Run((), (), (), tuple(pieces))
    with one_torch_thread(), closing(in_order([run], compare, work.workers, stopped, ignore, [])) as results:
        for piece, _ in results:
            done += piece.size
            if time.monotonic() - started > MEASURED_SECONDS:
                break
    return size * (time.monotonic() - started) / done if done else None


def _sides(work: Work) -> dict[str, Side]:
    return {
        side.where: Side(side.files.label, len(side.shards), sum(tensor.size for tensor in side.tensors.values()))
        for side in work.sides
    }


def preview_files(source: Files | None, output: Files, settings: Settings, headers: Reached = ignore) -> Preview:
    """The plan for `verify_files` with the same arguments. Raises what that raises before it reads weights."""
    work = prepare(source, output, settings, UNSHARED, headers, Findings(ignore))
    findings, journal = work.findings, work.journal()
    total = findings.total
    try:
        files, pieces = work.files_left(journal), work.left(journal)
    finally:
        if journal is not None:
            journal.close(finished=False)
    fetched = fetches(work, work.runs_of_files(files), work.runs(pieces), pieces) if work.is_remote else []
    left = total - findings.continued
    seconds = sum(fetch.seconds for fetch in fetched) if work.is_remote else _seconds(work, left)
    listed = {} if work.manifest is None else listed_hashes(work.output, work.manifest)
    findings.hashes |= listed
    known = conclude(work if listed else replace(work, manifest=None), findings, locate=False)
    compared = [one for one in findings.compared if one.size and one.kind in ("bytes", "values", "scan")]
    return Preview(_sides(work), len(compared), total, findings.continued, fetched, seconds, known)
