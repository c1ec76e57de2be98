"""`dsv4 verify` from the command line: exit codes, streams, selections, the manifest, and its independence."""

import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import reference_converter
from blake3 import blake3
from exact_values import convert
from patience import LONG
from raw_safetensors import Raw, merged, prefix_sha256, raw, read_file, read_folder, write_folder

from dsv4.cli import run
from dsv4.convert.proof.compare_tensor import PieceComparison
from dsv4.convert.proof.files import LocalFiles
from dsv4.convert.proof.result import Verification
from dsv4.convert.proof.run import Settings, verify, verify_files
from dsv4.convert.proof.tally import Tally
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import Interrupted, UsageError
from dsv4.progress import Reached, ignore


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and the reference converter's FP8 output of it, for two ranks."""
    folder = tmp_path_factory.mktemp("verify")
    make_checkpoint(folder / "source")
    reference_converter.convert(folder / "source", folder / "output", 2, "fp8")
    return folder / "source", folder / "output"


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run(["verify", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_identical(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, *pair)
    assert code == 0 and out.splitlines()[-1].startswith("IDENTICAL: ")
    assert "negative zeros became positive (equal in value; --strict makes this a difference)" in out
    assert "/s" in err
    assert command(capsys, *pair, "--strict")[0] == 1
    assert command(capsys, *pair, "--quiet") == (0, "", "")


def test_json(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, *pair, "--json", "--inverse")
    found = json.loads(out)
    assert (code, err, found["exit_code"], found["differences"]) == (0, "", 0, [])
    assert sum(found["counts"].values()) == len(found["tensors"])
    names = merged(read_folder(pair[0])).keys()
    assert found["tensors"].keys() == names  # every tensor once, nothing else
    blocks = found["statistics"]["fp8_blocks"]
    assert sum(blocks["spans"].values()) == blocks["count"] > 0
    assert blocks["smallest_headroom"] == 14 - max(map(int, blocks["spans"]))
    assert found["inverse"]["wrong"] == 0
    assert found["inverse"]["sign"] == found["negative_zeros_became_positive"] > 0
    assert found["inverse"]["sign_of_zero_lost_in"]
    assert all(set(row) <= set("=≈") for row in found["experts"].values())


def harmed(pair: tuple[Path, Path], folder: Path) -> tuple[str, Path]:
    """A copy of the output with one byte of one expert changed."""
    shutil.copytree(pair[1], folder)
    shards = read_folder(folder)
    shard = sorted(shards)[0]
    name = next(name for name in shards[shard] if ".experts." in name and name.endswith("weight"))
    codes = shards[shard][name].array().copy()
    codes[0, 0] ^= 0x40
    shards[shard][name] = shards[shard][name].like(codes)
    write_folder(folder, {shard: shards[shard]}, index=False)
    return name, folder


@pytest.mark.slow
def test_a_difference_is_shown(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, output = harmed(pair, tmp_path / "harmed")
    code, out, _ = command(capsys, pair[0], output)
    assert code == 1 and f"* {name}  1 of " in out
    assert "in 128x128 blocks (0,0)" in out and "first at [0, 0]: source 0x" in out
    assert out.splitlines()[-1].startswith("DIFFERENT: ")
    assert command(capsys, pair[0], output, "--quiet") == (1, "", "")
    assert command(capsys, pair[0], output, "--tensor", "norm.*")[0] == 0
    assert command(capsys, pair[0], output, "--tensor", name)[0] == 1


def test_truncated(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pair[1], tmp_path / "cut")
    path = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = command(capsys, pair[0], tmp_path / "cut")
    assert code == 3 and out.splitlines()[-1].startswith("NOT READABLE: ")
    assert f"output shard: {path.name}: " in out


def test_wrong_usage(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, *pair, "--tensor", "nothing.*")[0] == 2
    assert command(capsys, *pair, "--shard", "99")[0] == 2
    assert command(capsys, *pair, "--sample", "nine")[0] == 2
    assert command(capsys, *pair, "--max-memory", "10kB")[0] == 2
    assert command(capsys, pair[0], "--inverse")[0] == 2
    assert command(capsys, pair[0], tmp_path / "absent")[0] == 3
    assert command(capsys, tmp_path)[0] == 3


@pytest.mark.slow
def test_a_sample_says_so(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, *pair, "--sample", "20%", "--json")
    found = json.loads(out)
    assert code == found["exit_code"] == 5 and found["verdict"].startswith("NO DIFFERENCE in ")
    assert "seed 0" in found["selection"] and len(found["tensors"]) == len(verify(*pair).results)
    again, other = (json.loads(command(capsys, *pair, "--sample", "20%", "--seed", s, "--json")[1]) for s in "01")
    assert again["statistics"] == found["statistics"] != other["statistics"]
    part = json.loads(command(capsys, *pair, "--sample", "20%", "--tensor", "layers.1.*", "--json")[1])
    assert part["verdict"].endswith(", only tensors named 'layers.1.*'")
    assert part["audit"]["of_blocks"] < found["audit"]["of_blocks"]


@pytest.mark.slow
def test_python_takes_what_the_command_takes(pair: tuple[Path, Path]) -> None:
    audits = [verify(*pair, sample=sample).audit for sample in ("20%", 0.2, "0.2")]
    assert audits[0] == audits[1] == audits[2] is not None
    for wrong in ({"sample": "nine"}, {"sample": 0}, {"sample": "120%"}, {"shard": 0}, {"shard": 99}, {"tensor": "x"}):
        with pytest.raises(UsageError):
            verify(*pair, **wrong)  # type: ignore[arg-type]
    shown = repr(verify(*pair))  # in a notebook
    assert len(shown) < 1000 and "IDENTICAL: " in shown and "exit_code=0" in shown


@pytest.mark.slow
def test_a_shard(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(sorted(pair[0].glob("*.safetensors")), start=1):
        found = json.loads(command(capsys, pair[1], pair[0], "--shard", str(number), "--json")[1])
        assert found["tensors"].keys() == read_folder(pair[0])[path.name].keys()


@pytest.mark.parametrize(("workers", "more_memory"), [(1, None), (3, None), (None, 40 << 20), (9, 60 << 20)])
@pytest.mark.fast_cases(1)
def test_workers_and_memory_change_nothing(
    pair: tuple[Path, Path], workers: int | None, more_memory: int | None
) -> None:
    memory = None if more_memory is None else psutil.Process().memory_info().rss + more_memory
    wanted, found = verify(*pair).to_json(), verify(*pair, max_workers=workers, max_memory=memory).to_json()
    for timed in (wanted, found):
        del timed["seconds"]
    wanted["statistics"].pop("code_use")
    found["statistics"].pop("code_use")  # counted in a share of the bands, which depends on their size
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_bands_and_pieces_change_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert_dtype: str
) -> None:
    """Large tensors are compared in bands and pieces; here small ones are, and the result is that of one band."""
    reference_converter.convert(pair[0], tmp_path, 2, expert_dtype)
    random = np.random.default_rng(2)
    for shard, tensors in read_folder(tmp_path).items():
        for name, tensor in tensors.items():
            data = np.frombuffer(tensor.data, np.uint8).copy()
            if data.size > 9000:  # some harm to every large tensor, all over it
                data[random.integers(0, data.size, 9)] ^= 0x11
                tensors[name] = Raw(tensor.dtype, tensor.shape, data.tobytes())
        write_folder(tmp_path, {shard: tensors}, index=False)
    wanted = verify(pair[0], tmp_path, inverse=True).to_json()
    assert wanted["counts"]["*"] > 50
    monkeypatch.setattr("dsv4.convert.proof.compare_tensor.BAND_BYTES", 4096)
    monkeypatch.setattr("dsv4.convert.proof.compare_tensor.PIECE_BYTES", 20_000)
    found = verify(pair[0], tmp_path, inverse=True).to_json()
    for result in (wanted, found):
        del result["seconds"], result["read_bytes"], result["statistics"]["code_use"]
    assert found == wanted


def verify_with(
    progress: Reached, *folders: Path, headers: Reached = ignore, max_workers: int | None = None
) -> Verification:
    """`verify` with progress callbacks."""
    *source, output = map(LocalFiles, folders)
    settings = Settings(max_workers=max_workers)
    return verify_files(source[0] if source else None, output, settings, headers=headers, progress=progress)


def test_from_python_the_page_is_written_and_sizes_are_text(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "proof.html"
    page.write_text("older")
    result = verify(*pair, max_memory="16GB", report=page)
    assert result.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["proof.html"]
    written = page.read_text()
    assert written.startswith("<!doctype html>") and f"<dd>{pair[1]}</dd>" in written and "older" not in written
    with pytest.raises(UsageError, match=r"--max-memory 1\.0 MB is too little"):
        verify(*pair, max_memory="1MB", report=str(page))
    with pytest.raises(UsageError, match="'much' is not a size"):
        verify(*pair, max_memory="much")
    with pytest.raises(UsageError, match="is a folder"):  # before anything is read
        verify(tmp_path / "nowhere", report=tmp_path)


def test_progress_reaches_the_total(pair: tuple[Path, Path]) -> None:
    headers: list[tuple[int, int]] = []
    steps: list[tuple[int, int]] = []
    verify_with(lambda *call: steps.append(call), *pair, headers=lambda *call: headers.append(call))
    count = sum(len(list(folder.glob("*.safetensors"))) for folder in pair)
    assert headers == [(number, count) for number in range(1, count + 1)]
    assert len({total for _, total in steps}) == 1
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 0


def test_interrupted_says_how_far(pair: tuple[Path, Path]) -> None:
    before = set(threading.enumerate())

    def interrupt(done: int, total: int) -> None:
        if 2 * done > total:
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted, match=r"interrupted after 5\d% of [\d.]+ MB: no difference so far"):
        verify_with(interrupt, *pair)
    assert set(threading.enumerate()) <= before  # no thread goes on reading


def digests_of(path: Path, manifest_format: int) -> dict[str, dict[str, str]]:
    """What the tensors of a shard have in a manifest of that format."""
    if manifest_format == 3:
        return {name: {"prefix_sha256": digest} for name, digest in prefix_sha256(path).items()}
    key, digest = {1: ("sha256", hashlib.sha256), 2: ("blake3", blake3)}[manifest_format]
    return {name: {key: digest(tensor.data).hexdigest()} for name, tensor in read_file(path).items()}


def write_manifest(folder: Path, manifest_format: int = 3) -> dict[str, Any]:
    shards = read_folder(folder)
    digests = {shard: digests_of(folder / shard, manifest_format) for shard in shards}
    tensors = {
        name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "shard": shard,
            **digests[shard][name],
        }
        for shard, found in shards.items()
        for name, tensor in found.items()
    }
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file()
    }
    manifest = {
        "format": manifest_format,
        "shards": {name: files.pop(name) for name in shards},
        "files": files,
        "tensors": tensors,
    }
    (folder / "dsv4.json").write_text(json.dumps(manifest))
    return manifest


@pytest.mark.parametrize(
    ("manifest_format", "found"),
    [
        (1, "{name} has another SHA-256 than the manifest says"),
        (2, "{name} has another BLAKE3 than the manifest says"),
        (3, "{shard}: the first byte that changed is in {name}"),
    ],
)
def test_one_checkpoint_alone(
    manifest_format: int, found: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pair[0], tmp_path / "alone")
    write_manifest(tmp_path / "alone", manifest_format)
    code, out, err = command(capsys, tmp_path / "alone")
    assert (code, out.splitlines()[-1]) == (0, "SOUND: structure, config, codes and hashes agree")
    assert err.splitlines()[-1] == f"next: dsv4 run {tmp_path / 'alone'} -p Hello"
    for name in ("embed.weight", "norm.weight"):
        shards = read_folder(tmp_path / "alone")
        shard = next(s for s, tensors in shards.items() if name in tensors)
        before = (tmp_path / "alone" / shard).read_bytes()
        data = shards[shard][name].data
        position = before.index(data)
        (tmp_path / "alone" / shard).write_bytes(before[:position] + bytes([data[0] ^ 1]) + before[position + 1 :])
        code, out, _ = command(capsys, tmp_path / "alone")
        assert code == 1 and "manifest: " + found.format(name=name, shard=shard) in out.replace("its header or ", "")
        assert f"manifest: {shard} has another SHA-256" in out
        assert out.count("manifest: ") == 2  # the shard and the tensor, no other
        (tmp_path / "alone" / shard).write_bytes(before)
    (tmp_path / "alone" / "tokenizer.json").write_text("{}")
    assert "manifest: tokenizer.json has " in command(capsys, tmp_path / "alone")[1]


@pytest.mark.parametrize("layout", ["hf", "mp"])
def test_the_first_of_several_changes_in_a_shard_is_named(
    layout: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the digests that `convert` wrote; in rank files also those of slices and of copies."""
    ranks = ("--layout", "mp", "--model-parallel", "2") if layout == "mp" else ()
    convert(pair[0], tmp_path / "out", *ranks)
    path = max((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    places = sorted((*value["data_offsets"], name) for name, value in json.loads(data[8:start]).items())
    first, second = places[0], places[len(places) // 2]
    data[start + places[-1][1] - 1] ^= 1
    for (begin, end, name), where in ((second, second[2]), (first, f"its header or {first[2]}")):
        data[start + begin] ^= 1
        assert begin < end
        path.write_bytes(data)
        code, out, _ = command(capsys, tmp_path / "out")
        lines = [line for line in out.splitlines() if "the first byte that changed is in" in line]
        assert code == 1 and name in where
        found = [line.rpartition("manifest: ")[2] for line in lines]
        assert found == [f"{path.name}: the first byte that changed is in {where}"]


def test_alone_says_what_was_read(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quantized tensors for their codes; with a manifest every byte of each file that it lists, scales twice."""
    shutil.copytree(pair[0], tmp_path / "alone")
    quantized = verify(pair[0])
    shards = read_folder(pair[0])
    scaled = {
        n.removesuffix("weight") + "scale" for tensors in shards.values() for n in tensors if n.endswith("weight")
    }
    tensors = {name: tensor for found in shards.values() for name, tensor in found.items()}
    scales = scaled & tensors.keys()
    expected = sum(len(tensors[n].data) + len(tensors[n.removesuffix("scale") + "weight"].data) for n in scales)
    assert quantized.read_bytes == expected and "of quantized tensors read" in command(capsys, pair[0])[2]
    write_manifest(tmp_path / "alone")
    listed = sum(f.stat().st_size for f in (tmp_path / "alone").rglob("*") if f.is_file() and f.name != "dsv4.json")
    calls: list[tuple[int, int]] = []
    hashed = verify_with(lambda *call: calls.append(call), tmp_path / "alone")
    again = sum(len(tensors[n].data) for n in scales)
    assert (listed + again, *calls[-1]) == (hashed.read_bytes,) * 3
    assert "of quantized tensors and hashed files read" in command(capsys, tmp_path / "alone")[2]


@pytest.mark.slow
def test_alone_each_file_is_read_once_on_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte for its file's hash, the codes at the same time; only the scales in front of them twice."""
    make_checkpoint(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "alone", "--max-shard-size", "500kB")
    times: dict[str, Any] = {path.name: np.zeros(path.stat().st_size, int) for path in (tmp_path / "alone").iterdir()}
    readers, all_read = set[int](), threading.Event()
    began: list[int] = []
    real = LocalFiles.read_into

    def read(self: LocalFiles, name: str, offset: int, buffer: memoryview) -> None:
        if began and name.endswith(".safetensors"):
            times[name][offset : offset + len(buffer)] += 1
            readers.add(threading.get_ident())
            if len(readers) == 3:
                all_read.set()
            all_read.wait(LONG)  # so that one thread cannot read everything before the others start
        real(self, name, offset, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", read)
    result = verify_with(lambda done, total: began.append(done), tmp_path / "alone", max_workers=3)
    assert result.exit_code == 0 and result.hashed and len(readers) == 3
    shards = read_folder(tmp_path / "alone")
    twice = 0
    for name in shards:
        data = (tmp_path / "alone" / name).read_bytes()
        assert times[name].min() == 1 and times[name].max() <= 2
        twice += int((times[name] == 2).sum())
        for tensor, stored in shards[name].items():
            if not tensor.endswith("scale"):
                start = data.index(stored.data, 8)
                assert len(stored.data) < 64 or (times[name][start : start + len(stored.data)] == 1).all(), tensor
    assert twice == sum(len(t.data) for some in shards.values() for n, t in some.items() if n.endswith(".scale"))


def test_a_manifest_may_be_as_large_as_the_checkpoint_has_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """V4-Flash's has 25 MB, which no config.json would have."""
    folder = Path(shutil.copytree(pair[0], tmp_path / "alone"))
    manifest = write_manifest(folder)
    text = json.dumps(manifest)
    (folder / "dsv4.json").write_text(text + " " * (11_000_000 - len(text)))
    result = verify(folder)
    assert (result.exit_code, result.hashed) == (0, True)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " " * 11_000_000)
    assert [p.text for p in verify(folder).problems if "believable" in p.text]


@pytest.mark.parametrize("when", ["open_checkpoint", "plan_pair"])
def test_interrupted_before_anything_was_read(
    when: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted("interrupted", "Run the same command again.")

    monkeypatch.setattr(f"dsv4.convert.proof.work.prepare.{when}", interrupt)
    code, _, err = command(capsys, *pair)
    assert code == 130 and "interrupted" in err and "kept" not in err and "Nothing was changed." in err
    assert "0%" not in err


def test_alone_without_a_manifest(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, pair[1])
    assert (code, out.splitlines()[-1]) == (0, "SOUND: structure, config and codes agree")


def test_alone_finds_nan(tmp_path: Path) -> None:
    codes = np.zeros((4, 32), np.uint8)
    codes[2, 3] = 0x7F
    tensors = {"a.weight": raw("F8_E4M3", codes), "a.scale": raw("F8_E8M0", np.array([[255]], np.uint8))}
    write_folder(tmp_path, {"model.safetensors": tensors}, index=False)
    result = verify(tmp_path)
    found = [problem.text for problem in result.problems if problem.area == "codes"]
    assert result.exit_code == 1 and len(found) == 2
    assert found[0].startswith("a.weight holds 1 codes") and found[1].startswith("a.weight has 1 scales")


def test_what_the_machine_refuses(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error", "the shard")

    monkeypatch.setattr("os.preadv", refuse)
    code, _, err = command(capsys, *pair)
    assert code == 4 and "the shard: Input/output error" in err


def test_the_same_folder_is_said(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, pair[0], pair[0])
    assert code == 0 and "are the same folder" in err


def test_everything_differs(tmp_path: Path) -> None:
    """Counting must not depend on how much there is to count: every element, every block."""
    random = np.random.default_rng(0)
    codes = random.integers(1, 100, (300, 256), dtype=np.uint8)
    scale = raw("F8_E8M0", np.full((3, 2), 120, np.uint8))
    for place, found in (("a", codes), ("b", codes + np.uint8(1))):
        tensors = {"x.weight": raw("F8_E4M3", found), "x.scale": scale}
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    (result, _) = verify(tmp_path / "a", tmp_path / "b").results
    sizes = (128, 128, 44)
    assert result.tally.different == codes.size
    assert result.tally.blocks == {(r, c): rows * 128 for r, rows in enumerate(sizes) for c in range(2)}
    assert [first["at"] for first in result.tally.first] == [[0, c] for c in range(5)]


def test_hostile_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, name in (("a", "x\x1b[31m"), ("b", "y\x1b[31m")):
        write_folder(tmp_path / place, {"model.safetensors": {name: raw("F32", np.zeros(1, np.float32))}}, index=False)
    code, out, _ = command(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1 and "\x1b" not in out and "x\\x1b[31m" in out


def threads_of(monkeypatch: pytest.MonkeyPatch, least: int, *folders: Path) -> int:
    """How many threads `verify` compares with: every piece is seen by the thread that computes it.

    Nothing is computed before so many threads as `least` have begun.
    """
    seen, all_began = set[str](), threading.Event()
    original = PieceComparison.run

    def run_and_note(comparison: PieceComparison) -> Tally:
        seen.add(threading.current_thread().name)
        if len(seen) >= least:
            all_began.set()
        assert all_began.wait(LONG)
        time.sleep(0.001)  # a thread too many has time to take a piece
        return original(comparison)

    monkeypatch.setattr(PieceComparison, "run", run_and_note)
    verify(*folders)
    return len(seen)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.fast_cases(1)
def test_no_more_threads_than_cores_that_may_be_used(
    cores: int, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert threads_of(monkeypatch, cores, *pair) == cores


@pytest.mark.slow
def test_where_the_system_has_no_affinity(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert threads_of(monkeypatch, 2, *pair) == 2


def test_a_long_piece_does_not_hold_up_an_interrupt(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback is called while a piece takes long, and pieces at work stop once it raises."""
    released = threading.Event()
    original = PieceComparison.run

    def slow(comparison: PieceComparison) -> Tally:
        assert comparison.stopped.wait(LONG)
        released.set()
        return original(comparison)

    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > 1:  # the first comes before the work
            raise Interrupted("interrupted")

    monkeypatch.setattr(PieceComparison, "run", slow)
    with pytest.raises(Interrupted, match="after 0% of"):
        verify_with(interrupt, *pair)
    assert released.is_set()


MEASURE = """
import sys, psutil, torch
from dsv4.convert.proof.run import verify
from dsv4.machine import peak_memory
most = psutil.Process().memory_info().rss + int(sys.argv[3])
result = verify(sys.argv[1], sys.argv[2], max_memory=most, max_workers=16, inverse=True)
print(result.verdict)
assert peak_memory() <= most, (peak_memory(), most)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "integers"])
def test_the_whole_process_stays_within_max_memory(kind: str, tmp_path: Path) -> None:
    """Large tensors and many threads: bands become smaller, threads fewer."""
    random, shape = np.random.default_rng(0), (128, 8192)
    for place in ("a", "b"):
        tensors = {}
        for i in range(16):
            codes = random.integers(0, 120, shape, dtype=np.uint8)
            packed = random.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
            fp4 = raw("I8", packed), raw("F8_E8M0", random.integers(118, 124, (shape[0], shape[1] // 32), np.uint8))
            scale = 1.25 if kind == "integers" else 1.0
            fp8 = raw("F8_E4M3", codes), raw("F32", np.full((1, shape[1] // 128), scale, np.float32))
            tensors[f"x{i}.weight"], tensors[f"x{i}.scale"] = fp4 if place == "a" else fp8
        write_folder(tmp_path / place, {"model.safetensors": tensors}, index=False)
    for more in (64 << 20, 160 << 20):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "a"), str(tmp_path / "b"), str(more)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("DIFFERENT"), done.stderr


def test_too_little_memory_is_refused_with_the_least(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, *pair, "--max-memory", "9MB")
    least = re.search(r"Give at least (\d+MB)", err)
    assert code == 2 and "--max-memory 9.0 MB is too little" in err and least is not None
    more = str(int(least[1].removesuffix("MB")) + 100) + "MB"  # this process may have grown since
    assert command(capsys, *pair, "--max-memory", more)[0] == 0


@pytest.mark.parametrize(
    ("kind", "area", "verdict"),
    [
        ("deepseek_v49", "edition", "SOUND: structure, config and codes agree"),
        ("llama", "model", "SOUND: structure, config and codes agree; no DeepSeek-V4: shapes were not checked"),
    ],
)
def test_a_model_type_that_is_not_known(
    kind: str, area: str, verdict: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later edition is no other model; `run` is proposed for neither."""
    folder = Path(shutil.copytree(pair[0], tmp_path / "alone"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    code, out, err = command(capsys, folder)
    assert (code, out.splitlines()[-1]) == (0, verdict)
    assert "next:" not in err and area in {problem.area for problem in verify(folder).problems}
