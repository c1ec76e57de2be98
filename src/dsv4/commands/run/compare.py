"""`dsv4 run --logits` and `--compare`: teacher-forced logits, to a file or compared with another checkpoint's.

Two checkpoints run one after the other, each with all the memory. The fingerprints of the first run are compared while
the second runs, so the first difference is printed as soon as it is computed, and not at the end of a run that may take
hours.
"""

import gc
from typing import TYPE_CHECKING, Any

from dsv4 import __version__
from dsv4.errors import EXIT_DIFFERENCE, EXIT_DONE, InputError
from dsv4.machine import peak_memory
from dsv4.output import Output, aligned, human_bytes

from .answers import TokenProgress, rate, seconds_text
from .source import Loading, Source, check_loadable, load_model

if TYPE_CHECKING:
    from dsv4.model.evaluate.compare import Comparison, Run
    from dsv4.model.evaluate.logits import Evaluation
    from dsv4.model.evaluate.trace import Fingerprints, PositionedTrace
    from dsv4.model.transformer import Transformer

POSITIONS_SHOWN = 20  # without -v


def _timing(evaluation: "Evaluation") -> dict[str, Any]:
    decoded = len(evaluation.token_ids) - evaluation.prefill_tokens
    return {
        "tokens": len(evaluation.token_ids),
        "prefill_tokens": evaluation.prefill_tokens,
        "prefill_tokens_per_second": rate(evaluation.prefill_tokens, evaluation.prefill_seconds),
        "decode_tokens_per_second": rate(decoded, evaluation.decode_seconds),
        "first_token_seconds": evaluation.prefill_seconds,
        "peak_memory_bytes": peak_memory(),
    }


def _tell_timing(evaluation: "Evaluation", out: Output) -> None:
    timing = _timing(evaluation)
    decoded = timing["tokens"] - timing["prefill_tokens"]
    line = f"prefill {timing['prefill_tokens']} tokens, {timing['prefill_tokens_per_second']:.1f} tokens/s"
    if decoded:
        line += f"; single steps {decoded} tokens, {timing['decode_tokens_per_second']:.1f} tokens/s"
    out.say(line)
    first, peak = seconds_text(timing["first_token_seconds"]), human_bytes(timing["peak_memory_bytes"])
    out.say(f"first token after {first}, peak memory {peak}")


def save_logits(
    model: "Transformer",
    tokens: list[int],
    prefill: int | None,
    path: str,
    out: Output,
    trace: "PositionedTrace | None",
) -> int:
    """Write the logits of every position to `path`; the exit code. Of several ranks the first writes."""
    from dsv4.model.evaluate.logits import teacher_forced, write_logits

    with TokenProgress(out, len(tokens), "computing") as bar:
        evaluation = teacher_forced(model, tokens, prefill, trace=trace, on_progress=bar.advance)
    if out.mode == "silent":
        return EXIT_DONE
    write_logits(evaluation, path)
    out.say(f"wrote logits of {len(tokens)} positions to {path}")
    _tell_timing(evaluation, out)
    shapes: dict[str, Any] = {"logits": list(evaluation.logits.shape)}
    if evaluation.mtp_logits is not None:
        shapes["mtp_logits"] = list(evaluation.mtp_logits.shape)
    out.result({"file": path, "shapes": shapes, "statistics": _timing(evaluation)})
    return EXIT_DONE


def _run(
    source: Source,
    loading: Loading,
    tokens: list[int],
    prefill: int | None,
    mtp: bool,
    out: Output,
    earlier: "Fingerprints | None" = None,
) -> "Run":
    """One checkpoint on the tokens, loaded and freed again; the first difference from an `earlier` run is printed."""
    from dsv4.model.evaluate.compare import Run
    from dsv4.model.evaluate.logits import teacher_forced
    from dsv4.model.evaluate.trace import Fingerprints

    out.say(f"running {source.folder}")
    model = load_model(source, loading, out)
    with TokenProgress(out, len(tokens), "computing") as bar:

        def print_difference(module: str, position: int) -> None:
            bar.clear()
            out.say(f"{module} differs at position {position}; going on to compare the logits")

        fingerprints = Fingerprints(earlier, print_difference)
        evaluation = teacher_forced(model, tokens, prefill, mtp=mtp, trace=fingerprints, on_progress=bar.advance)
    _tell_timing(evaluation, out)
    del model
    gc.collect()
    return Run(evaluation, fingerprints)


def _check_same_vocabulary(one: Source, other: Source) -> None:
    sizes = one.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens", "Compare the same model.")


def verdict(comparison: "Comparison", tolerance: float) -> str:
    """The one sentence that the comparison ends in."""
    if comparison.bit_equal:
        return "BIT-EQUAL: every logit of every position has the same bits in both checkpoints"
    if comparison.within(tolerance):
        return f"within tolerance: no logit differs by more than {tolerance:g}, though not all bits are equal"
    return "DIFFERENT: the logits are not the same"


def _tell(comparison: "Comparison", tolerance: float, out: Output) -> None:
    out.data(verdict(comparison, tolerance))
    if comparison.bit_equal:
        return
    positions = len(comparison.difference)
    out.data(f"max |difference|    {comparison.max_difference:.6g}")
    if comparison.mtp_max_difference is not None:
        out.data(f"  of the MTP block  {comparison.mtp_max_difference:.6g}")
    out.data(f"KL divergence       mean {comparison.mean_kl:.3g}, max {comparison.max_kl:.3g} nats")
    out.data(f"top-1 agreement     {sum(comparison.top1)} of {positions} positions")
    if comparison.first_module is not None:
        out.data(f"first difference    {comparison.first_module}, position {comparison.first_position}")
    rows = [["position", "max |difference|", "KL", "top-1"]]
    for position in range(positions if out.verbose else min(positions, POSITIONS_SHOWN)):
        top1 = "same" if comparison.top1[position] else "differs"
        values = (comparison.difference[position], comparison.kl[position])
        rows.append([str(position), f"{values[0]:.6g}", f"{values[1]:.3g}", top1])
    for line in aligned(rows, right=(0, 1, 2)):
        out.data(line)
    if len(rows) <= positions:
        out.data(f"and {positions - len(rows) + 1} more positions (-v lists all, --json has the numbers)")


def compare_checkpoints(
    sources: tuple[Source, Source],
    loading: Loading,
    tokens: list[int],
    prefill: int | None,
    tolerance: float,
    report: str | None,
    out: Output,
) -> int:
    """Run both on the same tokens, say whether the logits are bit-equal; the exit code."""
    from dsv4.model.evaluate.compare import compare

    _check_same_vocabulary(*sources)
    for source in sources:
        check_loadable(source, loading)
    folders = (sources[0].folder, sources[1].folder)
    mtp = all(source.has_mtp for source in sources)
    one = _run(sources[0], loading, tokens, prefill, mtp, out)
    other = _run(sources[1], loading, tokens, prefill, mtp, out, one.fingerprints)
    comparison = compare(one, other)
    _tell(comparison, tolerance, out)
    if report is not None:
        from .report import write_report

        write_report(report, folders, tokens, comparison, verdict(comparison, tolerance), __version__)
        out.say(f"wrote {report}")
    same = comparison.within(tolerance)
    out.result(
        {"checkpoints": list(folders), "token_ids": tokens, "tolerance": tolerance, "same": same}
        | {"peak_memory_bytes": peak_memory()}
        | comparison.as_json()
    )
    return EXIT_DONE if same else EXIT_DIFFERENCE
