"""The exact cast: every code with every k, and the choice of S against an oracle that tries all 255 of them."""

from fractions import Fraction

import pytest
import torch
from oracle import (
    E2M1_MAGNITUDES,
    E4M3_MAGNITUDES,
    chosen_scale_byte,
    exact_in_e4m3,
    exact_scale_bytes,
    nearest_code,
    power,
)

from dsv4.quant import e2m1, e4m3
from dsv4.quant.block_scales import FP4_BLOCK, Block, scale_shape
from dsv4.quant.fp4_to_fp8 import (
    GUARANTEED_SPAN,
    HIGHEST_K,
    LOWEST_K,
    TABLE_K_MAX,
    TABLE_K_MIN,
    BlockScales,
    cast,
    choose_block_scales,
    exact_values,
    scales_if_safe,
)

WHOLE = Block(128, 128)
ONE_GROUP = Block(1, 32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def elements_of(
    codes: torch.Tensor, scale: torch.Tensor, block: Block, at: tuple[int, ...]
) -> tuple[list[tuple[int, int]], list[int]]:
    """(code, scale byte) of each element of the block at [batch.., block row, block column], and its group scales."""
    *batch, row, column = at
    rows = slice(row * block.rows, (row + 1) * block.rows)
    part = codes[(*batch, rows, slice(column * block.columns, (column + 1) * block.columns))]
    wide = block.columns // 32
    groups = scale[(*batch, rows, slice(column * wide, (column + 1) * wide))]
    pairs = torch.stack((part.int(), groups.int().repeat_interleave(32, -1)[..., : part.shape[-1]]), -1)
    return [(code, byte) for code, byte in pairs.flatten(0, -2).unique(dim=0).tolist()], groups.flatten().tolist()


def check_against_oracle(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> BlockScales:
    """Choose, compare every block with the oracle, cast, and compare every element as fractions."""
    packed = e2m1.pack(codes)
    chosen = choose_block_scales(packed, scale, block)
    shape = scale_shape(tuple(codes.shape), block)
    assert all(
        tuple(field.shape) == shape for field in (chosen.scale_bytes, chosen.span, chosen.rescaled, chosen.inexact)
    )
    for at in torch.ones(shape).nonzero().tolist():
        elements, groups = elements_of(codes, scale, block, tuple(at))
        byte, exact = chosen_scale_byte(elements, groups)
        here = tuple(at)
        assert (int(chosen.scale_bytes[here]), bool(chosen.inexact[here])) == (byte, not exact), (here, elements)
        assert int(chosen.span[here]) == max(groups) - min(groups)
        assert bool(chosen.rescaled[here]) == (exact and byte != max(groups) - 6)
    check_cast(codes, scale, chosen, block)
    return chosen


def check_cast(codes: torch.Tensor, scale: torch.Tensor, chosen: BlockScales, block: Block) -> None:
    packed = e2m1.pack(codes)
    result = cast(packed, scale, chosen.scale_bytes, block)
    assert result.shape == codes.shape and result.dtype == torch.uint8
    by_row = chosen.scale_bytes.repeat_interleave(block.rows, -2)[..., : codes.shape[-2], :]
    s_out = by_row.repeat_interleave(block.columns, -1)[..., : codes.shape[-1]].int()
    s_in = scale.repeat_interleave(32, -1)[..., : codes.shape[-1]].int()
    changed = exact_values(packed, scale, chosen.scale_bytes, block) != e4m3.decode(result).double()
    columns = [part.flatten() for part in (codes.int(), s_in - s_out, result.int(), changed.int())]
    for code, k, got, differs in torch.stack(columns, -1).unique(dim=0).tolist():
        exact = E2M1_MAGNITUDES[code & 7] * power(k)
        assert got & 0x7F == nearest_code(exact, E4M3_MAGNITUDES)
        assert got >> 7 == code >> 3  # the sign survives, that of zero included
        assert bool(differs) == (E4M3_MAGNITUDES[got & 0x7F] != exact)
    inexact_blocks = {tuple(at) for at in chosen.inexact.nonzero().tolist()}
    assert inexact_blocks == {
        (*at[:-2], at[-2] // block.rows, at[-1] // block.columns) for at in map(tuple, changed.nonzero().tolist())
    }


def test_limits_of_k_are_the_exact_ones() -> None:
    for code in range(1, 8):
        exact = [k for k in range(-40, 40) if exact_in_e4m3(code, k)]
        low, high = LOWEST_K[code], HIGHEST_K[code]
        assert low is not None and high is not None
        assert exact == list(range(low, high + 1))


def test_the_reference_s_choice_is_exact_up_to_the_guaranteed_span() -> None:
    for span in range(31):
        every_code = [(code, scale) for code in range(8) for scale in (100, 100 - span)]
        assert (100 - 6 in exact_scale_bytes(every_code)) == (span <= GUARANTEED_SPAN)


def test_cast_every_code_with_every_difference_of_scales() -> None:
    # k = s - S runs from -254 to 254; outside the table every code is zero or saturates, as at the table's ends.
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(1, 32)
    packed = e2m1.pack(codes)
    for k in range(-254, 255):
        s, S = max(k, 0), max(-k, 0)
        scale, block_scale = (torch.tensor([[byte]], dtype=torch.uint8) for byte in (s, S))
        result = cast(packed, scale, block_scale, ONE_GROUP)
        limited = min(max(k, TABLE_K_MIN), TABLE_K_MAX)
        expected = [nearest_code(m * power(limited), E4M3_MAGNITUDES) for m in E2M1_MAGNITUDES]
        if limited == k or k < 0:
            assert expected == [nearest_code(m * power(k), E4M3_MAGNITUDES) for m in E2M1_MAGNITUDES]
        assert result[0, :16].tolist() == expected + [code | 0x80 for code in expected]


def test_cast_every_pair_of_bytes() -> None:
    # Two neighbouring bytes are one index into the table: all 65536 of them, each row under its own k.
    pairs = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(1, 512, 256)
    packed = pairs.expand(3, -1, -1).contiguous()
    scale = torch.tensor([120, 127, 133], dtype=torch.uint8)[:, None, None].expand(3, 512, 16).contiguous()
    block_scale = torch.full(scale_shape((3, 512, 512), WHOLE), 127, dtype=torch.uint8)
    result = cast(packed, scale, block_scale, WHOLE)
    codes = e2m1.unpack(packed)
    for batch, k in enumerate((-7, 0, 6)):
        table = torch.tensor([nearest_code(m * power(k), E4M3_MAGNITUDES) for m in E2M1_MAGNITUDES])
        expected = table[(codes[batch] & 7).long()] | ((codes[batch].long() & 8) << 4)
        assert torch.equal(result[batch].long(), expected)


@pytest.mark.parametrize("smallest", [0, 3, 100, 222])
@pytest.mark.fast_cases(1)
def test_choice_with_all_codes_and_each_span(smallest: int) -> None:
    spans = torch.arange(31)
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).expand(31, 64)
    scale = torch.stack((torch.full((31,), smallest), smallest + spans), -1).to(torch.uint8)
    chosen = check_against_oracle(codes, scale, Block(1, 64))
    assert chosen.inexact.flatten().tolist() == (spans > GUARANTEED_SPAN).tolist()


def test_choice_at_every_scale_byte() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(255, 32)
    check_against_oracle(codes, torch.arange(255, dtype=torch.int32).to(torch.uint8)[:, None], ONE_GROUP)


@pytest.mark.parametrize("span", [0, 1, 5, 6, 14])
@pytest.mark.fast_cases(1)
def test_choice_where_the_reference_s_scale_would_be_below_e8m0(span: int) -> None:
    # Each block alone in its tensor: a tensor of easy blocks is decided without looking at the codes.
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64)
    for largest in range(span, span + 9):
        check_against_oracle(codes, torch.tensor([[largest - span, largest]], dtype=torch.uint8), Block(128, 64))


@pytest.mark.slow
def test_choice_for_every_pair_of_codes_and_span() -> None:
    # One block per row: a group that holds only code a and one that holds only code b, `span` above it.
    first, second, span = torch.meshgrid(torch.arange(8), torch.arange(8), torch.arange(31), indexing="ij")
    codes = torch.stack((first.flatten(), second.flatten()), -1).to(torch.uint8).repeat_interleave(32, -1)
    base = torch.full_like(span.flatten(), 90)
    scale = torch.stack((base, base + span.flatten()), -1).to(torch.uint8)
    chosen = check_against_oracle(codes, scale, Block(1, 64))
    assert chosen.inexact.any() and chosen.rescaled.any() and not (chosen.inexact | chosen.rescaled).all()


def test_choice_near_both_ends_of_e8m0() -> None:
    low = torch.tensor([[a, b] for a in range(12) for b in range(0, 30, 3)], dtype=torch.uint8)
    high = 254 - low
    scale = torch.cat((low, high))
    codes = torch.randint(0, 16, (len(scale), 64), dtype=torch.uint8, generator=generator())
    codes[::3, :32] = codes[::3, :32] & 0b1_00_1  # zeros and halves only
    codes[1::3, 32:] = codes[1::3, 32:] & 0b1_11_0  # even mantissas only
    check_against_oracle(codes, scale, Block(1, 64))


@pytest.mark.parametrize("zero", [0, 8])
@pytest.mark.parametrize("huge", [0, 1, 127, 200, 254])
def test_zeros_never_constrain(zero: int, huge: int) -> None:
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64).clone()
    codes[0, 32:] = zero
    scale = torch.tensor([[100, huge]], dtype=torch.uint8)
    chosen = check_against_oracle(codes, scale, Block(128, 64))
    assert not chosen.inexact.any()
    everything = torch.full((1, 64), zero, dtype=torch.uint8)
    chosen = check_against_oracle(everything, scale, Block(128, 64))
    result = cast(e2m1.pack(everything), scale, chosen.scale_bytes, Block(128, 64))
    assert result.unique().tolist() == [zero << 4]  # -0 stays -0


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 128), WHOLE),
        ((256, 384), WHOLE),
        ((130, 160), WHOLE),
        ((1, 2), WHOLE),
        ((3, 34), WHOLE),
        ((2, 33, 66), Block(32, 32)),
        ((2, 2, 5, 192), Block(4, 64)),
    ],
)
@pytest.mark.fast_cases(1)
def test_odd_shapes(shape: tuple[int, ...], block: Block) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator())
    group_shape = scale_shape(shape, FP4_BLOCK)
    scale = torch.randint(100, 114, group_shape, dtype=torch.uint8, generator=generator(1))
    assert not check_against_oracle(codes, scale, block).rescaled.any()
    wide = torch.randint(100, 120, group_shape, dtype=torch.uint8, generator=generator(2))
    check_against_oracle(codes, wide, block)
    few_codes = codes & 0b1_01_0  # zeros and ones of either sign leave room
    check_against_oracle(few_codes, wide, block)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.fast_cases(4)
