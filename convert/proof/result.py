"""The result of `verify`, as data: a status per tensor, counts, problems, statistics, a verdict.

`=` same bytes, `≈` other bytes but every element of equal value, `*` differs, `-` missing, `+` extra, `!` unreadable.
`--json` prints `Verification.to_json()`, and the report page is made from it alone.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv4.convert.proof.audit.odds import Audit
from dsv4.errors import EXIT_DIFFERENCE, EXIT_DONE, EXIT_INPUT, EXIT_SAMPLE
from dsv4.text import counted

from .files import Problem
from .plan import ComparedTensor, coarse_block
from .tally import E4M3_SPAN, Statistics, Tally, module_of, module_order

STATUSES = {
    "=": "same bytes",
    "≈": "other bytes, equal values",
    "*": "differs",
    "-": "missing",
    "+": "extra",
    "!": "unreadable",
}
OF_A_SAMPLE = {"=": "same bytes in the sample", "≈": "other bytes, equal values in the sample"}
_STATUS_OF_KIND = {"missing": "-", "extra": "+", "unreadable": "!", "different": "*", "scan": "="}
_SEVERITY = ".=≈+-*!"  # from not checked to unreadable: a cell of the proof grid shows the worst
BLOCKS_LISTED = 4096  # differing blocks listed per tensor; an expert of the largest release has 1,344
_NUMBER = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"((?:layers|mtp)\.\d+)\.ffn\.experts\.(\d+)\..*")


@dataclass
class TensorResult:
    """One tensor or scale that either checkpoint holds."""

    name: str
    status: str
    reason: str = ""
    compared: ComparedTensor | None = None  # None for a scale: the counts are its weight's
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        """As plain data, without counts that are zero."""
        found: dict[str, Any] = {"name": self.name, "status": self.status}
        if self.reason:
            found["reason"] = self.reason
        if self.compared is not None:
            found |= _stored(self.compared) | _counts(self.compared, self.tally)
        return found


def _stored(compared: ComparedTensor) -> dict[str, Any]:
    """Format, shape and shards of a tensor on each side."""
    found: dict[str, Any] = {}
    for side, tensor, weight in (
        ("source", compared.source, compared.source_weight),
        ("output", compared.output, compared.output_weight),
    ):
        if tensor is not None:
            found[side] = weight.described if weight else tensor.dtype
            found["shape"] = [weight.rows, weight.columns] if weight else list(tensor.shape)
            found[f"{side}_shards"] = sorted(tensor.shards)
    return found


def _counts(compared: ComparedTensor, tally: Tally) -> dict[str, Any]:
    found: dict[str, Any] = {"elements": tally.elements}
    if tally.different:
        found["different_elements"] = tally.different
        found["first_differences"] = tally.first
        if compared.kind == "values":
            found["largest_error"] = tally.largest_error
            found["mean_error"] = _mean_error([tally])
    block = coarse_block(compared)
    if tally.blocks and block:
        found["block"] = list(block)
        found["different_blocks"] = len(tally.blocks)
        found["blocks"] = [[r, c, n] for (r, c), n in sorted(tally.blocks.items())[:BLOCKS_LISTED]]
    found |= _counts_of_codes(tally)
    if tally.spans:
        found["spans"] = {str(span): count for span, count in sorted(tally.spans.items())}
        found["headroom"] = E4M3_SPAN - max(tally.spans)
        found["other_scale_blocks"] = tally.other_scale
    if tally.rebuilt:
        found["rebuilt"] = dict(tally.rebuilt)
    return found


def _mean_error(tallies: list[Tally]) -> float:
    """Over all elements, to six digits: the order in which threads finish shows in later ones."""
    mean = sum(tally.error_sum for tally in tallies) / max(sum(tally.elements for tally in tallies), 1)
    return float(f"{mean:.6g}")


def _counts_of_codes(tally: Tally) -> dict[str, Any]:
    """Zeros that changed sign, and codes and scales that are not numbers; counts of zero are left out."""
    signs = {
        "negative_zeros_became_positive": tally.lost_sign,
        "positive_zeros_became_negative": tally.gained_sign,
    }
    found: dict[str, Any] = {key: count for key, count in signs.items() if count}
    for key, counter in (("not_a_number_codes", tally.special), ("bad_scales", tally.bad_scales)):
        if positive := {side: count for side, count in counter.items() if count}:
            found[key] = positive
    return found


def _status(compared: ComparedTensor, tally: Tally) -> str:
    if compared.kind in _STATUS_OF_KIND:
        return _STATUS_OF_KIND[compared.kind]
    if tally.different or tally.copies_differ:
        return "*"
    assert compared.source is not None and compared.output is not None
    packed = [part.packing for _, tensor in compared.tensors() for part in tensor.slices]
    same = not tally.bytes_differ and compared.source.dtype == compared.output.dtype and not any(packed)
    return "=" if same or not compared.source.size + compared.output.size else "≈"


def _scale_status(compared: ComparedTensor, tally: Tally, weight: str) -> tuple[str, str]:
    """(status, reason) of a scale whose weight has the status `weight`, which decides if the scale's bytes differ."""
    source, output = compared.source_scale, compared.output_scale
    if compared.kind in ("missing", "extra", "unreadable", "scan"):
        return weight, compared.reason
    equal = weight in "=≈"
    if source is not None and output is not None:
        packed = any(part.packing for part in (*source.slices, *output.slices))
        same = (source.dtype, source.shape) == (output.dtype, output.shape) and not tally.scale_bytes_differ
        same = same and not packed
        return "=" if same else "≈" if equal else "*", ""
    unscaled = compared.output if output is None else compared.source
    if unscaled is not None and unscaled.dtype in ("BF16", "F32"):
        return "≈" if equal else "*", f"its factors are in the {unscaled.dtype} weight"
    if equal:
        return "≈", "absent on one side, every factor is 1"
    return "-" if output is None else "+", ""


