"""The same bytes however the work is cut up, spread or interrupted; and what an output folder may already hold."""

import fcntl
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Literal

import pytest
import torch
from checkpoint_variants import VARIANTS
from exact_values import convert, dsv4, edit_config, is_expert, read_json, tensors_of, tree
from jobs import job_of
from mixed_scales import mix_scales

from dsv4.convert import api
from dsv4.convert.plan.recipes import recipe
from dsv4.convert.plan.settings import OnInexact, Settings, resolve
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.write import atomic_file as files
from dsv4.convert.write import output_folder
from dsv4.convert.write import run as conversion
from dsv4.convert.write.atomic_file import AtomicFile
from dsv4.convert.write.run import run_conversion
from dsv4.convert.write.shards import resources
from dsv4.errors import Interrupted, MachineError
from dsv4.quant import fp4_to_fp8, fp8_to_fp4
from dsv4.quant.block_scales import Block
from dsv4.text import human_bytes

pytestmark = pytest.mark.slow  # test_in_flight.py and test_journal.py are in the fast loop

TINY = Geometry(
    vocab_size=64, compress_ratios=(0,), num_hash_layers=0, num_nextn_predict_layers=0, num_attention_heads=2
)  # fmt: skip
SHARDS = ("--max-shard-size", "600kB")
SETTINGS = resolve(max_shard_bytes=600_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["scattered"](tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("resume") / "whole"
    convert(source, output, *SHARDS)
    return output


def copy_of(source: Path, folder: Path) -> Path:
    """A source of its own, to be changed."""
    return Path(shutil.copytree(source, folder))


class TestSameBytes:
    @pytest.mark.parametrize("workers", [1, 2, 4])
    @pytest.mark.fast_cases(1)
    def test_any_number_of_workers(self, workers: int, source: Path, whole: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", *SHARDS, "--max-workers", workers)
        assert tree(tmp_path / "out") == tree(whole)

    @pytest.mark.parametrize("piece", [pytest.param(1, marks=pytest.mark.slow), 3000, 100_000])
    @pytest.mark.parametrize(("experts", "to"), [("fp4", "fp8"), ("fp4", "bf16"), ("fp8", "fp4")])
    @pytest.mark.fast_cases(2)
    def test_any_size_of_pieces(
        self, piece: int, experts: Literal["fp4", "fp8"], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of matrices whose blocks all differ, so that a piece with its neighbour's scales would show."""
        geometry = replace(TINY, n_routed_experts=2, moe_intermediate_size=256)
        source = make_checkpoint(tmp_path / "source", geometry=geometry, experts=experts)
        if experts == "fp4":
            mix_scales(source)
        options = ("--to", to, "--on-inexact", "round")
        convert(source, tmp_path / "whole", *options)
        monkeypatch.setattr(recipe, "PIECE_BYTES", piece)
        monkeypatch.setattr(fp4_to_fp8, "CACHE_BYTES", max(1, piece // 3))
        convert(source, tmp_path / "out", *options)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")

    @pytest.mark.slow
    def test_fp4_with_and_without_the_scales_of_the_scan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The scan hands its group scales on; where there is no room for them, they are computed once more."""
        source = make_checkpoint(tmp_path / "source", geometry=TINY, experts="fp8")
        expected = sum(math.prod(tensor.shape) for name, tensor in tensors_of(source).items() if is_expert(name))
        elements, real = [], fp8_to_fp4.cast

        def counted(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> fp8_to_fp4.Fp4Form:
            elements.append(codes.numel())
            return real(codes, scale, block)

        monkeypatch.setattr(fp8_to_fp4, "cast", counted)
        for room, casts in ((resources.SPARED_BYTES, 2), (0, 3)):
            monkeypatch.setattr(resources, "SPARED_BYTES", room)
            elements.clear()
            convert(source, tmp_path / f"{casts}", "--to", "fp4", "--on-inexact", "round")
            assert sum(elements) == casts * expected
        assert tree(tmp_path / "2") == tree(tmp_path / "3")

    def test_little_memory(self, source: Path, whole: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", *SHARDS, "--max-memory", "500MB")
        assert tree(tmp_path / "out") == tree(whole)

    def test_of_ranks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, options = VARIANTS["release"](tmp_path / "source"), ("--layout", "mp", "--model-parallel", "2")
        convert(source, tmp_path / "whole", *options)
        monkeypatch.setattr(recipe, "PIECE_BYTES", 5000)
        convert(source, tmp_path / "out", *options, "--max-workers", "3")
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")

    def test_in_another_place(self, source: Path, whole: Path, tmp_path: Path) -> None:
        """No path, date or host gets into the output."""
        elsewhere = copy_of(source, tmp_path / "elsewhere")
        convert(elsewhere, tmp_path / "deep" / "er" / "out", *SHARDS)
        assert tree(tmp_path / "deep" / "er" / "out") == tree(whole)


def interrupt_after(count: int) -> Callable[[int], None]:
    """A progress callback that is interrupted once so many bytes are written."""
    left = count

    def advance(written: int) -> None:
        nonlocal left
        left -= written
        if left <= 0:
            raise Interrupted("interrupted")

    return advance


def interrupt_when(output: Path, shards: int) -> Callable[[int], None]:
    """A progress callback that is interrupted once so many shards are published: it is called for each later one."""

    def advance(written: int) -> None:
        if len(list(output.glob("model-*"))) == shards:
            raise Interrupted("interrupted")

    return advance


def run_until(source: Path, output: Path, advance: Callable[[int], None], settings: Settings = SETTINGS) -> None:
    job = job_of(source, settings, output)
    with pytest.raises(Interrupted):
        run_conversion(job, progress=advance)


def run_until_two(source: Path, output: Path, settings: Settings = SETTINGS) -> None:
    """Two shards are finished, others are in flight or missing."""
    run_until(source, output, interrupt_when(output, 2), settings)
    assert len(list(output.glob("model-*"))) == 2


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


class TestResume:
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.999])
    @pytest.mark.fast_cases(1)
    def test_interrupted_anywhere(self, share: float, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        total = read_json(whole / "model.safetensors.index.json")["metadata"]["total_size"]
        run_until(source, output, interrupt_after(int(total * share)))
        assert all((output / name).read_bytes() == (whole / name).read_bytes() for name in visible(output))
        assert all(name.endswith(".safetensors") for name in visible(output))
        assert not list(output.glob("*.part"))
        done = len(visible(output))
        said = convert(source, output, *SHARDS)
        assert tree(output) == tree(whole)
        assert (f"{done} shards were there already" in said) == (done > 0)

    def test_progress_counts_what_was_there_as_it_is_found(self, source: Path, tmp_path: Path) -> None:
        """Hashing the shards of a former run takes a while too: each counts as soon as it is found whole."""
        output = tmp_path / "out"
        job = job_of(source, SETTINGS, output, workers=2)
        total = sum(shard.data_bytes for shard in job.plan.shards)
        run_until(source, output, interrupt_when(output, 3))
        there = [shard.data_bytes for shard in job.plan.shards if (output / shard.file).exists()]
        steps: list[int] = []
        run_conversion(job, progress=steps.append)
        assert len(there) == 3 and [step for step in steps if step][: len(there)] == there
        assert sum(steps) == total

    @pytest.mark.slow
    def test_while_the_last_files_are_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stopped before each of them in turn: index and config come last, so no loader meets half a model."""
        source = make_checkpoint(tmp_path / "source", geometry=replace(TINY, n_routed_experts=2, hidden_size=128))
        write, order, output = conversion.write_file, [], tmp_path / "out"

        def record(path: Path, data: list[bytes]) -> bool:
            order.append(path.relative_to(output).as_posix())
            return write(path, data)

        monkeypatch.setattr(conversion, "write_file", record)
        convert(source, output)
        whole = tree(output)
        assert order[-3:] == ["dsv4.json", "model.safetensors.index.json", "config.json"]
        for stop in order:

            def fail(path: Path, data: list[bytes], stop: str = stop) -> bool:
                if path.relative_to(output).as_posix() == stop:
                    raise Interrupted("interrupted")
                return write(path, data)

            shutil.rmtree(output)
            monkeypatch.setattr(conversion, "write_file", fail)
            assert dsv4("convert", source, output)[0] == 130
            assert not (output / "config.json").exists()
            monkeypatch.setattr(conversion, "write_file", write)
            convert(source, output)
            assert tree(output) == whole

    def test_interrupted_again_and_again(self, source: Path, whole: Path, tmp_path: Path) -> None:
        """Runs that each publish one shard only finish the conversion."""
        output, job = tmp_path / "out", job_of(source, SETTINGS, tmp_path / "out", workers=2)
        for finished in range(1, len(job.plan.shards)):
            run_until(source, output, interrupt_when(output, finished))
            assert len(visible(output)) == finished
        assert run_conversion(job).shards_written == 1 and tree(output) == tree(whole)

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    @pytest.mark.fast_cases(1)
    def test_a_finished_shard_that_was_damaged_is_made_again(
        self, damage: str, source: Path, whole: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        run_until_two(source, output)
        shard = min(output.glob("model-*"))
        data = bytearray(shard.read_bytes())
        if damage == "flip":
            data[-1] ^= 1
            shard.write_bytes(data)
        elif damage == "cut":
            shard.write_bytes(data[:-1])
        else:
            shard.unlink()
        convert(source, output, *SHARDS)
        assert tree(output) == tree(whole)

    @pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "gone_lines"])
    @pytest.mark.fast_cases(1)
    def test_a_damaged_journal(self, damage: str, source: Path, whole: Path, tmp_path: Path) -> None:
        """What it no longer says is done again."""
        output = tmp_path / "out"
        run_until_two(source, output)
        journal = output / ".dsv4-journal.jsonl"
        data = journal.read_bytes()
        lines = data.splitlines(keepends=True)
        journal.write_bytes(
            {"torn": data[:-20], "garbage": data + b"\xff{]\n", "empty": b"", "gone_lines": lines[0]}[damage]
        )
        if damage == "empty":  # then nothing says that the shards are ours
            assert dsv4("convert", source, output, *SHARDS)[0] == 2
            for path in output.glob("model-*"):
                path.unlink()
        convert(source, output, *SHARDS)
        assert tree(output) == tree(whole)

    def test_leftovers_of_a_killed_run_are_removed(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        run_until_two(source, output)
        (output / ".dsv4-model-00002-of-00006.safetensors.12345678.part").write_bytes(b"half")
        convert(source, output, *SHARDS)
        assert tree(output) == tree(whole)

    def test_a_source_shard_that_changed_is_read_again(self, source: Path, tmp_path: Path) -> None:
        """Even where size and header are the same: only what was made from it is made again."""
        source, output = copy_of(source, tmp_path / "source"), tmp_path / "out"
        run_until_two(source, output)
        shard = min(source.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        convert(source, output, *SHARDS)
        convert(source, tmp_path / "fresh", *SHARDS)
        assert tree(output) == tree(tmp_path / "fresh")

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (("--to", "bf16"), "--to "),
            (("--target", "sglang"), "--target "),
            (("--scale-dtype", "e8m0"), "--scale-dtype "),
            (("--wo-a", "bf16"), "--wo-a "),
            (("--max-shard-size", "700kB"), "--max-shard-size "),
        ],
    )
    @pytest.mark.parametrize("finished", [False, True])
    @pytest.mark.fast_cases(3)
    def test_other_options_are_refused_by_name(
        self, options: tuple[str, ...], word: str, finished: bool, source: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        if finished:
            convert(source, output, *SHARDS)
        else:
            run_until_two(source, output)
        before = tree(output)
        code, _, err = dsv4("convert", source, output, *SHARDS, *options)
        assert code == 2 and word in err and "--overwrite" in err and tree(output) == before

    @pytest.mark.parametrize(("first", "then"), [("keep", "round"), ("round", "keep"), ("keep", "error")])
    def test_a_run_that_kept_or_rounded_goes_on_in_no_other_way(
        self, first: OnInexact, then: str, source: Path, tmp_path: Path
    ) -> None:
        """Only what a run with `error` has written is the same whatever comes after."""
        output = tmp_path / "out"
        run_until_two(source, output, replace(SETTINGS, on_inexact=first))
        before = tree(output)
        code, _, err = dsv4("convert", source, output, *SHARDS, "--on-inexact", then)
        assert code == 2 and f"--on-inexact {first}, now {then}" in err and tree(output) == before

    def test_another_version_is_refused_by_name(
        self, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dsv4.convert.write.manifest.__version__", "99.9")
        code, _, err = dsv4("convert", source, whole, *SHARDS)
        assert code == 2 and "dsv4_version" in err and "99.9" in err

    def test_another_source_is_refused_by_name(self, whole: Path, tmp_path: Path) -> None:
        source = VARIANTS["release"](tmp_path / "source")
        code, _, err = dsv4("convert", source, whole, *SHARDS)
        assert code == 2 and "made from another checkpoint (" in err and "this one has" in err

    def test_another_config_is_refused_by_name(self, source: Path, whole: Path, tmp_path: Path) -> None:
        source = copy_of(source, tmp_path / "source")
        edit_config(source, vocab_size=65)
        code, _, err = dsv4("convert", source, whole, *SHARDS)
        assert code == 2 and "config.json is not this one" in err

    def test_a_changed_shard_of_a_finished_conversion_is_named(self, source: Path, tmp_path: Path) -> None:
        source, output = copy_of(source, tmp_path / "source"), tmp_path / "out"
        convert(source, output, *SHARDS)
        shard = max(source.glob("*.safetensors"))
        while shard.stat().st_ctime_ns <= (output / "dsv4.json").stat().st_mtime_ns:  # the clock has to tick
            shard.write_bytes(shard.read_bytes())
        code, _, err = dsv4("convert", source, output, *SHARDS)
        assert code == 2 and shard.name in err and "--overwrite" in err


class TestFinished:
    def test_nothing_to_do(self, source: Path, whole: Path) -> None:
        before = tree(whole)
        stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
        assert "nothing to do" in convert(source, whole, *SHARDS)
        code, out, _ = dsv4("convert", source, whole, *SHARDS, "--json")
        assert code == 0 and json.loads(out)["already_done"] is True and json.loads(out)["shards_written"] == 0
        assert tree(whole) == before and {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == stamps

    @pytest.mark.parametrize("name", ["model-00001-of-00006.safetensors", "tokenizer.json", "config.json"])
    @pytest.mark.fast_cases(1)
    def test_a_file_that_is_missing_or_short_is_named(self, name: str, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, *SHARDS)
        name = min(output.glob("model-*")).name if name.startswith("model-") else name
        data = (output / name).read_bytes()
        (output / name).write_bytes(data[:-1])
        code, _, err = dsv4("convert", source, output, *SHARDS)
        assert code == 3 and name in err and f"{len(data)} expected" in err and "--overwrite" in err
        (output / name).unlink()
        code, _, err = dsv4("convert", source, output, *SHARDS)
        assert code == 3 and f"{name} is missing" in err

    @pytest.mark.parametrize(("older", "key"), [(1, "sha256"), (2, "blake3")])
    def test_in_an_older_format(self, older: int, key: str, source: Path, whole: Path, tmp_path: Path) -> None:
        """What was finished when tensors had digests of their own bytes is finished."""
        output = Path(shutil.copytree(whole, tmp_path / "out"))
        manifest = read_json(output / "dsv4.json")
        manifest["format"] = older
        del manifest["digests"]
        for entry in manifest["tensors"].values():
            entry[key] = entry.pop("prefix_sha256", "")
        (output / "dsv4.json").write_text(json.dumps(manifest))
        assert "nothing to do" in convert(source, output, *SHARDS)
        code, _, err = dsv4("convert", source, output, *SHARDS, "--to", "bf16")
        assert code == 2 and "--to " in err

    def test_no_file_of_ours_is_left_but_the_result(self, whole: Path) -> None:
        assert not [path for path in whole.rglob("*") if path.name.startswith(".")]


class TestForeignFolders:
    def test_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for more in ((), ("--overwrite",)):
            code, _, err = dsv4("convert", source, tmp_path, *more)
            assert code == 2 and "notes.txt" in err and tree(tmp_path) == tree(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}

    def test_a_file_in_its_place(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        code, _, err = dsv4("convert", source, tmp_path / "out")
        assert code == 2 and "not a folder" in err and (tmp_path / "out").read_text() == "mine"

    @pytest.mark.parametrize(
        "text",
        [
            '{"format": "mine"}',
            '{"format": 3}',
            "[]",
            '{"format": 1}',
            '{"format": 1, "shards": {"a": 1}, "files": {}}',
            "{",
        ],
    )
    def test_somebody_elses_manifest(self, text: str, source: Path, tmp_path: Path) -> None:
        (tmp_path / "dsv4.json").write_text(text)
        code, _, err = dsv4("convert", source, tmp_path, "--overwrite")
        assert code == 3 and "dsv4.json" in err and (tmp_path / "dsv4.json").exists()

    def test_in_use(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.mkdir()
        with (output / ".dsv4-lock").open("w") as file:
            json.dump({"pid": 4711, "host": "elsewhere"}, file)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            code, _, err = dsv4("convert", source, output)
        assert code == 4 and "4711" in err and "elsewhere" in err
        convert(source, output)  # the lock went with its holder


class TestOverwrite:
    def test_replaces_what_was_ours(self, source: Path, tmp_path: Path) -> None:
        output, fresh = tmp_path / "out", tmp_path / "fresh"
        convert(source, output, *SHARDS)
        convert(source, output, "--to", "bf16", "--overwrite")
        convert(source, fresh, "--to", "bf16")
        assert tree(output) == tree(fresh)

    def test_also_of_an_unfinished_run(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        run_until_two(source, output, resolve(to="bf16", max_shard_bytes=500_000))
        convert(source, output, *SHARDS, "--overwrite")
        assert tree(output) == tree(whole)

    def test_keeps_what_was_not(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, "--layout", "mp", "--model-parallel", "1")
        (output / "notes.txt").write_text("mine")
        (output / "encoding").mkdir()
        (output / "encoding" / "mine.txt").write_text("mine")
        convert(source, output, "--layout", "mp", "--model-parallel", "2", "--overwrite")
        assert (output / "notes.txt").read_text() == (output / "encoding" / "mine.txt").read_text() == "mine"
        assert not (output / "model0-mp1.safetensors").exists() and (output / "model1-mp2.safetensors").exists()

    def test_refuses_to_write_over_a_strangers_file(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, "--layout", "mp", "--model-parallel", "1")
        (output / "README.md").write_text("mine")
        before = tree(output)
        code, _, err = dsv4("convert", source, output, "--overwrite")
        assert code == 2 and "README.md" in err and tree(output) == before

    @pytest.mark.parametrize("name", ["../victim", "/etc/victim", "a/../../victim", "..", ""])
    @pytest.mark.fast_cases(1)
    def test_a_manifest_that_names_files_elsewhere(self, name: str, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, *SHARDS)
        (tmp_path / "victim").write_text("precious")
        manifest = read_json(output / "dsv4.json")
        manifest["files"][name] = {"size": 1, "sha256": ""}
        (output / "dsv4.json").write_text(json.dumps(manifest))
        code, _, err = dsv4("convert", source, output, *SHARDS, "--overwrite")
        assert code == 3 and "tampered" in err and (tmp_path / "victim").read_text() == "precious"


def test_too_little_disk_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = dsv4("convert", source, tmp_path / "out", "--dry-run", "--json")
    needed = json.loads(out)["output_bytes"]
    monkeypatch.setattr(conversion, "free_bytes", lambda folder: needed - 1)
    code, _, err = dsv4("convert", source, tmp_path / "out")
    more = needed + conversion.SPARE_DISK_BYTES
    assert f"the output needs {human_bytes(more)}, {human_bytes(needed - 1)} are free" in err
    assert code == 4 and tree(tmp_path) == {}


def test_a_finished_part_needs_no_disk_again(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run_until_two(source, output)
    done = sum(path.stat().st_size for path in output.glob("model-*"))
    total = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    monkeypatch.setattr(conversion, "free_bytes", lambda folder: total - done + conversion.SPARE_DISK_BYTES)
    convert(source, output, *SHARDS)
    assert tree(output) == tree(whole)


def test_hashing_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, whole: Path) -> None:
    """Resuming reads finished shards in small blocks."""
    monkeypatch.setattr(output_folder, "HASH_BYTES", 1000)
    run_until_two(source, tmp_path / "out")
    convert(source, tmp_path / "out", *SHARDS)
    assert tree(tmp_path / "out") == tree(whole)


def test_what_is_replaced_makes_room_and_stays_if_that_is_not_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    convert(source, output, *SHARDS)
    before, needed = tree(output), sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    monkeypatch.setattr(conversion, "SPARE_DISK_BYTES", 0)
    monkeypatch.setattr(conversion, "free_bytes", lambda folder: 0 if (output / "dsv4.json").exists() else needed)
    assert dsv4("convert", source, output, "--to", "bf16", "--overwrite")[0] == 4 and tree(output) == before
    convert(source, output, *SHARDS, "--overwrite", "--scale-dtype", "e8m0")


def test_what_an_interrupted_run_left_makes_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were too large to delete at once, one or more of those in flight, and no room for them twice."""
    output = tmp_path / "out"
    monkeypatch.setattr(files, "SLOW_TO_DELETE_BYTES", 1)
    write, written = AtomicFile.write, Event()

    def record(file: AtomicFile, data: memoryview) -> None:
        write(file, data)
        if file.path.suffix == ".safetensors":
            written.set()

    def interrupt(count: int) -> None:
        if written.is_set():
            raise Interrupted("interrupted")

    monkeypatch.setattr(AtomicFile, "write", record)
    with pytest.raises(Interrupted):
        api.convert(source, output, progress=interrupt)
    left = list(output.iterdir())
    assert left
    needed = api.convert(source, tmp_path / "whole").output_bytes
    monkeypatch.setattr(conversion, "SPARE_DISK_BYTES", 0)
    monkeypatch.setattr(
        conversion,
        "free_bytes",
        lambda folder: needed - sum(path.stat().st_size for path in left if path.exists()),
    )
    convert(source, output)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_file_of_another_length_than_planned_never_appears(size: int, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="10 bytes written"), AtomicFile(tmp_path / "file", size) as file:
        file.write(memoryview(b"0123456789"))
        file.commit()
    assert tree(tmp_path) == {}
