"""The plan, on the true headers of the releases: sizes against published totals, order, shards."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import release_headers
from checkpoint_variants import VARIANTS
from release_headers import BITS, FLASH, PRO

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.plan import Plan, make_plan
from dsv4.convert.plan.settings import resolve

# Payload of the FP8 layouts in bytes: the Base releases, and published conversions of others (their size lists).
FLASH_BASE, PRO_BASE = 292_555_345_480, 1_602_325_824_632
FLASH_SGLANG = 293_978_643_016


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(release_headers.make_released(tmp_path_factory.mktemp("flash") / "flash", FLASH))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of Flash's widths, with three layers."""
    short = replace(FLASH, compress_ratios=(0, 4, 128, 0))
    return make_plan(Checkpoint.open(release_headers.make_released(tmp_path_factory.mktemp("short"), short)), resolve())


def data_bytes(plan: Plan) -> int:
    return sum(shard.data_bytes for shard in plan.shards)


@pytest.mark.slow
def test_pro_from_its_headers(tmp_path: Path) -> None:
    """145,116 tensors in; the bytes of the Pro-Base layout out."""
    checkpoint = Checkpoint.open(release_headers.make_released(tmp_path / "pro", PRO))
    plan = make_plan(checkpoint, resolve())
    assert sum(len(shard.tensors) for shard in plan.shards) == 145_116
    assert data_bytes(plan) == PRO_BASE
    assert plan.source_bytes == sum(path.stat().st_size for path in (tmp_path / "pro").glob("*.safetensors"))


@pytest.mark.slow
def test_flash_in_published_layouts(flash: Checkpoint) -> None:
    assert data_bytes(make_plan(flash, resolve())) == FLASH_BASE
    assert data_bytes(make_plan(flash, resolve(target="sglang", wo_a="bf16"))) == FLASH_SGLANG


def elements(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * (2 if dtype == "I8" else 1)


@pytest.mark.slow
def test_flash_in_bf16(flash: Checkpoint) -> None:
    """Two bytes for each element of a quantized weight, no scales; all else as it is."""
    expected = 0
    for tensors in release_headers.shards(FLASH):
        for name, (dtype, shape) in tensors.items():
            if dtype in ("I8", "F8_E4M3"):
                expected += 2 * elements(dtype, shape)
            elif not name.endswith(".scale"):
                expected += math.prod(shape) * BITS[dtype] // 8
    assert data_bytes(make_plan(flash, resolve(to="bf16"))) == expected


@pytest.mark.slow
def test_flash_on_ranks(flash: Checkpoint) -> None:
    """Sliced or owned by one rank: once. Everything else: in every rank. wo_a in BF16 without its scale."""
    ranks, once, everywhere = 8, 0, 0
    sliced = ("wq_b.weight", "wq_b.scale", "wo_a.weight", "wo_b.weight", "wo_b.scale", "attn_sink")
    for tensors in release_headers.shards(FLASH):
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * BITS[dtype] // 8
            if name.endswith("wo_a.scale"):
                continue
            if name.endswith("wo_a.weight"):
                size *= 2
            mine = ".experts." in name or name in ("embed.weight", "head.weight") or "weights_proj" in name
            if mine or name.endswith(sliced):
                once += size
            else:
                everywhere += size
    plan = make_plan(flash, resolve(to="same", layout="mp", model_parallel=ranks))
    assert [shard.file for shard in plan.shards] == [f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    assert data_bytes(plan) == once + ranks * everywhere


def test_shards_are_filled_in_the_order_of_the_source(plan: Plan) -> None:
    """Layer after layer, expert 2 before expert 10; full, or done with its second source shard."""
    assert len(plan.shards) > 4
    seen: list[str] = []
    for shard in plan.shards:
        for number in sorted({int(name.split("-")[1]) for name in shard.source_shards}):
            seen.append(f"model-{number:05d}")
    assert seen == sorted(seen)
    limit = resolve().max_shard_bytes
    for shard, following in pairwise(plan.shards):
        assert shard.data_bytes <= limit
        largest = max(tensor.nbytes for tensor in following.tensors)
        # The next weight is at most that large, and its scale a twentieth of it.
        full = shard.data_bytes + 1.05 * largest > limit
        assert full or len({*shard.source_shards, *following.source_shards}) > 2
        assert len(shard.source_shards) <= 2
    first = next(shard for shard in plan.shards if any(".experts.2." in t.name for t in shard.tensors))
    assert any(".experts.10." in t.name for t in first.tensors)


def test_a_weight_and_its_scale_stay_together(plan: Plan) -> None:
    for shard in plan.shards:
        names = {tensor.name for tensor in shard.tensors}
        for tensor in shard.tensors:
            if tensor.weight.scale is not None:
                assert {tensor.weight.name, tensor.weight.scale.name} <= names


def test_the_header_is_what_the_file_will_have(plan: Plan) -> None:
    assert plan.output_bytes == sum(len(shard.header) + shard.data_bytes for shard in plan.shards)
    assert all(len(shard.header) % 8 == 0 for shard in plan.shards)


def test_notes(tmp_path: Path) -> None:
    fp4, fp8 = (Checkpoint.open(VARIANTS[name](tmp_path / name)) for name in ("release", "base"))
    assert make_plan(fp4, resolve()).notes == make_plan(fp8, resolve(to="fp4")).notes == ()
    assert "no routed expert is FP8" in make_plan(fp4, resolve(to="fp4")).notes[0]
    assert "no routed expert is FP4" in make_plan(fp8, resolve()).notes[0]
