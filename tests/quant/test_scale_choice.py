"""Which scales do not follow from their values: compared with what the way back chooses; and other scales put back."""

import numpy as np
import pytest
import torch

from dsv4.quant import Block, from_bf16, scale_choice, to_bf16
from dsv4.quant.block_scales import FP4_BLOCK
from dsv4.quant.from_bf16 import BlockForm

BLOCKS = {"fp4": FP4_BLOCK, "fp8 rows": Block(1, 32), "fp8": Block(32, 32), "fp8 wide": Block(16, 48)}
KINDS = pytest.mark.parametrize("kind", BLOCKS)


def codes_of(kind: str, seed: int, shape: tuple[int, int] = (96, 192)) -> torch.Tensor:
    """Blocks that each draw from a random range of magnitudes, so that all answers occur; some are all zeros."""
    rng, block = np.random.default_rng(seed), BLOCKS[kind]
    most = 8 if kind == "fp4" else 127
    high, wide = -(-shape[0] // block.rows), -(-shape[1] // block.columns)
    limit = rng.integers(0, most + 1, (high, wide)) if seed % 2 else rng.choice([0, 1, most], (high, wide))
    spread = limit.repeat(block.rows, 0).repeat(block.columns, 1)[: shape[0], : shape[1]]
    magnitudes = (rng.random(shape) * spread).astype(np.uint8)
    if seed % 3 == 0:
        magnitudes &= 0b0111_1110  # even codes: twice the scale fits
    if kind == "fp4":
        codes = magnitudes | rng.integers(0, 2, shape, np.uint8) << 3
        return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
    return torch.from_numpy(magnitudes | rng.integers(0, 2, shape, np.uint8) << 7)


def scales_of(codes: torch.Tensor, kind: str, low: int, high: int, seed: int) -> torch.Tensor:
    block, packed = BLOCKS[kind], kind == "fp4"
    shape = -(-len(codes) // block.rows), -(-codes.shape[1] * (2 if packed else 1) // block.columns)
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape, np.uint8))


def to_values(kind: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if kind == "fp4":
        return to_bf16.from_fp4(codes, scales).values
    return to_bf16.from_fp8(codes, scales, BLOCKS[kind]).values


def back(kind: str, values: torch.Tensor) -> BlockForm:
    return from_bf16.to_fp4(values) if kind == "fp4" else from_bf16.to_fp8(values, BLOCKS[kind])


@KINDS
@pytest.mark.parametrize("shape", [(96, 192), (37, 90)], ids=["whole", "ragged"])
def test_the_answer_is_where_the_way_back_chooses_another_scale(kind: str, shape: tuple[int, int]) -> None:
    seen = set()
    for seed in range(1, 7):
        codes = codes_of(kind, seed, shape)
        scales = scales_of(codes, kind, 60, 190, seed)
        found = scale_choice.not_by_rule(codes, scales, BLOCKS[kind], kind == "fp4")
        chosen = back(kind, to_values(kind, codes, scales)).scale_bytes
        assert torch.equal(found, chosen != scales)
        assert torch.equal(
            scale_choice.by_codes(codes, BLOCKS[kind], kind == "fp4"),
            scale_choice.in_torch(codes, BLOCKS[kind], kind == "fp4"),
        )
        seen |= set(found.flatten().tolist())
    assert seen == {False, True}


@KINDS
@pytest.mark.parametrize("ends", [(0, 30), (225, 255)])
def test_no_block_is_left_out_at_the_ends_of_the_range(kind: str, ends: tuple[int, int]) -> None:
    for seed in range(1, 5):
        codes = codes_of(kind, seed)
        scales = scales_of(codes, kind, *ends, seed)
        values = to_values(kind, codes, scales)
        finite = torch.where(torch.isfinite(values), values, 0)
        other = back(kind, finite).scale_bytes != scales
        assert not (other & ~scale_choice.not_by_rule(codes, scales, BLOCKS[kind], kind == "fp4")).any()


@KINDS
@pytest.mark.parametrize("shape", [(96, 192), (37, 90)], ids=["whole", "ragged"])
@pytest.mark.parametrize("ends", [(14, 40), (100, 140)])
def test_with_the_scales_come_the_codes(kind: str, shape: tuple[int, int], ends: tuple[int, int]) -> None:
    for seed in range(1, 5):
        codes = codes_of(kind, seed, shape)
        scales = scales_of(codes, kind, *ends, seed)
        values = to_values(kind, codes, scales)
        places = scale_choice.not_by_rule(codes, scales, BLOCKS[kind], kind == "fp4").flatten().nonzero()[:, 0]
        form = back(kind, values)
        found = from_bf16.with_scales(form, values, BLOCKS[kind], places, scales.flatten()[places])
        assert torch.equal(found.scale_bytes, scales) and torch.equal(found.codes, codes)
        assert not found.changed.any() and not torch.equal(form.scale_bytes, scales)


@KINDS
def test_a_scale_that_does_not_fit_is_not_taken(kind: str) -> None:
    """Places that are none, NaN, and scales under which an element would be rounded or exceed the largest code."""
    codes = codes_of(kind, 5)
    values = to_values(kind, codes, scales_of(codes, kind, 100, 140, 5))
    form = back(kind, values)
    count = form.scale_bytes.numel()
    for byte in (*range(0, 255, 11), 255):
        places = torch.arange(-2, count + 2)
        wanted = torch.full(places.shape, byte, dtype=torch.uint8)
        found = from_bf16.with_scales(form, values, BLOCKS[kind], places, wanted)
        assert not found.changed.any()
        again = from_bf16.decode(found, tuple(values.shape), BLOCKS[kind])
        assert torch.equal(again, values.double()) and torch.equal(torch.signbit(again), torch.signbit(values))
