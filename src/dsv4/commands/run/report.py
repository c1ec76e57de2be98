"""The HTML report of a comparison: one file, no script, nothing loaded from elsewhere, curves as inline SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dsv4.result_file import result_file

if TYPE_CHECKING:
    from dsv4.model.evaluate.compare import Comparison

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 220, 70, 28, 12

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td { padding: .15em 1.2em .15em 0; vertical-align: top }
.verdict { font-size: 1.2em; font-weight: 600; padding: .6em .8em; background: #eef2f7; border-radius: 6px }
svg { width: 100%; height: auto } code { word-break: break-all }
@media (prefers-color-scheme: dark) { body { background: #161a1f; color: #ddd } .verdict { background: #242b35 } }
"""


def _scale(values: Sequence[float]) -> tuple[float, float, bool]:
    """Lowest and highest value of an axis, and whether it is logarithmic: when positive values span 2 decades."""
    finite = [v for v in values if math.isfinite(v)]
    positive = [v for v in finite if v > 0]
    if positive and max(positive) / min(positive) > 100:
        return math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))), True
    high = max(finite, default=0.0)
    return 0.0, high if high > 0 else 1.0, False


def _points(values: Sequence[float], low: float, high: float, logarithmic: bool) -> list[str]:
    right, bottom = WIDTH - 10, HEIGHT - BOTTOM
    points = []
    for i, value in enumerate(values):
        at = high if not math.isfinite(value) else value
        if logarithmic and math.isfinite(value):
            at = math.log10(value) if value > 0 else low
        share = min(max((at - low) / (high - low or 1), 0), 1)
        x = LEFT + (right - LEFT) * (i / max(len(values) - 1, 1))
        points.append(f"{x:.1f},{bottom - (bottom - TOP) * share:.1f}")
    return points


def curve(values: Sequence[float], title: str) -> str:
    """One curve over the positions, as an SVG element."""
    low, high, logarithmic = _scale(values)
    points, bottom = _points(values, low, high, logarithmic), HEIGHT - BOTTOM
    labels = [(f"1e{high:g}", TOP), (f"1e{low:g}", bottom)] if logarithmic else [(f"{high:.3g}", TOP), ("0", bottom)]
    marks = "".join(
        f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" font-size="12" fill="currentColor">{text}</text>'
        f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".2"/>'
        for text, y in labels
    )
    ends = "".join(
        f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}" font-size="12" fill="currentColor">{text}</text>'
        for x, anchor, text in ((LEFT, "start", "position 0"), (WIDTH - 10, "end", str(len(values) - 1)))
    )
    dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="1.8" fill="#2b6cb0"/>' for p in points)
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="#2b6cb0" stroke-width="1.5"/>'
    return (
        f'<h2>{escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{marks}{ends}{line}{dots}</svg>"
    )


def _rows(folders: tuple[str, str], tokens: Sequence[int], comparison: "Comparison", version: str) -> list[list[str]]:
    first = "none"
    if comparison.first_module is not None:
        first = f"{comparison.first_module}, position {comparison.first_position}"
    mtp = comparison.mtp_max_difference
    return [
        ["First checkpoint", folders[0]],
        ["Second checkpoint", folders[1]],
        ["Bit-equal", "yes" if comparison.bit_equal else "no"],
        ["Largest |difference| of a logit", f"{comparison.max_difference:.6g}"],
        ["Largest |difference|, MTP block", "not compared" if mtp is None else f"{mtp:.6g}"],
        ["KL divergence (nats)", f"mean {comparison.mean_kl:.3g}, max {comparison.max_kl:.3g}"],
        ["Top-1 agreement", f"{sum(comparison.top1)} of {len(comparison.top1)} positions"],
        ["First module that differs", first],
        ["Token ids", ", ".join(map(str, tokens))],
        ["Made by", f"dsv4 {version}"],
    ]


def write_report(
    path: str, folders: tuple[str, str], tokens: Sequence[int], comparison: "Comparison", verdict: str, version: str
) -> None:
    """Write the report to `path`."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>"
        for name, value in _rows(folders, tokens, comparison, version)
    )
    curves = (
        curve(comparison.difference, "Largest |difference| of logits, by position")
        + curve(comparison.kl, "KL divergence in nats, by position")
        + curve([float(same) for same in comparison.top1], "Likeliest token agrees (1) or not (0), by position")
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>dsv4 run --compare</title><style>{_STYLE}</style>"
        f'<h1>Two checkpoints, the same tokens</h1><p class="verdict">{escape(verdict)}</p>'
        f"<table>{rows}</table>{curves}</html>\n"
    )
    with result_file(path) as file:
        file.write(page.encode())
