"""Text is printed, and made printable, in few places: the sinks. Everybody else passes names as they were found."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("quant", "convert", "model", "src/dsv4")

# Who may escape: where text is laid out, printed, becomes an error's message, or is put into a page.
ESCAPE = {
    "src/dsv4/text.py", "src/dsv4/output.py", "src/dsv4/errors.py", "src/dsv4/cli.py",
    "convert/proof/report/template.py",
}  # fmt: skip
# Who may print. `dsv4 --version` is a constant.
PRINT = {"src/dsv4/output.py", "src/dsv4/cli.py"}


def _names() -> Iterator[tuple[str, str]]:
    """File and name, with its dots, of everything that is used."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.relative_to(ROOT).as_posix().startswith(("src/dsv4/quant", "src/dsv4/convert", "src/dsv4/model")):
                continue  # links to the other rooms
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Name | ast.Attribute):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node)


def test_text_is_escaped_at_the_sinks() -> None:
    assert {file for file, name in _names() if name == "printable"} == ESCAPE


def test_text_is_printed_at_the_sink() -> None:
    printing = {"print", "sys.stdout.write", "sys.stderr.write", "typer.echo"}
    assert {file for file, name in _names() if name in printing} == PRINT
