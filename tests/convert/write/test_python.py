"""`convert()` from Python: every option is validated as on the command line, and the host process stays as it is."""

from pathlib import Path
from typing import Any

import pytest
from exact_values import dsv4, tree
from fault_lab import GEOMETRY

from dsv4.convert import convert, verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.shards import resources
from dsv4.errors import InputError, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("python") / "source", geometry=GEOMETRY)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("to", "int8"),
        ("target", "vlm"),
        ("layout", "xx"),
        ("scale_dtype", "f16"),
        ("wo_a", "fp4"),
        ("on_inexact", "ignore"),
        ("max_workers", 0),
        ("max_workers", -1),
        ("max_shard_size", -1),
        ("max_shard_size", 0),
        ("max_shard_size", "many"),
        ("max_memory", "lots"),
        ("max_memory", 0),
    ],
)
def test_what_the_command_line_refuses(option: str, value: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()
    code, _, err = dsv4("convert", source, tmp_path / "out", f"--{option.replace('_', '-')}={value}")
    assert code == 2
    words = str(caught.value).partition(": ")[2] or str(caught.value)
    assert words.removeprefix(f"{value} ") in err or "should be greater than or equal to 1" in str(caught.value) + err


@pytest.mark.parametrize("value", [1.5, "2", True])
def test_workers_are_a_whole_number(value: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-workers"):
        convert(source, tmp_path / "out", max_workers=value)


def test_sizes_as_text_or_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "bytes", max_shard_size=150_000, max_memory=500 * 10**6)
    convert(str(source), str(tmp_path / "text"), max_shard_size="150kB", max_memory="500MB")
    assert tree(tmp_path / "bytes") == tree(tmp_path / "text")


def test_malloc_is_changed_by_the_command_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[bool] = []
    monkeypatch.setattr(resources, "keep_freed_memory", lambda: changed.append(True))
    convert(source, tmp_path / "python")
    assert not changed
    assert dsv4("convert", source, tmp_path / "command")[0] == 0 and changed


def test_shares_of_the_work(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_shard_size": "150kB"}
    convert(source, tmp_path / "whole", **options)
    for part in ("2/2", "1/2"):
        assert convert(source, tmp_path / "shared", part=part, **options).shards_written
    convert(source, tmp_path / "shared", finish=True, **options)
    assert tree(tmp_path / "shared") == tree(tmp_path / "whole")
    with pytest.raises(UsageError, match="three ways"):
        convert(source, tmp_path / "shared", part="1/2", finish=True, **options)


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = convert(source, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert planned.to_json()["dry_run"] and "exact" not in planned.to_json()
    written = convert(source, tmp_path / "out")
    assert planned.output_bytes == written.output_bytes and len(planned.plan.shards) == written.shards_written
    assert "dry_run" not in written.to_json()


def test_results_print_as_a_few_lines(source: Path, tmp_path: Path) -> None:
    """The last line of a notebook's cell is printed with repr."""
    result = convert(source, tmp_path / "out")
    assert all(len(repr(value)) < 1000 for value in (result, result.plan, verify(source, tmp_path / "out")))


def test_an_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "nowhere", tmp_path / "out")
    error = caught.value
    assert error.hint and str(error) == f"{error.message}\n  {error.hint}"
