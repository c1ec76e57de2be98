"""FP8 -> FP4: exact exactly where one of all 255 scales is, nearest elsewhere, against fractions."""

from fractions import Fraction

import pytest
import torch
from oracle import E2M1_MAGNITUDES, E4M3_MAGNITUDES, E8M0_VALUES, nearest_code, power

from dsv4.quant import e2m1, e4m3, e8m0, fp4_to_fp8, fp8_to_fp4
from dsv4.quant.block_scales import Block, scale_shape

GROUP = Block(1, 32)
E2M1_SET = frozenset(E2M1_MAGNITUDES)
FP4_VALUES = [frozenset(magnitude * scale for magnitude in E2M1_MAGNITUDES) for scale in E8M0_VALUES]  # by scale byte
REPRESENTABLE = [code for code in range(256) if code & 0x7F != 0x7F]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_fractions(codes: list[int], scale: float) -> list[Fraction]:
    return [E4M3_MAGNITUDES[code & 0x7F] * Fraction(scale) for code in codes]


def exact_bytes(magnitudes: list[Fraction]) -> list[int]:
    distinct = set(magnitudes)
    return [byte for byte, values in enumerate(FP4_VALUES) if distinct <= values]


def check_group(codes: list[int], scale: float, form: fp8_to_fp4.Fp4Form) -> bool:
    """One group of 32 against the oracle. Returns whether it is exact."""
    magnitudes = as_fractions(codes, scale)
    candidates = exact_bytes(magnitudes)
    byte = int(form.scale_bytes)
    assert bool(form.exact) == bool(candidates)
    if candidates:
        assert byte in candidates
    else:
        largest = max(magnitudes)
        assert byte == next((s for s in range(255) if largest <= 6 * E8M0_VALUES[s]), 254)
    for code, magnitude, got in zip(codes, magnitudes, e2m1.unpack(form.packed).flatten().tolist(), strict=True):
        assert got & 7 == nearest_code(magnitude / E8M0_VALUES[byte], E2M1_MAGNITUDES)
        assert got >> 3 == code >> 7
    return bool(candidates)


