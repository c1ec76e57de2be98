"""`verify` continues after an interrupt: the same result, nothing compared twice, nothing trusted that changed."""

import copy
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exact_values import convert, dsv4, edit_tensors, tensors_of
from raw_safetensors import Raw

from dsv4.convert.proof import run as proof
from dsv4.convert.proof.compare_tensor import PieceComparison
from dsv4.convert.proof.files import LocalFiles
from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.resume import journal
from dsv4.convert.proof.run import Settings, verify_files
from dsv4.convert.proof.tally import Tally
from dsv4.convert.proof.work.findings import Findings
from dsv4.convert.proof.work.preview import preview_files
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import Interrupted

SMALL = Geometry(vocab_size=64, compress_ratios=(4, 0), n_routed_experts=4, index_n_heads=4)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_checkpoint(folder / "source", geometry=SMALL)
    convert(folder / "source", folder / "output", "--max-shard-size", "300kB")
    return folder


@pytest.fixture
def pair(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source and its conversion, to be changed; old enough, as far as a journal is concerned."""
    monkeypatch.setattr(journal, "SETTLED_NS", 0)
    return tuple(Path(shutil.copytree(originals / side, tmp_path / side)) for side in ("source", "output"))  # type: ignore[return-value]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The pieces that were really compared, in every run."""
    found: list[tuple[str, int]] = []
    real = PieceComparison.run

    def counted(self: PieceComparison) -> Tally:
        tally = real(self)
        found.append((self.compared.name, self.piece.start))
        return tally

    monkeypatch.setattr(PieceComparison, "run", counted)
    return found


def verify(pair: tuple[Path, Path], journals: Path | None, share: float = 2.0, **settings: Any) -> Verification:
    """A verification that is interrupted after a share of its bytes."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise Interrupted("interrupted")

    source, output = (LocalFiles(folder) for folder in pair)
    try:
        return verify_files(source, output, Settings(journals=journals, max_workers=1, **settings), progress=progress)
    finally:
        source.close()
        output.close()


def interrupted(pair: tuple[Path, Path], journals: Path, share: float, **settings: Any) -> Interrupted:
    with pytest.raises(Interrupted) as raised:
        verify(pair, journals, share, **settings)
    return raised.value


def result_of(verification: Verification) -> dict[str, Any]:
    found = verification.to_json()
    del found["seconds"], found["continued_bytes"]
    return found


def flip(path: Path) -> None:
    """Another last byte, and the time of modification as it was: only the inode's time of change tells."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.fast_cases(1)
def test_the_same_result_and_nothing_compared_twice(
    share: float, inverse: bool, pair: tuple[Path, Path], compared: list[Any], tmp_path: Path
) -> None:
    whole = verify(pair, None, inverse=inverse)
    every = sorted(compared)
    compared.clear()
    error = interrupted(pair, tmp_path / "journals", share, inverse=inverse)
    assert error.hint == "Nothing was changed. The same command continues with what is left."
    (file,) = (tmp_path / "journals").iterdir()
    recorded = file.read_bytes().count(b'"tallies"')
    assert recorded > 0
    compared.clear()
    continued = verify(pair, tmp_path / "journals", inverse=inverse)
    assert len(compared) == len(every) - recorded and set(compared) < set(every)
    assert result_of(continued) == result_of(whole) and continued.continued_bytes > 0
    assert not list((tmp_path / "journals").iterdir())  # nothing is left of it when the verdict is drawn


def test_again_and_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shares = [0.2, 0.4, 0.6, 0.8]
    for share in shares:
        interrupted(pair, tmp_path / "journals", share)
    continued = verify(pair, tmp_path / "journals")
    assert continued.continued_bytes >= 0.75 * continued.read_bytes
    assert result_of(continued) == result_of(verify(pair, None))


def test_a_difference_found_before_is_found_after(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = tensors_of(pair[1])
    for name in (min(tensors), "layers.0.ffn.experts.3.w2.weight", "norm.weight"):
        data = bytearray(tensors[name].data)
        data[0] ^= 1
        edit_tensors(pair[1], {name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))})
    whole = verify(pair, None)
    assert whole.exit_code == 1
    interrupted(pair, tmp_path / "journals", 0.95)
    continued = verify(pair, tmp_path / "journals")
    assert result_of(continued) == result_of(whole) and continued.continued_bytes > 0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.fast_cases(1)
