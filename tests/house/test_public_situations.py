"""tests/public_situations.md: every report is linked, and every test that is named there exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = (TESTS / "public_situations.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| situation")
]
REPORT = re.compile(r"[\w.-]+/[\w.-]+#\d+")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
@pytest.mark.fast_cases(7)
def test_a_row_names_reports_and_a_test(row: list[str]) -> None:
    situation, reports, behaviour, test = (cell.strip(" |") for cell in row)
    assert situation and behaviour
    assert all(REPORT.fullmatch(report) for report in reports.split(", "))
    file, _, name = test.partition("::")
    found = list(TESTS.rglob(file))
    assert found, file
    functions = {node.name for path in found for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}
    assert name in functions, f"{file} has no {name}"


def test_no_report_stands_in_two_rows() -> None:
    reports = [report for row in ROWS for report in REPORT.findall(row[1])]
    assert len(reports) == len(set(reports))
