"""The one library of compiled code: what is said where it is missing, damaged, foreign or older than its sources."""

import shutil
from pathlib import Path

import pytest

from dsv4 import cli, compiled
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.model.kernels import binding
from dsv4.model.kernels.reference import KEYS_PER_BLOCK
from dsv4.quant import fp4_to_fp8_compiled


def test_missing(tmp_path: Path) -> None:
    assert compiled._load(tmp_path / "nothing.so") == (None, "dsv4 was installed without a C compiler")


def test_a_library_that_is_cut_short_is_not_loaded(tmp_path: Path) -> None:
    """As after a full disk; the loader of the system would map what is missing and end the process."""
    if not compiled.FILE.exists() or not (whole := compiled.FILE.read_bytes()).startswith(b"\x7fELF"):
        pytest.skip("no library was built, or not for Linux")
    for length in (4, 63, 64, 5000, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "_compiled.so"
        cut.write_bytes(whole[:length])
        assert compiled._load(cut) == (None, "_compiled.so is incomplete")


def test_a_library_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder in its place stands for one that another user installed without permission to read it."""
    (tmp_path / "_compiled.so").mkdir()
    assert compiled._load(tmp_path / "_compiled.so") == (None, "_compiled.so does not load: Is a directory")


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(60), b"MZ"])
def test_what_is_no_library_does_not_load(content: bytes, tmp_path: Path) -> None:
    damaged = tmp_path / "_compiled.so"
    damaged.write_bytes(content)
    library, problem = compiled._load(damaged)
    assert library is None and problem is not None and problem.startswith("_compiled.so does not load: ")
    assert str(tmp_path) not in problem  # of which a line has no room


def test_a_library_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """Any other library of this machine: it loads, but has none of our functions."""
    import _ctypes

    other = shutil.copy(_ctypes.__file__, tmp_path / "_compiled.so")
    library, problem = compiled._load(other)
    assert library is None and problem is not None and "dsv4_fingerprint" in problem


def test_a_library_older_than_its_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of an editable install: its functions may take other arguments."""
    if not compiled.FILE.exists():
        pytest.skip("no library was built")
    assert compiled._load(compiled.FILE)[1] is None
    monkeypatch.setattr(compiled, "fingerprint", lambda package: "0" * 16)
    library, problem = compiled._load(compiled.FILE)
    assert library is None and problem is not None and "other C files" in problem


def test_a_constant_is_read_from_the_c_files() -> None:
    assert compiled.constant("KEYS_PER_BLOCK") == KEYS_PER_BLOCK > 0
    with pytest.raises(KeyError, match="NO_SUCH_NAME"):
        compiled.constant("NO_SUCH_NAME")


def test_the_fingerprint_covers_every_c_file() -> None:
    found = {path.name for path in compiled.sources(compiled.PACKAGE)}
    tops = (compiled.PACKAGE / room for room in ("quant", "model", "convert"))
    assert found == {path.name for top in tops for path in top.rglob("*.[ch]")}


def test_everything_works_without_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "_loaded", lambda: compiled._load(tmp_path / "nothing.so"))
    for module, name in ((binding, "library"), (binding, "forms"), (fp4_to_fp8_compiled, "_library")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    make_checkpoint(tmp_path / "model")
    assert cli.run(["run", str(tmp_path / "model"), "-p", "a", "--max-new-tokens", "1"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "without the compiled library (dsv4 was installed without a C compiler; install dsv4 again" in said
    assert cli.run(["env"]) == 0
    assert "dsv4 was installed without a C compiler" in capsys.readouterr().out
