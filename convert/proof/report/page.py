"""The report page of `verify`: one HTML file made from the JSON alone, so that numbers and pictures cannot disagree.

Self-contained: style and SVG inline, no script, nothing fetched. Readable in light and dark, on a phone (charts
scroll sideways within their frames) and on paper (everything fits the width). Names come from files that nobody
vouches for: each is escaped before it enters the page.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from dsv4.convert.proof.values.formats import E2M1, E4M3, Format, decode
from dsv4.errors import printable

from .charts import code_bars, gigabytes, proof_grid, scale_map, size_bars, span_histogram

LISTED = 200  # differing tensors shown; the JSON has all
BLOCKS = 24

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --panel: #f5f7fa;
  --same: #9cc5e8; --equal: #4f94cd; --differs: #b3261e; --unreadable: #6a1b9a; --unchecked: #e4e8ee; --heat: #2f6da8;
  --good: #19693a; --bad: #b3261e; --beyond: #c98a00; --d0: #2f6da8; --d1: #8a6d1f; --d2: #3c7d4b; --d3: #7d4b8f;
  --d4: #a3522f; --d5: #4b5a6b; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --ink: #e6ebf2; --soft: #9aa7b8; --line: #323b48;
  --panel: #1a2029; --same: #2f5f8a; --equal: #63a8e3; --differs: #ff6b5e; --unreadable: #d08bf5; --unchecked: #2a323d;
  --heat: #6fb1ec; --good: #5fd38d; --bad: #ff7b70; --beyond: #f0b429; --d0: #3a75ad; --d1: #8a7230; --d2: #3f7d50;
  --d3: #86569a; --d4: #a85b3a; --d5: #5c6c7f; } }
@media print { :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #333; --line: #999; --panel: #fff;
  --same: #b9d6ee; --equal: #6ea8d8; --differs: #8c0d06; --unreadable: #4a0d6e; --unchecked: #eee; --heat: #1f4f80;
  --good: #0b4a24; --bad: #8c0d06; --beyond: #8a5f00; }
  body { font-size: 9pt; padding: 0; } .frame { overflow: visible; break-inside: avoid; }
  .frame svg { min-width: 0 !important; } h2, p.soft { break-after: avoid; }
  section { break-inside: avoid-page; } section.long { break-inside: auto; } tr { break-inside: avoid; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; max-width: 1040px; padding: 20px 16px 40px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 12px; } h2 { font-size: 1.05rem; margin: 28px 0 6px; }
p { margin: 4px 0 8px; } .soft { color: var(--soft); } code { font-size: .88em; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--good); background: var(--panel); padding: 12px 14px; font-size: 1.1rem;
  font-weight: 600; } .verdict.bad { border-color: var(--bad); }
.verdict b { color: var(--good); } .verdict.bad b { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; } td, th { text-align: left; vertical-align: top;
  padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right;
  white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 12px 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } .frame { overflow-x: auto; border: 1px solid var(--line); padding: 10px;
  border-radius: 4px; } svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .88rem; margin: 6px 0; }
.legend span::before { content: ""; display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  vertical-align: -1px; background: var(--c); }
.label, .tick { fill: var(--soft); font-size: 9.5px; } .tick { font-size: 9px; }
.big { fill: var(--soft); font-size: 12px; } .strong { fill: var(--ink); font-size: 11px; font-weight: 600; }
.big.strong { font-size: 13px; } .onbar { fill: #fff; font-size: 11px; }
.same { fill: var(--same); } .equal { fill: var(--equal); } .differs { fill: var(--differs); }
.unreadable { fill: var(--unreadable); } .unchecked { fill: var(--unchecked); } .heat { fill: var(--heat); }
.beyond { fill: var(--beyond); } .limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 5 3; fill: none; }
.gap { stroke: var(--page); stroke-width: .6; } .axis { stroke: var(--line); }
.dtype0 { fill: var(--d0); } .dtype1 { fill: var(--d1); } .dtype2 { fill: var(--d2); } .dtype3 { fill: var(--d3); }
.dtype4 { fill: var(--d4); } .dtype5 { fill: var(--d5); }
.wide td:first-child { white-space: nowrap; }
@media (max-width: 600px) { .wide td { display: block; border: 0; padding: 2px 0; white-space: normal !important; }
  .wide tr { display: block; border-bottom: 1px solid var(--line); padding: 4px 0; } .wide th { display: none; }
  body { padding: 14px 10px 30px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; } td, th { padding-right: 6px; } }
"""


