"""What is installed: the wheel holds `dsv4` and nothing else, complete, and both kinds of install give one command."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dsv4
from dsv4 import compiled

pytestmark = pytest.mark.slow  # they build dsv4, its C code included, and install it

ROOT = Path(__file__).parents[2]
TOPS = {"dsv4": ROOT / "src" / "dsv4", **{f"dsv4/{name}": ROOT / name for name in ("quant", "convert", "model")}}


def has_compiler() -> bool:
    """Whether the installation finds a compiler: the one that Python was built with, under that name, or $CC."""
    return shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0]) is not None


def product_files() -> set[str]:
    """Every file of the product by its place in the package; the links in src/dsv4 are not followed."""
    links = ("quant", "convert", "model")
    return {
        f"{top}/{path.relative_to(folder).as_posix()}"
        for top, folder in TOPS.items()
        for path in folder.rglob("*.*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
        if not (top == "dsv4" and path.relative_to(folder).parts[0] in links)
    }


def copy_sources(copy: Path) -> Path:
    """A copy of what is tracked and the build reads, links as links."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    copy.mkdir(parents=True)
    for name in ("src", "quant", "convert", "model"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, made from a copy of the tracked sources with the installed build backend."""
    work = tmp_path_factory.mktemp("build")
    copy = copy_sources(work / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


def wheel_of(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_dsv4_and_nothing_else(built: Path) -> None:
    with wheel_of(built) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"dsv4", f"dsv4-{dsv4.__version__}.dist-info"}


def test_every_file_is_in_the_wheel(built: Path) -> None:
    with wheel_of(built) as wheel:
        found = {name for name in wheel.namelist() if name.startswith("dsv4/")}
    built_here = {f"dsv4/quant/{compiled.FILE.name}"} if has_compiler() else set()
    assert found == product_files() | built_here


def test_the_wheel_is_for_a_platform_and_for_every_python(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name.split("-")[2:4] == ["py3", "none"] and not path.name.endswith("-any.whl")


def test_the_wheel_has_every_form_and_none_is_for_the_builder_alone(built: Path, tmp_path: Path) -> None:
    """-march=native would make a wheel that stops with an illegal instruction elsewhere."""
    if not has_compiler():
        pytest.skip("no C compiler")
    with wheel_of(built) as wheel:
        library = Path(wheel.extract(f"dsv4/quant/{compiled.FILE.name}", tmp_path))
    names = {"x86_64": ["avx2", "avx512", "avx512bf16"], "aarch64": ["neon"]}.get(platform.machine(), [])
    for form in ("plain", *names):
        assert f"dsv4_linears_{form}\0".encode() in library.read_bytes()
    assert "native" not in (ROOT / "setup.py").read_text()


def test_without_a_compiler_the_wheel_is_made_all_the_same(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(copy)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CC": str(tmp_path / "no-compiler")}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with wheel_of(tmp_path) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_metadata(built: Path) -> None:
    with wheel_of(built) as wheel:
        read = {name.split("/")[-1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(read["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("dsv4", dsv4.__version__)
    assert metadata["License-Expression"] == "MIT" and metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier") and "FP8" in metadata["Keywords"]
    assert read["entry_points.txt"].split() == ["[console_scripts]", "dsv4", "=", "dsv4.__main__:main"]


def test_the_sdist_has_what_the_wheel_is_made_of(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", *(f"src/{name}" for name in product_files())} <= names


LOOK = """
import json, sys, dsv4, dsv4.quant, dsv4.convert, dsv4.model, dsv4.quant.e2m1
from importlib.util import find_spec
others = [name for name in ("quant", "convert", "model", "tests", "benchmarks") if find_spec(name)]
print(json.dumps({"file": dsv4.quant.e2m1.__file__, "others": others, "version": dsv4.__version__}))
"""


def test_the_wheel_works(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with wheel_of(built) as wheel:
        wheel.extractall(target)
    # First on the path, so it is what is imported; the rest of the environment provides the dependencies.
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    found = json.loads(run("-c", LOOK))
    assert Path(found["file"]).is_relative_to(target)
    assert found["others"] == [] and found["version"] == dsv4.__version__
    assert run("-m", "dsv4", "--version") == f"dsv4 {dsv4.__version__}\n"


def test_the_install_under_test_works(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "dsv4"
    for command in ([str(script)], [sys.executable, "-m", "dsv4"]):
        done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == f"dsv4 {dsv4.__version__}\n"
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["others"] == []
