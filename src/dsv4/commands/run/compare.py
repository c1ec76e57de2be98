"""`dsv4 run --compare`: the logits of two checkpoints on the same tokens.

Two checkpoints run one after the other, each with all the memory. The fingerprints of the first run are compared while
the second runs, so the first difference is printed as soon as it is computed and not after hours.
"""

import gc
from typing import TYPE_CHECKING

from dsv4.errors import EXIT_DIFFERENCE, EXIT_DONE, InputError
from dsv4.machine import peak_memory
from dsv4.options import as_typed
from dsv4.output import Output
from dsv4.text import aligned

from .answers import TokenProgress
from .logits import say_timing
from .options import RunOptions
from .placement import Placement, load_model
from .reads import say_reads
from .source import Source

if TYPE_CHECKING:
    from dsv4.model.evaluate.compare import Comparison, Run
    from dsv4.model.evaluate.logits import Evaluation
    from dsv4.model.evaluate.trace import Fingerprints

POSITIONS_SHOWN = 20  # without -v


def _run(
    source: Source,
    placement: Placement,
    tokens: list[int],
    prefill: int | None,
    draft: bool,
    earlier: "Fingerprints | None",
    out: Output,
) -> "Run":
    """One checkpoint on the tokens, loaded and freed again; the first difference from an `earlier` run is printed."""
    from dsv4.model.evaluate.compare import Run
    from dsv4.model.evaluate.logits import teacher_forced
    from dsv4.model.evaluate.trace import Fingerprints

    out.say(f"running {source.folder}")
    model = load_model(source, placement, out, draft)
    with TokenProgress(out, len(tokens), "computing") as bar:

        def print_difference(module: str, position: int) -> None:
            bar.clear()
            out.say(f"{module} differs at position {position}; going on to compare the logits")

        fingerprints = Fingerprints(earlier, print_difference)
        evaluation = teacher_forced(model, tokens, prefill, draft=draft, trace=fingerprints, on_progress=bar.advance)
    say_timing(evaluation, out)
    say_reads(model, out)
    del model
    gc.collect()
    return Run(evaluation, fingerprints)


def _check_same_vocabulary(one: Source, other: Source) -> None:
    sizes = one.config.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens", "Compare the same model.")


def verdict(comparison: "Comparison", tolerance: float) -> str:
    """The verdict of the comparison, one sentence: of the logits, and of modules whose difference the logits lost."""
    if comparison.bit_equal and comparison.first_module is not None:
        where = f"{comparison.first_module}, position {comparison.first_position}"
        return (
            f"BIT-EQUAL LOGITS, OTHER MODULES: every logit has the same bits in both checkpoints, but the modules "
            f"differ, first {where}: other tokens may give other logits"
        )
    if comparison.bit_equal:
        return "BIT-EQUAL: every logit of every position has the same bits in both checkpoints"
    if comparison.within(tolerance):
        return f"within tolerance: no logit differs by more than {tolerance:g}, though not all bits are equal"
    return "DIFFERENT: the logits are not the same"


def _print_comparison(comparison: "Comparison", tolerance: float, out: Output) -> None:
    out.data(verdict(comparison, tolerance))
    if comparison.bit_equal:
        return
    positions = len(comparison.difference)
    out.data(f"max |difference|    {comparison.max_difference:.6g}")
    if comparison.mtp_max_difference is not None:
        out.data(f"  of the drafts     {comparison.mtp_max_difference:.6g}")
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


def _conclude(
    comparison: "Comparison",
    sides: tuple[str, str],
    tokens: list[int],
    options: RunOptions,
    out: Output,
) -> int:
    """Print the comparison, and write the page; the exit code."""
    same, words = comparison.within(options.tolerance), verdict(comparison, options.tolerance)
    _print_comparison(comparison, options.tolerance, out)
    out.result(
        {"checkpoints": list(sides), "token_ids": tokens, "tolerance": options.tolerance, "same": same}
        | {"verdict": words}
        | {"peak_memory_bytes": peak_memory()}
        | comparison.as_json()
    )
    if options.report is not None and out.mode != "silent":
        from .report import next_steps, render, write_report

        steps = next_steps(sides, comparison, options)
        command = as_typed("dsv4 run", options)
        write_report(options.report, render(sides, tokens, comparison, words, options.tolerance, command, steps))
        out.say(f"wrote {options.report}")
    return EXIT_DONE if same else EXIT_DIFFERENCE


def compare_with_logits(
    source: Source, placement: Placement, earlier: "Evaluation", options: RunOptions, out: Output
) -> int:
    """Run a checkpoint on the tokens of a file of logits and print whether its own are bit-equal; the exit code."""
    from dsv4.model.evaluate.compare import Run, compare

    run = _run(source, placement, earlier.token_ids, options.prefill, earlier.draft_logits is not None, None, out)
    sides = (str(options.compare), source.folder)
    return _conclude(compare(Run(earlier), run), sides, earlier.token_ids, options, out)


def compare_checkpoints(
    sources: tuple[Source, Source], placement: Placement, tokens: list[int], options: RunOptions, out: Output
) -> int:
    """Run both on the same tokens and print whether the logits are bit-equal; the exit code."""
    from dsv4.model.evaluate.compare import compare
    from dsv4.model.loading import check_loadable

    _check_same_vocabulary(*sources)
    draft = sources[0].stages == sources[1].stages
    for source in sources:
        check_loadable(source.checkpoint, placement.group, draft)
    folders = (sources[0].folder, sources[1].folder)
    one = _run(sources[0], placement, tokens, options.prefill, draft, None, out)
    other = _run(sources[1], placement, tokens, options.prefill, draft, one.fingerprints, out)
    return _conclude(compare(one, other), folders, tokens, options, out)
