"""What `verify` found, as data: one status per tensor, counts, problems, statistics, a verdict.

`=` same bytes, `≈` other bytes but every element of equal value, `*` differs, `-` missing, `+` extra, `!` unreadable.
`Verification.to_json()` is what `--json` prints, and all that the report page is made from.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dsv4.errors import EXIT_DIFFERENCE, EXIT_DONE, EXIT_INPUT

from .files import Problem
from .plan import Unit, coarse_block
from .tally import E4M3_SPAN, Tally

STATUSES = {
    "=": "same bytes",
    "≈": "other bytes, equal values",
    "*": "differs",
    "-": "missing",
    "+": "extra",
    "!": "unreadable",
}
_SEVERITY = ".=≈+-*!"  # from not checked to unreadable: a cell of the proof grid shows the worst
BLOCKS_LISTED = 4096  # differing blocks listed per tensor; an expert of the largest release has 1,344
_EXPERT = re.compile(r"((?:layers|mtp)\.\d+)\.ffn\.experts\.(\d+)\..*")
_MODULE = re.compile(r"((?:layers|mtp)\.\d+)\..*")


@dataclass
class TensorResult:
    """One tensor (or scale) of the union of both checkpoints."""

    name: str
    status: str
    reason: str = ""
    unit: Unit | None = None
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        """Only what there is to say: fields of no interest are left out."""
        found: dict[str, Any] = {"name": self.name, "status": self.status}
        if self.reason:
            found["reason"] = self.reason
        if self.unit is not None:
            found |= _stored(self.unit) | _counts(self.unit, self.tally)
        return found


def _stored(unit: Unit) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, tensor, weight in (
        ("source", unit.source, unit.source_weight),
        ("output", unit.output, unit.output_weight),
    ):
        if tensor is not None:
            found[side] = weight.described if weight else tensor.dtype
            found["shape"] = [weight.rows, weight.columns] if weight else list(tensor.shape)
            found[f"{side}_shards"] = sorted(tensor.shards)
    return found


def _counts(unit: Unit, tally: Tally) -> dict[str, Any]:
    found: dict[str, Any] = {"elements": tally.elements}
    if tally.different:
        found["different_elements"] = tally.different
        found["first_differences"] = tally.first
    block = coarse_block(unit)
    if tally.blocks and block:
        found["block"] = list(block)
        found["different_blocks"] = len(tally.blocks)
        found["blocks"] = [[r, c, n] for (r, c), n in sorted(tally.blocks.items())[:BLOCKS_LISTED]]
    for key, count in (
        ("negative_zeros_became_positive", tally.lost_sign),
        ("positive_zeros_became_negative", tally.gained_sign),
    ):
        if count:
            found[key] = count
    for key, counter in (("not_a_number_codes", tally.special), ("bad_scales", tally.bad_scales)):
        if positive := {side: count for side, count in counter.items() if count}:
            found[key] = positive
    if tally.spans:
        found["spans"] = {str(span): count for span, count in sorted(tally.spans.items())}
        found["headroom"] = E4M3_SPAN - max(tally.spans)
        found["other_scale_blocks"] = tally.other_scale
    if tally.rebuilt:
        found["rebuilt"] = dict(tally.rebuilt)
    return found


def _problems(count: int) -> str:
    return f"{count} problem" + ("s" if count != 1 else "")


def module_of(name: str) -> str:
    """`layers.3.attn.wq_a.weight` -> `layers.3`; what belongs to no layer -> `top`."""
    match = _MODULE.fullmatch(name)
    return match[1] if match else "top"


def module_order(module: str) -> tuple[int, int]:
    """Top first, then layers, then mtp stages, by number."""
    kind, _, number = module.partition(".")
    return {"top": 0, "layers": 1}.get(kind, 2), int(number or 0)


@dataclass
class Statistics:
    """Sums over all tensors, for the report: spans, codes, scales per module, bytes per dtype."""

    spans: Counter[int] = field(default_factory=Counter)
    other_scale: int = 0
    codes: dict[tuple[str, str], Any] = field(default_factory=dict)
    scales: dict[tuple[str, str], Any] = field(default_factory=dict)  # (side, module) -> uses of each exponent
    sizes: dict[str, Counter[str]] = field(default_factory=lambda: {"source": Counter(), "output": Counter()})
    rebuilt: Counter[str] = field(default_factory=Counter)

    def take_histograms(self, name: str, tally: Tally) -> None:
        """Add the tally's histograms to those of its module, out of the tally: one per tensor would fill memory."""
        for key, uses in tally.codes.items():
            self.codes[key] = self.codes[key] + uses if key in self.codes else uses
        for side, uses in tally.scale_codes.items():
            at = side, module_of(name)
            self.scales[at] = self.scales[at] + uses if at in self.scales else uses
        tally.codes, tally.scale_codes = {}, {}

    def take_codes(self, other: "Statistics") -> None:
        """Add the histograms that another process took."""
        for mine, theirs in ((self.codes, other.codes), (self.scales, other.scales)):
            for key, uses in theirs.items():
                mine[key] = mine[key] + uses if key in mine else uses

    def add(self, unit: Unit, tally: Tally) -> None:
        """Count one whole tensor in."""
        self.spans.update(tally.spans)
        self.other_scale += tally.other_scale
        self.rebuilt.update(tally.rebuilt)
        for side, tensor in unit.tensors():
            self.sizes[side][tensor.dtype] += tensor.size * (1 + len(tensor.copies))

    def to_json(self) -> dict[str, Any]:
        """Histograms with empty bins left out where that is shorter."""
        scales: dict[str, dict[str, dict[str, int]]] = {}
        for side, module in sorted(self.scales, key=lambda key: (key[0] != "source", module_order(key[1]))):
            uses = {
                str(exponent - 127): int(count) for exponent, count in enumerate(self.scales[side, module]) if count
            }
            scales.setdefault(side, {})[module] = uses
        found: dict[str, Any] = {
            "bytes_by_dtype": {side: dict(sorted(sizes.items())) for side, sizes in self.sizes.items()},
            "scale_exponents": scales,
            "code_use": {f"{side} {kind}": [int(n) for n in uses] for (side, kind), uses in sorted(self.codes.items())},
        }
        if self.spans:
            found["fp8_blocks"] = {
                "count": sum(self.spans.values()),
                "span_limit": E4M3_SPAN,
                "spans": {str(span): count for span, count in sorted(self.spans.items())},
                "smallest_headroom": E4M3_SPAN - max(self.spans),
                "beyond_span_limit": sum(count for span, count in self.spans.items() if span > E4M3_SPAN),
                "other_scale_than_reference": self.other_scale,
            }
        return found