def test_random_blocks(seed: int) -> None:
    shape = (64, 64)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator(seed))
    few = torch.tensor([0b1_11_1, 0b1_01_0, 0b1_00_1, 0b1_10_0])[seed % 4]
    codes[seed % 3 :: 2] &= int(few)
    scale = torch.randint(60, 60 + 8 + seed, scale_shape(shape, FP4_BLOCK), dtype=torch.uint8, generator=generator(99))
    check_against_oracle(codes, scale, Block(2, 32))


def test_a_non_contiguous_scale_and_int8_codes() -> None:
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8, generator=generator())
    scale = torch.randint(90, 120, (2, 8), dtype=torch.uint8, generator=generator(1)).T
    chosen = check_against_oracle(codes, scale, Block(4, 64))
    again = choose_block_scales(e2m1.pack(codes).view(torch.int8), scale.contiguous(), Block(4, 64))
    assert torch.equal(again.scale_bytes, chosen.scale_bytes)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 2, 64)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    packed = torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scale = torch.empty(scale_shape(shape, FP4_BLOCK), dtype=torch.uint8)
    chosen = choose_block_scales(packed, scale, WHOLE)
    assert tuple(chosen.scale_bytes.shape) == scale_shape(shape, WHOLE)
    assert tuple(cast(packed, scale, chosen.scale_bytes, WHOLE).shape) == shape