def test_a_changed_file_is_compared_again(how: str, side: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    interrupted(pair, tmp_path / "journals", 0.9)
    victim = min(pair[side].glob("*.safetensors"))
    flip(victim)
    if how == "replaced":
        shutil.copy2(victim, tmp_path / "copy")
        os.replace(tmp_path / "copy", victim)
    continued = verify(pair, tmp_path / "journals")
    assert continued.exit_code == 1
    assert result_of(continued) == result_of(verify(pair, None))


def test_a_file_that_was_just_changed_is_not_recorded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within the same tick of the clock would leave the same stamp."""
    monkeypatch.setattr(journal, "SETTLED_NS", 10**12)
    error = interrupted(pair, tmp_path / "journals", 0.9)
    assert error.hint == "Nothing was changed. The same command starts from the beginning."
    assert verify(pair, tmp_path / "journals").continued_bytes == 0


def test_a_file_that_changes_while_it_is_read_is_not_recorded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PieceComparison.run

    def touched(self: PieceComparison) -> Tally:
        tally = real(self)
        for path in pair[1].glob("*.safetensors"):
            os.utime(path)
        return tally

    monkeypatch.setattr(PieceComparison, "run", touched)
    assert "from the beginning" in interrupted(pair, tmp_path / "journals", 0.9).hint


def cut(data: bytes) -> bytes:
    return data[: 2 * len(data) // 3]


def garbled(data: bytes) -> bytes:
    return bytes(byte ^ 4 if i % 997 == 500 else byte for i, byte in enumerate(data))


@pytest.mark.parametrize("damage", [cut, garbled, lambda data: b"", lambda data: b"\xff{" + data])
@pytest.mark.fast_cases(1)
def test_a_damaged_journal_costs_work_only(
    damage: Callable[[bytes], bytes], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    interrupted(pair, tmp_path / "journals", 0.7)
    (file,) = (tmp_path / "journals").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    interrupted(pair, tmp_path / "journals", 0.9)
    assert result_of(verify(pair, tmp_path / "journals")) == result_of(verify(pair, None))


@pytest.mark.parametrize("other", ["code", "settings", "pair"])
@pytest.mark.fast_cases(1)
def test_another_comparison_has_another_journal(
    other: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(pair, tmp_path / "journals", 0.9)
    if other == "code":
        monkeypatch.setattr(journal, "code_hash", lambda: "newer")
    elif other == "pair":
        pair = pair[0], Path(shutil.copytree(pair[1], tmp_path / "elsewhere"))
    assert verify(pair, tmp_path / "journals", inverse=other == "settings").continued_bytes == 0


def test_one_that_another_run_has_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    interrupted(pair, tmp_path / "journals", 0.9)
    (file,) = (tmp_path / "journals").iterdir()
    before = file.read_bytes()
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert verify(pair, tmp_path / "journals").continued_bytes == 0
    assert file.read_bytes() == before


def test_without_a_folder_for_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "from the beginning" in interrupted(pair, tmp_path / "file", 0.9).hint
    assert verify(pair, tmp_path / "file").exit_code == 0


def test_every_count_survives(pair: tuple[Path, Path], compared: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that differ everywhere, with --inverse: what comes back from plain data is what went in."""
    tensors, tallies = tensors_of(pair[1]), []
    for name in ("layers.0.ffn.experts.3.w2.weight", "norm.weight", "layers.0.attn.wq_a.scale"):
        data = bytes(byte ^ 0x11 for byte in tensors[name].data)
        edit_tensors(pair[1], {name: Raw(tensors[name].dtype, tensors[name].shape, data)})
    real = proof.PieceComparison.run

    def kept(self: PieceComparison) -> Tally:
        tally = real(self)
        text = json.dumps(journal.tally_to_json(tally))
        tallies.append((journal.tally_from_json(json.loads(text)), copy.deepcopy(tally)))
        return tally

    monkeypatch.setattr(proof.PieceComparison, "run", kept)
    verify(pair, None, inverse=True)
    for name in vars(Tally()):
        values = [(getattr(back, name), getattr(tally, name)) for back, tally in tallies]
        if name in ("codes", "scale_codes"):
            assert all(a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a) for a, b in values), name
        else:
            assert all(a == b for a, b in values), name
    assert any(tally.blocks and tally.first and tally.spans and tally.rebuilt for _, tally in tallies)


def test_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache, not in a checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, calls = PieceComparison.run, []

    def run(self: PieceComparison) -> Tally:
        calls.append(self)
        if len(calls) == 20:
            raise Interrupted("interrupted")
        return real(self)

    monkeypatch.setattr(PieceComparison, "run", run)
    before = {path for folder in pair for path in folder.rglob("*")}
    code, _, err = dsv4("verify", *pair, "--max-workers", 1)
    assert code == 130 and "The same command continues with what is left." in err
    assert {path for folder in pair for path in folder.rglob("*")} == before
    assert len(list((tmp_path / "cache" / "dsv4" / "verify").iterdir())) == 1
    code, _, err = dsv4("verify", *pair)
    assert code == 0 and "was compared by a run that was interrupted" in err
    assert not list((tmp_path / "cache" / "dsv4" / "verify").iterdir())


