"""Imports point one way: errors <- quant <- convert <- model <- the command line. `model` takes the reader only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"dsv4": ROOT / "src" / "dsv4", **{f"dsv4.{name}": ROOT / name for name in ("quant", "convert", "model")}}
MODULES = [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.glob("*.py"))]

# What a module of each package may take from ours. src/dsv4 may take anything.
ALLOWED = {
    "dsv4.quant": ("dsv4.errors", "dsv4.quant"),
    "dsv4.convert": ("dsv4.errors", "dsv4.quant", "dsv4.convert"),
    "dsv4.model": ("dsv4.errors", "dsv4.quant", "dsv4.model", "dsv4.convert.checkpoint"),
}
VERSION = {"dsv4.convert": ("dsv4.__version__",), "dsv4.model": ("dsv4.__version__",)}  # `from dsv4 import __version__`


def imported(tree: ast.AST, package: str) -> set[str]:
    """Full names of everything that a module imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, "relative imports stay inside a folder"
            base = f"{package}.{node.module}" if node.level and node.module else package if node.level else node.module
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def wrong_imports(package: str, source: str) -> set[str]:
    ours = {name for name in imported(ast.parse(source), package) if name.split(".")[0] == "dsv4"}
    return {name for name in ours if not is_inside(name, (*ALLOWED[package], *VERSION.get(package, ())))}


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda value: getattr(value, "name", value))
def test_direction(package: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if package != "dsv4":
        assert not wrong_imports(package, source)
    names = imported(ast.parse(source), package)
    assert not {name for name in names if name.split(".")[0] in ("click", "tests", "quant", "convert", "model")}


def test_errors_imports_nothing() -> None:
    assert not imported(ast.parse((PACKAGES["dsv4"] / "errors.py").read_text()), "dsv4")


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("dsv4.quant", "from dsv4.convert.plan import Plan"),
        ("dsv4.convert", "from dsv4.model.ops import linear"),
        ("dsv4.convert", "def f():\n    import dsv4.output"),
        ("dsv4.model", "from dsv4.convert.plan import Plan"),
        ("dsv4.model", "from dsv4.convert import checkpoint, plan"),
        ("dsv4.quant", "from dsv4 import cli"),
    ],
)
def test_a_wrong_arrow_is_noticed(package: str, line: str) -> None:
    assert wrong_imports(package, line)


def test_every_module_says_what_it_is_for() -> None:
    for _, path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
