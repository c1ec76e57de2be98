"""Records the output of every module by position: as lines of a file, or as fingerprints for a comparison.

The engine reports flat outputs, [T, ...] for the T tokens of a call. Here each report gets the position of its first
token, so that two runs that split the same tokens differently can be compared.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch

_LAYER = re.compile(r"layers\.\d+")

PositionedTrace = Callable[[str, int, torch.Tensor], None]
"""Called with (module, position of the first row, output [T, ...])."""


def positioned(trace: PositionedTrace | None, end: int) -> Callable[[str, torch.Tensor], None] | None:
    """The callback for one call of the engine on one sequence whose last token is at position `end` - 1."""
    if trace is None:
        return None

    def report(name: str, output: torch.Tensor) -> None:
        trace(name, end - len(output), output)

    return report


def counting(on_progress: Callable[[float], None] | None, layers: int) -> Callable[[str, torch.Tensor], None] | None:
    """A callback for the engine that reports progress in tokens, a share of each after every layer of the stack."""
    if on_progress is None:
        return None

    def report(name: str, output: torch.Tensor) -> None:
        if _LAYER.fullmatch(name):
            on_progress(len(output) / layers)

    return report


def together(*reports: Callable[[str, torch.Tensor], None] | None) -> Callable[[str, torch.Tensor], None] | None:
    """One callback that calls all the given ones; None if there are none."""
    given = [report for report in reports if report is not None]
    if len(given) < 2:
        return given[0] if given else None

    def report(name: str, output: torch.Tensor) -> None:
        for each in given:
            each(name, output)

    return report


def _row_digests(output: torch.Tensor) -> list[bytes]:
    rows = output.detach().cpu().contiguous().flatten(1) if output.dim() > 1 else output.detach().cpu()[:, None]
    raw = rows.contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in raw]


class Fingerprints:
    """A trace that keeps 8 bytes per module and position: enough to say where two runs differ, for any model size.

    With the fingerprints of an `earlier` run, `on_difference` is called once, as soon as a module's report differs,
    with the module and the position. In a run with single steps, a module earlier in the model may still differ at a
    later position: `first_difference` considers all of them.
    """

    def __init__(
        self, earlier: "Fingerprints | None" = None, on_difference: Callable[[str, int], None] | None = None
    ) -> None:
        self.digests: dict[str, dict[int, bytes]] = {}
        self._earlier, self._on_difference = earlier, on_difference

    def __call__(self, name: str, position: int, output: torch.Tensor) -> None:
        """Keep the digests of one report, and compare them with the earlier run's."""
        rows = self.digests.setdefault(name, {})
        rows.update(enumerate(_row_digests(output), start=position))
        if self._earlier is None or self._on_difference is None:
            return
        differs = self.first_position(self._earlier, name, range(position, position + len(output)))
        if differs is not None:
            self._on_difference(name, differs)
            self._earlier = None

    def first_position(self, other: "Fingerprints", name: str, positions: Iterable[int]) -> int | None:
        """The first of the positions at which the output of a module differs."""
        rows, others = self.digests.get(name, {}), other.digests.get(name, {})
        return next((p for p in positions if rows.get(p) != others.get(p)), None)

    def first_difference(self, other: "Fingerprints") -> tuple[str, int] | None:
        """The first module, in the order of computation, whose output differs, and the first such position."""
        for name, rows in self.digests.items():
            position = self.first_position(other, name, rows)
            if position is not None:
                return name, position
        extra = [name for name in other.digests if name not in self.digests]
        return (extra[0], min(other.digests[extra[0]])) if extra else None


def _statistics(output: torch.Tensor) -> dict[str, float]:
    wide = output.detach().cpu().to(torch.float64)
    return {
        "mean": float(wide.mean()),
        "root_mean_square": float((wide * wide).mean().sqrt()),
        "min": float(wide.min()),
        "max": float(wide.max()),
    }


class TraceWriter:
    """A trace as JSON lines: module, positions and the output's statistics, or the experts chosen.

    `sha256` is over the output's bytes, so equal lines mean equal bits.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.prompt = 0

    def __call__(self, name: str, position: int, output: torch.Tensor) -> None:
        """Write one report."""
        line: dict[str, Any] = {"prompt": self.prompt, "module": name, "positions": [position, position + len(output)]}
        if output.is_floating_point():
            raw = output.detach().cpu().contiguous().view(torch.uint8).numpy()
            line |= {"shape": list(output.shape), "dtype": str(output.dtype).removeprefix("torch.")}
            line |= _statistics(output) | {"sha256": hashlib.sha256(raw.tobytes()).hexdigest()}
        else:
            line["experts"] = output.tolist()
        self._file.write(json.dumps(line).encode() + b"\n")
