"""The pictures of the report page: inline SVG made of strings.

Colours are classes, so that the page's style sheet decides them for light, dark and paper. Nothing is told by colour
alone: what differs also has another lightness, and the numbers of every chart are in words or labels beside it.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

LABEL = 64  # room for row labels, in SVG units
ROW = 12
WIDTH = 960
PHONE = 800  # a chart is never drawn smaller than this, so that its labels stay legible: its frame scrolls instead
# Status -> class of a cell in the proof grid.
CELLS = {"=": "same", "≈": "equal", "*": "differs", "-": "differs", "+": "differs", "!": "unreadable", ".": "unchecked"}


def svg(width: float, height: float, body: Sequence[str], title: str, narrowest: float = PHONE) -> str:
    """An SVG element with a title that screen readers say."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width:g}px;min-width:{min(width, narrowest):g}px">{"".join(body)}</svg>'
    )


def rect(x: float, y: float, width: float, height: float, kind: str, tip: str = "", opacity: float = 1.0) -> str:
    """A rectangle; `tip` shows on hovering."""
    fade = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    tip = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{kind}"{fade}>{tip}</rect>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> str:
    """A text."""
    return f'<text x="{x:.2f}" y="{y:.2f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _runs(row: str) -> list[tuple[int, int, str]]:
    """`==*=` -> (0, 2, '='), (2, 1, '*'), (3, 1, '='): one rectangle per run keeps large grids small."""
    found: list[tuple[int, int, str]] = []
    for position, status in enumerate(row):
        if found and found[-1][2] == status:
            found[-1] = (found[-1][0], found[-1][1] + 1, status)
        else:
            found.append((position, 1, status))
    return found


