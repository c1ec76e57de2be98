"""`verify --sample`: what is drawn, that damage is found as often as the formula says, and that it is never a proof."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference_converter
from exact_values import convert, dsv4, edit_tensors, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import Tensors
from tall import SIDE, tall, write_tall

from dsv4.convert.proof.audit.draw import draw, kind_of
from dsv4.convert.proof.audit.odds import detectable, missed
from dsv4.convert.proof.audit.sample import Sample, parse_sample
from dsv4.convert.proof.compare_tensor import confirmed
from dsv4.convert.proof.files import LocalFiles
from dsv4.convert.proof.layout import open_checkpoint
from dsv4.convert.proof.plan import ComparedTensor, plan_pair
from dsv4.convert.proof.run import verify
from dsv4.convert.proof.tally import Tally
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.errors import MachineError, UsageError

SEEDS = 200
SHARE = 0.08


@pytest.fixture(scope="module")
def model() -> Tensors:
    return tall(100 * SIDE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model: Tensors) -> Path:
    return write_tall(tmp_path_factory.mktemp("audit") / "source", model)


def compared(source: Path, output: Path) -> list[ComparedTensor]:
    sides = [open_checkpoint(LocalFiles(folder), where) for folder, where in ((source, "source"), (output, "output"))]
    return plan_pair(*sides)


def break_blocks(model: Tensors, count: int) -> Tensors:
    """`count` broken blocks, of all tensors, no two in one row of blocks: a code of some, the scale of others."""
    numbers = np.random.default_rng(count)
    tensors = dict(model)
    names = ["embed.weight", *(f"layers.0.ffn.experts.{expert}.w1.weight" for expert in range(2))]
    rows = [(name, row) for name in names for row in range(100) for _ in range(tensors[name].shape[1] // SIDE)]
    chosen: dict[tuple[str, int], None] = {}
    for number in numbers.permutation(len(rows)):
        if len(chosen) < count:
            chosen[rows[number]] = None
    for position, (name, row) in enumerate(chosen):
        scale = name.removesuffix("weight") + "scale"
        target, at = (scale, row) if position % 2 and scale in tensors else (name, row * SIDE + 77)
        codes = tensors[target].array().copy()
        codes[at, 0] ^= 1
        tensors[target] = tensors[target].like(codes)
    return tensors


def tails(chance: float, count: int, limit: float) -> tuple[int, int]:
    """(lowest, highest) of a binomial count; beyond each of them lies less than `limit` of the probability."""
    odds = [math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)]
    low = next(k for k in range(count + 1) if sum(odds[: k + 1]) >= limit)
    high = next(k for k in range(count, -1, -1) if sum(odds[k:]) >= limit)
    return low, high


@pytest.mark.slow
@pytest.mark.parametrize("broken", [5, 25])
def test_damage_is_found_as_often_as_the_formula_says(
    source: Path, model: Tensors, tmp_path: Path, broken: int
) -> None:
    """The draws are independent of the damage, so the number of misses is binomial, for any fixed damage."""
    output = write_tall(tmp_path / "output", break_blocks(model, broken))
    codes = [verify(source, output, sample=SHARE, seed=seed, max_workers=1) for seed in range(SEEDS)]
    assert {result.exit_code for result in codes} == {1, 5}
    misses = sum(result.exit_code == 5 for result in codes)
    audit = codes[0].audit
    assert audit is not None and audit.blocks == 501 and audit.drawn == 16 * 2 + 8 + 1
    low, high = tails(missed(audit.drawn, audit.blocks // broken), SEEDS, 1e-3)
    assert low <= misses <= high


@pytest.mark.slow
def test_every_broken_block_of_the_sample_is_found(source: Path, model: Tensors, tmp_path: Path) -> None:
    output = write_tall(tmp_path / "output", break_blocks(model, 40))
    everything = verify(source, output)
    found = verify(source, output, sample="100%")
    assert found.audit is not None and found.audit.drawn == found.audit.blocks
    blocks = [{r.name: r.tally.blocks for r in result.results if r.tally.blocks} for result in (everything, found)]
    assert blocks[0] == blocks[1] and found.exit_code == 1
    assert found.verdict.startswith("DIFFERENT (a sample of 501 blocks of 501, seed 0)")


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.001, 1), seed=st.integers(0, 1 << 40))
@pytest.mark.slow
def test_what_is_drawn(source: Path, share: float, seed: int) -> None:
    tensors = compared(source, source)
    pieces, audit = draw(tensors, Sample(share, seed))
    assert (pieces, audit) == draw(tensors, Sample(share, seed))
    assert {piece.tensor for piece in pieces} == set(range(len(tensors)))  # each at least once
    rows = {n: sum(p.stop - p.start for p in pieces if p.tensor == n) for n in range(len(tensors))}
    for a, b in pairwise(pieces):
        assert a.tensor < b.tensor or (a.tensor == b.tensor and a.stop < b.start)  # distinct; neighbours are one
    by_kind: dict[str, int] = {}
    for number, one in enumerate(tensors):
        per_row = 2 * SIDE if one.name in ("embed.weight", "norm.weight") else 1  # bytes of a flat tensor
        by_kind[kind_of(one.name)] = by_kind.get(kind_of(one.name), 0) + rows[number] // per_row
    assert by_kind["embed.weight"] == SIDE * max(1, math.ceil(share * 100))
    assert by_kind["layers.*.ffn.experts.*.w1.weight"] == SIDE * max(2, math.ceil(share * 200))
    assert audit.kinds["layers.*.ffn.experts.*.w1.weight"] == (2 * max(2, math.ceil(share * 200)), 400)


def test_every_block_is_drawn_equally_often(source: Path) -> None:
    """Rows of blocks of both experts over many seeds: binomial counts, none of them beyond six deviations."""
    tensors = compared(source, source)
    counts = np.zeros((len(tensors), 100))
    for seed in range(400):
        for piece in draw(tensors, Sample(0.05, seed))[0]:
            if ".experts." in tensors[piece.tensor].name:
                counts[piece.tensor, piece.start // SIDE : -(-piece.stop // SIDE)] += 1
    drawn = counts[counts.any(axis=1)]
    assert drawn.shape[0] == 2 and drawn.sum() == 400 * 10
    assert abs(drawn - 400 * 0.05).max() < 6 * math.sqrt(400 * 0.05 * 0.95)


def test_a_small_sample_reads_a_small_share(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = LocalFiles.read_into

    def counted(self: LocalFiles, name: str, offset: int, buffer: memoryview) -> None:
        if name.endswith(".safetensors"):
            reads.append(len(buffer))
        real(self, name, offset, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", counted)
    verify(source, source, sample="2%", seed=5)
    total = 2 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 0.02 * total <= sum(reads) <= 0.022 * total


def test_the_verdict_and_its_code(source: Path, tmp_path: Path) -> None:
    code, out, err = dsv4("verify", source, source, "--sample", "8%", "--seed", "7")
    assert code == 5 and "IDENTICAL" not in out and f"next: dsv4 verify {source} {source}" in err
    chance = missed(41, detectable(41))
    words = f"a converter that breaks 1 block in {detectable(41)} is missed with probability {chance:.2g}"
    assert out.splitlines()[-1] == f"NO DIFFERENCE in 41 blocks of 501 (8.18 % of all; {words})"
    found = json.loads(dsv4("verify", source, source, "--sample", "0.08", "--seed", "7", "--json")[1])
    assert found["exit_code"] == 5 and found["audit"]["seed"] == 7 and found["audit"]["share"] == 0.08
    assert found["audit"]["missed"] == chance and found["audit"]["blocks"] == 41
    assert found["audit"]["kinds"]["embed.weight"] == {"blocks": 8, "of_blocks": 100}
    page = tmp_path / "page.html"
    assert dsv4("verify", source, source, "--sample", "8%", "--report", page)[0] == 5
    assert "NO DIFFERENCE" in page.read_text() and "same bytes in the sample" in page.read_text()


def test_one_checkpoint_alone(source: Path, model: Tensors, tmp_path: Path) -> None:
    code, out, _ = dsv4("verify", source, "--sample", "50%")
    assert code == 5 and "NO FAULT in 200 blocks of 400" in out
    nan = dict(model)
    name = "layers.0.ffn.experts.1.w1.weight"
    nan[name] = nan[name].like(np.full_like(nan[name].array(), 0x7F))
    code, out, _ = dsv4("verify", write_tall(tmp_path / "nan", nan), "--sample", "1%")
    assert code == 1 and f"{name} holds" in out


FORMS: dict[str, Callable[[Path, Path], object]] = {
    "the same": lambda source, folder: shutil.copytree(source, folder),
    "fp8": lambda source, folder: convert(source, folder),
    "bf16": lambda source, folder: convert(source, folder, "--to", "bf16"),
    "gguf": lambda source, folder: convert(source, folder, "--to", "gguf"),
    "ranks": lambda source, folder: convert(source, folder, "--layout", "mp", "--model-parallel", "2"),
    "reference": lambda source, folder: reference_converter.convert(source, folder, 2, "fp8"),
    "mxfp4": lambda source, folder: convert(source, folder, "--to", "mxfp4"),
    "mxfp8": lambda source, folder: convert(source, folder, "--to", "mxfp8"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("release") / "v4")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_verify_knows(small: Path, tmp_path: Path, form: str) -> None:
    FORMS[form](small, tmp_path / "output")
    for pair in ((small, tmp_path / "output"), (tmp_path / "output", small)):
        whole, sampled = verify(*pair), verify(*pair, sample="1%", seed=1)
        assert sampled.exit_code == (whole.exit_code or 5), sampled.verdict
        assert {result.name for result in sampled.results} == {result.name for result in whole.results}
    # All blocks of one expert differ: the one that is drawn does too.
    source = Path(shutil.copytree(small, tmp_path / "source"))
    name, damaged = next((n, t) for n, t in tensors_of(source).items() if n.endswith("experts.1.w1.weight"))
    edit_tensors(source, {name: damaged.like(damaged.array() ^ 0x11)})
    found = verify(source, tmp_path / "output", sample="1%", seed=1)
    assert [r.name for r in found.results if r.status == "*" and r.name.endswith("weight")] == [name]


def test_wrong_usage(source: Path) -> None:
    for text in ("nine", "0", "120%", "nan"):
        with pytest.raises(UsageError):
            parse_sample(text)
    with pytest.raises(UsageError, match="--inverse"):
        verify(source, source, sample="1%", inverse=True)


@given(st.integers(1, 10**9))
def test_the_odds(drawn: int) -> None:
    one_in = detectable(drawn)
    assert missed(drawn, one_in) <= 0.01 or one_in == 2
    assert missed(drawn, math.ceil(1.1 * one_in) + 2) > 0.01
    assert math.isclose(missed(drawn, one_in), math.exp(drawn * math.log1p(-1 / one_in)), rel_tol=1e-6)


def test_a_difference_that_does_not_come_back_is_damage_on_the_way() -> None:
    tallies = [Tally(different=3), Tally(different=0), Tally(different=2), Tally(different=2), Tally()]
    with pytest.raises(MachineError, match="arrived damaged"):
        confirmed(lambda: tallies.pop(0))
    assert confirmed(lambda: tallies.pop(0)).different == 2
    assert confirmed(lambda: tallies.pop(0)).different == 0 and not tallies
