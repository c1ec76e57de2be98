"""The journal of an unfinished conversion: torn anywhere it costs work, never a byte; and it holds for one job only."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from exact_values import convert, dsv4, edit_config, tree
from fault_lab import GEOMETRY
from jobs import job_of

from dsv4.convert.plan.settings import resolve
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.journal import Journal, journal_name, read_journal
from dsv4.convert.write.run import run_conversion
from dsv4.errors import Interrupted

OPTIONS = ("--max-shard-size", "60KB", "--max-workers", "1")
SETTINGS = resolve(max_shard_bytes=60_000)
MIDDLES = 12  # places inside lines at which a whole conversion goes on; the reader is asked at every byte


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("journal") / "source", geometry=GEOMETRY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("journal") / "whole"
    convert(source, output, *OPTIONS)
    return tree(output)


@pytest.fixture(scope="module")
def unfinished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted by the last bytes of the last shard: all others are written and in the journal."""
    output = tmp_path_factory.mktemp("journal") / "unfinished"
    job = job_of(source, SETTINGS, output)
    job = replace(job, resources=replace(job.resources, shards=1))
    left = sum(shard.data_bytes for shard in job.plan.shards)

    def advance(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        run_conversion(job, progress=advance)
    return output


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*"))


def cut(unfinished: Path, output: Path, length: int) -> None:
    """The folder as it is if only so many bytes of the journal reached the disk.

    The first line is durable before any shard gets its name, so where that is torn there are no shards.
    """
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(unfinished, output)
    journal = output / journal_name()
    data = journal.read_bytes()
    journal.write_bytes(data[:length])
    if length <= data.index(b"\n"):
        for path in shards(output):
            path.unlink()


@pytest.fixture(scope="module")
def short(unfinished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same journal with one tensor for each shard, to be read thousands of times."""
    folder, past = tmp_path_factory.mktemp("journal"), read_journal(unfinished)
    assert past is not None
    journal = Journal(folder, past.jobs[0], past.owned)
    for shard in past.shards.values():
        journal.add(replace(shard, tensors=dict([next(iter(shard.tensors.items()))])))
    journal.close()
    return folder


@pytest.mark.slow
def test_the_reader_takes_whole_lines_at_every_cut(short: Path, tmp_path: Path) -> None:
    data, everything = (short / journal_name()).read_bytes(), read_journal(short)
    assert everything is not None
    names, journal = list(everything.shards), tmp_path / journal_name()
    assert len(names) >= 3 and data.count(b"\n") == 1 + len(names)
    for length in range(len(data) + 1):
        journal.write_bytes(data[:length])
        past, lines = read_journal(tmp_path), data[:length].count(b"\n")
        if lines == 0:
            assert past is None
            continue
        assert past is not None and past.jobs == everything.jobs and past.owned == everything.owned
        assert past.shards == {name: everything.shards[name] for name in names[: lines - 1]}


def test_a_line_after_a_torn_one_stands_alone(short: Path, tmp_path: Path) -> None:
    data, everything = (short / journal_name()).read_bytes(), read_journal(short)
    assert everything is not None
    last = max(everything.shards)
    for length in range(0, len(data), 13):
        (tmp_path / journal_name()).write_bytes(data[:length])
        journal = Journal(tmp_path, everything.jobs[0], everything.owned)
        journal.add(everything.shards[last])
        journal.close()
        past = read_journal(tmp_path)
        assert past is not None and past.jobs == everything.jobs
        assert past.shards[last] == everything.shards[last]
        assert len(past.shards) == len({*sorted(everything.shards)[: max(0, data[:length].count(b"\n") - 1)], last})


@pytest.mark.slow
def test_the_same_command_completes_after_any_cut(
    source: Path, unfinished: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    data = (unfinished / journal_name()).read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    places = {0, 1, *range(0, len(data), len(data) // MIDDLES), *(end + by for end in ends for by in (-1, 0, 1))}
    for length in sorted(place for place in places if place <= len(data)):
        cut(unfinished, tmp_path / "out", length)
        kept = max(0, data[:length].count(b"\n") - 1)
        said = convert(source, tmp_path / "out", *OPTIONS)
        assert (f"{kept} shards were there already" in said) == (kept > 0), (length, said)
        assert tree(tmp_path / "out") == whole, length


@pytest.fixture
def begun(unfinished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "out"))


def check_refused(source: Path, output: Path, word: str, *options: str) -> None:
    before = tree(output)
    code, _, err = dsv4("convert", source, output, *OPTIONS, *options)
    assert code == 2 and word in err and "--overwrite" in err, err
    assert tree(output) == before


class TestAnotherJob:
    """What is not tested with the options in test_convert_resume.py: there of finished folders, here of begun ones."""

    def test_layout(self, source: Path, begun: Path) -> None:
        check_refused(source, begun, "--layout ", "--layout", "mp", "--model-parallel", "1")

    def test_version(self, source: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dsv4.convert.write.manifest.__version__", "99.9")
        check_refused(source, begun, "dsv4_version")

    def test_config_of_the_source(self, source: Path, begun: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(source, tmp_path / "source"))
        edit_config(source, rope_theta=12345)
        check_refused(source, begun, "config.json is not this one")

    def test_shards_of_the_source(self, begun: Path, tmp_path: Path) -> None:
        source = make_checkpoint(tmp_path / "source", geometry=replace(GEOMETRY, n_routed_experts=3))
        check_refused(source, begun, "made from another checkpoint")


def as_older_format(path: Path, older: int) -> None:
    """A journal as it was when tensors had SHA-256 (1) or BLAKE3 (2) of their own bytes."""
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["job"]["format"] = older
    for line in others:
        for entry in line["tensors"].values():
            entry[{1: "sha256", 2: "blake3"}[older]] = entry.pop("prefix_sha256")
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))


@pytest.mark.parametrize("older", [1, 2])
@pytest.mark.fast_cases(1)
def test_the_same_job_in_an_older_format_begins_anew(
    older: int, source: Path, whole: dict[str, str], unfinished: Path, tmp_path: Path
) -> None:
    """Its entries have other digests, so no shard of it is kept; the folder stays ours all the time."""
    output = Path(shutil.copytree(unfinished, tmp_path / "out"))
    as_older_format(output / journal_name(), older)
    contents = read_journal(output)
    assert contents is not None and not contents.shards and contents.owned
    code, _, err = dsv4("convert", source, output, *OPTIONS, "--to", "bf16")
    assert code == 2 and "--to " in err
    assert "were there already" not in convert(source, output, *OPTIONS)
    assert tree(output) == whole


def test_the_line_that_makes_the_folder_ours_shares_no_block_with_others(unfinished: Path) -> None:
    """A disk that loses power while it adds a line may lose the whole block."""
    first, *others = (unfinished / journal_name()).read_bytes().splitlines(keepends=True)
    assert len(first) % 4096 == 0 and len(others) > 1