def check(codes: torch.Tensor, scale: torch.Tensor, block: Block) -> list[bool]:
    form = fp8_to_fp4.cast(codes, scale, block)
    rows, columns = codes.shape
    exact = []
    for row in range(rows):
        for group in range(-(-columns // 32)):
            columns_of_group = slice(32 * group, min(32 * group + 32, columns))
            stored = scale[row // block.rows, 32 * group // block.columns]
            value = float(stored) if scale.dtype == torch.float32 else float(e8m0.decode(stored[None]))
            part = fp8_to_fp4.Fp4Form(
                form.packed[row, 16 * group : 16 * group + 16], form.scale_bytes[row, group], form.exact[row, group]
            )
            exact.append(check_group(codes[row, columns_of_group].tolist(), value, part))
    return exact


@pytest.mark.slow
def test_every_pair_of_codes() -> None:
    # A group that holds code a and code b: 127 x 127 / 2 pairs of magnitudes decide exactness.
    pairs = [(a, b) for a in range(127) for b in range(a, 127)]
    codes = torch.tensor(pairs, dtype=torch.uint8).repeat(1, 16)
    codes[:, 5] = 0x80
    form = fp8_to_fp4.cast(codes, torch.full((1, 1), 127, dtype=torch.uint8), Block(len(pairs), 32))
    for row, (a, b) in enumerate(pairs):
        low, high = E4M3_MAGNITUDES[a], E4M3_MAGNITUDES[b]
        exact = any(low / power(k) in E2M1_SET and high / power(k) in E2M1_SET for k in range(-12, 9))
        assert bool(form.exact[row]) == exact
        got = e2m1.unpack(form.packed[row]).tolist()
        step = E8M0_VALUES[int(form.scale_bytes[row])]
        assert got[:2] == [nearest_code(low / step, E2M1_MAGNITUDES), nearest_code(high / step, E2M1_MAGNITUDES)]
        assert got[5] == e2m1.NEGATIVE_ZERO


@pytest.mark.parametrize("byte", [0, 1, 2, 5, 9, 10, 60, 127, 200, 244, 247, 248, 250, 252, 253, 254])
@pytest.mark.fast_cases(4)
def test_every_code_with_scales_up_to_the_ends(byte: int) -> None:
    codes = torch.tensor(REPRESENTABLE, dtype=torch.uint8)[:, None].repeat(1, 2)
    scale = torch.full((1, 1), byte, dtype=torch.uint8)
    check(codes, scale, Block(254, 32))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, 0, 100])
def test_float32_scales(exponent: int) -> None:
    codes = torch.tensor([REPRESENTABLE[i : i + 32] for i in range(0, 254 - 32, 7)], dtype=torch.uint8)
    check(codes, torch.full((1, 1), 2.0**exponent), Block(64, 32))


def test_a_scale_that_is_no_power_of_two_is_exact_only_if_the_product_is() -> None:
    codes = torch.full((1, 32), 0b0_0111_111, dtype=torch.uint8)  # 1.875
    almost = torch.tensor([[16 / 15]])  # 1.875 times this float32 rounds to 2, and is not 2
    assert not check(codes, almost, GROUP)[0]
    codes = torch.full((1, 32), 0b0_0111_000, dtype=torch.uint8)  # 1.0
    assert check(codes, torch.tensor([[1.5]]), GROUP)[0]


@pytest.mark.parametrize(
    ("shape", "block"), [((5, 64), Block(2, 64)), ((3, 70), Block(128, 128)), ((33, 34), Block(32, 32))]
)
def test_random_codes_and_ragged_shapes(shape: tuple[int, int], block: Block) -> None:
    codes = torch.tensor(REPRESENTABLE, dtype=torch.uint8)[torch.randint(0, 254, shape, generator=generator())]
    scale = torch.randint(100, 140, scale_shape(shape, block), dtype=torch.uint8, generator=generator(1))
    check(codes, scale, block)


@pytest.mark.parametrize("seed", range(4))
def test_an_upcast_tensor_goes_back_to_equal_values(seed: int) -> None:
    shape, block = (40, 96), Block(16, 32)
    packed = torch.randint(0, 256, (40, 48), dtype=torch.uint8, generator=generator(seed))
    groups = torch.randint(90, 104, (40, 3), dtype=torch.uint8, generator=generator(seed + 10))
    chosen = fp4_to_fp8.choose_block_scales(packed, groups, block)
    assert not chosen.inexact.any()
    codes = fp4_to_fp8.cast(packed, groups, chosen.scale_bytes, block)
    for scale in (chosen.scale_bytes, e8m0.decode(chosen.scale_bytes)):
        form = fp8_to_fp4.cast(codes, scale, block)
        assert form.exact.all()
        back = e2m1.decode(e2m1.unpack(form.packed)) * e8m0.decode(form.scale_bytes).repeat_interleave(32, -1)
        before = e2m1.decode(e2m1.unpack(packed)) * e8m0.decode(groups).repeat_interleave(32, -1)
        assert torch.equal(back.view(torch.int32), before.view(torch.int32)) and back.shape == shape
        assert fp8_to_fp4.error(form, codes, scale, block) == (0, 0.0, float((before.double() ** 2).sum()), 0.0)


def test_error_counts_and_measures() -> None:
    codes = torch.tensor([[0b0_0111_000, 0b0_0111_001] + [0] * 30], dtype=torch.uint8)  # 1.0, 1.125
    scale = torch.full((1, 1), 130, dtype=torch.uint8)  # 8
    form = fp8_to_fp4.cast(codes, scale, GROUP)
    assert not form.exact.any()
    # 9 lies between 8 and 12 on the grid of 2**1, where the top is 12: it becomes 8.
    assert fp8_to_fp4.error(form, codes, scale, GROUP) == (1, 1.0, 64.0 + 81.0, 1.0)


def test_refuses_nan_and_blocks_that_cut_groups() -> None:
    scale = torch.full((1, 1), 127, dtype=torch.uint8)
    for nan in (0x7F, 0xFF):
        with pytest.raises(ValueError, match="NaN"):
            fp8_to_fp4.cast(torch.full((1, 32), nan, dtype=torch.uint8), scale, GROUP)
    with pytest.raises(ValueError, match="not positive and finite"):
        fp8_to_fp4.cast(torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8), GROUP)
    with pytest.raises(ValueError, match="groups of 32"):
        fp8_to_fp4.cast(torch.zeros(1, 48, dtype=torch.uint8), scale, Block(1, 48))


def test_zeros_of_both_signs() -> None:
    codes = torch.tensor([[0, e4m3.NEGATIVE_ZERO] * 16], dtype=torch.uint8)
    form = fp8_to_fp4.cast(codes, torch.full((1, 1), 127, dtype=torch.uint8), GROUP)
    assert form.exact.all() and e2m1.unpack(form.packed)[0, :2].tolist() == [0, e2m1.NEGATIVE_ZERO]