@dataclass
class Verification:
    """The result of a run. `exit_code` is what the command ends with; `verdict` is its sentence."""

    source: str | None
    output: str
    results: list[TensorResult]
    problems: list[Problem]
    statistics: Statistics
    strict: bool = False
    inverse: bool = False
    hashed: bool = False  # a manifest's hashes were compared
    selection: str = ""  # "" or what was left out
    unchecked: list[str] = field(default_factory=list)  # names that the selection left out
    read_bytes: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Tensors per status, every status present."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    @property
    def lost_signs(self) -> int:
        """Negative zeros that became positive."""
        return sum(result.tally.lost_sign for result in self.results)

    @property
    def gained_signs(self) -> int:
        """Positive zeros that became negative."""
        return sum(result.tally.gained_sign for result in self.results)

    @property
    def _values_differ(self) -> bool:
        counts = self.counts
        return any(counts[status] for status in "*-+")

    def _unbuildable(self, kind: str) -> list[str]:
        return [result.name for result in self.results if result.tally.rebuilt[kind]]

    @property
    def exit_code(self) -> int:
        """0 identical, 1 a difference, 3 something could not be read."""
        severities = {problem.severity for problem in self.problems}
        if self.counts["!"] or "unreadable" in severities:
            return EXIT_INPUT
        signs = self.strict and (self.lost_signs or self.gained_signs)
        inverse = self.inverse and bool(self._unbuildable("wrong"))
        if self._values_differ or "difference" in severities or signs or inverse:
            return EXIT_DIFFERENCE
        return EXIT_DONE

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts, code = self.counts, self.exit_code
        part = f" ({self.selection})" if self.selection else ""
        if code == EXIT_INPUT:
            sure = "; what could be read differs" if self._values_differ else ""
            return f"NOT READABLE: not everything could be read{sure}{part}"
        wrong = [problem for problem in self.problems if problem.severity == "difference"]
        if self.source is None:
            checked = (
                "structure, config, codes and hashes agree" if self.hashed else "structure, config and codes agree"
            )
            return f"NOT SOUND{part}: {_problems(len(wrong))}" if code else f"SOUND{part}: {checked}"
        if code == EXIT_DONE:
            return (
                f"IDENTICAL{part}: {counts['=']} tensors have the same bytes, {counts['≈']} other bytes of equal value"
            )
        if self._values_differ:
            return f"DIFFERENT{part}: {counts['*']} tensors differ, {counts['-']} are missing, {counts['+']} are extra"
        if wrong:
            return f"DIFFERENT{part}: all values are equal, but beside the values: {_problems(len(wrong))}"
        return f"DIFFERENT{part}: all values are equal, but zeros changed sign (--strict)"

    @property
    def what_was_read(self) -> str:
        """What `read_bytes` counts; headers and small files to compare come on top."""
        if self.source is not None:
            return "tensors"
        return "quantized tensors and hashed files" if self.hashed else "quantized tensors"

    def _others(self) -> dict[str, str]:
        """Per module the worst status of everything but its routed experts."""
        found: dict[str, str] = {}
        pairs = [(result.name, result.status) for result in self.results] + [(name, ".") for name in self.unchecked]
        for name, status in pairs:
            if not _EXPERT.fullmatch(name):
                module = module_of(name)
                found[module] = max(found.get(module, "."), status, key=_SEVERITY.index)
        return {module: found[module] for module in sorted(found, key=module_order)}

    def _grid(self) -> dict[str, str]:
        """Per module one character per routed expert: the worst status of its tensors; `.` was not checked."""
        cells: dict[str, dict[int, str]] = {}
        pairs = [(result.name, result.status) for result in self.results] + [(name, ".") for name in self.unchecked]
        for name, status in pairs:
            if match := _EXPERT.fullmatch(name):
                row = cells.setdefault(match[1], {})
                row[int(match[2])] = max(row.get(int(match[2]), "."), status, key=_SEVERITY.index)
        return {
            module: "".join(cells[module].get(expert, ".") for expert in range(max(cells[module]) + 1))
            for module in sorted(cells, key=module_order)
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        found: dict[str, Any] = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "source": self.source,
            "output": self.output,
            "selection": self.selection,
            "strict": self.strict,
            "counts": self.counts,
            "statuses": STATUSES,
            "negative_zeros_became_positive": self.lost_signs,
            "positive_zeros_became_negative": self.gained_signs,
            "problems": [problem.to_json() for problem in self.problems],
            "differences": [result.to_json() for result in self.results if result.status not in "=≈"],
            "experts": self._grid(),
            "others": self._others(),
            "statistics": self.statistics.to_json(),
            "read_bytes": self.read_bytes,
            "seconds": round(self.seconds, 3),
        }
        if self.inverse:
            found["inverse"] = {
                **{key: self.statistics.rebuilt[key] for key in ("codes", "sign", "wrong")},
                "sign_of_zero_lost_in": self._unbuildable("sign"),
                "not_rebuilt": self._unbuildable("wrong"),
            }
        found["tensors"] = {result.name: _short(result) for result in self.results}
        return found


def _short(result: TensorResult) -> dict[str, Any]:
    """The per-tensor line of `tensors`: details are in `differences` only."""
    details = {"first_differences", "blocks", "name", "shape", "source_shards", "output_shards"}
    return {key: value for key, value in result.to_json().items() if key not in details}
