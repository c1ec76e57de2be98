"""Blocks without an exact FP8 form: found by trying every scale there is, then refused, kept or rounded."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from exact_values import (
    E2M1,
    convert,
    dsv4,
    experts,
    packed_codes,
    read_json,
    same_bits,
    scale_of,
    tensors_of,
    tree,
    values,
    weights,
)
from mixed_scales import mix_scales
from raw_safetensors import Tensors

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.write.shards import scan

pytestmark = pytest.mark.slow  # conversions of whole checkpoints, many times

# Every expert matrix is [256, 256]: two by two blocks that all differ; four experts in two layers.
MIXED = Geometry(
    moe_intermediate_size=256,
    vocab_size=64, compress_ratios=(0, 0), num_hash_layers=0, n_routed_experts=4, num_attention_heads=2, head_dim=64
)  # fmt: skip


ONE_SHARD = ("--max-shard-size", "6GB")  # larger than usual: whatever the source's shards are


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mix_scales(make_checkpoint(tmp_path_factory.mktemp("mixed") / "source", geometry=MIXED, seed=3))


def in_e4m3(value: np.ndarray) -> np.ndarray:
    """Which float64 values are E4M3 values, by ml_dtypes."""
    return value.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) == value


def exact_bytes(codes: np.ndarray, groups: np.ndarray) -> list[int]:
    """All scale bytes with which every element of an FP8 block is an E4M3 value; codes [r, c], groups [r, c / 32]."""
    pairs = np.unique(np.stack((codes & 7, groups.repeat(32, 1)), -1).reshape(-1, 2), axis=0)
    magnitudes, exponents = E2M1[pairs[:, :1]], pairs[:, 1:].astype(int) - np.arange(255)
    return [int(S) for S in np.flatnonzero(in_e4m3(magnitudes * np.exp2(exponents)).all(axis=0))]


def blocks(name: str, tensors: Tensors) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Codes and group scale bytes of each 128 x 128 block."""
    codes, scale = packed_codes(tensors[name]), scale_of(name, tensors)
    assert scale is not None
    return {
        (r // 128, c // 128): (codes[r : r + 128, c : c + 128], scale.array()[r : r + 128, c // 32 : c // 32 + 4])
        for r in range(0, codes.shape[0], 128)
        for c in range(0, codes.shape[1], 128)
    }


def judged(tensors: Tensors) -> dict[str, dict[tuple[int, int], tuple[int, list[int]]]]:
    """Per expert and block: the reference's scale byte (may be negative) and all exact ones."""
    return {
        name: {
            at: (int(groups.max()) - 6, exact_bytes(codes, groups.astype(int)))
            for at, (codes, groups) in blocks(name, tensors).items()
        }
        for name in experts(tensors)
    }


@pytest.fixture(scope="module")
def truth(source: Path) -> dict[str, dict[tuple[int, int], tuple[int, list[int]]]]:
    return judged(tensors_of(source))


Truth = dict[str, dict[tuple[int, int], tuple[int, list[int]]]]


def hopeless(truth: Truth) -> set[str]:
    return {name for name, found in truth.items() if any(not exact for _, exact in found.values())}


def test_there_are_blocks_of_every_kind(truth: Truth) -> None:
    flat = [found for blocks_ in truth.values() for found in blocks_.values()]
    assert any(not exact for _, exact in flat)
    assert any(exact and reference not in exact for reference, exact in flat)
    assert any(reference in exact for reference, exact in flat)


def test_error_names_every_tensor_and_writes_nothing(source: Path, truth: Truth, tmp_path: Path) -> None:
    before = tree(source)
    code, out, err = dsv4("convert", source, tmp_path / "out", *ONE_SHARD)
    assert (code, out) == (3, "") and tree(tmp_path / "out") == {} and tree(source) == before
    named = {line.split(":")[0].strip() for line in err.splitlines() if ".experts." in line}
    assert named == hopeless(truth)
    assert "--on-inexact keep" in err and "--on-inexact round" in err
    for name in named:
        line = next(line for line in err.splitlines() if name + ":" in line)
        assert all(f"block {at}" in line for at, (_, exact) in truth[name].items() if not exact)


def test_an_error_about_many_tensors_describes_the_first(
    source: Path, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that were trained since, none has an exact form: thousands in a shard."""
    monkeypatch.setattr(scan, "NAMED", 3)
    code, _, err = dsv4("convert", source, tmp_path / "out", *ONE_SHARD)
    lines = err.splitlines()
    assert code == 3 and f"no exact form for {len(hopeless(truth))} tensors" in lines[0]
    assert sum(".experts." in line for line in lines) == 3
    assert lines[4].strip() == f"and {len(hopeless(truth)) - 3} more"


def test_the_message_says_what_would_change(source: Path, truth: Truth, tmp_path: Path) -> None:
    """Elements changed, elements to zero, and the span, of the first bad block of each tensor."""
    _, _, err = dsv4("convert", source, tmp_path / "out", *ONE_SHARD)
    old = tensors_of(source)
    for name in hopeless(truth):
        line = next(line for line in err.splitlines() if name + ":" in line)
        at = next(at for at, (_, exact) in truth[name].items() if not exact)
        codes, groups = blocks(name, old)[at]
        exact = E2M1[codes] * np.exp2(groups.astype(int).repeat(32, 1) - max(truth[name][at][0], 0))
        rounded = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        span = int(groups.max()) - int(groups.min())
        changed, lost = int((rounded != exact).sum()), int(((exact != 0) & (rounded == 0)).sum())
        assert f"block {at} spans 2^{span}: {changed} elements change, {lost} to zero" in line


def check_scales(new: Tensors, truth: Truth, cast: list[str]) -> int:
    """The reference's scale where it is exact, else the closest exact one; returns how many had to move."""
    moved = 0
    for name in cast:
        scale = scale_of(name, new)
        assert scale is not None
        for at, (reference, exact) in truth[name].items():
            chosen = int(scale.array()[at])
            if exact:
                assert abs(chosen - reference) == min(abs(S - reference) for S in exact) and chosen in exact
                moved += chosen != reference
            else:
                assert chosen == max(reference, 0)
    return moved


def test_keep_leaves_those_tensors_alone(source: Path, truth: Truth, tmp_path: Path) -> None:
    said = convert(source, tmp_path / "out", "--on-inexact", "keep", "--scale-dtype", "e8m0")
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    for name in experts(old):
        assert same_bits(values(name, old), values(name, new)), name
        assert new[name].dtype == ("I8" if name in hopeless(truth) else "F8_E4M3")
        if name in hopeless(truth):
            assert (new[name], scale_of(name, new)) == (old[name], scale_of(name, old))
    manifest = read_json(tmp_path / "out" / "dsv4.json")
    assert manifest["kept_tensors"] == sorted(hopeless(truth))
    assert manifest["summary"]["inexact_blocks"] == 0
    moved = check_scales(new, truth, [n for n in experts(old) if n not in hopeless(truth)])
    assert manifest["summary"]["moved_blocks"] == moved > 0
    assert f"no exact form for {len(hopeless(truth))} tensors: kept as in the source" in said
    assert "no config.json can describe that" in said and "for an engine convert again with --to bf16" in said
    code, out, _ = dsv4("verify", source, tmp_path / "out")
    assert code == 1 and "DIFFERENT: all values are equal" in out
    assert "the routed experts are fp4 and fp8 (no config can describe both" in out
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["weight_map"].keys() == new.keys()
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in new.values())


def test_round_changes_no_more_than_it_says(source: Path, truth: Truth, tmp_path: Path) -> None:
    said = convert(source, tmp_path / "out", "--on-inexact", "round", "--scale-dtype", "e8m0")
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "dsv4.json")
    total = 0
    for name in experts(old):
        before, after = values(name, old), values(name, new)
        changed, entry = int((before != after).sum()), manifest["tensors"][name]
        assert entry.get("changed_elements", 0) == changed and (changed > 0) == (name in hopeless(truth))
        assert entry["inexact_blocks"] == sum(not exact for _, exact in truth[name].values())
        assert entry["blocks"] == len(truth[name])
        scale = scale_of(name, old)
        assert scale is not None
        spans = [int(groups.max()) - int(groups.min()) for _, groups in blocks(name, old).values()]
        assert entry["max_span"] == max(spans)
        assert (np.signbit(before) == np.signbit(after)).all()
        total += changed
    check_scales(new, truth, experts(old))
    assert manifest["summary"]["changed_elements"] == total and manifest["kept_tensors"] == []
    assert f"NOT exact: {total:,} elements were rounded" in said


def test_to_bf16_nothing_is_inexact_but_what_leaves_its_range(source: Path, tmp_path: Path) -> None:
    """The smallest scales of the mixed checkpoint, 2^-127, times 0.5 and 1.5: BF16 subnormals hold them all."""
    convert(source, tmp_path / "out", "--to", "bf16")
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(same_bits(values(name, old), values(name, new)) for name in weights(old))
    assert {new[name].dtype for name in experts(new)} == {"BF16"}


@pytest.mark.parametrize(("first", "then"), [("error", "keep"), ("error", "round")])
@pytest.mark.fast_cases(1)
def test_a_refused_run_goes_on_with_another_policy(source: Path, first: str, then: str, tmp_path: Path) -> None:
    """Shards before the bad one are finished and kept; the result is that of a run with the policy from the start."""
    options = ("--max-shard-size", "100kB")
    code, _, _ = dsv4("convert", source, tmp_path / "out", *options, "--on-inexact", first)
    assert code == 3
    done = [path.name for path in (tmp_path / "out").glob("model-*")]
    said = convert(source, tmp_path / "out", *options, "--on-inexact", then)
    assert done and f"{len(done)} shards were there already" in said
    convert(source, tmp_path / "whole", *options, "--on-inexact", then)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
