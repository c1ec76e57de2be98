"""Weights on other devices: decoded to the same values, without a question to the device."""

import pytest
import torch

from dsv4.model.kernels.torch_device import DECODED_ELEMENTS, decode_to_bf16, is_bf16, linear
from dsv4.model.weights import BFLOAT16, FLOAT4_E2M1FN, FLOAT8_E4M3FN, Matrix
from dsv4.quant.block_scales import FP4_BLOCK, Block

RANDOM = torch.Generator().manual_seed(3)


def some(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=RANDOM, dtype=torch.uint8)


def fp8(rows: int, columns: int, block: Block, scale: torch.Tensor) -> Matrix:
    codes = some(rows, columns) & 0b1_1111_110  # no NaN, which is 0x7F and 0xFF
    return Matrix("w", FLOAT8_E4M3FN, (rows, columns), codes.view(torch.float8_e4m3fn), scale, block)


MATRICES = {
    "fp4": Matrix("w", FLOAT4_E2M1FN, (70, 96), some(70, 48), some(70, 3, low=67, high=188), FP4_BLOCK),
    "fp8": fp8(200, 300, Block(128, 128), some(2, 3, low=67, high=188).view(torch.float8_e8m0fnu)),
    "fp8 32x32": fp8(70, 96, Block(32, 32), some(3, 3, low=67, high=188).view(torch.float8_e8m0fnu)),
    "fp8 float32": fp8(200, 300, Block(128, 128), 2.0 ** some(2, 3, high=120).float() * 2.0**-60),
    "bf16": Matrix("w", BFLOAT16, (9, 40), torch.randn(9, 40, generator=RANDOM).bfloat16()),
}


@pytest.mark.parametrize("name", list(MATRICES))
def test_every_row_decodes_to_the_value_that_float32_has(name: str) -> None:
    matrix = MATRICES[name]
    assert is_bf16(matrix)
    for start, stop in ((0, matrix.shape[0]), (1, 2), (matrix.shape[0] // 2 + 1, matrix.shape[0])):
        decoded, expected = decode_to_bf16(matrix, start, stop), matrix.decode(start, stop)
        assert decoded.dtype == torch.bfloat16 and torch.equal(decoded.float(), expected)
        assert torch.equal(torch.signbit(decoded), torch.signbit(expected))


def test_what_bfloat16_cannot_hold_takes_the_other_way() -> None:
    scale = torch.full((2, 3), 0.3)
    matrix = Matrix("w", FLOAT8_E4M3FN, (200, 300), some(200, 300) & 126, scale, Block(128, 128), exact_products=False)
    assert not is_bf16(matrix)
    ragged = Matrix("w", FLOAT4_E2M1FN, (4, 48), some(4, 24), some(4, 2, low=100, high=130), FP4_BLOCK)
    assert not is_bf16(ragged)
    x = torch.randn(3, 300, generator=RANDOM)
    assert torch.equal(linear(x, matrix), x @ matrix.decode().T)


@pytest.mark.parametrize("name", list(MATRICES))
def test_the_product_is_the_same_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = MATRICES[name]
    x = torch.randint(-3, 4, (5, matrix.shape[1]), generator=RANDOM).float() * 2.0**-40
    whole = linear(x, matrix, 1, matrix.shape[0])
    monkeypatch.setattr("dsv4.model.kernels.torch_device.DECODED_ELEMENTS", DECODED_ELEMENTS >> 17)
    # The device's sums may take another order for another shape: 2**-24 of the largest term, some hundred terms.
    terms = x.double().abs() @ matrix.decode(1, matrix.shape[0]).double().abs().T
    assert ((linear(x, matrix, 1, matrix.shape[0]).double() - whole.double()).abs() <= terms * 2.0**-16).all()
