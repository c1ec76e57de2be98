"""Functions stay small: in the package, in the tests, in benchmarks and examples."""

import ast
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
PACKAGE = ("quant", "convert", "model", "src/dsv4")
MOST_LINES, USUAL_LINES = 60, 8


def functions(*folders: str) -> list[tuple[str, int]]:
    """(place and name, lines with decorators) of every function; links are not followed."""
    found = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if any(parent.is_symlink() for parent in path.parents):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found.append((f"{path.relative_to(ROOT)}: {node.name}", (node.end_lineno or first) - first + 1))
    return found


def test_no_function_is_longer_than_a_screen() -> None:
    every = functions(*PACKAGE, "tests", "benchmarks", "examples", ".ci")
    assert len(every) > 1000
    assert [(name, lines) for name, lines in every if lines > MOST_LINES] == []


def test_most_functions_are_a_few_lines() -> None:
    assert median(lines for _, lines in functions(*PACKAGE)) <= USUAL_LINES
