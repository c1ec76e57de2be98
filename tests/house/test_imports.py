"""Imports point one way: errors <- quant <- convert <- model <- the command line, and between the rooms of convert."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"dsv4": ROOT / "src" / "dsv4", **{f"dsv4.{name}": ROOT / name for name in ("quant", "convert", "model")}}


def modules() -> list[tuple[str, Path]]:
    """(package, file) of every module; links are not followed, so each is met once."""
    return [
        (".".join((top, *path.relative_to(folder).parts[:-1])), path)
        for top, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
        if "__pycache__" not in path.parts and path.relative_to(folder).parts[0] not in ("quant", "convert", "model")
    ]


MODULES = modules()
# Below all rooms: errors, words, progress, machine, files that appear whole, the loader of compiled code; nothing about
# checkpoints or numbers.
BOTTOM = ("dsv4.errors", "dsv4.text", "dsv4.progress", "dsv4.machine", "dsv4.files", "dsv4.compiled")
# What each room may take from dsv4, BOTTOM and its own modules aside. The most specific row counts.
ROOMS: dict[str, tuple[str, ...]] = {
    "dsv4.quant": (),
    "dsv4.convert": ("dsv4.convert",),
    "dsv4.convert.checkpoint": ("dsv4.quant",),
    "dsv4.convert.plan": ("dsv4.quant", "dsv4.convert.checkpoint"),
    "dsv4.convert.write": ("dsv4.quant", "dsv4.convert.checkpoint", "dsv4.convert.plan", "dsv4.__version__"),
    "dsv4.convert.hub": ("dsv4.convert.checkpoint",),
    "dsv4.convert.proof": (),  # promise 9: nothing of the converter
    "dsv4.convert.inspect": ("dsv4.quant", "dsv4.convert.checkpoint", "dsv4.convert.plan"),
    "dsv4.convert.doctor": ("dsv4.convert.checkpoint", "dsv4.convert.plan", "dsv4.convert.inspect"),
    "dsv4.convert.synthetic": ("dsv4.quant",),
    "dsv4.model": ("dsv4.quant", "dsv4.convert.checkpoint", "dsv4.model", "dsv4.__version__"),
    "dsv4": ("dsv4",),
}


def room_of(package: str) -> str:
    """The row of ROOMS that a package falls under."""
    return max((room for room in ROOMS if is_inside(package, (room,))), key=len)


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
    room = room_of(package)
    allowed = (*BOTTOM, room, *ROOMS[room])
    ours = {name for name in imported(ast.parse(source), package) if name.split(".")[0] == "dsv4"}
    return {name for name in ours if not is_inside(name, allowed)}


def test_direction() -> None:
    wrong: dict[str, set[str]] = {}
    for package, path in MODULES:
        source = path.read_text(encoding="utf-8")
        names = imported(ast.parse(source), package)
        outside = {name for name in names if name.split(".")[0] in ("click", "tests", "quant", "convert", "model")}
        if found := wrong_imports(package, source) | outside:
            wrong[f"{package}/{path.name}"] = found
    assert len(MODULES) > 200 and wrong == {}


def test_the_bottom_imports_only_itself() -> None:
    for module in BOTTOM:
        path = PACKAGES["dsv4"] / f"{module.removeprefix('dsv4.')}.py"
        ours = {name for name in imported(ast.parse(path.read_text()), "dsv4") if is_inside(name, ("dsv4",))}
        assert all(is_inside(name, BOTTOM) for name in ours), module


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("dsv4.quant", "from dsv4.convert.plan.plan import Plan"),
        ("dsv4.convert.checkpoint", "from dsv4.convert.plan.plan import Plan"),
        ("dsv4.convert.plan", "from dsv4.convert.write import journal"),
        ("dsv4.convert.write", "from dsv4.model.kernels.reference import linear"),
        ("dsv4.convert.hub", "def f():\n    import dsv4.output"),
        ("dsv4.convert.proof", "from dsv4.convert.checkpoint.header import Entry"),
        ("dsv4.convert.proof", "from dsv4.quant import e2m1"),
        ("dsv4.convert.proof", "def f():\n    from dsv4.convert import convert"),
        ("dsv4.model", "from dsv4.convert.plan.plan import Plan"),
        ("dsv4.model.layers", "from dsv4.convert import checkpoint, plan"),
        ("dsv4.quant", "from dsv4 import cli"),
    ],
)
def test_a_wrong_arrow_is_noticed(package: str, line: str) -> None:
    assert wrong_imports(package, line)


def _graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, at the top or inside a function."""
    names = {f"{package}.{path.stem}" if path.stem != "__init__" else package for package, path in MODULES}
    graph: dict[str, set[str]] = {}
    for package, path in MODULES:
        own = package if path.stem == "__init__" else f"{package}.{path.stem}"
        taken = imported(ast.parse(path.read_text(encoding="utf-8")), package)
        graph[own] = {n if n in names else n.rpartition(".")[0] for n in taken if n.startswith("dsv4")} & names - {own}
    return graph


def test_no_import_cycle() -> None:
    # A package's __init__ names what it offers lazily, so arrows into packages themselves are left out.
    packages = {package for package, _ in MODULES}
    graph = {name: taken - packages for name, taken in _graph().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


MOST_FILES = 12


@pytest.mark.parametrize("folder", sorted({path.parent for _, path in MODULES}), ids=lambda path: path.name)
def test_rooms_are_small(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.suffix in (".py", ".c", ".h") and path.stem != "__init__"]
    assert len(files) <= MOST_FILES, [path.name for path in files]


def test_every_module_says_what_it_is_for() -> None:
    for _, path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
