"""Triton's kernels against the reference forms, in Triton's interpreter, which needs no GPU.

Triton is no package of the test extra (600 MB); `.ci/run` installs it for this file alone.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed; .ci/run installs it")

from dsv4.model.kernels import cuda, reference
from dsv4.model.kernels import reference_small as small
from dsv4.model.weights import FLOAT4_E2M1FN, FLOAT8_E4M3FN, Matrix
from dsv4.quant.activation import simulate_fp8
from dsv4.quant.block_scales import FP4_BLOCK, Block

RANDOM = torch.Generator().manual_seed(5)
DTYPES = (torch.bfloat16, torch.float32)
# A step of bfloat16, because the interpreter cuts where a GPU rounds; some float32 sums in another order.
STEP = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}


def some(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=RANDOM, dtype=torch.uint8)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM).to(dtype)


def fp8(rows: int, columns: int, block: Block, scale: torch.Tensor) -> Matrix:
    codes = some(rows, columns)
    codes[codes & 127 == 127] = 8  # no NaN
    return Matrix("w", FLOAT8_E4M3FN, (rows, columns), codes.view(torch.float8_e4m3fn), scale, block)


MATRICES = {
    "fp4": Matrix("w", FLOAT4_E2M1FN, (70, 96), some(70, 48), some(70, 3, low=120, high=130), FP4_BLOCK),
    "fp8": fp8(200, 300, Block(128, 128), some(2, 3, low=120, high=130).view(torch.float8_e8m0fnu)),
    "fp8 32x32": fp8(70, 96, Block(32, 32), some(3, 3, low=120, high=130).view(torch.float8_e8m0fnu)),
    "fp8 float32": fp8(200, 300, Block(128, 128), 2.0 ** some(2, 3, high=12).float() * 2.0**-6),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(MATRICES))
def test_linear(name: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[name]
    for count, start, stop in ((1, 0, matrix.shape[0]), (16, 1, 2), (3, matrix.shape[0] // 2 + 1, matrix.shape[0])):
        x = normal(count, matrix.shape[1], dtype=dtype)
        expected, found = reference.linear(x, matrix, start, stop), cuda.linear(x, matrix, start, stop)
        terms = x.double().abs() @ matrix.decode(start, stop).double().abs().T
        assert ((found.double() - expected.double()).abs() <= terms * 2.0**-20).all()


def test_every_code_and_every_scale_of_a_weight_is_decoded() -> None:
    """Rows of the identity pick single products: the kernels' decoders against the table of values."""
    codes = torch.arange(256, dtype=torch.uint8)
    packed = codes.reshape(8, 32).repeat(1, 1)
    fp4 = Matrix("w", FLOAT4_E2M1FN, (8, 64), packed, some(8, 2, low=67, high=188), FP4_BLOCK)
    wide = codes.clone()
    wide[codes & 127 == 127] = 0
    eight = Matrix("w", FLOAT8_E4M3FN, (4, 64), wide.reshape(4, 64), some(4, 2, low=67, high=188), Block(1, 32))
    for matrix in (fp4, eight):
        for first in range(0, 64, 16):
            x = torch.eye(64, dtype=torch.bfloat16)[first : first + 16]
            assert torch.equal(cuda.linear(x, matrix), matrix.decode()[:, first : first + 16].T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [64, 128])
def test_simulated_fp8_is_the_same_value(dtype: torch.dtype, group: int) -> None:
    x = (normal(9, 3 * group) * 10.0 ** normal(9, 1)).to(dtype)
    ties = (torch.arange(3 * group) / 16).to(dtype)  # values midway between two codes, and below the normal ones
    x = torch.cat((x, ties[None], ties[None] * -(2.0**-13), torch.zeros(1, 3 * group, dtype=dtype)))
    assert torch.equal(cuda.simulate_fp8(x, group), simulate_fp8(x, group))


def close(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    return all(
        f.dtype == e.dtype
        and f.shape == e.shape
        and bool(
            ((f.float() - e.float()).abs() <= STEP[dtype] * e.float().abs().clamp(min=e.float().abs().mean())).all()
        )
        for f, e in pairs
    )


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """Each operation of both kinds, with arguments whose lengths are no powers of two."""
    h, weights, comb = normal(3, 4, 1100, dtype=dtype), normal(3, 4).abs(), normal(3, 4, 4).abs()
    x, gate, up = normal(3, 1100, dtype=dtype), normal(3, 1100, dtype=dtype) * 5, normal(3, 1100, dtype=dtype) * 5
    mixes, scale, base = normal(3, 24), normal(3).abs(), normal(24)
    return {
        "inverse_rms": (cuda.inverse_rms, small.inverse_rms, (x, 1e-6)),
        "rms_norm": (cuda.rms_norm, small.rms_norm, (x, normal(1100), 1e-6)),
        "hc_pre": (cuda.hc_pre, small.hc_pre, (weights, h)),
        "hc_post": (cuda.hc_post, small.hc_post, (x, h, weights, comb)),
        "swiglu, shared": (cuda.swiglu, small.swiglu, (gate, up, 7.0, None)),
        "swiglu, routed": (cuda.swiglu, small.swiglu, (gate, up, 7.0, weights[:, 0])),
        "hc_split_sinkhorn": (cuda.hc_split_sinkhorn, small.hc_split_sinkhorn, (mixes, scale, base, 4, 20, 1e-6)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_small_operations(name: str, dtype: torch.dtype) -> None:
    kernel, reference_form, arguments = calls(dtype)[name]
    assert close(kernel(*arguments), reference_form(*arguments), dtype)


def test_nothing_is_computed_for_no_tokens() -> None:
    h, none = normal(0, 4, 40), normal(0, 40)
    assert cuda.inverse_rms(none, 1e-6).shape == (0,) and cuda.rms_norm(none, normal(40), 1e-6).shape == (0, 40)
    assert cuda.hc_pre(normal(0, 4), h).shape == (0, 40) and cuda.swiglu(none, none, 7.0, None).shape == (0, 40)
    assert cuda.hc_post(none, h, normal(0, 4), normal(0, 4, 4)).shape == (0, 4, 40)
    assert cuda.hc_split_sinkhorn(normal(0, 24), normal(3), normal(24), 4, 20, 1e-6)[2].shape == (0, 4, 4)
    assert cuda.simulate_fp8(normal(0, 128), 128).shape == (0, 128)