def proof_grid(experts: Mapping[str, str], others: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Modules down, routed experts across; the first cell of a row stands for the module's other tensors."""
    columns = max(map(len, experts.values()), default=0)
    cell = (WIDTH - LABEL - 2 * ROW) / columns if columns else 0.0
    left, body = LABEL + 2.0 * ROW, []
    modules = list(others) + [module for module in experts if module not in others]
    for number, module in enumerate(modules):
        y = ROW + number * ROW
        body.append(text(LABEL - 6, y + 9, module, "end"))
        if status := others.get(module):
            body.append(rect(LABEL, y, ROW, ROW - 2, CELLS[status], f"{module}: other tensors: {words[status]}"))
        for start, count, status in _runs(experts.get(module, "")):
            named = f"expert {start}" if count == 1 else f"experts {start} to {start + count - 1}"
            tip = f"{module}, {named}: {words[status]}"
            body.append(rect(left + start * cell, y, count * cell, ROW - 2, CELLS[status], tip))
    step = next((s for s in (1, 2, 4, 8, 16, 32, 64, 128) if columns / s <= 16), 256)
    body += [text(left + (e + 0.5) * cell, 9, str(e), "middle", "tick") for e in range(0, columns, step)]
    if step * cell > 4:  # lines between cells where there is room for them
        bottom = ROW + len(experts) * ROW + (len(modules) - len(experts)) * ROW
        gap = 1 if cell > 4 else step
        body += [f'<path d="M{left + e * cell:.2f} {ROW}V{bottom}" class="gap"/>' for e in range(gap, columns, gap)]
    return svg(WIDTH, ROW * (len(modules) + 2), body, "Proof grid: one row per layer, one cell per routed expert")


def span_histogram(spans: Mapping[str, int], limit: int) -> str:
    """FP8 blocks by the spread of the FP4 scales inside; heights are logarithmic, counts are written on the bars.

    Narrower than the other charts and with larger letters: the limit has to be in sight on a phone too.
    """
    width, height, top, left = 560.0, 170.0, 40.0, 10.0
    last = max(max(map(int, spans)), limit) + 1
    bar = (width - 2 * left) / (last + 1)
    tallest = math.log10(max(spans.values()) + 1)
    every = math.ceil(20 / bar)
    body = []
    for span in range(last + 1):
        count, x = spans.get(str(span), 0), left + span * bar
        if span % every == 0:
            body.append(text(x + bar / 2, top + height + 15, str(span), "middle", "big"))
        if count:
            tall = max(2.0, height * math.log10(count + 1) / tallest)
            kind = "equal" if span <= limit else "beyond"
            body.append(rect(x + 1, top + height - tall, bar - 2, tall, kind, f"span 2^{span}: {count} blocks"))
            if bar > 30:
                body.append(text(x + bar / 2, top + height - tall - 4, short(count), "middle", "big"))
    edge = left + (limit + 1) * bar
    body.append(f'<path d="M{edge:.2f} 18V{top + height:.2f}" class="limit"/>')
    anchor, shift = ("end", -6) if edge > width / 2 else ("start", 6)
    body.append(text(edge + shift, 16, f"E4M3 absorbs any codes up to 2^{limit}", anchor, "big strong"))
    body.append(text(width / 2, top + height + 34, "log2(largest / smallest scale) in an FP8 block", "middle", "big"))
    return svg(width, top + height + 42, body, "Histogram of scale spans per FP8 block", narrowest=330)


def scale_map(modules: Mapping[str, Mapping[str, int]], side: str) -> str:
    """Modules down, scale exponents across; the darker, the more scales (logarithmic)."""
    exponents = sorted({int(exponent) for uses in modules.values() for exponent in uses})
    low, high = exponents[0], exponents[-1]
    cell = min(28.0, (WIDTH - LABEL) / (high - low + 1))
    most = math.log10(max(count for uses in modules.values() for count in uses.values()) + 1)
    body = []
    for number, (module, uses) in enumerate(modules.items()):
        y = ROW + number * ROW
        body.append(text(LABEL - 6, y + 9, module, "end"))
        for exponent, count in uses.items():
            x = LABEL + (int(exponent) - low) * cell
            shade = 0.15 + 0.85 * math.log10(count + 1) / most
            body.append(rect(x, y, cell - 0.5, ROW - 1, "heat", f"{module}: 2^{exponent}: {count} scales", shade))
    for tick in range(low, high + 1, max(1, math.ceil(34 / cell))):
        body.append(text(LABEL + (tick - low + 0.5) * cell, 9, f"2^{tick}", "middle", "tick"))
    width = LABEL + max(cell * (high - low + 1), 120) + 20
    return svg(width, ROW * (len(modules) + 1) + 4, body, f"Scale exponents of the {side}, per layer")


def code_bars(uses: Sequence[int], labels: Sequence[str], title: str) -> str:
    """Use of every code of a format, as shares of the largest."""
    bar, height, top = (WIDTH - 20) / len(uses), 70.0, 12.0
    most, total = max(uses), sum(uses)
    body = []
    for code, count in enumerate(uses):
        tall, x = height * count / most, 10 + code * bar
        tip = f"code 0x{code:02x} = {labels[code]}: {count} ({100 * count / total:.2f}%)"
        kind = "unreadable" if labels[code] == "NaN" and count else "heat"
        if count:
            body.append(rect(x + bar * 0.1, top + height - tall, bar * 0.8, max(tall, 0.6), kind, tip))
        if bar > 30:
            body.append(text(x + bar / 2, top + height + 12, labels[code], "middle", "tick"))
            body.append(text(x + bar / 2, top + height - tall - 3, f"{100 * count / total:.1f}%", "middle", "tick"))
        elif code % 16 == 0:
            body.append(text(x, top + height + 12, labels[code], "start", "tick"))
    body.append(f'<path d="M10 {top + height}H{WIDTH - 10}" class="axis"/>')
    return svg(WIDTH, top + height + 18, body, title)


def size_bars(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes by dtype, one stacked row per side on one scale, with the numbers below each other."""
    dtypes = sorted({dtype for side in sizes.values() for dtype in side})
    most = max(sum(side.values()) for side in sizes.values()) or 1
    body, y = [], 0.0
    for side, found in sizes.items():
        if not found:
            continue
        body.append(text(0, y + 12, f"{side}: {gigabytes(sum(found.values()))}", kind="strong"))
        x = 0.0
        for dtype in dtypes:
            wide = WIDTH * found.get(dtype, 0) / most
            if wide:
                kind = f"dtype{dtypes.index(dtype) % 6}"
                body.append(rect(x, y + 18, max(wide, 0.5), 22, kind, f"{dtype}: {gigabytes(found[dtype])}"))
                name = f"{dtype} {gigabytes(found[dtype])}"
                if wide > 8 * len(name):
                    body.append(text(x + 6, y + 33, name, kind="onbar"))
            x += wide
        y += 54
    return svg(WIDTH, y, body, "Bytes by dtype")


def gigabytes(count: float) -> str:
    """`159609485896` -> `159.6 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def short(count: int) -> str:
    """`18087936` -> `18.1M`, for labels on bars."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= factor:
            return f"{count / (1000 if unit == 'k' else factor):.3g}{unit}"
    return str(count)
