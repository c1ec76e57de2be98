"""The report page of `verify`: one HTML file made from the JSON alone, so that numbers and pictures cannot disagree.

Self-contained: style and SVG inline, no script, nothing fetched. Readable in light and dark, on a phone (charts scroll
sideways within their frames) and on paper (everything fits the width). This module prepares what the template
`verify.html.j2` lays out.
"""

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from dsv4.convert.proof.index import ignored_lines
from dsv4.convert.proof.values.formats import E2M1, E4M3, Format, decode
from dsv4.errors import EXIT_DONE, EXIT_SAMPLE
from dsv4.text import human_bytes

from .charts import Chart, code_bars, proof_grid, scale_map, size_bars, span_histogram
from .template import render_page

LISTED = 200  # differing tensors and problems shown; the JSON has all
IN_BANNER = 10  # problems shown beside the verdict; all are listed below it
BLOCKS = 24
GOOD = (EXIT_DONE, EXIT_SAMPLE)
Step = tuple[str, str]  # advice, and a command for it or ""

LEGEND = (
    ("same", "same bytes"),
    ("equal", "equal values"),
    ("differs", "differs, missing or extra"),
    ("unreadable", "unreadable"),
    ("unchecked", "not checked"),
)


LEGEND_OF_A_SAMPLE = (("same", "same bytes in the sample"), ("equal", "equal values in the sample"))


def made_by(command: str = "") -> dict[str, str]:
    """Version, time and command line for the page and the JSON."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": version("dsv4"), "date": now, "command": command}


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = max(found["seconds"], 1e-9)
    read = f"{human_bytes(found['read_bytes'])} in {seconds:.1f} s, {human_bytes(found['read_bytes'] / seconds)}/s"
    made = found["made_by"]
    facts = [
        ("Source", found["source"]),
        ("Output", found["output"]),
        ("Checked", found["selection"] or "everything"),
        ("Read", read),
        ("Made by", f"dsv4 {made['version']}, {made['date']}"),
        ("Command", made["command"]),
    ]
    return [(name, value) for name, value in facts if value]


def _wrong(found: dict[str, Any]) -> list[dict[str, str]]:
    return [problem for problem in found["problems"] if problem["severity"] != "note"]


def _sentence(problem: dict[str, str]) -> str:
    return f"{problem['where']} {problem['area']}: {problem['text']}"


def _next_for_a_difference(found: dict[str, Any]) -> Iterator[Step]:
    counts = found["counts"]
    if counts["*"] or counts["-"] or counts["+"]:
        yield "Do not use the output in place of the source: it is another model. The tensors are listed below.", ""
        yield (
            "If it was converted with --on-inexact round, compare the listed blocks with those that convert named.",
            "",
        )
    if any(problem["area"] in ("config", "side file") for problem in _wrong(found)):
        yield "Mend the files that the problems name, such as config.json, and verify again.", ""
    if any(problem["area"] in ("index", "shard", "layout", "manifest", "codes") for problem in _wrong(found)):
        yield "Download or convert the files that the problems name again, and verify again.", ""


def next_steps(found: dict[str, Any]) -> list[Step]:
    """What to do after this verdict."""
    source, output = found["source"], found["output"]
    if found["exit_code"] == 3:
        return [("Download or copy the files that the problems name again, and verify again.", "")]
    if found["exit_code"] not in GOOD:
        return list(_next_for_a_difference(found))
    if found["selection"]:
        words = "Only a part was compared. Verify without --tensor, --shard and --sample for a proof:"
        return [(words, shlex.join(["dsv4", "verify", *([source] if source else []), output]))]
    if source is None:
        command = shlex.join(["dsv4", "verify", "SOURCE", output])
        return [("Compare it with the checkpoint that it was made from:", command)]
    doctor = ("See how an engine loads the output:", shlex.join(["dsv4", "doctor", output, "--for", "vllm"]))
    if source.startswith(("hf:", "ms:")):
        return [doctor]
    run = shlex.join(["dsv4", "run", source, "-p", "Hello", "--compare", output])
    return [("Compare the logits of both:", run), doctor]


def _counts(found: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(status, meaning, tensors) of every status that occurs."""
    return [(status, found["statuses"][status], count) for status, count in found["counts"].items() if count]


def _signs(found: dict[str, Any]) -> list[str]:
    pairs = (
        ("negative_zeros_became_positive", "negative zeros became positive"),
        ("positive_zeros_became_negative", "positive zeros became negative"),
    )
    return [f"{found[key]:,} {words}: equal in value, not in sign." for key, words in pairs if found[key]]


