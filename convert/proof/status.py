"""From tallies to statuses: what is said about each tensor of a unit."""

from collections.abc import Iterator

from dsv4.errors import printable

from .files import Problem
from .plan import Unit
from .result import TensorResult
from .tally import Tally


def _status(unit: Unit, tally: Tally) -> str:
    """Status of the unit's main tensor."""
    fixed = {"missing": "-", "extra": "+", "unreadable": "!", "different": "*", "scan": "="}
    if unit.kind in fixed:
        return fixed[unit.kind]
    if tally.different or tally.copies_differ:
        return "*"
    assert unit.source is not None and unit.output is not None
    same = not tally.bytes_differ and unit.source.dtype == unit.output.dtype
    return "=" if same or not unit.source.size + unit.output.size else "≈"


def _scale_status(unit: Unit, tally: Tally, weight: str) -> tuple[str, str]:
    """Status of the unit's scale: its bytes if they are the same, else its weight's values decide."""
    source, output = unit.source_scale, unit.output_scale
    if unit.kind in ("missing", "extra", "unreadable", "scan"):
        return weight, unit.reason
    if source is not None and output is not None:
        same = (source.dtype, source.shape) == (output.dtype, output.shape) and not tally.scale_bytes_differ
        return ("=", "") if same else ("≈" if weight in "=≈" else "*", "")
    floats = ("BF16", "F32")
    tensor = unit.output if output is None else unit.source
    if tensor is not None and tensor.dtype in floats:
        return ("≈" if weight in "=≈" else "*"), f"its factors are in the {tensor.dtype} weight"
    if weight in "=≈":
        return "≈", "absent on one side, every factor is 1"
    return ("-", "") if output is None else ("+", "")


def _reason(unit: Unit, tally: Tally) -> str:
    if tally.copies_differ:
        return "ranks hold different copies: " + ", ".join(map(printable, sorted(tally.copies_differ)))
    return unit.reason


def unit_results(unit: Unit, tally: Tally) -> Iterator[TensorResult]:
    status = _status(unit, tally)
    sides = [side for side, tensor in unit.tensors() if tensor.name == unit.name]
    if sides or unit.kind == "unreadable":
        yield TensorResult(unit.name, status, _reason(unit, tally), unit, tally)
    if unit.scale_name:
        scale, reason = _scale_status(unit, tally, status)
        yield TensorResult(unit.scale_name, scale, reason)


def code_problems(results: list[TensorResult]) -> list[Problem]:
    """NaN codes and scales that are no scales: no correct conversion holds them."""
    found = []
    for result in results:
        for side in ("source", "output"):
            name = printable(result.name)
            if count := result.tally.special[side]:
                found.append(Problem("codes", side, f"{name} holds {count} codes that are not finite numbers"))
            if count := result.tally.bad_scales[side]:
                found.append(Problem("codes", side, f"{name} has {count} scales that are not positive and finite"))
    return found
