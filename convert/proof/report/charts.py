"""The charts of the report page, as lists of SVG shapes; a template draws them (`parts.html.j2`).

Colours are classes, so that the page's style decides them for light, dark and paper. No fact is shown by colour alone:
tensors that differ also have another lightness, and the numbers of every chart are in words or labels beside it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dsv4.text import human_bytes

LABEL = 64.0  # width of the row labels, in SVG units
ROW = 12.0
WIDTH = 960.0
PHONE = 800.0  # a chart is never drawn smaller than this, so that its labels stay legible: its frame scrolls instead
# Status -> class of a cell in the proof grid.
CELLS = {"=": "same", "≈": "equal", "*": "differs", "-": "differs", "+": "differs", "!": "unreadable", ".": "unchecked"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One SVG element: its attributes, the text inside, and the text shown on hovering."""

    tag: str
    attributes: Mapping[str, str]
    words: str = ""
    tip: str = ""


@dataclass
class Chart:
    """A drawing. `title` is what screen readers say; `narrowest` is the smallest width on a screen, in pixels."""

    width: float
    title: str
    height: float = 0.0
    narrowest: float = PHONE
    shapes: list[Shape] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, tip: str, opacity: float = 1.0) -> None:
        """A rectangle of a class."""
        place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{height:.2f}", "class": kind}
        fade = {"fill-opacity": f"{opacity:.2f}"} if opacity < 1 else {}
        self.shapes.append(Shape("rect", place | fade, tip=tip))

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> None:
        """A text; `anchor` says which end of it is at `x`."""
        place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "class": kind, "text-anchor": anchor}
        self.shapes.append(Shape("text", place, words))

    def path(self, steps: str, kind: str) -> None:
        """A line."""
        self.shapes.append(Shape("path", {"d": steps, "class": kind}))


def _runs(row: str) -> Iterator[tuple[int, int, str]]:
    """`==*=` -> (0, 2, '='), (2, 1, '*'), (3, 1, '='): a rectangle per run keeps large grids small."""
    start = 0
    for position in range(1, len(row) + 1):
        if position == len(row) or row[position] != row[start]:
            yield start, position - start, row[start]
            start = position


def proof_grid(experts: Mapping[str, str], others: Mapping[str, str], words: Mapping[str, str]) -> Chart:
    """Modules down, routed experts across; the first cell of a row stands for the module's other tensors."""
    chart = Chart(WIDTH, "Proof grid: one row per layer, one cell per routed expert")
    columns = max(map(len, experts.values()), default=0)
    cell = (WIDTH - LABEL - 2 * ROW) / columns if columns else 0.0
    left = LABEL + 2 * ROW
    modules = list(others) + [module for module in experts if module not in others]
    for number, module in enumerate(modules):
        y = ROW + number * ROW
        chart.text(LABEL - 6, y + 9, module, "end")
        if status := others.get(module):
            chart.rect(LABEL, y, ROW, ROW - 2, CELLS[status], f"{module}: other tensors: {words[status]}")
        for start, count, status in _runs(experts.get(module, "")):
            named = f"expert {start}" if count == 1 else f"experts {start} to {start + count - 1}"
            tip = f"{module}, {named}: {words[status]}"
            chart.rect(left + start * cell, y, count * cell, ROW - 2, CELLS[status], tip)
    _grid_lines(chart, columns, cell, ROW + len(modules) * ROW)
    chart.height = ROW * (len(modules) + 2)
    return chart


def _grid_lines(chart: Chart, columns: int, cell: float, bottom: float) -> None:
    """Numbers above the grid, and lines between its cells where there is room for them."""
    left = LABEL + 2 * ROW
    step = next((s for s in (1, 2, 4, 8, 16, 32, 64, 128) if columns / s <= 16), 256)
    for expert in range(0, columns, step):
        chart.text(left + (expert + 0.5) * cell, 9, str(expert), "middle", "tick")
    if step * cell > 4:
        gap = 1 if cell > 4 else step
        for expert in range(gap, columns, gap):
            chart.path(f"M{left + expert * cell:.2f} {ROW:g}V{bottom:g}", "gap")