@pytest.mark.slow
def test_scales_alone_decide_only_where_they_can() -> None:
    for largest in range(255):
        for span in range(min(largest, 30) + 1):
            scale = torch.tensor([[largest - span, largest]], dtype=torch.uint8)
            safe = scales_if_safe(scale, Block(128, 64))
            every_code = [(code, byte) for code in range(8) for byte in (largest - span, largest)]
            assert (safe is not None) == (largest - 6 in exact_scale_bytes(every_code))
            if safe is not None:
                assert (int(safe.scale_bytes), int(safe.span)) == (largest - 6, span)
                assert not safe.rescaled.any() and not safe.inexact.any()


def test_refuses_byte_255() -> None:
    packed, scale = torch.zeros(2, 16, dtype=torch.uint8), torch.tensor([[127], [255]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="byte 255"):
        choose_block_scales(packed, scale, WHOLE)


@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (2,), (1, 2, 1)])
def test_refuses_a_scale_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[2, 1\] expected"):
        choose_block_scales(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8), WHOLE)


def test_refuses_a_block_that_cuts_groups() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        packed, scale = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
        choose_block_scales(packed, scale, Block(128, 48))


def test_exact_values_at_the_extremes_of_both_scales() -> None:
    # 6 * 2**127 against an FP8 zero under 2**-127, and the reverse: far outside float32, still told apart.
    packed = e2m1.pack(torch.full((1, 32), 0b0_11_1, dtype=torch.uint8))
    for s, S in ((254, 0), (0, 254)):
        scale, block_scale = (torch.tensor([[byte]], dtype=torch.uint8) for byte in (s, S))
        codes = cast(packed, scale, block_scale, ONE_GROUP)
        changed = exact_values(packed, scale, block_scale, ONE_GROUP) != e4m3.decode(codes).double()
        assert changed.all()


def test_magnitudes_in_the_docstring_table() -> None:
    assert [float(m) for m in E2M1_MAGNITUDES] == list(e2m1.MAGNITUDES)
    assert Fraction(6) * power(6) == 384 and max(E4M3_MAGNITUDES) == 448