def _reason(compared: ComparedTensor, tally: Tally) -> str:
    if tally.copies_differ:
        return "ranks hold different copies: " + ", ".join(sorted(tally.copies_differ))
    return compared.reason


def tensor_results(compared: ComparedTensor, tally: Tally) -> Iterator[TensorResult]:
    """The result of a compared tensor, and of its scale if it has one."""
    status = _status(compared, tally)
    if compared.kind == "unreadable" or any(tensor.name == compared.name for _, tensor in compared.tensors()):
        yield TensorResult(compared.name, status, _reason(compared, tally), compared, tally)
    if compared.scale_name:
        yield TensorResult(compared.scale_name, *_scale_status(compared, tally, status))


def _problems(count: int) -> str:
    return f"{count} problem" + ("s" if count != 1 else "")


@dataclass(repr=False)
class Verification:
    """The result of `verify`. `exit_code` is the command's, `verdict` its one sentence."""

    source: str | None
    output: str
    results: list[TensorResult]
    problems: list[Problem]
    statistics: Statistics
    strict: bool = False
    inverse: bool = False
    hashed: bool = False  # a manifest's hashes were compared
    selection: str = ""  # what was compared, in words; "" for everything
    unchecked: list[str] = field(default_factory=list)  # names that were not selected
    ignored: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # side -> kind -> names
    identity: dict[str, dict[str, str]] = field(default_factory=dict)  # side -> what -> SHA-256
    read_bytes: int = 0
    continued_bytes: int = 0  # of read_bytes: read by an earlier run that was interrupted, and not changed since
    audit: Audit | None = None  # the blocks that were compared, if not all were
    seconds: float = 0.0

    def __repr__(self) -> str:
        """The verdict and the two sides: a result has a line for each of thousands of tensors."""
        sides = f"source={self.source!r}, output={self.output!r}"
        return f"Verification({self.verdict!r}, exit_code={self.exit_code}, {sides})"

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

    @property
    def _wrong(self) -> int:
        """Problems that are differences."""
        return sum(problem.severity == "difference" for problem in self.problems)

    @property
    def is_foreign(self) -> bool:
        """Whether a side is no DeepSeek-V4, so that names and shapes were not compared with its config."""
        return any(problem.area == "model" for problem in self.problems)

    @property
    def is_of_known_edition(self) -> bool:
        """Whether the model type of each side is one that `verify` knows, or not said."""
        return not any(problem.area in ("model", "edition") for problem in self.problems)

    def _unbuildable(self, kind: str) -> list[str]:
        return [result.name for result in self.results if result.tally.rebuilt[kind]]

    @property
    def exit_code(self) -> int:
        """0 identical, 1 a difference, 3 something could not be read, 5 no difference in a sample of the blocks."""
        severities = {problem.severity for problem in self.problems}
        if self.counts["!"] or "unreadable" in severities:
            return EXIT_INPUT
        signs = self.strict and (self.lost_signs or self.gained_signs)
        inverse = self.inverse and bool(self._unbuildable("wrong"))
        if self._values_differ or "difference" in severities or signs or inverse:
            return EXIT_DIFFERENCE
        return EXIT_DONE if self.audit is None else EXIT_SAMPLE

    @property
    def checked(self) -> str:
        """What was compared, in words; "" for everything."""
        return ", ".join(filter(None, (self.selection, self.audit.described if self.audit else "")))

    @property
    def statuses(self) -> dict[str, str]:
        """What each status means."""
        return STATUSES if self.audit is None else STATUSES | OF_A_SAMPLE

    @property
    def verdict(self) -> str:
        """One sentence."""
        part = f" ({self.checked})" if self.checked else ""
        if self.exit_code == EXIT_INPUT:
            sure = "; what could be read differs" if self._values_differ else ""
            return f"NOT READABLE: not everything could be read{sure}{part}"
        if self.exit_code == EXIT_SAMPLE and self.audit is not None:
            word = "NO FAULT" if self.source is None else "NO DIFFERENCE"
            more = [self.selection, "the hub lists the hashes of dsv4.json" if self.hashed else ""]
            return ", ".join(filter(None, (f"{word} {self.audit.words}", *more)))
        word, words = self._judgement_alone() if self.source is None else self._judgement()
        return f"{word}{part}: {words}"

    def _judgement_alone(self) -> tuple[str, str]:
        if self.exit_code:
            return "NOT SOUND", _problems(self._wrong)
        checked = "structure, config, codes and hashes" if self.hashed else "structure, config and codes"
        return "SOUND", f"{checked} agree" + ("; no DeepSeek-V4: shapes were not checked" if self.is_foreign else "")

    def _what_differs(self) -> Iterator[str]:
        for status, words, alone in (
            ("*", "differ", "differs"),
            ("-", "are missing", "is missing"),
            ("+", "are extra", "is extra"),
        ):
            found = [result for result in self.results if result.status == status]
            scales = sum(result.compared is None for result in found)
            of_scales = f" ({scales} of them scales)" if scales else ""
            if found or status == "*":
                yield f"{counted(len(found), 'tensor')} {words if len(found) != 1 else alone}{of_scales}"
        if self._wrong:
            yield f"{_problems(self._wrong)} beside the values"

    def _judgement(self) -> tuple[str, str]:
        counts = self.counts
        if self.exit_code == EXIT_DONE:
            return "IDENTICAL", f"{counts['=']} tensors have the same bytes, {counts['≈']} other bytes of equal value"
        if self._values_differ:
            return "DIFFERENT", ", ".join(self._what_differs())
        if self._wrong:
            return "DIFFERENT", f"all values are equal, but beside the values: {_problems(self._wrong)}"
        return "DIFFERENT", "all values are equal, but zeros changed sign (--strict)"

    @property
    def what_was_read(self) -> str:
        """The contents of `read_bytes`, as a phrase. Headers and side files are not counted."""
        if self.source is not None:
            return "tensors"
        return "quantized tensors and hashed files" if self.hashed and self.audit is None else "quantized tensors"

    def _statuses(self) -> Iterator[tuple[str, str]]:
        """(name, status) of every tensor; `.` was not checked."""
        yield from ((result.name, result.status) for result in self.results)
        yield from ((name, ".") for name in self.unchecked)

    def _others(self) -> dict[str, str]:
        """Module -> the worst status of all its tensors but the routed experts'."""
        found: dict[str, str] = {}
        for name, status in self._statuses():
            if not _EXPERT.fullmatch(name):
                module = module_of(name)
                found[module] = max(found.get(module, "."), status, key=_SEVERITY.index)
        return {module: found[module] for module in sorted(found, key=module_order)}

    def _grid(self) -> dict[str, str]:
        """Module -> one character per routed expert: the worst status of the expert's tensors."""
        cells: dict[str, dict[int, str]] = {}
        for name, status in self._statuses():
            if match := _EXPERT.fullmatch(name):
                row = cells.setdefault(match[1], {})
                row[int(match[2])] = max(row.get(int(match[2]), "."), status, key=_SEVERITY.index)
        return {
            module: "".join(cells[module].get(expert, ".") for expert in range(max(cells[module]) + 1))
            for module in sorted(cells, key=module_order)
        }

    def errors_by_kind(self) -> dict[str, dict[str, Any]]:
        """Kind of tensor -> how many differ in value, their largest error, and the mean over all of their elements.

        The kind is the name without numbers: `layers.3.attn.wq_a.weight` -> `layers.*.attn.wq_a.weight`.
        """
        kinds: dict[str, list[Tally]] = {}
        for result in self.results:
            if result.compared is not None and result.compared.kind == "values" and result.tally.different:
                kinds.setdefault(_NUMBER.sub(".*.", result.name), []).append(result.tally)
        return {
            kind: {
                "tensors": len(tallies),
                "largest_error": max(tally.largest_error for tally in tallies),
                "mean_error": _mean_error(tallies),
            }
            for kind, tallies in kinds.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        found: dict[str, Any] = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "source": self.source,
            "output": self.output,
            "identity": self.identity,
            "ignored": self.ignored,
            "selection": self.checked,
            "strict": self.strict,
            "counts": self.counts,
            "statuses": self.statuses,
            "negative_zeros_became_positive": self.lost_signs,
            "positive_zeros_became_negative": self.gained_signs,
            "problems": [problem.to_json() for problem in self.problems],
            "differences": [result.to_json() for result in self.results if result.status not in "=≈"],
            "errors": self.errors_by_kind(),
            "experts": self._grid(),
            "others": self._others(),
            "statistics": self.statistics.to_json(),
            "read_bytes": self.read_bytes,
            "continued_bytes": self.continued_bytes,
            "seconds": round(self.seconds, 3),
        }
        if self.inverse:
            found["inverse"] = {
                **{key: self.statistics.rebuilt[key] for key in ("codes", "sign", "wrong")},
                "sign_of_zero_lost_in": self._unbuildable("sign"),
                "not_rebuilt": self._unbuildable("wrong"),
            }
        if self.audit is not None:
            found["audit"] = self.audit.to_json()
        found["tensors"] = {result.name: _short(result) for result in self.results}
        return found

    def to_html(self) -> str:
        """The report page."""
        from .report.page import made_by, render

        return render(self.to_json() | {"made_by": made_by()})


def _short(result: TensorResult) -> dict[str, Any]:
    """A tensor's entry in `tensors`: its details are in `differences` only."""
    details = {"first_differences", "blocks", "name", "shape", "source_shards", "output_shards"}
    return {key: value for key, value in result.to_json().items() if key not in details}
