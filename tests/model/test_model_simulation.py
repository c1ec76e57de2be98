"""What float32 cannot show: where the simulated model quantizes and rounds, and what it must leave alone.

Expected values are written out here with plain torch on whole tensors, rounding to bfloat16 where the release does;
sums are float64, so only results that are rounded afterwards are compared, with the one unit that the last float32 of
a sum may move them.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.model import load, loading
from dsv4.model.kernels.reference_small import head_norm, swiglu
from dsv4.model.kernels.table import REFERENCE
from dsv4.model.layers.numerics import Numerics
from dsv4.model.transformer import Transformer
from dsv4.model.weights import Matrix
from dsv4.quant.block_scales import Block

GENERATOR = torch.Generator().manual_seed(4)
GEOMETRY = Geometry(compress_ratios=(4, 128, 0), vocab_size=64, hidden_size=128, n_routed_experts=4, index_topk=3)
TOKENS = torch.randint(0, 64, (1, 135), generator=torch.Generator().manual_seed(2))


def e4m3(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..., n] through FP8 in groups, in float64, by ml_dtypes."""
    groups = x.to(torch.float64).unflatten(-1, (-1, group)).numpy()
    amax = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-4)
    power = 2.0 ** np.ceil(np.log2(amax / 448))
    codes = np.clip(groups / power, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float64) * power).flatten(-2)


