"""`--max-memory` and the printed bound hold for the whole process, whatever the data is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_variants import VARIANTS
from exact_values import dsv4
from jobs import job_of
from raw_safetensors import Raw, Tensors, raw, write_file
from release_headers import PRO, make_released

from dsv4.convert.plan.recipes import recipe
from dsv4.convert.plan.recipes.recipe import OutputTensor, split
from dsv4.convert.plan.settings import resolve

ROWS, COLUMNS = 1024, 4096
RNG = np.random.default_rng(1)


def fp4(scales: np.ndarray, codes: np.ndarray) -> Tensors:
    return {"weight": raw("I8", codes), "scale": raw("F8_E8M0", scales)}


def all_zero() -> Tensors:
    """Every block takes the search for a scale: the reference's would be below the smallest."""
    return fp4(np.zeros((ROWS, COLUMNS // 32), np.uint8), np.zeros((ROWS, COLUMNS // 2), np.uint8))


def no_exact_form() -> Tensors:
    scales = RNG.integers(0, 255, (ROWS, COLUMNS // 32), dtype=np.uint8)
    return fp4(scales, RNG.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8))


def fp8_codes() -> Raw:
    codes = RNG.integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)
    return raw("F8_E4M3", np.where(codes & 0x7F == 0x7F, 0, codes))


def no_powers_of_two() -> Tensors:
    """Scales with which FP4 and BF16 are computed by values, in float64."""
    scales = RNG.uniform(1, 2, (ROWS // 128, COLUMNS // 128)).astype(np.float32)
    return {"weight": fp8_codes(), "scale": raw("F32", scales)}


def many_binades() -> Tensors:
    """FP8 codes that no FP4 group holds."""
    scales = RNG.integers(110, 120, (ROWS // 128, COLUMNS // 128), dtype=np.uint8)
    return {"weight": fp8_codes(), "scale": raw("F8_E8M0", scales)}


def scales_that_are_recorded() -> Tensors:
    """No group has a code above 2, and neighbours have other scales: the manifest must keep every one."""
    scales = RNG.integers(20, 230, (ROWS, COLUMNS // 32), dtype=np.uint8)
    return fp4(scales, RNG.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8) & 0x33)


def checkpoint(folder: Path, matrix: Callable[[], Tensors], count: int) -> Path:
    tensors = {f"layers.0.ffn.experts.{i}.w1.{part}": t for i in range(count) for part, t in matrix().items()}
    folder.mkdir()
    write_file(folder / "model.safetensors", tensors)
    fp4_experts = tensors["layers.0.ffn.experts.0.w1.weight"].dtype == "I8"
    config = {
        "model_type": "deepseek_v4",
        "expert_dtype": "fp4" if fp4_experts else "fp8",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak(*arguments: object) -> int:
    """Peak memory of a conversion in a process of its own, by the kernel."""
    command = [sys.executable, "-m", "dsv4", "convert", *map(str, arguments), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["peak_memory_bytes"])


def bound(*arguments: object) -> int:
    code, out, err = dsv4("convert", *arguments, "--dry-run", "--json")
    assert code == 0, err
    return int(json.loads(out)["peak_memory_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matrix", "count", "options"),
    [
        (all_zero, 60, ()),
        (no_exact_form, 8, ("--on-inexact", "round")),
        (no_exact_form, 8, ("--to", "bf16", "--on-inexact", "round")),
        (scales_that_are_recorded, 30, ("--to", "bf16")),
        (no_powers_of_two, 6, ("--to", "fp4", "--on-inexact", "round")),
        (no_powers_of_two, 6, ("--to", "bf16", "--on-inexact", "round")),
        (many_binades, 8, ("--to", "fp4", "--on-inexact", "round")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_bound_holds(matrix: Callable[[], Tensors], count: int, options: tuple[str, ...], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", matrix, count)
    allowed = ("--max-memory", "450MB")
    said = bound(source, tmp_path / "out", *options, *allowed)
    assert peak(source, tmp_path / "out", *options, *allowed) <= said <= 450 * 10**6


@pytest.mark.slow
@pytest.mark.parametrize("matrix", [all_zero, no_exact_form, many_binades], ids=lambda matrix: matrix.__name__)
def test_the_bound_holds_with_several_shards_in_flight(matrix: Callable[[], Tensors], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", matrix, 16)
    to = "fp4" if matrix is many_binades else "fp8"
    options = ("--to", to, "--on-inexact", "round", "--max-shard-size", "16MB", "--max-workers", "3")
    said = bound(source, tmp_path / "out", *options)
    assert peak(source, tmp_path / "out", *options) <= said < 900 * 10**6


@pytest.mark.slow
def test_one_row_may_be_a_whole_tensor(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", all_zero, 1)
    write_file(source / "model.safetensors", {"embed.weight": Raw("U8", (1, 300_000_000), bytes(300_000_000))})
    allowed = ("--max-memory", "450MB")
    assert peak(source, tmp_path / "out", *allowed) <= 450 * 10**6


PLANNING = """
import sys
from dsv4 import cli
from dsv4.machine import peak_memory
from dsv4.commands.convert import command
before = peak_memory()
assert cli.run(["convert", *sys.argv[1:], "--dry-run", "-q"]) in (0, 4)  # 4: the disk has no room for 1.6 TB
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_a_plan_of_the_largest_release_takes_little(tmp_path: Path) -> None:
    """145,116 tensors."""
    source = make_released(tmp_path / "source", PRO)
    command = [sys.executable, "-c", PLANNING, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 10**6


def piece_bytes(tensor: OutputTensor) -> list[int]:
    """What the pieces of a tensor read or write, whichever is more."""
    return [(piece.stop - piece.start) * tensor.row_bytes for piece in split(tensor)]


@pytest.mark.parametrize(("to", "ranks"), [("fp8", None), ("bf16", None), ("same", None), ("same", 4), ("fp8", 4)])
@pytest.mark.parametrize("variant", ["release", "base"])
@pytest.mark.fast_cases(1)
def test_no_piece_is_larger_than_planned(
    variant: str, to: str, ranks: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a rank's slice of columns is a small part of the rows that are read for it."""
    monkeypatch.setattr(recipe, "PIECE_BYTES", 4096)
    source = VARIANTS[variant](tmp_path / "source")
    plan = job_of(source, resolve(to, layout="mp" if ranks else "hf", model_parallel=ranks), tmp_path / "out").plan
    for shard in plan.shards:
        for tensor in shard.tensors:
            assert all(size <= max(4096, tensor.row_unit * tensor.row_bytes) for size in piece_bytes(tensor))
            assert not tensor.nbytes or sum(piece_bytes(tensor)) >= tensor.nbytes
            if tensor.rank_slice is not None:
                assert tensor.row_bytes >= tensor.source.row_bytes
    assert plan.piece_memory >= 6 * 4096
