"""What holds of each conversion into another tool's form: the way back, the proof, the same bytes however cut up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from exact_values import convert, different_values, dsv4, edit_config, edit_tensors, read_json, tensors_of, tree
from foreign_checkpoints import foreign
from jobs import job_of
from ranks import run_ranks
from raw_safetensors import raw
from tiny import RAGGED

from dsv4.convert import verify
from dsv4.convert.plan.input_scale import read_input_scale
from dsv4.convert.plan.settings import CONVERSIONS, Settings, resolve
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.write.run import run_conversion
from dsv4.errors import Interrupted

SMALL = Geometry(compress_ratios=(4, 0, 0), num_hash_layers=1, n_routed_experts=4, index_n_heads=4)
FORMS = [name for name, conversion in CONVERSIONS.items() if conversion.has_own_form]
KEEP_BYTES = ("mxfp8", "mxfp4", "mlx", "nvfp4")  # of every weight; the others keep those of the experts
SHARDS = ("--max-shard-size", "900kB")
NEEDS = {"nvfp4": ("--input-scale", "1.0")}


def form(to: str) -> tuple[str, ...]:
    """The value of `--to`, and what it needs."""
    return to, *NEEDS.get(to, ())


def settings(to: str) -> Settings:
    given = {"input_scale": read_input_scale("1.0")} if to in NEEDS else {}
    return resolve(to, max_shard_bytes=900_000, **given)


pytestmark = pytest.mark.parametrize("to", FORMS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("forms") / "source", seed=5, geometry=SMALL)


@pytest.fixture
def whole(to: str, source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "whole", "--to", *form(to), *SHARDS)
    return tmp_path / "whole"


def assert_is_back(source: Path, back: Path, to: str) -> None:
    """Equal bytes where the form kept them; equal values, in the release's dtypes, where it did not."""
    before, after = tensors_of(source), tensors_of(back)
    kept = [name for name in before if to in KEEP_BYTES or ".experts." in name]
    assert kept and all(after[name] == before[name] for name in kept)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert different_values(before, after) == []


@pytest.mark.fast_cases(1)
def test_back_to_the_release(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "back", "--to", "fp4")
    assert_is_back(source, tmp_path / "back", to)
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json")


