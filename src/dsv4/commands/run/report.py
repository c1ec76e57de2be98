"""The HTML page of a comparison of two checkpoints, in the style of `verify`'s page: one file without scripts."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4 import output
from dsv4.convert.proof.report.charts import LABEL, WIDTH, Chart
from dsv4.convert.proof.report.page import Step, made_by
from dsv4.convert.proof.report.template import render_page
from dsv4.files import result_file
from dsv4.options import as_typed

from .options import RunOptions

if TYPE_CHECKING:
    from dsv4.model.evaluate.compare import Comparison

HEIGHT, TOP, BOTTOM, RIGHT = 220.0, 12.0, 192.0, WIDTH - 16
DECADES_SPANNED = 2  # an axis is logarithmic if its positive values span more than this
TICKS = 4
DOTTED = 200  # points are drawn as dots too if there are at most so many
TOKENS_SHOWN = 200

NOISE = (
    "Checkpoints that hold the same values give the same bits: every difference is 0. If a value or the order of a "
    "sum differs by one part in a million anywhere, the logits of small checkpoints move by 1 to 7 % (median of all "
    "positions) and 3 to 24 % of the likeliest tokens change, because the simulated quantizations round at every "
    "layer; with --no-simulation the logits move by one part in a million. So a large difference may have a small "
    "cause: look at the first module that differs."
)


def _axis(values: Sequence[float]) -> tuple[float, float, bool]:
    """(lowest, highest, logarithmic) of an axis; ends of a logarithmic axis are powers of ten, given by exponent."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if positive and max(positive) / min(positive) > 10**DECADES_SPANNED:
        return math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))), True
    high = max(finite, default=0.0)
    return 0.0, high if high > 0 else 1.0, False


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """(place on the axis, label) of some ticks."""
    if logarithmic:
        step = max(1, math.ceil((high - low) / TICKS))
        return [(exponent, f"1e{exponent}") for exponent in range(int(low), int(high) + 1, step)]
    return [(high * i / TICKS, f"{high * i / TICKS:.3g}") for i in range(TICKS + 1)]


def _across(position: int, count: int) -> float:
    """Where a position lies from left to right."""
    return LABEL + (RIGHT - LABEL) * position / max(count - 1, 1)


def _position_labels(chart: Chart, count: int) -> None:
    """Positions below the chart."""
    step = max(1, math.ceil(count / 10))
    for position in range(0, count, step):
        chart.text(_across(position, count), BOTTOM + 16, str(position), "middle", "tick")


def curve(values: Sequence[float], title: str) -> Chart:
    """One value per position, on a linear or logarithmic axis. Values that are not finite are at the top."""
    chart = Chart(WIDTH, title, HEIGHT)
    low, high, logarithmic = _axis(values)

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(max((value - low) / ((high - low) or 1), 0), 1)

    for at, label in _ticks(low, high, logarithmic):
        chart.text(LABEL - 6, height(at) + 3, label, "end", "tick")
        chart.path(f"M{LABEL:g} {height(at):.1f}H{RIGHT:g}", "axis")
    points = []
    for position, value in enumerate(values):
        at = high if not math.isfinite(value) else value
        if logarithmic and math.isfinite(value):
            at = math.log10(value) if value > 0 else low
        points.append((_across(position, len(values)), height(at), f"position {position}: {value:.3g}"))
    chart.path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points), "curve")
    if len(points) <= DOTTED:
        for x, y, tip in points:
            chart.rect(x - 2, y - 2, 4, 4, "heat", tip)
    _position_labels(chart, len(values))
    return chart


def agreement(top1: Sequence[bool]) -> Chart:
    """One cell per position: does the likeliest token agree?"""
    chart = Chart(WIDTH, "Likeliest token by position", 44)
    wide = (RIGHT - LABEL) / max(len(top1), 1)
    for position, same in enumerate(top1):
        kind, words = ("same", "the same token") if same else ("differs", "another token")
        chart.rect(LABEL + position * wide, TOP, wide, 12, kind, f"position {position}: {words}")
    for position in range(0, len(top1), max(1, math.ceil(len(top1) / 10))):
        chart.text(LABEL + (position + 0.5) * wide, TOP + 26, str(position), "middle", "tick")
    return chart


