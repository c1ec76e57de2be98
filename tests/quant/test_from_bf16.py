"""BF16 to FP4 and FP8 against ml_dtypes: every BF16 value, every pair of magnitudes that share a block, both forms."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4.quant import Block, from_bf16, to_bf16
from dsv4.quant.block_scales import FP4_BLOCK
from dsv4.quant.from_bf16 import BlockForm

Form = Callable[[torch.Tensor, Block], BlockForm]
FORMATS = {"fp4": (ml_dtypes.float4_e2m1fn, 6.0), "fp8": (ml_dtypes.float8_e4m3fn, 448.0)}


def convert(kind: str, values: torch.Tensor, block: Block) -> BlockForm:
    return from_bf16.to_fp4(values) if kind == "fp4" else from_bf16.to_fp8(values, block)


def in_torch(kind: str, values: torch.Tensor, block: Block) -> BlockForm:
    target = from_bf16._E2M1 if kind == "fp4" else from_bf16._E4M3
    return from_bf16.in_torch(values, block, target)


FORMS = pytest.mark.parametrize("form", [convert, in_torch])
KINDS = pytest.mark.parametrize("kind", ["fp4", "fp8"])


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def unpacked(kind: str, form: BlockForm) -> np.ndarray:
    codes = form.codes.numpy()
    return np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1) if kind == "fp4" else codes


def rounded(kind: str, values: np.ndarray, exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one block a row by ml_dtypes, and which elements keep their value. Exact: float64 has all quotients."""
    dtype, _ = FORMATS[kind]
    scaled = np.ldexp(values, -exponent[:, None])
    codes = scaled.astype(np.float32).astype(dtype)
    return codes.view(np.uint8), codes.astype(np.float64) == scaled


