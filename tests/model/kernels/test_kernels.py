"""The order of sums, the functions built on it, and every row of the kernel table against the reference row."""

import math
import os
import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_threads import kernel_threads

from dsv4 import compiled
from dsv4.errors import UsageError
from dsv4.model.kernels import binding, table
from dsv4.model.kernels.deterministic import LANES, exp, lane_dot, lane_sum, sigmoid, silu, softplus, sqrt, tree_sum
from dsv4.model.kernels.reference import Expert, Experts, Product
from dsv4.model.kernels.table import REFERENCE, TORCH_DEVICE
from dsv4.model.weights import Matrix
from dsv4.quant.block_scales import Block

GENERATOR = torch.Generator().manual_seed(8)
CPU = table.select_kernels(torch.device("cpu"))  # the reference row where there is no library


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def halves(values: list[np.float32]) -> np.float32:
    """The sum by halves, one addition at a time."""
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[i + half] for i in range(half)] + values[2 * half :]
    return values[0]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 28, 100])
def test_tree_sum_adds_by_halves(length: int) -> None:
    x = torch.randn(4, length, generator=GENERATOR) * 10 ** torch.randn(4, length, generator=GENERATOR)
    assert tree_sum(x).tolist() == [float(halves(list(row))) for row in x.numpy()]


