"""One conversion by several processes: the same bytes as from one, for any division, death or late start of parts."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_variants import VARIANTS
from exact_values import convert, dsv4, edit_tensors, read_json, tensors_of, tree
from hypothesis import given
from hypothesis import strategies as st
from jobs import job_of
from ranks import run_ranks, torchrun
from raw_safetensors import Raw

from dsv4.commands.distributed import Ranks, torchrun_rank
from dsv4.convert.plan.partition import Part, Publish, assign_shards, parse_part
from dsv4.convert.plan.settings import resolve
from dsv4.convert.write import output_folder
from dsv4.convert.write.run import check_part, run_conversion
from dsv4.errors import InputError, UsageError

SHARDS = ("--max-shard-size", "300kB")
WRITE = ("dsv4.convert.write.run", "write_shard")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["scattered"](tmp_path_factory.mktemp("parts") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parts") / "whole"
    convert(source, output, *SHARDS)
    return output


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model-*.safetensors")}


def plan_of(sizes: list[int]) -> Any:
    return SimpleNamespace(shards=[SimpleNamespace(file=f"{i:03}", size=size) for i, size in enumerate(sizes)])


class TestAssignment:
    @given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.integers(1, 20))
    def test_every_shard_goes_to_one_part_and_the_parts_are_balanced(self, sizes: list[int], count: int) -> None:
        plan = plan_of(sizes)
        parts = assign_shards(plan, count)
        assert len(parts) == count
        assert sorted((s for part in parts for s in part), key=lambda s: s.file) == plan.shards
        assert all(part == sorted(part, key=lambda s: s.file) for part in parts)
        # Each shard went to the part that had least, so no part is ahead of another by more than one shard.
        filled = [sum(s.size for s in part) for part in parts]
        assert max(filled) - min(filled) <= max(sizes)

    @given(st.lists(st.integers(1, 5), max_size=30), st.integers(1, 8))
    def test_depends_on_nothing_but_the_plan(self, sizes: list[int], count: int) -> None:
        names = [[[s.file for s in part] for part in assign_shards(plan_of(sizes), count)] for _ in range(2)]
        assert names[0] == names[1]

    def test_equal_shards_are_counted_out(self) -> None:
        assert [len(part) for part in assign_shards(plan_of([7] * 64), 8)] == [8] * 8

    @pytest.mark.parametrize("sizes", [[8, *[1] * 8], [1, 1, 1, 8, 1, 1, 1, 1, 1]])
    def test_by_size_and_not_by_number(self, sizes: list[int]) -> None:
        assert [sum(shard.size for shard in part) for part in assign_shards(plan_of(sizes), 2)] == [8, 8]


class TestNames:
    @pytest.mark.parametrize(("text", "index", "count"), [("1/1", 0, 1), ("2/8", 1, 8), ("64/64", 63, 64)])
    def test_part(self, text: str, index: int, count: int) -> None:
        assert parse_part(text) == Part(index, count)

    @pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "one/2", "1 /2", "\x1b[1/2"])
    def test_not_a_part(self, text: str) -> None:
        with pytest.raises(UsageError, match="not a part") as error:
            parse_part(text)
        assert "\x1b" not in str(error.value)

    def test_of_the_launcher(self) -> None:
        for environment in ({}, {"MASTER_ADDR": "a"}, {"RANK": "0", "WORLD_SIZE": "1"}):
            assert torchrun_rank(environment) is None
        assert torchrun_rank({"MASTER_ADDR": "a", "RANK": "3", "WORLD_SIZE": "4"}) == Ranks(3, 4)
        cores = len(os.sched_getaffinity(0))
        assert Ranks(0, 9).workers == cores and Ranks(0, 9, 0, cores + 1).workers == 1
        wrong = ({"MASTER_ADDR": "a", "RANK": "1"}, {"TORCHELASTIC_RUN_ID": "x", "RANK": "a", "WORLD_SIZE": "4"})
        for environment in wrong:
            with pytest.raises(UsageError, match="WORLD_SIZE"):
                torchrun_rank(environment)


class TestParts:
    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
    @pytest.mark.fast_cases(1)
    def test_in_any_order_then_finish(self, order: tuple[int, ...], source: Path, whole: Path, tmp_path: Path) -> None:
        output, before = tmp_path / "out", set()
        for i in order:
            said = convert(source, output, *SHARDS, "--part", f"{i}/3")
            assert f"part {i} of 3" in said and "--finish" in said
            assert shards(output) > before and not (output / "config.json").exists()
            assert not (output / "model.safetensors.index.json").exists()
            before = shards(output)
        convert(source, output, *SHARDS, "--finish")
        assert tree(output) == tree(whole)

    def test_of_the_reference_engines_layout(self, tmp_path: Path) -> None:
        source, options = VARIANTS["release"](tmp_path / "source"), ("--layout", "mp", "--model-parallel", "2")
        convert(source, tmp_path / "whole", *options)
        for more in ("--part=2/2", "--part=1/2", "--finish"):
            convert(source, tmp_path / "out", *options, more)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")

    def test_a_part_without_shards(self, source: Path, whole: Path, tmp_path: Path) -> None:
        count = len(shards(whole)) + 1
        said = convert(source, tmp_path / "out", *SHARDS, "--part", f"{count}/{count}")
        assert "0 shards written" in said and shards(tmp_path / "out") == set()
        convert(source, tmp_path / "out", *SHARDS)
        assert tree(tmp_path / "out") == tree(whole)

    def test_another_number_of_parts_takes_over(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, *SHARDS, "--part", "2/3")
        there = shards(output)
        written = 0
        for i in (1, 2):
            code, out, _ = dsv4("convert", source, output, *SHARDS, "--part", f"{i}/2", "--json")
            result = json.loads(out)
            assert code == 0 and (result["part"], result["parts"]) == (i, 2)
            written += result["shards_written"]
        assert written == len(shards(whole)) - len(there)
        convert(source, output, *SHARDS)  # one process finishes what parts have begun
        assert tree(output) == tree(whole)

    def test_a_part_again_has_nothing_to_do(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", *SHARDS, "--part", "1/2")
        assert "0 shards written" in convert(source, tmp_path / "out", *SHARDS, "--part", "1/2")

    def test_of_other_options_are_refused(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, *SHARDS, "--part", "1/2")
        before = shards(output)
        for more in (("--part", "2/2"), ("--finish",), ()):
            code, _, err = dsv4("convert", source, output, *SHARDS, *more, "--target", "sglang")
            assert code == 2 and "--target " in err and shards(output) == before

    @pytest.mark.parametrize("more", [("--finish",), ("--overwrite",)])
    def test_does_not_go_with(self, more: tuple[str, ...], source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", "--part", "1/2", *more)
        assert code == 2 and more[0] in err and not (tmp_path / "out").exists()

    def test_two_of_one_part_at_a_time(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.mkdir()
        with (output / ".dsv4-lock.1-of-2").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            code, _, err = dsv4("convert", source, output, *SHARDS, "--part", "1/2")
            assert code == 4 and "out" in err
            convert(source, output, *SHARDS, "--part", "2/2")  # the others go on

    def test_nobody_publishes_while_a_part_is_at_work(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        for i in (1, 2):
            convert(source, output, *SHARDS, "--part", f"{i}/2")
        with (output / ".dsv4-lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # as each part does
            for more in (("--finish",), ()):
                assert dsv4("convert", source, output, *SHARDS, *more)[0] == 4
        convert(source, output, *SHARDS, "--finish")
        assert tree(output) == tree(whole)


class TestFinish:
    def test_of_nothing(self, source: Path, tmp_path: Path) -> None:
        code, _, err = dsv4("convert", source, tmp_path / "out", *SHARDS, "--finish")
        assert code == 3 and "not complete" in err

    def test_names_what_is_missing(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        convert(source, output, *SHARDS, "--part", "1/2")
        missing = sorted(shards(whole) - shards(output))
        code, _, err = dsv4("convert", source, output, *SHARDS, "--finish")
        assert code == 3 and f"{len(missing)} of {len(shards(whole))} shards" in err
        assert all(name in err for name in missing[:5]) and not (output / "config.json").exists()

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    @pytest.mark.fast_cases(1)
    def test_names_what_is_damaged(self, damage: str, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        for i in (1, 2):
            convert(source, output, *SHARDS, "--part", f"{i}/2")
        victim = max(output.glob("model-*"))
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.unlink() if damage == "remove" else victim.write_bytes(data if damage == "flip" else data[:-1])
        code, _, err = dsv4("convert", source, output, *SHARDS, "--finish")
        assert code == 3 and "1 of" in err and victim.name in err and not (output / "config.json").exists()
        for i in (1, 2):
            convert(source, output, *SHARDS, "--part", f"{i}/2")
        convert(source, output, *SHARDS, "--finish")
        assert tree(output) == tree(whole)

    def test_removes_what_killed_parts_left(self, source: Path, whole: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        for i in (1, 2):
            convert(source, output, *SHARDS, "--part", f"{i}/2")
        (output / ".dsv4-scratch-3-of-4").mkdir()
        (output / ".dsv4-scratch-3-of-4" / "model-00001-of-00003.safetensors").write_bytes(b"fetched")
        (output / ".dsv4-lock.3-of-4").write_text("{}")
        convert(source, output, *SHARDS, "--finish")
        assert tree(output) == tree(whole)

    def test_what_others_have_just_read_is_not_read_again(
        self, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out"
        job = job_of(source, resolve(max_shard_bytes=300_000), output)
        for i in (0, 1):
            run_conversion(job, Part(i, 2))
        found = [check_part(job, Part(i, 2)) for i in (0, 1)]
        assert found == [[shard.file for shard in part] for part in assign_shards(job.plan, 2)]
        victim = output / found[1][-1]
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        assert check_part(job, Part(1, 2)) == found[1][:-1]
        with pytest.raises(InputError, match=victim.name):  # the publishing process reads what was not confirmed
            run_conversion(job, Publish(frozenset(found[0] + found[1][:-1])))
        data[-1] ^= 1
        victim.write_bytes(data)
        monkeypatch.setattr(output_folder, "file_sha256", lambda path, stop: pytest.fail("read again"))
        run_conversion(job, Publish(frozenset(found[0] + found[1])))
        assert tree(output) == tree(whole)

    def test_a_second_time(self, source: Path, whole: Path) -> None:
        before = tree(whole)
        assert "nothing to do" in convert(source, whole, *SHARDS, "--finish") and tree(whole) == before


@pytest.mark.slow
class TestRanks:
    def test_under_torchrun(self, source: Path, whole: Path, tmp_path: Path) -> None:
        ended = torchrun(2, "convert", source, tmp_path / "out", *SHARDS, "--json")
        assert ended.returncode == 0, ended.stderr
        assert tree(tmp_path / "out") == tree(whole)
        result = json.loads(ended.stdout)
        assert result["shards_written"] == result["shards"] == len(shards(whole)) and result["exact"]

    @pytest.mark.parametrize("count", [1, 3, 4])
    def test_any_number(self, count: int, source: Path, whole: Path, tmp_path: Path) -> None:
        ended = run_ranks(count, tmp_path, "convert", source, "out", *SHARDS)
        assert ended.codes == [0] * count, ended.err
        assert tree(tmp_path / "out") == tree(whole)
        assert "every block exact" in ended.err[0] and not any(ended.err[1:] + ended.out)
        ended = run_ranks(count, tmp_path, "convert", source, "out", *SHARDS)
        assert ended.codes == [0] * count and "nothing to do" in ended.err[0] and not any(ended.err[1:])

    def test_only_the_first_shows_the_plan(self, source: Path, tmp_path: Path) -> None:
        ended = run_ranks(2, tmp_path, "convert", source, "out", "--dry-run", "--json")
        assert ended.codes == [0, 0] and json.loads(ended.out[0])["dry_run"] and not ended.out[1]

    @pytest.mark.parametrize(("dies", "call"), [(1, 1), (1, 3), (0, 2)])
    def test_a_killed_rank_fails_the_run_and_another_number_continues(
        self, dies: int, call: int, source: Path, whole: Path, tmp_path: Path
    ) -> None:
        ended = run_ranks(2, tmp_path, "convert", source, "out", *SHARDS, kill={dies: (*WRITE, call)})
        assert ended.codes[dies] == -9 and ended.codes[1 - dies] in (4, 143)
        said = ended.err[1 - dies]
        assert f"rank {1 - dies} of 2 on " in said and "bug" not in said
        assert "another rank ended" in said or "interrupted" in said
        assert not (tmp_path / "out" / "config.json").exists()
        ended = run_ranks(3, tmp_path, "convert", source, "out", *SHARDS)
        assert ended.codes == [0, 0, 0], ended.err
        assert tree(tmp_path / "out") == tree(whole)

    def test_a_rank_that_fails_says_who_it_is_and_why(self, source: Path, tmp_path: Path) -> None:
        bad = shutil.copytree(source, tmp_path / "bad")
        name = "layers.0.ffn.experts.3.w2.scale"
        scale = tensors_of(bad)[name]
        edit_tensors(bad, {name: Raw(scale.dtype, scale.shape, b"\xff" * len(scale.data))})
        ended = run_ranks(2, tmp_path, "convert", bad, "out", *SHARDS, "--json")
        failed = next(i for i in (0, 1) if ended.codes[i] == 3)
        assert f"rank {failed} of 2 on " in ended.err[failed] and name in ended.err[failed]
        assert ended.codes[1 - failed] in (4, 143) and "bug" not in ended.err[1 - failed]
        assert "error" in json.loads(ended.out[0]) and not ended.out[1]

    def test_overwrite_clears_once(self, source: Path, whole: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", "--to", "bf16")
        ended = run_ranks(2, tmp_path, "convert", source, "out", *SHARDS, "--overwrite")
        assert ended.codes == [0, 0], ended.err
        assert tree(tmp_path / "out") == tree(whole)
        assert read_json(tmp_path / "out" / "dsv4.json") == read_json(whole / "dsv4.json")

    def test_part_and_finish_are_another_way(self, source: Path, tmp_path: Path) -> None:
        for more in (("--part", "1/2"), ("--finish",)):
            ended = run_ranks(2, tmp_path, "convert", source, "out", *more)
            assert ended.codes == [2, 2] or 143 in ended.codes
            assert "torchrun" in ended.err[0] + ended.err[1]