def expected(kind: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale bytes and changed elements of one block a row, from the rule: the release's scale, or twice that
    if the largest code is the format's largest and every element has a code under it."""
    largest = FORMATS[kind][1]
    amax = np.abs(values).max(1)
    mantissa, exponent = np.frexp(np.where(amax > 0, amax, 1) / largest)
    exponent = np.where(amax > 0, np.maximum(exponent - (mantissa == 0.5), -127), 0)
    _, coarser_exact = rounded(kind, values, exponent + 1)
    coarser = (amax == np.ldexp(largest, exponent)) & coarser_exact.all(1)
    exponent = exponent + coarser
    codes, exact = rounded(kind, values, exponent)
    return codes, (exponent + 127).astype(np.uint8), (~exact).sum(1)


def check(kind: str, form: Form, values: torch.Tensor, block: Block) -> None:
    """Every row of `values` is one block."""
    found = form(kind, values, block)  # type: ignore[call-arg, arg-type]
    codes, scales, changed = expected(kind, values.double().numpy())
    np.testing.assert_array_equal(found.scale_bytes.numpy()[:, 0], scales)
    np.testing.assert_array_equal(unpacked(kind, found), codes)
    np.testing.assert_array_equal(found.changed.numpy()[:, 0], changed)


@KINDS
@FORMS
def test_every_value_alone_in_a_block(kind: str, form: Form) -> None:
    bits = np.arange(1 << 16)
    bits = bits[bits & 0x7F80 != 0x7F80]  # no infinity and no NaN
    rows = np.zeros((len(bits), 2), np.int64)
    rows[:, 1] = bits
    check(kind, form, bf16(rows), Block(1, 32))


@KINDS
@FORMS
def test_every_pair_of_magnitudes_in_a_block(kind: str, form: Form) -> None:
    """The larger has each mantissa, the smaller each value down to 2**-19 of it: below that all round to zero."""
    larger = np.arange(130 << 7, 131 << 7)
    smaller = np.arange(111 << 7, 130 << 7)
    signs = np.random.default_rng(1).integers(0, 2, (len(larger), len(smaller), 2)) << 15
    pairs = np.stack(np.meshgrid(larger, smaller, indexing="ij"), -1)
    check(kind, form, bf16((pairs | signs).reshape(-1, 2)), Block(1, 32))


@KINDS
@pytest.mark.parametrize("block", [Block(1, 32), Block(32, 32), Block(128, 128)])
@pytest.mark.parametrize("exponent", [-120, -20, 100])
def test_both_forms_give_the_same_bits_on_uneven_shapes(kind: str, block: Block, exponent: int) -> None:
    block = FP4_BLOCK if kind == "fp4" else block
    values = torch.randn((131, 166), generator=torch.Generator().manual_seed(3)).ldexp(torch.tensor(exponent))
    values[:40, :40] = values[:40, :40].sign() * 2.0**exponent  # some blocks are exact
    values[0, :64] = -0.0
    for one, other in zip(
        convert(kind, values.bfloat16(), block), in_torch(kind, values.bfloat16(), block), strict=True
    ):
        assert torch.equal(one, other)


def quantized(kind: str, shape: tuple[int, int], block: Block, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale bytes by the rule of the releases, from normal numbers, with ml_dtypes."""
    dtype, largest = FORMATS[kind]
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0**-6 * np.exp2(rng.integers(-2, 3, shape))
    high, wide = shape[0] // block.rows, shape[1] // block.columns
    amax = np.abs(values).reshape(high, block.rows, wide, block.columns).max((1, 3))
    exponent = np.ceil(np.log2(amax / largest)).astype(int)
    spread = exponent.repeat(block.rows, 0).repeat(block.columns, 1)
    codes = np.ldexp(values, -spread).astype(np.float32).astype(dtype).view(np.uint8)
    return torch.from_numpy(codes), torch.from_numpy((exponent + 127).astype(np.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_fp4_of_a_release_comes_back_to_its_bytes(seed: int) -> None:
    codes, scales = quantized("fp4", (256, 1024), FP4_BLOCK, seed)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    assert {3, 4, 6} == set(np.unique(expected_top(codes)))  # groups whose largest code is 3 are among them
    values = to_bf16.from_fp4(packed, scales).values
    found = from_bf16.to_fp4(values)
    assert torch.equal(found.codes, packed) and torch.equal(found.scale_bytes, scales) and not found.changed.any()
    assert (packed == 0x80).any(), "no zero with a sign"


def expected_top(codes: torch.Tensor) -> Any:
    magnitudes = (codes & 7).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return magnitudes.reshape(len(magnitudes), -1, 32).max(-1)


@pytest.mark.parametrize("block", [Block(128, 128), Block(32, 32)])
def test_fp8_comes_back_to_equal_values(block: Block) -> None:
    codes, scales = quantized("fp8", (256, 512), block, 4)
    values = to_bf16.from_fp8(codes, scales, block).values
    found = from_bf16.to_fp8(values, block)
    assert not found.changed.any()
    back = to_bf16.from_fp8(found.codes, found.scale_bytes, block).values
    assert torch.equal(back.view(torch.int16), values.view(torch.int16))  # the sign of zero included


@KINDS
@FORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(kind: str, form: Form, bad: float) -> None:
    values = torch.ones((2, 64), dtype=torch.bfloat16)
    values[1, 40] = bad
    with pytest.raises(ValueError, match="NaN and infinity"):
        form(kind, values, Block(1, 32))  # type: ignore[call-arg, arg-type]


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="two codes share a byte"):
        from_bf16.to_fp4(torch.ones((2, 33), dtype=torch.bfloat16))


def test_the_error_is_what_float64_says() -> None:
    values = torch.tensor([[6.0, 5.0, 0.2, 1.0] + [0.0] * 28], dtype=torch.bfloat16)
    found = from_bf16.to_fp4(values)
    assert found.changed.tolist() == [[2]]  # 5 lies between 4 and 6, 0.2 between 0 and 0.5
    wide = values.double()
    back = torch.tensor([[6.0, 4.0, 0.0, 1.0] + [0.0] * 28]).double()
    error = from_bf16.error(found, values, FP4_BLOCK)
    assert error.changed == 2
    assert error.squared_error == float(((wide - back) ** 2).sum())
    assert error.squared_value == float((wide**2).sum())
    assert error.max_error == 1.0
