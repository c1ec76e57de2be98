"""The verdict of a verification, from what all processes found."""

from dsv4.convert.proof.config import declares_powers_of_two, identity
from dsv4.convert.proof.files import Problem
from dsv4.convert.proof.layout import Checkpoint
from dsv4.convert.proof.manifest import check_manifest
from dsv4.convert.proof.result import TensorResult, Verification, tensor_results

from .findings import Findings
from .prepare import Work


def _check_scale_format(checkpoint: Checkpoint, findings: Findings) -> None:
    """`scale_fmt: ue8m0` promises powers of two; other float32 scales break the promise."""
    if not declares_powers_of_two(checkpoint):
        return
    for compared, tally in zip(findings.compared, findings.tallies, strict=True):
        of_two = any(tensor.factor for side, tensor in compared.tensors() if side == checkpoint.where)
        if (odd := tally.odd_scales[checkpoint.where]) and not of_two:
            text = f"scale_fmt says ue8m0, {compared.scale_name} has {odd} other float32 scales"
            checkpoint.problem("config", text)
            return


def _code_problems(results: list[TensorResult]) -> list[Problem]:
    """NaN codes, scales that are not positive and finite, slices that are filled up with something else.

    No correct conversion holds them.
    """
    found = []
    for result in results:
        name = result.name
        for (side, tensor, file), count in result.tally.bad_filling.items():
            value = 1 if tensor.endswith(".scale") else 0
            text = f"{tensor}: {count} bytes of {file} after its last row are not those of {value}, which fills it up"
            found.append(Problem("layout", side, text))
        for side in ("source", "output"):
            if count := result.tally.special[side]:
                found.append(Problem("codes", side, f"{name} holds {count} codes that are not finite numbers"))
            if count := result.tally.bad_scales[side]:
                found.append(Problem("codes", side, f"{name} has {count} scales that are not positive and finite"))
    return found


def conclude(work: Work, findings: Findings, locate: bool) -> Verification:
    """The verdict from the findings of all processes. locate: see `check_manifest`."""
    for compared, tally in zip(findings.compared, findings.tallies, strict=True):
        findings.statistics.add(compared, tally)
    for side in work.sides:
        _check_scale_format(side, findings)
    if work.manifest is not None:
        check_manifest(work.output, work.manifest, findings.hashes, locate)
    pairs = zip(findings.compared, findings.tallies, strict=True)
    results = [result for compared, tally in pairs for result in tensor_results(compared, tally)]
    return Verification(
        None if work.source is None else work.source.files.label,
        work.output.files.label,
        results,
        [problem for side in work.sides for problem in side.problems] + _code_problems(results),
        findings.statistics,
        hashed=work.manifest is not None,
        ignored={side.where: ignored for side in work.sides if (ignored := side.ignored.to_json())},
        identity={side.where: identity(side) for side in work.sides},
        read_bytes=findings.read,
        continued_bytes=findings.continued,
        strict=work.settings.strict,
        inverse=work.settings.inverse,
        selection=work.settings.selection.describe(),
        unchecked=work.unchecked,
        audit=findings.audit,
    )