def units_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 lie between two bfloat16 of the same sign."""
    return (a.view(torch.int16).to(torch.int32) - b.view(torch.int16).to(torch.int32)).abs()


def test_quantized_linear_quantizes_its_input_and_rounds_once() -> None:
    weight = torch.randn(40, 256, generator=GENERATOR).to(torch.float8_e4m3fn)
    scale = torch.tensor([[121, 126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    matrix = Matrix("w", "float8_e4m3fn", (40, 256), weight, scale, Block(128, 128))
    x = torch.randn(7, 256, generator=GENERATOR).to(torch.bfloat16)
    exact = (e4m3(x, 128) @ matrix.decode().to(torch.float64).T).to(torch.bfloat16)
    found = Numerics(True, REFERENCE).quantized_linear(x, matrix)
    assert found.dtype == torch.bfloat16
    assert (units_apart(found, exact) <= 1).all() and (found == exact).to(torch.float32).mean() > 0.99
    unquantized = (x.to(torch.float64) @ matrix.decode().to(torch.float64).T).to(torch.bfloat16)
    assert (found == unquantized).to(torch.float32).mean() < 0.5  # the test would notice a missing quantization


def test_without_simulation_nothing_is_quantized() -> None:
    matrix = Matrix("w", "bfloat16", (8, 64), torch.randn(8, 64, generator=GENERATOR).to(torch.bfloat16))
    x = torch.randn(3, 64, generator=GENERATOR)
    found = Numerics(False, REFERENCE).quantized_linear(x, matrix)
    exact = x.to(torch.float64) @ matrix.values.to(torch.float64).T
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5


def test_the_share_multiplies_before_the_rounding() -> None:
    """silu(g) * u times the routing weight, then bfloat16: not the other way round."""
    gate, up = (torch.randn(5, 64, generator=GENERATOR).to(torch.bfloat16) * 4 for _ in range(2))
    share = torch.rand(5, generator=GENERATOR)
    g, u = gate.to(torch.float64).clamp(max=10), up.to(torch.float64).clamp(-10, 10)
    product = g / (1 + torch.exp(-g)) * u
    before = (product * share[:, None].to(torch.float64)).to(torch.bfloat16)
    after = product.to(torch.bfloat16) * share[:, None].to(torch.bfloat16)
    found = swiglu(gate, up, 10.0, share)
    assert (found == before).to(torch.float32).mean() > 0.99
    assert (found == after).to(torch.float32).mean() < 0.9


@pytest.mark.parametrize("heads", [32, 64, 4, 36])
def test_head_norm_rounds_squares_mean_and_factor(heads: int) -> None:
    """And never the square root, however many heads there are."""
    q = torch.randn(6, heads, 64, generator=GENERATOR).to(torch.bfloat16)
    squares = (q.to(torch.float64) ** 2).to(torch.bfloat16).to(torch.float64)
    mean = squares.mean(-1).to(torch.float32).to(torch.bfloat16).to(torch.float64)
    root = ((mean + 1e-6).to(torch.bfloat16).to(torch.float64)).sqrt()
    factor = (1 / root).to(torch.float32).to(torch.bfloat16)
    # A mean within a float32 rounding of the middle between two bfloat16 goes either way: one head in a few hundred.
    # A rounding too many or too few would change more than a quarter of them.
    assert (head_norm(q, 1e-6) == q * factor[..., None]).all(-1).to(torch.float32).mean() > 0.9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(make_checkpoint(tmp_path_factory.mktemp("simulation") / "c", geometry=GEOMETRY, tokenizer=False))


def on_a_grid(x: torch.Tensor, group: int, grid: np.ndarray) -> bool:
    """Whether each group of the last dimension is a power of two times values of the grid."""
    groups = x.to(torch.float64).unflatten(-1, (-1, group)).flatten(0, -2).numpy()
    amax = np.abs(groups).max(-1, keepdims=True)
    exponents = np.floor(np.log2(np.where(amax > 0, amax / grid.max(), 1)))
    fits = np.zeros(len(groups), dtype=bool)
    for offset in (0, 1, 2):
        fits |= np.isin(np.abs(groups) / 2.0 ** (exponents + offset), grid).all(-1)
    return bool(fits.all())


E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
E2M1 = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def test_keys_are_fp8_but_for_their_rotary_dims_and_index_keys_are_fp4(model: Transformer) -> None:
    cache = model.new_cache(1)
    model.forward(TOKENS, cache)
    rotary = GEOMETRY.qk_rope_head_dim
    for layer in cache.sequences[0].layers:
        assert layer.compressor is not None and layer.compressor.entries.length
        for keys in (layer.window.rows(), layer.compressor.entries.rows()):
            assert on_a_grid(keys[:, :-rotary], 64, E4M3)
            assert not on_a_grid(keys[:, -rotary:], 64, E4M3)
    indexer = cache.sequences[0].layers[0].indexer
    assert indexer is not None and on_a_grid(indexer.entries.rows(), 32, E2M1)


def test_simulation_changes_the_logits_a_little(model: Transformer) -> None:
    """A few percent, as eight-bit activations should; none at all would mean that the switch does nothing."""
    exact = load(model.store.checkpoint, simulation=False)
    simulated = model.forward(TOKENS[:, :20], model.new_cache(1)).logits
    plain = exact.forward(TOKENS[:, :20], exact.new_cache(1)).logits
    relative = float((simulated - plain).norm() / plain.norm())
    assert 0.005 < relative < 0.5


def test_activations_are_bfloat16_in_the_reference_row_too(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "select_kernels", lambda device: REFERENCE)
    reference: Transformer = load(model.store.checkpoint)
    kinds: dict[str, torch.dtype] = {}
    reference.forward(
        TOKENS[:, :3], reference.new_cache(1), trace=lambda name, tensor: kinds.update({name: tensor.dtype})
    )
    assert {kinds[name] for name in kinds if name.endswith((".attn", ".ffn", ".0", ".1"))} == {torch.bfloat16}
    assert kinds["logits"] == torch.float32


def test_every_module_is_traced_once(model: Transformer) -> None:
    names: list[str] = []
    trace: Callable[[str, torch.Tensor], None] = lambda name, tensor: names.append(name)  # noqa: E731
    model.forward(TOKENS[:, :3], model.new_cache(1), trace=trace)
    layer = [["layers.{}.attn", "layers.{}.ffn.gate.experts", "layers.{}.ffn", "layers.{}"]] * 2
    assert names == ["embed", *(n.format(i) for i, part in enumerate(layer) for n in part), "logits"]
