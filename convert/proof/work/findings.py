"""What one process of a verification has found so far, and the findings of all processes."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv4.convert.proof.audit.odds import Audit
from dsv4.convert.proof.compare_tensor import Piece
from dsv4.convert.proof.plan import ComparedTensor
from dsv4.convert.proof.schedule import Share
from dsv4.convert.proof.tally import Statistics, Tally
from dsv4.errors import Interrupted
from dsv4.progress import Reached
from dsv4.text import counted, human_bytes


@dataclass
class Findings:
    """The findings of one process so far: bytes read and a tally per compared tensor. progress: in bytes."""

    progress: Reached
    compared: list[ComparedTensor] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    hashes: dict[str, str] = field(default_factory=dict)
    read: int = 0
    total: int = 0
    continued: int = 0  # bytes of `read` that an earlier run has read
    is_kept: bool = False  # whether the same command continues with what is left
    audit: Audit | None = None  # the drawn blocks, for a sample

    def advance(self, count: int = 0) -> None:
        """Count bytes that were read, and report how far the work is."""
        self.read += count
        self.progress(self.read, self.total)

    def add(self, piece: Piece, tally: Tally, read: int | None = None) -> None:
        """Count a finished piece. read: bytes that were not counted yet, if not all of the piece's."""
        self.statistics.take_histograms(self.compared[piece.tensor].name, tally)
        self.tallies[piece.tensor].add(tally)
        self.advance(piece.size if read is None else read)

    def add_all(self, tallies: Iterable[tuple[Piece, Tally]]) -> None:
        """Count the finished pieces of a file, whose bytes are counted by itself."""
        for piece, tally in tallies:
            self.add(piece, tally, read=0)

    def so_far(self, error: Interrupted) -> Interrupted:
        """The interruption, with a message about the share of the work that was done and the differences found."""
        differing = sum(bool(tally.different or tally.copies_differ) for tally in self.tallies)
        found = f"differences in {counted(differing, 'tensor')} so far" if differing else "no difference so far"
        percent = 100 * self.read // max(self.total, 1)
        when = f"after {percent}% of {human_bytes(self.total)}: {found}" if self.total else "before any tensor was read"
        again = "continues with what is left" if self.is_kept else "starts from the beginning"
        explained = Interrupted(f"interrupted {when}", f"Nothing was changed. The same command {again}.")
        explained.exit_code = error.exit_code
        return explained


def merged_findings(own: Findings, share: Share) -> Findings:
    """The findings of all processes, the same in each of them."""
    if share.count == 1:
        return own
    tallies = {number: tally for number, tally in enumerate(own.tallies) if tally != Tally()}
    merged = Findings(own.progress, own.compared, [Tally() for _ in own.tallies], audit=own.audit)
    each = share.gather((tallies, own.statistics, own.hashes, own.read, own.continued))
    for some, statistics, hashes, read, continued in each:
        for number, tally in some.items():
            merged.tallies[number].add(tally)
        merged.statistics.add_histograms(statistics)
        merged.hashes |= hashes
        merged.read += read
        merged.continued += continued
    return merged