def _rows(comparison: "Comparison", tolerance: float) -> list[tuple[str, str, str]]:
    """(quantity, expected of an exact conversion, found)."""
    zero = f"0 (up to {tolerance:g} accepted)" if tolerance else "0"
    mtp = comparison.mtp_max_difference
    return [
        ("Bits of all logits", "equal", "equal" if comparison.bit_equal else "not equal"),
        ("Largest |difference| of a logit", zero, f"{comparison.max_difference:.6g}"),
        ("Largest |difference|, drafts", zero, "not compared" if mtp is None else f"{mtp:.6g}"),
        ("KL divergence, mean (nats)", "0", f"{comparison.mean_kl:.3g}"),
        ("KL divergence, largest (nats)", "0", f"{comparison.max_kl:.3g}"),
        (
            "Likeliest token agrees",
            f"at all {len(comparison.top1)} positions",
            f"at {sum(comparison.top1)} of {len(comparison.top1)} positions",
        ),
    ]


def next_steps(sides: tuple[str, str], comparison: "Comparison", options: RunOptions) -> list[Step]:
    """What to do after this verdict. sides: two checkpoints, or a file of logits and a checkpoint."""
    source = "SOURCE" if Path(sides[0]).is_file() else sides[0]
    verify = shlex.join(["dsv4", "verify", source, sides[1]])
    if comparison.bit_equal and comparison.first_module is None:
        doctor = shlex.join(["dsv4", "doctor", sides[1], "--for", "vllm"])
        return [
            ("These tokens use only a part of the weights. Compare all values:", verify),
            ("See how an engine loads the second checkpoint:", doctor),
        ]
    steps = [("Find the tensors that differ:", verify)]
    if not options.no_simulation and source == sides[0]:
        words = "See how large the cause is: without the simulated quantizations a small one has a small effect:"
        steps.append((words, as_typed("dsv4 run", replace(options, no_simulation=True, report=None))))
    return steps


def _tokens(tokens: Sequence[int]) -> str:
    more = f" and {len(tokens) - TOKENS_SHOWN:,} more" if len(tokens) > TOKENS_SHOWN else ""
    return ", ".join(map(str, tokens[:TOKENS_SHOWN])) + more


def render(
    folders: tuple[str, str],
    tokens: Sequence[int],
    comparison: "Comparison",
    verdict: str,
    tolerance: float,
    command: str,
    steps: Sequence[Step] = (),
) -> str:
    """The page. `verdict` is the comparison's sentence, `command` the line that was typed, `steps` what to do next."""
    made = made_by(command)
    word, _, rest = verdict.partition(":")
    first = comparison.first_module
    headline = f"First module that differs: {first}, at position {comparison.first_position}" if first else ""
    return render_page(
        "compare.html.j2",
        Path(__file__).parent,
        good=comparison.within(tolerance),
        word=word,
        rest=f":{rest}",
        headline=headline,
        facts=[
            ("First checkpoint", folders[0]),
            ("Second checkpoint", folders[1]),
            ("Token ids", _tokens(tokens)),
            ("Made by", f"dsv4 {made['version']}, {made['date']}"),
            ("Command", made["command"]),
        ],
        steps=steps,
        rows=_rows(comparison, tolerance),
        noise=NOISE,
        charts=[
            curve(comparison.difference, "Largest |difference| of logits, by position"),
            curve(comparison.kl, "KL divergence in nats, by position"),
            agreement(comparison.top1),
        ],
    )


def write_report(path: str, page: str) -> None:
    """Write the page; on an error an older file stays."""
    with result_file(path, output.current().warn_once) as file:
        file.write(page.encode())