def _inverse(inverse: dict[str, Any]) -> list[tuple[str, list[str], int]]:
    """(sentence, names of tensors, how many more) about the codes that were rebuilt."""
    back = inverse["codes"] - inverse["sign"] - inverse["wrong"]
    found: list[tuple[str, list[str], int]] = [
        (f"{back:,} of {inverse['codes']:,} FP4 codes were rebuilt from the output's values.", [], 0)
    ]
    for key, why in (("sign_of_zero_lost_in", "The sign of zero is lost in"), ("not_rebuilt", "Values differ in")):
        if names := inverse[key]:
            found.append((f"{why} {len(names):,} tensors:", names[:BLOCKS], max(len(names) - BLOCKS, 0)))
    return found


def _element(side: dict[str, Any]) -> str:
    scale = f" × {side['scale']}" if side["scale"] else ""
    return f"{side['code']}{scale} = {side['value']}"


def _where(difference: dict[str, Any]) -> list[str]:
    """Lines about a differing tensor: reason, number of elements, blocks, the first element."""
    lines = [difference["reason"]] if difference.get("reason") else []
    if count := difference.get("different_elements"):
        lines.append(f"{count:,} of {difference['elements']:,} elements")
    if blocks := difference.get("blocks"):
        some = " ".join(f"({row},{column})" for row, column, _ in blocks[:BLOCKS])
        more = difference["different_blocks"] - BLOCKS
        size = "x".join(map(str, difference["block"]))
        lines.append(f"{size} blocks {some}" + (f" and {more:,} more" if more > 0 else ""))
    for first in difference.get("first_differences", [])[:1]:
        lines += [f"first at {first['at']}: source {_element(first['source'])}", f"output {_element(first['output'])}"]
    return lines


def _differences(found: dict[str, Any]) -> dict[str, Any]:
    """Differing tensors with their lines; a scale is left out where its weight is listed."""
    differences = found["differences"]
    names = {difference["name"] for difference in differences}
    listed = [d for d in differences if d["name"].removesuffix("scale") + "weight" not in names]
    return {
        "count": len(differences),
        "scales": len(differences) - len(listed),
        "rows": [(d["status"], d["name"], _where(d)) for d in listed[:LISTED]],
        "more": max(len(listed) - LISTED, 0),
    }


def _value_labels(number_format: Format) -> list[str]:
    """The value of each code, as text."""
    values = decode(number_format, np.arange(1 << number_format.bits))
    numbers = values.mantissa.astype(np.float64) * 2.0**values.exponent
    signed = zip(values.negative, numbers, values.special, strict=True)
    return ["NaN" if special else f"{'-' if negative else ''}{number:g}" for negative, number, special in signed]


def _codes(found: dict[str, Any]) -> list[tuple[str, Chart]]:
    """(title, chart) per side and format."""
    charts = []
    for key, uses in sorted(found["statistics"]["code_use"].items(), reverse=True):
        side, name = key.split()
        if sum(uses):
            labels = _value_labels(E2M1 if name == "E2M1" else E4M3)
            title = f"{side}, {'FP4 (E2M1)' if name == 'E2M1' else 'FP8 (E4M3)'}"
            charts.append((title, code_bars(uses, labels, f"Use of {name} codes in the {side}")))
    return charts


def _sizes(found: dict[str, Any]) -> dict[str, Any]:
    sizes = found["statistics"]["bytes_by_dtype"]
    dtypes = sorted({dtype for side in sizes.values() for dtype in side})
    rows = [(dtype, [human_bytes(side.get(dtype, 0)) for side in sizes.values()]) for dtype in dtypes]
    return {"chart": size_bars(sizes), "sides": list(sizes), "rows": rows}


def render(found: dict[str, Any]) -> str:
    """The page for one result: `Verification.to_json()` with a `made_by`."""
    word, _, rest = found["verdict"].partition(":")
    statistics, wrong = found["statistics"], _wrong(found)
    blocks = statistics.get("fp8_blocks")
    scales = statistics["scale_exponents"].items()
    return render_page(
        "verify.html.j2",
        found=found,
        good=found["exit_code"] in GOOD,
        word=word,
        rest=f":{rest}" if rest else "",
        problems=[_sentence(problem) for problem in wrong],
        ignored=ignored_lines(found["ignored"]),
        notes=[_sentence(problem) for problem in found["problems"] if problem["severity"] == "note"],
        in_banner=IN_BANNER,
        listed=LISTED,
        facts=_facts(found),
        steps=next_steps(found),
        counts=_counts(found),
        signs=_signs(found),
        legend=LEGEND if "audit" not in found else (*LEGEND_OF_A_SAMPLE, *LEGEND[2:]),
        grid=proof_grid(found["experts"], found["others"], {**found["statuses"], ".": "not checked"}),
        blocks=blocks,
        spans=span_histogram(blocks["spans"], blocks["span_limit"]) if blocks else None,
        differences=_differences(found),
        inverse=_inverse(found["inverse"]) if "inverse" in found else [],
        scales=[(side, scale_map(modules, side)) for side, modules in scales],
        codes=_codes(found),
        sizes=_sizes(found),
    )
