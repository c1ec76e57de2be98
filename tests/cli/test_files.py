"""Reports, logits and traces: complete under their name, or not there, and an older one survives."""

import errno
import os
from pathlib import Path

import pytest
from full_disk import files_of_at_most

from dsv4 import output
from dsv4.errors import UsageError
from dsv4.files import check_writable, result_file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    with result_file(tmp_path / "a", pytest.fail) as file:
        file.write(b"new")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == {"a"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("older", [None, b"older"])
def test_an_older_file_survives(tmp_path: Path, error: type[BaseException], older: bytes | None) -> None:
    path = tmp_path / "a"
    if older is not None:
        path.write_bytes(older)
    with pytest.raises(error), result_file(path, pytest.fail) as file:
        file.write(b"half")
        raise error
    assert (path.read_bytes() if path.exists() else None) == older
    assert names(tmp_path) == ({"a"} if older else set())


@pytest.mark.parametrize("size", [5000, 10**6])
def test_a_full_disk_names_the_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(b"older")
    with files_of_at_most(4096), pytest.raises(OSError) as caught, result_file(path, pytest.fail) as file:
        file.write(b"x" * size)
    assert caught.value.filename == str(path) and caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"older" and names(tmp_path) == {"report.html"}


def test_data_is_synced_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: (calls.append(name), real[name](*a))[1])
    with result_file(tmp_path / "a", pytest.fail) as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("of", ["files and folders", "folders"])
def test_an_fsync_that_is_not_supported_is_said_once(
    number: int, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def cannot(descriptor: int) -> None:
        if of == "folders" and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return real(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", cannot)
    out = output.Output()
    for name in ("logits", "trace"):
        with result_file(tmp_path / name, out.warn_once) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    said = capsys.readouterr().err
    assert said.count("cannot fsync") == 1 and str(tmp_path) in said and names(tmp_path) == {"logits", "trace"}


def test_an_fsync_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "a").write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught, result_file(tmp_path / "a", pytest.fail) as file:
        file.write(b"x")
    assert caught.value.filename == str(tmp_path / "a") and (tmp_path / "a").read_bytes() == b"older"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "target")
    with result_file(tmp_path / "link", pytest.fail) as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "target").read_bytes() == b"x"


def test_what_is_no_ordinary_file_is_written_to(tmp_path: Path) -> None:
    with result_file("/dev/null", pytest.fail) as file:
        file.write(b"x")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with result_file(tmp_path / "pipe", pytest.fail) as file:
        file.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with result_file(tmp_path / "a", pytest.fail) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_long_name(tmp_path: Path) -> None:
    with result_file(tmp_path / ("n" * 255), pytest.fail) as file:
        file.write(b"x")
    assert names(tmp_path) == {"n" * 255}


def test_what_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"older")
    for path in (tmp_path / "new", tmp_path / "old", Path("/dev/null")):
        check_writable(path)
    assert names(tmp_path) == {"old"} and (tmp_path / "old").read_bytes() == b"older"


def test_what_cannot_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UsageError, match="the folder does not exist"):
        check_writable(tmp_path / "no" / "such")

    def refuse(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        check_writable(tmp_path / "page.html")
    assert caught.value.filename == str(tmp_path / "page.html")