@pytest.mark.parametrize("length", [5, 16, 48, 72])
def test_lanes_add_in_order(length: int) -> None:
    x, w = torch.randn(3, length, generator=GENERATOR), torch.randn(2, length, generator=GENERATOR)

    def one(terms: np.ndarray, lane: Callable[[int], int], order: list[int]) -> float:
        lanes = [np.float32(0)] * LANES
        for k in order:
            lanes[lane(k)] = lanes[lane(k)] + terms[k]
        return float(halves(lanes))

    odd_first = [k ^ 1 for k in range(length + length % 2) if k ^ 1 < length]
    found = lane_dot(x, w).tolist()
    assert found == [[one(a * b, lambda k: k % 32 // 2, odd_first) for b in w.numpy()] for a in x.numpy()]
    assert lane_sum(x).tolist() == [one(a, lambda k: k % LANES, list(range(length))) for a in x.numpy()]


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (exp, math.exp),
        (softplus, lambda v: math.log1p(math.exp(v)) if v < 600 else v),
        (sigmoid, lambda v: 1 / (1 + math.exp(-v))),
        (silu, lambda v: v / (1 + math.exp(-v))),
    ],
)
def test_functions_are_accurate(
    function: Callable[[torch.Tensor], torch.Tensor], formula: Callable[[float], float]
) -> None:
    """Within two units in the last place of float64 arithmetic; exp and softplus round once, the others twice more."""
    x = torch.cat((torch.linspace(-80, 80, 4001), torch.randn(2000, generator=GENERATOR), torch.tensor([0.0, -0.0])))
    expected = np.array([formula(float(v)) for v in x])
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    error = np.abs(function(x).numpy().astype(np.float64) - expected) / ulp
    assert error.max() < (0.51 if function in (exp, softplus) else 2.0)


def test_functions_do_not_depend_on_the_neighbours() -> None:
    """Bodies and tails of arrays go through the same operations: each element alone gives the same bits."""
    x = torch.randn(67, generator=GENERATOR) * 5
    for function in (exp, softplus, sigmoid, silu):
        alone = torch.cat([function(x[i : i + 1].clone()) for i in range(len(x))])
        assert torch.equal(bits(function(x)), bits(alone))


def test_sqrt_is_correctly_rounded() -> None:
    x = torch.cat((torch.rand(100_000, generator=GENERATOR) * 4, torch.arange(1.0, 2000.0), torch.tensor([0.0, 1e-30])))
    assert (sqrt(x).numpy() == np.sqrt(x.numpy())).all()


def test_exp_of_minus_infinity_is_zero() -> None:
    assert exp(torch.tensor([-torch.inf, -500.0])).tolist() == [0.0, 0.0]


def e8m0(shape: tuple[int, ...], smallest: int = 90) -> torch.Tensor:
    return torch.randint(smallest, 160, shape, generator=GENERATOR).to(torch.uint8).view(torch.float8_e8m0fnu)


def matrices(rows: int, columns: int) -> list[Matrix]:
    """One of each stored format."""
    normal = torch.randn(rows, columns, generator=GENERATOR)
    blocks = (-(-rows // 128), -(-columns // 128))
    packed = torch.randint(-128, 128, (rows, columns // 2), generator=GENERATOR).to(torch.int8)
    fp8 = normal.to(torch.float8_e4m3fn)
    shape = (rows, columns)
    odd_scale = torch.rand(blocks, generator=GENERATOR) + 0.5
    powers = 2.0 ** torch.randint(-9, 9, blocks, generator=GENERATOR)
    return [
        Matrix("float32", "float32", shape, normal),
        Matrix("bfloat16", "bfloat16", shape, normal.to(torch.bfloat16)),
        Matrix("fp8", "float8_e4m3fn", shape, fp8, e8m0(blocks), Block(128, 128)),
        Matrix("fp8, float32 scales", "float8_e4m3fn", shape, fp8, powers, Block(128, 128)),
        Matrix("fp8, odd scales", "float8_e4m3fn", shape, fp8, odd_scale, Block(128, 128), exact_products=False),
        Matrix("fp8, 32 x 32", "float8_e4m3fn", shape, fp8, e8m0((-(-rows // 32), -(-columns // 32))), Block(32, 32)),
        Matrix("fp4", "float4_e2m1fn", shape, packed, e8m0((rows, columns // 32))),
        Matrix(
            "fp4, tiny scales", "float4_e2m1fn", shape, packed, e8m0((rows, columns // 32), 0), exact_products=False
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(133, 224), (24, 64), (5, 512), (3, 32)])
@pytest.mark.fast_cases(1)
def test_linear(rows: int, columns: int, dtype: torch.dtype) -> None:
    for matrix in matrices(rows, columns):
        for count in (1, 8, 50):  # 50 rows and few of the weight: threads share out rows of x
            x = torch.randn(count, columns, generator=GENERATOR).to(dtype)
            for start, stop in ((0, None), (1, rows - 1)):
                expected = REFERENCE.linear(x, matrix, start, stop)
                found = CPU.linear(x, matrix, start, stop)
                assert torch.equal(bits(found), bits(expected)), (matrix.name, count, start)
                rounded = expected.to(torch.bfloat16)
                for linear in (REFERENCE.linear, CPU.linear, TORCH_DEVICE.linear):
                    found = linear(x, matrix, start, stop, torch.bfloat16)
                    assert found.dtype == torch.bfloat16
                    if linear is not TORCH_DEVICE.linear:
                        assert torch.equal(bits(found), bits(rounded)), (matrix.name, count, start)
                exact = x.to(torch.float64) @ matrix.decode(start, stop).to(torch.float64).T
                scale = x.to(torch.float64).abs() @ matrix.decode(start, stop).to(torch.float64).abs().T
                # A sum of n terms in lanes of n / 16: each addition is off by at most 2**-24 of the sum of magnitudes.
                bound = scale * (columns / LANES + 5) * 2.0**-24
                assert ((expected - exact).abs() <= bound).all(), matrix.name
                assert ((TORCH_DEVICE.linear(x, matrix, start, stop) - exact).abs() <= scale * columns * 2.0**-24).all()


def test_a_few_rows_are_added_up_as_each_of_them() -> None:
    """Two to six rows have a loop of their own: whole groups of four rows of the weight, and what is left of them."""
    x = torch.randn(6, 224, generator=GENERATOR).to(torch.bfloat16)
    for matrix in matrices(139, 224):
        expected = REFERENCE.linear(x, matrix)
        for count in range(2, 7):
            assert torch.equal(bits(CPU.linear(x[:count], matrix)), bits(expected[:count])), (matrix.name, count)


@pytest.mark.parametrize("columns", [32, 64, 96, 160])
def test_fp4_in_whole_and_half_pairs_of_blocks(columns: int) -> None:
    """The kernels take two blocks of 32 columns at a time, then the one that is left; each has its own scale."""
    packed = torch.randint(-128, 128, (9, columns // 2), generator=GENERATOR).to(torch.int8)
    matrix = Matrix("fp4", "float4_e2m1fn", (9, columns), packed, e8m0((9, columns // 32)))
    x = torch.randn(6, columns, generator=GENERATOR).to(torch.bfloat16)
    expected = REFERENCE.linear(x, matrix)
    for count in (1, 2, 6):
        assert torch.equal(bits(CPU.linear(x[:count], matrix)), bits(expected[:count])), count


@pytest.mark.parametrize(("x_exponent", "scale_exponent", "code"), [(-100, -30, 0x78), (90, 45, 0x01)])
def test_fp8_where_x_times_the_block_scale_is_no_bfloat16(x_exponent: int, scale_exponent: int, code: int) -> None:
    """The product of all three is a normal float32: 2**-122 and 2**126."""
    scale = torch.full((1, 1), 127 + scale_exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    codes = torch.full((8, 64), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
    matrix = Matrix("fp8", "float8_e4m3fn", (8, 64), codes, scale, Block(128, 128))
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 5] = 2.0**x_exponent
    expected = REFERENCE.linear(x, matrix)
    assert (expected > 0).all() and torch.isfinite(expected).all()
    assert torch.equal(bits(CPU.linear(x, matrix)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linears_are_the_same_as_one_by_one(dtype: torch.dtype) -> None:
    """All formats in one call: products that share their x, whole and in parts, of one row, of many and of none."""
    every = matrices(133, 224)
    alone, many, none = (torch.randn(n, 224, generator=GENERATOR).to(dtype) for n in (1, 9, 0))
    wide = torch.randn(3, 448, generator=GENERATOR).to(dtype)[:, 100:324]  # rows apart
    products = [Product(x, matrix) for matrix in every for x in (alone, alone, many, none, many, wide)]
    products += [Product(many, every[2], 7, 61), Product(alone, every[6], 130, 133), Product(alone, every[0], 5, 5)]
    expected = [REFERENCE.linear(*product, dtype) for product in products]

    def found_by(row: table.KernelTable, count: int = len(products)) -> list[torch.Tensor]:
        """The first results, each a part of a larger tensor."""
        wide = [torch.full((len(y), y.shape[1] + 3), math.nan, dtype=dtype) for y in expected[:count]]
        row.linears_into(products[:count], [y[:, 2:-1] for y in wide])
        assert all(y[:, [0, 1, -1]].isnan().all() for y in wide)
        return [y[:, 2:-1] for y in wide]

    for threads in (1, 3):
        with kernel_threads(threads):
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found_by(CPU), expected, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found_by(REFERENCE), expected, strict=True))
    assert all(torch.isfinite(y).all() for y in found_by(TORCH_DEVICE, len(products) - 1))
    CPU.linears_into([], [])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.fast_cases(1)
def test_every_code_by_every_way_of_decoding(count: int) -> None:
    """All codes of FP8 (NaN aside) and FP4 at scales 2**-60 to 2**60, against the tables, one code at a time."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    for exponent in (-60, -7, 0, 60):
        scale = torch.full((4, 8), 127 + exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        fp8 = codes.view(torch.float8_e4m3fn).expand(4, 256).contiguous()
        fp4 = codes[:128].view(torch.int8).expand(4, 128).contiguous()
        for matrix in (
            Matrix("fp8", "float8_e4m3fn", (4, 256), fp8, scale[:1, :2].contiguous(), Block(128, 128)),
            Matrix("fp4", "float4_e2m1fn", (4, 256), fp4, scale),
        ):
            for element in range(256):
                x = torch.zeros(count, 256, dtype=torch.bfloat16)
                x[:, element] = 1
                expected = matrix.decode()[:, element].expand(count, 4)
                assert torch.equal(CPU.linear(x, matrix), expected), (matrix.name, exponent, element)


def attention_case(queries: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q = torch.randn(queries, 6, 64, generator=GENERATOR).to(dtype)
    window = torch.randn(130, 64, generator=GENERATOR).to(dtype)
    compressed = torch.randn(40, 64, generator=GENERATOR).to(dtype)
    index = torch.randint(-1, 170, (queries, 150), generator=GENERATOR).to(torch.int32)
    index[:, 0] = 3
    index[0, 64:128] = -1  # a whole block of keys is masked
    return q, window, compressed, index, torch.randn(6, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1, 2, 9])
def test_sparse_attention(queries: int, dtype: torch.dtype) -> None:
    q, window, compressed, index, sink = attention_case(queries, dtype)
    expected = REFERENCE.sparse_attention(q, window, compressed, index, sink, 0.125)
    assert torch.equal(bits(CPU.sparse_attention(q, window, compressed, index, sink, 0.125)), bits(expected))
    exact = attention_in_float64(q, torch.cat((window, compressed)), index, sink, 0.125)
    # bfloat16 probabilities and results are off by 2**-8 each, of values that average random numbers.
    tolerance = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    for found in (expected, TORCH_DEVICE.sparse_attention(q, window, compressed, index, sink, 0.125)):
        assert (found.to(torch.float64) - exact).abs().max() < tolerance


def attention_in_float64(
    q: torch.Tensor, pool: torch.Tensor, index: torch.Tensor, sink: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax over the listed keys and the sink, one query at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(len(q)):
        keys = pool[index[t][index[t] >= 0].to(torch.int64)].to(torch.float64)
        logits = torch.cat((q[t].to(torch.float64) @ keys.T * scale, sink[:, None].to(torch.float64)), 1)
        out[t] = torch.softmax(logits, 1)[:, :-1] @ keys
    return out


@pytest.mark.parametrize("high", [40, 64])
def test_subnormal_attention(high: int) -> None:
    """vdpbf16ps takes subnormal numbers for zero: here a product of a value is one, or a sum before a block."""
    keys = torch.randn(65, 96, generator=GENERATOR).to(torch.bfloat16)
    keys[:, 0] = torch.where(torch.arange(65) == high, 83.0, 0.0)  # the scores; exp(-83) is 2**-119.7
    keys[:, 3] = 0
    keys[0, 3] = 2.0**-10
    q, sink = torch.zeros(2, 7, 96, dtype=torch.bfloat16), torch.zeros(7)
    q[:, :, 0] = 1
    index = torch.arange(65, dtype=torch.int32).expand(2, -1).contiguous()
    expected = REFERENCE.sparse_attention(q, keys, keys[:0], index, sink, 1.0)
    assert (0 < expected[..., 3]).all() and (expected[..., 3] < 2.0**-126).all()
    assert torch.equal(bits(CPU.sparse_attention(q, keys, keys[:0], index, sink, 1.0)), bits(expected))


def test_attention_with_tiny_scores() -> None:
    q, window, compressed, index, sink = attention_case(3, torch.bfloat16)
    q, window = q * 2.0**-70, window * 2.0**-62
    expected = REFERENCE.sparse_attention(q, window, compressed, index, sink, 2.0**120)
    assert torch.equal(bits(CPU.sparse_attention(q, window, compressed, index, sink, 2.0**120)), bits(expected))


def test_masked_keys_at_the_end_change_no_bit() -> None:
    q, window, compressed, index, sink = attention_case(5, torch.bfloat16)
    longer = torch.cat((index, torch.full((5, 77), -1, dtype=torch.int32)), 1)
    for row in (REFERENCE, CPU):
        expected = row.sparse_attention(q, window, compressed, index, sink, 0.125)
        assert torch.equal(bits(row.sparse_attention(q, window, compressed, longer, sink, 0.125)), bits(expected))


@pytest.mark.parametrize("queries", [1, 8, 17])
def test_index_scores_of_many_queries_and_keys(queries: int) -> None:
    """Whole and ragged groups of keys and queries, and products that underflow in some of them."""
    q = torch.randn(queries, 24, 64, generator=GENERATOR).to(torch.bfloat16)
    keys = torch.randn(200, 64, generator=GENERATOR).to(torch.bfloat16)
    weights = torch.randn(queries, 24, generator=GENERATOR).to(torch.bfloat16)
    for tiny in (False, True):
        if tiny:
            q[queries // 2] *= 2.0**-70
            keys[70:72] *= 2.0**-66
        assert torch.equal(bits(CPU.index_scores(q, weights, keys)), bits(REFERENCE.index_scores(q, weights, keys)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "blocks"), [(16, 50), (12, 3), (1, 7), (64, 131), (65, 33)])
def test_index_scores(heads: int, blocks: int, dtype: torch.dtype) -> None:
    q = torch.randn(5, heads, 32, generator=GENERATOR).to(dtype)
    weights = torch.randn(5, heads, generator=GENERATOR).to(dtype)
    keys = torch.randn(blocks, 32, generator=GENERATOR).to(dtype)
    expected = REFERENCE.index_scores(q, weights, keys)
    assert torch.equal(bits(CPU.index_scores(q, weights, keys)), bits(expected))
    if dtype == torch.bfloat16:
        assert torch.equal(expected, expected.to(torch.bfloat16).to(torch.float32))
    products = torch.einsum("thd,bd->thb", q.double(), keys.double()).clamp(min=0) * weights.double()[..., None]
    # In bfloat16 every product is rounded twice and the sum once, each time by at most 2**-8.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    bound = 3.1 * unit * products.abs().sum(1) + 1e-6
    for found in (expected, TORCH_DEVICE.index_scores(q, weights, keys)):
        assert ((found - products.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [1, 6])
def test_index_scores_of_unusual_numbers(heads: int, dtype: torch.dtype) -> None:
    """NaN is one in every row, and one only; a sum below zero that is rounded to zero is +0."""
    generator = torch.Generator().manual_seed(8)  # of its own: whether a sum is so small depends on the numbers
    q = torch.randn(40, heads, 64, generator=generator)
    weights, keys = torch.randn(40, heads, generator=generator), torch.randn(20, 64, generator=generator)
    q[32:] *= 2.0**-64
    keys[:2] *= 2.0**-71
    assert ((q @ keys.T < 0) & (q @ keys.T > -(2.0**-134))).any()
    q[0, 0, 3], q[1, 0, 3] = math.nan, -math.inf
    keys[5, 3], keys[6], keys[7, :2], keys[8, 1] = 0, 0, torch.tensor([math.inf, -math.inf]), math.inf
    weights[2, 0], weights[3, 0] = math.inf, -math.nan
    q, weights, keys = q.to(dtype), weights.to(dtype), keys.to(dtype)
    expected = REFERENCE.index_scores(q, weights, keys)
    assert 20 < expected.isnan().sum() < 200 and torch.equal(bits(CPU.index_scores(q, weights, keys)), bits(expected))
    assert (bits(expected)[expected.isnan()] == 0x7FC00000).all()


def widths(name: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Arguments for one of the small operations: ordinary values, and rows of zeros, huge and tiny numbers."""
    x = torch.randn(9, 4, 160, generator=GENERATOR)
    x[0], x[1], x[2], x[3, :, :5] = 0, x[1] * 1e4, x[2] * 1e-6, -0.0
    h = x.to(dtype)
    rows = h[:, 0]
    positive = torch.rand(9, 4, generator=GENERATOR)
    equal = torch.tensor([0.0, 0.5] * 6)  # a bias that makes sums equal
    special = torch.tensor([math.nan, -math.nan, -0.0, 0.0, math.inf, -math.inf, 1e-45])[torch.arange(630) % 7].view(
        9, 70
    )
    gates = torch.cat((torch.full((9, 4, 4), -torch.inf), h[..., :4].float()), -1)  # no block before the first
    return {
        "simulate_fp8": [(h, 128), (h, 64), (h, 32), (h[..., :0], 64)],
        "simulate_key": [(h, 96, 64), (rows, 144, 64), (h, 160, 32), (h, 0, 64)],
        "inverse_rms": [(rows, 1e-6), (h[:, :, :7], 1e-3)],
        "rms_norm": [(h, torch.randn(160, generator=GENERATOR), 1e-6)],
        "head_norm": [(h, 1e-6)],
        "rotate": [(h, torch.randn(9, 16, generator=GENERATOR), torch.randn(9, 16, generator=GENERATOR))],
        "hc_split_sinkhorn": [
            (
                torch.randn(9, (2 + n) * n, generator=GENERATOR) * 3,
                torch.randn(3),
                torch.randn((2 + n) * n),
                n,
                20,
                1e-6,
            )
            for n in (1, 2, 3, 4)
        ],
        "hc_pre": [(positive, h)],
        "hc_input": [(positive, h, torch.randn(160, generator=GENERATOR), 1e-6)],
        "hc_post": [(rows, h, positive, torch.rand(9, 4, 4, generator=GENERATOR))],
        "sqrtsoftplus": [(h.float(),), (torch.linspace(-120, 120, 999),), (torch.tensor([800.0, 40.0, 0.0, -0.0]),)],
        "pool": [(h.float(), h.float() * 3), (h[..., :8].float(), gates), (h[:0].float(), h[:0].float())],
        "simulate_index": [(h[..., :128],), (h[..., :32] * 30,), (h[..., :16],), (h[..., :1],)],
        "choose_experts": [(torch.randint(-3, 3, (9, 12), generator=GENERATOR) / 2, equal, k) for k in (1, 6, 12)],
        "best_in_reach": [
            (scores, torch.tensor([70, 0, 1, 69, 70, 99, 3, 20, 50]), count)
            for scores in (torch.randn(9, 70, generator=GENERATOR).round(decimals=1), special)
            for count in (1, 16, 200)
        ],
        "list_keys": [
            (torch.randint(-1, 40, (9, 16), generator=GENERATOR, dtype=torch.int32), chosen, 33)
            for chosen in torch.randint(-1, 9, (9, 8), generator=GENERATOR, dtype=torch.int32).split((7, 1), 1)
        ],
        "expert_weights": [
            (rows.float(), torch.randint(0, 160, (9, k), generator=GENERATOR), 1e-20, 1.5) for k in (1, 6)
        ],
        "add_experts": [(h, torch.stack([torch.randperm(7, generator=GENERATOR)[:4] for _ in h]), rows)],
        "swiglu": [(rows * 9, h[:, 1] * 9, 10.0, None), (rows * 9, h[:, 1] * 9, 10.0, positive[:, 0])],
    }[name]


SMALL = [
    "simulate_fp8",
    "simulate_key",
    "inverse_rms",
    "rms_norm",
    "head_norm",
    "rotate",
    "hc_split_sinkhorn",
    "hc_pre",
    "hc_input",
    "hc_post",
    "swiglu",
    "sqrtsoftplus",
    "simulate_index",
    "pool",
    "best_in_reach",
    "list_keys",
    "choose_experts",
    "expert_weights",
    "add_experts",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SMALL)
def test_small_operations(name: str, dtype: torch.dtype) -> None:
    for arguments in widths(name, dtype):
        expected, found = getattr(REFERENCE, name)(*arguments), getattr(CPU, name)(*arguments)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "hc_split_sinkhorn"])
def test_threads_share_out_the_rows_of_small_operations(name: str) -> None:
    """More threads than rows divide evenly among, and than there are rows."""
    for threads in (2, 4, 50):
        for arguments in widths(name, torch.bfloat16):
            expected = getattr(REFERENCE, name)(*arguments)
            with kernel_threads(threads):
                found = getattr(CPU, name)(*arguments)
            assert torch.equal(bits(found), bits(expected)), threads


def known(rows: int, columns: int) -> list[Matrix]:
    """One of each stored format that may have so many columns."""
    return matrices(rows, columns)[: None if columns % 32 == 0 else 2]


def mixed_experts(count: int, width: int, inner: int) -> Experts:
    """Experts of every stored format, each of their matrices in another."""
    inward, other, outward = known(inner, width), known(inner, width)[::-1], known(width, inner)
    n = len(inward)
    return Experts([Expert(inward[i % n], other[i % n], outward[(i + 3) % n]) for i in range(count)])


def same_together(dtype: torch.dtype, columns: int = 64) -> None:
    """The methods of KernelTable that are one call of C, on the row that has these and on the one that has not."""
    x, h = (torch.randn(shape, generator=GENERATOR).to(dtype) for shape in ((5, columns), (5, 4, columns // 4)))
    chosen = torch.stack([torch.randperm(9, generator=GENERATOR)[:3] for _ in x])
    shares, bias = torch.rand(1, 3, generator=GENERATOR), torch.randn(9, generator=GENERATOR)
    arguments: list[tuple[Any, ...]] = []
    for matrix in known(9, columns):
        arguments += [("gate", x, matrix, None, chosen, 3, 1e-20, 1.5), ("gate", x, matrix, bias, None, 3, 0.0, 2.0)]
    for fn in known(24, columns):
        small = torch.randn(24, generator=GENERATOR)
        arguments.append(("hc_mixes", h, fn, torch.tensor([0.5, 2.0, 1.0]), small, 5, 1e-6, 1e-5))
    positions, ape = torch.tensor([3, 4, 5, 130, 131]), torch.randn(4, 9, generator=GENERATOR)
    for wkv, wgate in zip(known(9, columns), known(9, columns)[::-1], strict=True):
        arguments.append(("raw_keys", x, wkv, wgate, ape, positions))
    for fn in known(4, columns):
        arguments.append(("head_vector", h, fn, torch.tensor([0.7]), torch.randn(4, generator=GENERATOR), 1e-6, 1e-5))
    experts = mixed_experts(10, columns, 2 * columns)
    for token in range(len(x)):
        for group in (0, 32, 128):
            arguments.append(("token_experts", x[token : token + 1], experts, chosen[token, None], shares, 7.0, group))
    for name, *given in arguments:
        expected, found = getattr(REFERENCE, name)(*given), getattr(CPU, name)(*given)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operations_together_are_the_same_as_one_by_one(dtype: torch.dtype) -> None:
    for threads in (1, 3):
        with kernel_threads(threads):
            same_together(dtype)
    same_together(dtype, 48)  # no whole steps


def test_every_compiled_operation_is_tested() -> None:
    names = set(table.KernelTable.__dataclass_fields__)
    compiled = {name for name in names if getattr(table.CPU, name) is not getattr(REFERENCE, name)}
    together = {name for name in names if name.endswith("at_once")}
    assert compiled == {"linear", "sparse_attention", "index_scores", *together, *SMALL}
    assert names - compiled == {"hc_head_weights", "engram_gate"}


def test_compiled_code_rounds_every_bfloat16_to_the_e4m3_of_the_reference() -> None:
    """All 65,536 bit patterns but NaN and infinity, each in a group with an amax of 448, so that the scale is 1."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 448]
    x = torch.stack((every, torch.full_like(every, 448.0)), 1)
    expected = every.to(torch.float32).to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(bits(CPU.simulate_fp8(x, 2)[:, 0]), bits(expected))


def test_where_the_library_was_built_the_compiled_row_was_tested() -> None:
    """Without it, CPU is the reference row, and the comparisons above say nothing."""
    assert (CPU is table.CPU) == compiled.FILE.exists(), compiled.problem()


def test_the_library_has_every_form_of_this_processor() -> None:
    """By what the system says of the processor, where it does: a form that is missing would go unnoticed."""
    if not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64" or compiled.library() is None:
        pytest.skip("another system, or no library")
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    needed = {"avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}
    assert {form for form in needed if form in binding.forms()} == {f for f, n in needed.items() if n <= {*flags}}
    assert "avx512bf16" not in binding.forms() or {"avx512_bf16", "avx512vbmi"} <= {*flags}
    assert binding.forms()[-1] == "plain"


@pytest.fixture(params=[form for form in binding.FORMS if form in binding.forms()[1:]])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the library that runs here, in the place of the best one, which all other tests run."""
    name: str = request.param
    bound = binding.bind(compiled.library(), name)
    monkeypatch.setattr(binding, "library", lambda: bound)
    return name


@pytest.mark.slow
def test_every_form_has_the_bits_of_the_reference(form: str) -> None:
    assert binding.form_name() == {"avx512": "AVX-512", "avx2": "AVX2", "plain": "plain C"}[form]
    assert binding.is_slow() == (form == "plain")
    for dtype in (torch.bfloat16, torch.float32):
        test_linear(133, 224, dtype)
        test_sparse_attention(9, dtype)
        test_index_scores(12, 3, dtype)
        test_index_scores_of_many_queries_and_keys(9)
        test_index_scores_of_unusual_numbers(6, dtype)
        for name in SMALL:
            test_small_operations(name, dtype)
        same_together(dtype)
    for count in (1, 2):
        test_every_code_by_every_way_of_decoding(count)


def test_a_form_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "forms", lambda: ["avx2", "plain"])
    monkeypatch.setattr(compiled, "library", lambda: object())
    monkeypatch.delenv(binding.VARIABLE, raising=False)
    assert binding.wanted_form() == "avx2"
    monkeypatch.setenv(binding.VARIABLE, "plain")
    assert binding.wanted_form() == "plain"
    monkeypatch.setenv(binding.VARIABLE, "sse9")
    with pytest.raises(UsageError, match="DSV4_KERNELS is 'sse9'") as raised:
        binding.wanted_form()
    assert "native, avx512bf16, avx512, avx2, neon, plain" in raised.value.hint
    monkeypatch.setenv(binding.VARIABLE, "avx512")
    with pytest.raises(UsageError, match="this processor does not have") as raised:
        binding.wanted_form()
    assert "native, avx2, plain" in raised.value.hint


def test_without_a_library_no_form_runs_whichever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    monkeypatch.setattr(binding, "library", binding.library.__wrapped__)
    monkeypatch.setattr(binding, "forms", binding.forms.__wrapped__)
    for name in ("", "native", "avx2"):
        monkeypatch.setenv(binding.VARIABLE, name)
        assert binding.library() is None and binding.is_slow()
    assert table.select_kernels(torch.device("cpu")) is REFERENCE
    monkeypatch.setenv(binding.VARIABLE, "sse9")
    with pytest.raises(UsageError, match="DSV4_KERNELS is 'sse9'"):
        binding.library()


def test_two_callers_at_once_and_a_child_of_fork() -> None:
    """The helper threads serve one caller at a time; the other computes alone. A forked child starts helpers anew."""
    matrix = matrices(133, 224)[2]
    x = torch.randn(64, 224, generator=GENERATOR).to(torch.bfloat16)
    expected = bits(REFERENCE.linear(x, matrix))

    def right(_: int) -> bool:
        return torch.equal(bits(CPU.linear(x, matrix)), expected)

    with kernel_threads(4), ThreadPoolExecutor(3) as callers:
        assert all(callers.map(right, range(60)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, which is what is tested
            child = os.fork()
        if child == 0:
            os._exit(0 if right(0) else 1)
        assert os.waitpid(child, 0)[1] == 0
