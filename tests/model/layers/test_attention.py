"""Which keys a query sees, by plain loops over positions; and attention in few calls against single operations."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_threads import kernel_threads

from dsv4 import compiled
from dsv4.model.kernels import binding, table
from dsv4.model.layers.attention import Attention, WindowAttention, finished_blocks, window_rows
from dsv4.model.layers.numerics import Numerics
from dsv4.model.layers.rotary import Rotary
from dsv4.model.layers.shared_attention import SharedKeyAttention
from dsv4.model.weights import Matrix
from dsv4.quant.block_scales import Block

GENERATOR = torch.Generator().manual_seed(3)
CONFIG = SimpleNamespace(
    head_dim=64, qk_rope_head_dim=16, rms_norm_eps=1e-6, o_groups=2, o_lora_rank=32, ratio=lambda layer: 0
)
SHAPES = {"wq_a": (96, 128), "wkv": (64, 128), "wq_b": (256, 96), "wo_a": (64, 128), "wo_b": (128, 64)}


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("count", [1, 3, 140])
def test_a_block_is_seen_from_its_last_token_on(ratio: int, count: int) -> None:
    for position in (0, 1, ratio - 2, ratio - 1, ratio, 2 * ratio - 1):
        blocks = (position + count) // ratio
        expected = [
            [block if (block + 1) * ratio - 1 <= query else -1 for block in range(blocks)]
            for query in range(position, position + count)
        ]
        assert finished_blocks(position, count, blocks, ratio).tolist() == expected


@pytest.mark.parametrize("window", [1, 5])
def test_the_window_ends_with_the_query(window: int) -> None:
    for position, first in ((0, 0), (3, 0), (9, 4)):
        expected = []
        for query in range(position, position + 7):
            seen = [key - first for key in range(max(0, query - window + 1), query + 1)]
            expected.append(seen + [-1] * (window - len(seen)))
        assert window_rows(position, 7, first, window).tolist() == expected


class Weights:
    """All weights of an attention sublayer, in FP8 where the release has that, or in BF16; 32 columns a scale."""

    keep_everything = True

    def __init__(self, quantized: bool) -> None:
        self._vectors = {
            "q_norm.weight": torch.rand(96, generator=GENERATOR),
            "kv_norm.weight": torch.rand(64, generator=GENERATOR),
        }
        self._matrices = {f"{name}.weight": self._make(shape, quantized) for name, shape in SHAPES.items()}

    @staticmethod
    def _make(shape: tuple[int, int], quantized: bool) -> Matrix:
        values = torch.randn(shape, generator=GENERATOR)
        if not quantized:
            return Matrix("bf16", "bfloat16", shape, values.to(torch.bfloat16))
        scale = torch.randint(118, 130, (shape[0] // 32, shape[1] // 32), generator=GENERATOR).to(torch.uint8)
        return Matrix(
            "fp8",
            "float8_e4m3fn",
            shape,
            values.to(torch.float8_e4m3fn),
            scale.view(torch.float8_e8m0fnu),
            Block(32, 32),
        )

    def matrix(self, name: str) -> Matrix:
        return self._matrices[name]

    def vector(self, name: str) -> torch.Tensor:
        return self._vectors[name]


def v4(weights: Weights, numerics: Numerics, rotary: Rotary) -> WindowAttention:
    return Attention(CONFIG, 0, weights, rotary, numerics)


def v41(weights: Weights, numerics: Numerics, rotary: Rotary) -> WindowAttention:
    return SharedKeyAttention(CONFIG, weights, rotary, replace(numerics, fp8_group=32), None, None)


@pytest.mark.parametrize("make", [v4, v41])
@pytest.mark.parametrize("form", binding.forms())
def test_attention_in_few_calls_has_the_bits_of_single_operations(
    form: str, make: type[WindowAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = binding.bind(compiled.library(), form)
    monkeypatch.setattr(binding, "library", lambda: bound)
    single = replace(table.CPU, queries_at_once=None, project_at_once=None)
    for quantized in (False, True):
        for simulation in (False, True):
            for tokens, threads in ((1, 1), (1, 3), (7, 3)):
                weights, found = Weights(quantized), []
                x = torch.randn(tokens, 128, generator=GENERATOR)
                for kernels in (table.CPU, single):
                    rotary = Rotary(torch.linspace(1, 0.1, 8), torch.device("cpu"), kernels)
                    rotary.reserve(40)
                    attention = make(weights, Numerics(simulation, kernels), rotary)
                    given, positions = x.to(attention._numerics.dtype), torch.arange(20, 20 + tokens)
                    with kernel_threads(threads):
                        every = attention.queries_and_keys(given, positions)
                        found.append([*every, attention.project(every[1].clone(), positions)])
                for a, b in zip(*found, strict=True):
                    assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
                    assert torch.isfinite(a).all() and a.any()
