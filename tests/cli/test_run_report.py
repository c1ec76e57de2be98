"""The page of `run --compare`: its numbers are the comparison's, its charts have scales."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsv4 import output
from dsv4.commands.run.compare import _conclude, verdict
from dsv4.commands.run.options import RunOptions
from dsv4.commands.run.report import agreement, curve, next_steps, render
from dsv4.convert.proof.report.charts import Chart
from dsv4.model.evaluate.compare import Comparison

FOUND = Comparison(
    bit_equal=False, max_difference=0.5, mean_kl=0.125, max_kl=0.25, top1_agreement=2 / 3, mtp_max_difference=0.75,
    first_module="layers.1.ffn", first_position=2, difference=[0.0, 0.5, 0.0625], kl=[0.0, 0.25, 0.125],
    top1=[True, True, False],
)  # fmt: skip


def page_of(comparison: Comparison, tolerance: float = 0.0) -> str:
    return render(("a", "<b>"), [5, 6, 7], comparison, verdict(comparison, tolerance), tolerance, "dsv4 run a")


def rows(page: str) -> dict[str, list[str]]:
    """First cell of a table row -> the others."""
    found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return {cells[0]: cells[1:] for cells in found if cells}


def test_every_number_is_in_its_row() -> None:
    found = rows(page_of(FOUND))
    assert found == {
        "Bits of all logits": ["equal", "not equal"],
        "Largest |difference| of a logit": ["0", "0.5"],
        "Largest |difference|, drafts": ["0", "0.75"],
        "KL divergence, mean (nats)": ["0", "0.125"],
        "KL divergence, largest (nats)": ["0", "0.25"],
        "Likeliest token agrees": ["at all 3 positions", "at 2 of 3 positions"],
    }
    without = rows(page_of(replace(FOUND, mtp_max_difference=None)))
    assert without["Largest |difference|, drafts"] == ["0", "not compared"]


def test_red_or_green_and_the_first_module() -> None:
    page = page_of(FOUND)
    banner = page[page.index('<div class="verdict') : page.index("<dl>")]
    assert '"verdict bad"' in banner and "DIFFERENT" in banner
    assert "First module that differs: layers.1.ffn, at position 2" in banner
    page = page_of(FOUND, tolerance=1.0)
    assert '<div class="verdict"><p><b>within tolerance</b>' in page and "0 (up to 1 accepted)" in page
    equal = replace(FOUND, bit_equal=True, first_module=None, first_position=None)
    assert '<div class="verdict"><p><b>BIT-EQUAL</b>' in page_of(equal) and "First module" not in page_of(equal)


@pytest.mark.parametrize(("tolerance", "mode"), [(0.0, "text"), (1.0, "text"), (0.0, "json")])
def test_a_difference_that_the_logits_lost_is_in_the_one_verdict(
    tolerance: float, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, because the logits have the same bits; but nothing says that all is equal."""
    lost = replace(FOUND, bit_equal=True, max_difference=0.0, mtp_max_difference=None)
    page = tmp_path / "page.html"
    options = RunOptions(checkpoint="a", compare="b", tokens="5,6,7", tolerance=tolerance, report=str(page))
    out = output.configure(mode == "json", False, False)
    assert _conclude(lost, ("a", "b"), [5, 6, 7], options, out) == 0
    said = capsys.readouterr().out
    sentence = json.loads(said)["verdict"] if mode == "json" else said.strip()
    assert sentence.startswith("BIT-EQUAL LOGITS, OTHER MODULES: ") and "first layers.1.ffn, position 2" in sentence
    word, rest = sentence.split(":", 1)
    assert f"<p><b>{word}</b>:{rest}</p>" in page.read_text()


def test_the_page_says_what_to_do_next(tmp_path: Path) -> None:
    options = RunOptions(checkpoint="a b", compare="c", tokens="5,6,7", report="page.html")
    sides, equal = ("a b", "c"), replace(FOUND, bit_equal=True, first_module=None, first_position=None)
    commands = [command for _, command in next_steps(sides, equal, options)]
    assert commands == ["dsv4 verify 'a b' c", "dsv4 doctor c --for vllm"]
    repeated = "dsv4 run 'a b' --tokens 5,6,7 --no-simulation --compare c"
    steps = next_steps(sides, FOUND, options)
    assert steps[0][1] == "dsv4 verify 'a b' c" and sorted(steps[1][1].split()) == sorted(repeated.split())
    assert [step[1] for step in next_steps(sides, FOUND, replace(options, no_simulation=True))] == [steps[0][1]]
    (tmp_path / "logits").touch()
    of_a_file = next_steps((str(tmp_path / "logits"), "c"), FOUND, options)
    assert [step[1] for step in of_a_file] == ["dsv4 verify SOURCE c"]
    page = render(sides, [5], FOUND, verdict(FOUND, 0.0), 0.0, "dsv4 run", steps)
    assert "<h2>What to do next</h2>" in page and "--no-simulation" in page


def test_self_contained_and_safe() -> None:
    page = page_of(FOUND)
    assert "&lt;b&gt;" in page and "<b>DIFFERENT" in page and "<script" not in page and "http" not in page
    assert "prefers-color-scheme: dark" in page and "max-width: 600px" in page and "dsv4 run a" in page
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert [drawing.get("aria-label") for drawing in drawings] == re.findall(r"<h2>(.*?)</h2>", page)[1:]


def labels(chart: Chart) -> list[str]:
    return [shape.words for shape in chart.shapes if shape.tag == "text"]


def heights(chart: Chart) -> list[float]:
    """Of the points, from the bottom up."""
    return [-float(shape.attributes["y"]) for shape in chart.shapes if shape.tag == "rect"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 0.25], ["0", "0.125", "0.25", "0.375", "0.5", "0", "1", "2"]),
        ([1e-6, 1e-3, 0.5], ["1e-6", "1e-4", "1e-2", "1e0", "0", "1", "2"]),
        ([0.0, 0.0], ["0", "0.25", "0.5", "0.75", "1", "0", "1"]),
        ([3.0], ["0", "0.75", "1.5", "2.25", "3", "0"]),
    ],
)
def test_axes_have_scales(values: list[float], expected: list[str]) -> None:
    chart = curve(values, "title")
    assert labels(chart) == expected
    order = sorted(range(len(values)), key=values.__getitem__)
    assert order == sorted(range(len(values)), key=heights(chart).__getitem__)


def test_what_is_not_finite_lies_at_the_top() -> None:
    chart = curve([1.0, float("inf"), 2.0], "title")
    assert heights(chart)[1] == heights(chart)[2] > heights(chart)[0]


def test_one_cell_per_position() -> None:
    chart = agreement([True, False, True, True])
    kinds = [shape.attributes["class"] for shape in chart.shapes if shape.tag == "rect"]
    assert kinds == ["same", "differs", "same", "same"]


def test_many_positions() -> None:
    """A chart of thousands of positions is one line with about ten labels below."""
    chart = curve([float(i) for i in range(5000)], "title")
    assert len(chart.shapes) < 30 and labels(chart)[-1] == "4500"
    (line,) = [shape for shape in chart.shapes if shape.attributes["class"] == "curve"]
    assert line.attributes["d"].count("L") == 4999