@pytest.mark.slow
def test_ragged_widths(to: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ragged", seed=6, geometry=RAGGED)
    convert(source, tmp_path / "out", "--to", *form(to))
    assert verify(source, tmp_path / "out").exit_code == 0
    convert(tmp_path / "out", tmp_path / "back", "--to", "fp4")
    assert_is_back(source, tmp_path / "back", to)


def with_a_flipped_bit(folder: Path, copy: Path, place: float) -> Path:
    """A copy with another bit at this share of its second shard."""
    shutil.copytree(folder, copy)
    (shard,) = copy.glob("model-00002-of-*")
    raw = bytearray(shard.read_bytes())
    raw[int(place * len(raw))] ^= 0b0000_0100
    shard.write_bytes(raw)
    return copy


@pytest.mark.fast_cases(1)
def test_verify_finds_equal_values_and_then_a_flipped_bit(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    found = verify(source, whole)
    assert found.exit_code == 0 and {problem.severity for problem in found.problems} <= {"note"}
    assert found.counts["≈"] > 0 and not any(found.counts[status] for status in "*-+!")
    assert verify(whole).exit_code == 0
    for number, place in enumerate((0.3, 0.6, 0.9)):
        damaged = verify(source, with_a_flipped_bit(whole, tmp_path / str(number), place))
        assert damaged.exit_code == 1 and damaged.counts["*"] > 0


@pytest.mark.slow
def test_parts_and_workers_write_the_same_bytes(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    assert len(list(whole.glob("*-of-*"))) > 2
    for part in ("1/2", "2/2"):
        convert(source, tmp_path / "parts", "--to", *form(to), *SHARDS, "--part", part, "--max-workers", 1)
    convert(source, tmp_path / "parts", "--to", *form(to), *SHARDS, "--finish")
    assert tree(tmp_path / "parts") == tree(whole)


@pytest.mark.slow
def test_ranks_of_a_launcher_write_the_same_bytes(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, tmp_path, "convert", source, tmp_path / "ranks", "--to", *form(to), *SHARDS)
    assert ended.codes == [0, 0], ended.err
    assert tree(tmp_path / "ranks") == tree(whole)


@pytest.mark.fast_cases(1)
def test_an_interrupted_run_continues_to_the_same_bytes(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    job = job_of(source, settings(to), tmp_path / "out")

    def stop_after_the_first_shard(count: int) -> None:
        if (tmp_path / "out" / job.plan.shards[0].file).exists():
            raise Interrupted("test")

    with pytest.raises(Interrupted):
        run_conversion(job, progress=stop_after_the_first_shard)
    assert not (tmp_path / "out" / "config.json").exists()
    result = run_conversion(job_of(source, settings(to), tmp_path / "out"))
    assert result.shards_reused == 1
    assert tree(tmp_path / "out") == tree(whole)


def test_a_dry_run_tells_the_sizes(to: str, source: Path, whole: Path, tmp_path: Path) -> None:
    code, out, _ = dsv4("convert", source, tmp_path / "none", "--to", *form(to), *SHARDS, "--dry-run", "--json")
    files = json.loads(out)["files"]
    assert code == 0 and files == {name: (whole / name).stat().st_size for name in files}


def test_inspect_and_doctor_know_it(to: str, whole: Path) -> None:
    code, out, _ = dsv4("inspect", whole, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["form"] and facts["findings"] == []
    code, out, _ = dsv4("doctor", whole, "--for", "sglang", "--json")
    unknown = [check for check in json.loads(out)["checks"] if check["status"] == "unknown"]
    assert code == 1 and len(unknown) == 1 and "--to fp4" in unknown[0]["command"]


def refused(source: Path, output: Path, *options: object) -> str:
    """What it says. Shards that were finished before may stay: without config and index they are no checkpoint."""
    code, _, err = dsv4("convert", source, output, *options)
    assert code == 3, err
    assert not (output / "config.json").exists() and not list(output.glob("*.index.json"))
    return err


@pytest.mark.fast_cases(1)
def test_a_scale_that_is_nan_is_named(to: str, source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    for name in ("layers.1.ffn.experts.2.w2.scale", "layers.1.attn.wkv.scale"):
        scale = tensors_of(source)[name]
        array = scale.array().copy()
        array[-1, -1] = 255
        edit_tensors(copy, {name: scale.like(array)})
        assert name in refused(copy, tmp_path / name, "--to", *form(to))
        edit_tensors(copy, {name: scale})


def test_columns_that_are_no_groups_are_named(to: str, source: Path, tmp_path: Path) -> None:
    copy, stem = Path(shutil.copytree(source, tmp_path / "copy")), "layers.1.ffn.experts.2.w2"
    edit_tensors(copy, {
        f"{stem}.weight": raw("I8", np.zeros((4, 20), np.uint8)),
        f"{stem}.scale": raw("F8_E8M0", np.full((4, 2), 127, np.uint8)),
    })  # fmt: skip
    assert f"{stem}.weight" in refused(copy, tmp_path / "out", "--to", *form(to))


@pytest.mark.parametrize("kind", ["AWQ", "MLX (affine)"])
def test_what_another_tool_has_quantized_is_no_source(to: str, kind: str, tmp_path: Path) -> None:
    assert kind in refused(foreign(tmp_path / "source", kind), tmp_path / "out", "--to", *form(to))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [("--target", "vllm"), ("--scale-dtype", "f32"), ("--wo-a", "bf16"), ("--on-inexact", "keep"),
                ("--layout", "mp", "--model-parallel", "2")],
)  # fmt: skip
def test_options_that_it_has_no_room_for(to: str, options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    code, _, err = dsv4("convert", source, tmp_path / "out", "--to", *form(to), *options)
    assert code == 2 and f"--to {to}" in err and not (tmp_path / "out").exists()


@pytest.mark.fast_cases(1)
def test_float32_scales_that_are_no_powers_of_two(to: str, source: Path, tmp_path: Path) -> None:
    """Refused by name; rounded only if that is asked for, and then said, counted and found by verify."""
    copy, name = Path(shutil.copytree(source, tmp_path / "copy")), "layers.1.attn.wq_a.scale"
    scale = tensors_of(source)[name]
    factors = np.full(scale.shape, 1.0, np.float32)
    edit_tensors(copy, {name: raw("F32", factors)})
    if to == "nvfp4":  # which leaves dense weights as they are
        factors[-1, -1] = 1.1
        edit_tensors(copy, {name: raw("F32", factors)})
        convert(copy, tmp_path / "out", "--to", *form(to))
        assert tensors_of(tmp_path / "out")[name].data == factors.tobytes()
        return
    convert(copy, tmp_path / "powers", "--to", *form(to))
    assert verify(copy, tmp_path / "powers").exit_code == 0
    factors[-1, -1] = 1.1
    edit_tensors(copy, {name: raw("F32", factors)})
    edit_config(copy, quantization_config=read_json(copy / "config.json")["quantization_config"] | {"scale_fmt": None})
    named = {"gguf": "blk.1.attn_q_a.weight", "mlx": "model.layers.1.self_attn.q_a_proj.weight"}
    named = named.get(to, "layers.1.attn.wq_a.weight")
    assert named in refused(copy, tmp_path / "out", "--to", *form(to))
    code, out, _ = dsv4("convert", copy, tmp_path / "rounded", "--to", *form(to), "--on-inexact", "round", "--json")
    result = json.loads(out)
    assert code == 0 and not result["exact"] and result["changed_elements"] > 0
    found = verify(copy, tmp_path / "rounded")
    (different,) = [one for one in found.results if one.tally.different]
    assert (different.name, different.tally.different) == ("layers.1.attn.wq_a.weight", result["changed_elements"])