def _safe(value: object) -> str:
    """Any text from outside, for the page."""
    return escape(printable(str(value)))


def _section(title: str, body: Iterable[str], kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{"".join(body)}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Cells are HTML already. Columns in `numbers` are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line(head, 'th') if head else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _frame(chart: str) -> str:
    return f'<div class="frame">{chart}</div>'


def _head(found: dict[str, Any]) -> str:
    word, _, rest = found["verdict"].partition(":")
    kind = "" if found["exit_code"] == 0 else " bad"
    facts = [("Source", found["source"]), ("Output", found["output"]), ("Checked", found["selection"] or "everything")]
    seconds = max(found["seconds"], 1e-9)
    facts.append(
        ("Read", f"{gigabytes(found['read_bytes'])} in {seconds:.1f} s, {gigabytes(found['read_bytes'] / seconds)}/s")
    )
    listed = "".join(f"<dt>{name}</dt><dd>{_safe(value)}</dd>" for name, value in facts if value)
    return f'<div class="verdict{kind}"><b>{_safe(word)}</b>:{_safe(rest)}</div><dl>{listed}</dl>'


def _counts(found: dict[str, Any]) -> str:
    rows = [
        (f"<code>{_safe(status)}</code>", _safe(found["statuses"][status]), f"{count:,}")
        for status, count in found["counts"].items()
        if count or status in "=≈*"
    ]
    words = []
    for key, what in (
        ("negative_zeros_became_positive", "negative zeros became positive"),
        ("positive_zeros_became_negative", "positive zeros became negative"),
    ):
        if found[key]:
            words.append(f"<p>{found[key]:,} {what}: equal in value, not in sign.</p>")
    return _section("Tensors", [_table((), rows, frozenset({2})), *words])


def _inverse(found: dict[str, Any]) -> str:
    inverse = found.get("inverse")
    if inverse is None:
        return ""
    back = inverse["codes"] - inverse["sign"] - inverse["wrong"]
    body = [f"<p>{back:,} of {inverse['codes']:,} FP4 codes were rebuilt from the output's values.</p>"]
    for key, why in (("sign_of_zero_lost_in", "The sign of zero is gone in"), ("not_rebuilt", "Values differ in")):
        if names := inverse[key]:
            some = ", ".join(f"<code>{_safe(name)}</code>" for name in names[:BLOCKS])
            more = f" and {len(names) - BLOCKS:,} more" if len(names) > BLOCKS else ""
            body.append(f"<p>{why} {len(names):,} tensors: {some}{more}.</p>")
    return _section("The way back", body)


def _problems(found: dict[str, Any]) -> str:
    rows = [
        (_safe(problem["where"]), _safe(problem["area"]), _safe(problem["text"]))
        for problem in sorted(found["problems"], key=lambda p: p["severity"] == "note")
    ]
    if not rows:
        return ""
    some = [*rows[:LISTED], *([("", "", f"and {len(rows) - LISTED:,} more")] if len(rows) > LISTED else [])]
    noted = sum(problem["severity"] == "note" for problem in found["problems"])
    title = f"Beside the values: {len(rows) - noted:,} problems, {noted:,} notes"
    return _section(title, [_table(("", "", ""), some)], "long")


def _where(difference: dict[str, Any]) -> str:
    """Blocks and the first element of a differing tensor."""
    words = [_safe(difference["reason"])] if difference.get("reason") else []
    if count := difference.get("different_elements"):
        words.append(f"{count:,} of {difference['elements']:,} elements")
    if blocks := difference.get("blocks"):
        some = " ".join(f"({row},{column})" for row, column, _ in blocks[:BLOCKS])
        more = difference["different_blocks"] - BLOCKS
        size = "x".join(map(str, difference["block"]))
        words.append(f"{size} blocks {some}" + (f" and {more:,} more" if more > 0 else ""))
    for first in difference.get("first_differences", [])[:1]:
        sides = [first[side] for side in ("source", "output")]
        shown = [f"{s['code']}" + (f" · {s['scale']}" if s["scale"] else "") + f" = {s['value']}" for s in sides]
        words.append(f"first at {first['at']}: <code>{_safe(shown[0])}</code>, then <code>{_safe(shown[1])}</code>")
    return "<br>".join(words)


def _differences(found: dict[str, Any]) -> str:
    differences = found["differences"]
    if not differences:
        return ""
    names = {difference["name"] for difference in differences}
    listed = [d for d in differences if d["name"].removesuffix("scale") + "weight" not in names]
    rows = [(f"<code>{_safe(d['status'])} {_safe(d['name'])}</code>", _where(d)) for d in listed[:LISTED]]
    if len(listed) > LISTED:
        rows.append(("", f"and {len(listed) - LISTED:,} more, all in the JSON"))
    note = "<p class=soft>A scale is listed with its weight.</p>" if len(listed) < len(differences) else ""
    title = f"Not the same: {len(differences):,} tensors"
    return _section(title, [note, _table(("Tensor", "Where"), rows)], "long wide")


def _grid(found: dict[str, Any]) -> str:
    words = {**found["statuses"], ".": "not checked"}
    legend = (
        ("same", "same bytes"),
        ("equal", "equal values"),
        ("differs", "differs, missing or extra"),
        ("unreadable", "unreadable"),
        ("unchecked", "not checked"),
    )
    keys = "".join(f'<span style="--c:var(--{kind})">{escape(word)}</span>' for kind, word in legend)
    body = [
        "<p class=soft>One row per layer: first all but the routed experts, then one cell per expert.</p>",
        f'<div class="legend">{keys}</div>',
        _frame(proof_grid(found["experts"], found["others"], words)),
    ]
    return _section("Proof grid", body)


def _spans(found: dict[str, Any]) -> str:
    blocks = found["statistics"].get("fp8_blocks")
    if not blocks:
        return ""
    words = [
        f"{blocks['count']:,} FP8 blocks hold FP4 groups.",
        f"Smallest headroom: 2^{blocks['smallest_headroom']}.",
        f"Another scale than the reference rule's (largest / 2^6): {blocks['other_scale_than_reference']:,} blocks.",
    ]
    if beyond := blocks["beyond_span_limit"]:
        words.append(
            f"{beyond:,} blocks lie beyond the limit: there it depends on the codes whether an exact form exists."
        )
    chart = span_histogram(blocks["spans"], blocks["span_limit"])
    return _section("How close to the edge", [f"<p>{' '.join(words)}</p>", _frame(chart)])


def _scales(found: dict[str, Any]) -> str:
    body = []
    for side, modules in found["statistics"]["scale_exponents"].items():
        body += [
            f"<p class=soft>Scales of the {_safe(side)}; the stronger the colour, the more of them.</p>",
            _frame(scale_map(modules, side)),
        ]
    return _section("Scale map", body, "long") if body else ""


def _value_labels(number_format: Format) -> list[str]:
    values = decode(number_format, np.arange(1 << number_format.bits))
    found = []
    for negative, mantissa, exponent, special in zip(
        values.negative, values.mantissa, values.exponent, values.special, strict=True
    ):
        number = f"{float(mantissa) * 2.0 ** int(exponent):g}"
        found.append("NaN" if special else ("-" if negative else "") + number)
    return found


def _codes(found: dict[str, Any]) -> str:
    body = []
    for key, uses in sorted(found["statistics"]["code_use"].items(), reverse=True):
        side, name = key.split()
        if sum(uses):
            labels = _value_labels(E2M1 if name == "E2M1" else E4M3)
            body.append(f"<p class=soft>{_safe(side)}, {'FP4 (E2M1)' if name == 'E2M1' else 'FP8 (E4M3)'}</p>")
            body.append(_frame(code_bars(uses, labels, f"Use of {name} codes in the {side}")))
    if not body:
        return ""
    note = "<p class=soft>Counted in the first of every eight stretches of each tensor, of about a megabyte each.</p>"
    return _section("Use of codes", [note, *body], "long")


def _sizes(found: dict[str, Any]) -> str:
    sizes = found["statistics"]["bytes_by_dtype"]
    dtypes = sorted({dtype for side in sizes.values() for dtype in side})
    rows = [[_safe(dtype), *(gigabytes(side.get(dtype, 0)) for side in sizes.values())] for dtype in dtypes]
    table = _table(["", *map(_safe, sizes)], rows, frozenset({1, 2}))
    return _section("Bytes by dtype", [_frame(size_bars(sizes)), table])


def render(found: dict[str, Any]) -> str:
    """The page for one result of `Verification.to_json()`."""
    parts = (_counts, _grid, _spans, _differences, _problems, _inverse, _scales, _codes, _sizes)
    body = _head(found) + "".join(part(found) for part in parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dsv4 verify</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>dsv4 verify</h1>{body}</body></html>\n"
    )