def span_histogram(spans: Mapping[str, int], limit: int) -> Chart:
    """FP8 blocks by the span of the FP4 scales inside; heights are logarithmic, counts are written on the bars.

    Narrower than the other charts and with larger letters: the limit has to be in sight on a phone too.
    """
    chart = Chart(560.0, "Histogram of scale spans per FP8 block", narrowest=330.0)
    height, top, left = 170.0, 40.0, 10.0
    last = max(max(map(int, spans)), limit) + 1
    bar = (chart.width - 2 * left) / (last + 1)
    tallest = math.log10(max(spans.values()) + 1)
    every = math.ceil(20 / bar)
    for span in range(last + 1):
        count, x = spans.get(str(span), 0), left + span * bar
        if span % every == 0:
            chart.text(x + bar / 2, top + height + 15, str(span), "middle", "big")
        if count:
            tall = max(2.0, height * math.log10(count + 1) / tallest)
            kind = "equal" if span <= limit else "beyond"
            chart.rect(x + 1, top + height - tall, bar - 2, tall, kind, f"span 2^{span}: {count} blocks")
            if bar > 30:
                chart.text(x + bar / 2, top + height - tall - 4, short(count), "middle", "big")
    edge = left + (limit + 1) * bar
    chart.path(f"M{edge:.2f} 18V{top + height:.2f}", "limit")
    anchor, shift = ("end", -6) if edge > chart.width / 2 else ("start", 6)
    chart.text(edge + shift, 16, f"E4M3 absorbs any codes up to 2^{limit}", anchor, "big strong")
    words = "log2(largest / smallest scale) in an FP8 block"
    chart.text(chart.width / 2, top + height + 34, words, "middle", "big")
    chart.height = top + height + 42
    return chart


def scale_map(modules: Mapping[str, Mapping[str, int]], side: str) -> Chart:
    """Modules down, scale exponents across; the darker, the more scales (logarithmic)."""
    exponents = sorted({int(exponent) for uses in modules.values() for exponent in uses})
    low, high = exponents[0], exponents[-1]
    cell = min(28.0, (WIDTH - LABEL) / (high - low + 1))
    chart = Chart(LABEL + max(cell * (high - low + 1), 120) + 20, f"Scale exponents of the {side}, per layer")
    most = math.log10(max(count for uses in modules.values() for count in uses.values()) + 1)
    for number, (module, uses) in enumerate(modules.items()):
        y = ROW + number * ROW
        chart.text(LABEL - 6, y + 9, module, "end")
        for exponent, count in uses.items():
            x = LABEL + (int(exponent) - low) * cell
            shade = 0.15 + 0.85 * math.log10(count + 1) / most
            chart.rect(x, y, cell - 0.5, ROW - 1, "heat", f"{module}: 2^{exponent}: {count} scales", shade)
    for tick in range(low, high + 1, max(1, math.ceil(34 / cell))):
        chart.text(LABEL + (tick - low + 0.5) * cell, 9, f"2^{tick}", "middle", "tick")
    chart.height = ROW * (len(modules) + 1) + 4
    return chart


def code_bars(uses: Sequence[int], labels: Sequence[str], title: str) -> Chart:
    """Use of every code of a format, as shares of the largest."""
    bar, height, top = (WIDTH - 20) / len(uses), 70.0, 12.0
    chart = Chart(WIDTH, title, top + height + 18)
    most, total = max(uses), sum(uses)
    for code, count in enumerate(uses):
        tall, x = height * count / most, 10 + code * bar
        tip = f"code 0x{code:02x} = {labels[code]}: {count} ({100 * count / total:.2f}%)"
        kind = "unreadable" if labels[code] == "NaN" and count else "heat"
        if count:
            chart.rect(x + bar * 0.1, top + height - tall, bar * 0.8, max(tall, 0.6), kind, tip)
        if bar > 30:
            chart.text(x + bar / 2, top + height + 12, labels[code], "middle", "tick")
            chart.text(x + bar / 2, top + height - tall - 3, f"{100 * count / total:.1f}%", "middle", "tick")
        elif code % 16 == 0:
            chart.text(x, top + height + 12, labels[code], "start", "tick")
    chart.path(f"M10 {top + height}H{WIDTH - 10}", "axis")
    return chart


def size_bars(sizes: Mapping[str, Mapping[str, int]]) -> Chart:
    """Bytes by dtype, one stacked row per side on one scale, with the numbers below each other."""
    chart = Chart(WIDTH, "Bytes by dtype")
    dtypes = sorted({dtype for side in sizes.values() for dtype in side})
    most = max(sum(side.values()) for side in sizes.values()) or 1
    for side, found in sizes.items():
        if not found:
            continue
        chart.text(0, chart.height + 12, f"{side}: {human_bytes(sum(found.values()))}", kind="strong")
        x = 0.0
        for number, dtype in enumerate(dtypes):
            wide = WIDTH * found.get(dtype, 0) / most
            if wide:
                name = f"{dtype} {human_bytes(found[dtype])}"
                tip = f"{dtype}: {human_bytes(found[dtype])}"
                chart.rect(x, chart.height + 18, max(wide, 0.5), 22, f"dtype{number % 6}", tip)
                if wide > 8 * len(name):
                    chart.text(x + 6, chart.height + 33, name, kind="onbar")
            x += wide
        chart.height += 54
    return chart


def short(count: int) -> str:
    """`18087936` -> `18.1M`, for labels on bars."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= factor:
            return f"{count / (1000 if unit == 'k' else factor):.3g}{unit}"
    return str(count)