class CountedFiles(LocalFiles):
    """A folder that counts the bytes that are read of each file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counts: Counter[str] = Counter()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        super().read_into(name, offset, buffer)
        self.counts[name] += len(buffer)


def alone(folder: Path, journals: Path | None) -> tuple[Verification, Counter[str], list[tuple[int, int]]]:
    """A verification against the manifest, the bytes read of each file, and what it says that it continues."""
    files, said = CountedFiles(folder), list[tuple[int, int]]()
    try:
        settings = Settings(journals=journals, max_workers=1)
        result = verify_files(None, files, settings, continues=lambda *numbers: said.append(numbers))
    finally:
        files.close()
    return result, files.counts, said


def interrupted_alone(folder: Path, journals: Path, files: int) -> list[str]:
    """Interrupt a verification after so many files. Returns the lines of its journal for files that it found whole."""
    real, looked = Findings.add_all, list[None]()

    def counted(self: Findings, tallies: Any) -> None:
        real(self, tallies)
        looked.append(None)
        if len(looked) == files:
            raise Interrupted("interrupted")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as raised:
        patch.setattr(Findings, "add_all", counted)
        alone(folder, journals)
    assert raised.value.hint == "Nothing was changed. The same command continues with what is left."
    (file,) = journals.iterdir()
    return [line for line in file.read_text().splitlines() if '"tallies"' in line]


def hashed_files(folder: Path) -> list[str]:
    manifest = json.loads((folder / "dsv4.json").read_text())
    return [*manifest["shards"], *manifest["files"]]


@pytest.mark.parametrize("files", [1, 4])
def test_alone_no_file_is_read_twice(files: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, every, _ = alone(pair[1], None)
    assert whole.verdict.startswith("SOUND: structure, config, codes and hashes")
    assert len(interrupted_alone(pair[1], tmp_path / "journals", files)) == files
    plan = preview_files(None, LocalFiles(pair[1]), Settings(journals=tmp_path / "journals", max_workers=1))
    continued, read, said = alone(pair[1], tmp_path / "journals")
    assert said == [(files, len(hashed_files(pair[1])))]
    saved = every - read
    assert len(saved) == files and all(count >= (pair[1] / name).stat().st_size for name, count in saved.items())
    assert saved.total() == continued.continued_bytes == plan.continued_bytes > 0 == plan.exit_code
    assert continued.read_bytes == plan.read_bytes and result_of(continued) == result_of(whole)
    assert not list((tmp_path / "journals").iterdir())


@pytest.mark.parametrize("change", ["bytes", "time of a side file", "manifest"])
def test_alone_a_changed_file_is_read_again(change: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, every = pair[1], len(hashed_files(pair[1])) - 1
    victim = output / "generation_config.json" if "side file" in change else min(output.glob("*.safetensors"))
    lines = interrupted_alone(output, tmp_path / "journals", every)
    assert len(lines) == every and any(victim.name in line for line in lines)
    if change == "bytes":
        flip(victim)
    elif "side file" in change:
        os.utime(victim)
    else:
        manifest = json.loads((output / "dsv4.json").read_text())
        manifest["shards"][victim.name]["sha256"] = "0" * 64
        (output / "dsv4.json").write_text(json.dumps(manifest))
    continued, read, said = alone(output, tmp_path / "journals")
    assert said == [(every - 1, every + 1)] and read[victim.name] >= victim.stat().st_size
    assert continued.exit_code == (0 if "side file" in change else 1)
    assert result_of(continued) == result_of(alone(output, None)[0])


def test_alone_a_damaged_file_is_read_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output, every = pair[1], len(hashed_files(pair[1]))
    victim = min(output.glob("*.safetensors"))
    flip(victim)
    assert len(interrupted_alone(output, tmp_path / "journals", every)) == every - 1
    continued, read, said = alone(output, tmp_path / "journals")
    assert said == [(every - 1, every)] and read[victim.name] > victim.stat().st_size
    assert continued.exit_code == 1 and result_of(continued) == result_of(alone(output, None)[0])


@pytest.mark.parametrize("damage", [cut, garbled, lambda data: b""])
def test_alone_a_damaged_journal_costs_work_only(
    damage: Callable[[bytes], bytes], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recorded = len(interrupted_alone(pair[1], tmp_path / "journals", 4))
    (file,) = (tmp_path / "journals").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    continued, _, said = alone(pair[1], tmp_path / "journals")
    assert not said or said[0][0] < recorded
    assert result_of(continued) == result_of(alone(pair[1], None)[0])
