"""The engine without simulation against transformers in float32, on random models, layer by layer.

Both compute the same function in float32 with different orders of summation: 1e-5 of the largest value of a tensor is a
few dozen units in the last place, which is what three layers of sums over a few hundred terms explain.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from oracle_transformers import BASE, random_model, release_tensors, write_checkpoint

from dsv4.model import load
from dsv4.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer, DeepseekV4HyperHead

pytestmark = pytest.mark.slow  # the library alone takes seconds to import
TOLERANCE = 1e-5

CONFIGS: dict[str, dict[str, Any]] = {
    "all kinds of layers": BASE,
    "window only, no yarn": {**BASE, "compress_ratios": [0, 0], "num_hidden_layers": 2, "rope_scaling": None},
    "compressed first, hash routing everywhere": {
        **BASE, "compress_ratios": [128, 4, 4], "num_hash_layers": 3, "index_topk": 64, "o_groups": 4, "hc_mult": 2,
    },
    "wide heads, small limit": {
        **BASE, "compress_ratios": [4, 0, 4], "head_dim": 48, "num_attention_heads": 2, "swiglu_limit": 0.1,
        "num_hash_layers": 0, "hc_sinkhorn_iters": 3, "rms_norm_eps": 1e-3, "hc_eps": 1e-2, "index_topk": 5,
    },
    # r is 16, and the ramp would end at pair 12 of 8: its end is cut off at r - 1, not at the last pair.
    "yarn to beyond the last pair": {
        **BASE, "compress_ratios": [4, 128], "num_hidden_layers": 2, "compress_rope_theta": 100.0,
        "rope_scaling": BASE["rope_scaling"] | {"original_max_position_embeddings": 4096},
    },
}  # fmt: skip


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst < TOLERANCE, f"relative difference {worst:.2e}"


def tokens(config: dict[str, Any], count: int) -> torch.Tensor:
    return torch.randint(0, config["vocab_size"], (1, count), generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], "DeepseekV4ForCausalLM", Transformer]:
    config = CONFIGS[request.param]
    model = random_model(config, seed=11)
    folder: Path = tmp_path_factory.mktemp("pair") / "checkpoint"
    write_checkpoint(folder, config, release_tensors(model.state_dict()))
    return config, model, load(folder, simulation=False)


@pytest.mark.parametrize("count", [1, 7, 140])
@pytest.mark.fast_cases(4)
def test_layers_and_logits_of_a_prefill(pair: Any, count: int) -> None:
    config, oracle, engine = pair
    ids, expected, found = tokens(config, count), {}, {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, n=n: expected.update({f"layers.{n}": out}))
        for n, layer in enumerate(oracle.model.layers)
    ]
    with torch.no_grad():
        logits = oracle(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    output = engine.forward(ids, engine.new_cache(1), trace=lambda name, tensor: found.update({name: tensor}))
    for name, value in expected.items():
        close(found[name], value[0])
    close(output.logits, logits)


@pytest.mark.fast_cases(1)
def test_decode(pair: Any) -> None:
    config, oracle, engine = pair
    from transformers.cache_utils import DynamicCache

    ids, cache, past = tokens(config, 137), engine.new_cache(1), DynamicCache(config=oracle.config)
    for start, stop in [(0, 121), *((i, i + 1) for i in range(121, 137))]:
        with torch.no_grad():
            expected = oracle(ids[:, start:stop], cache=past, use_cache=True).logits
        close(engine.forward(ids[:, start:stop], cache).logits, expected)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_mtp_block(tmp_path: Path) -> None:
    """transformers has no MTP block, but all of its parts: one more decoder layer and another head."""
    config = {**BASE, "compress_ratios": [4, 128, 0], "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    main = random_model(config, seed=3)
    # A model with one layer more lends its last layer, norm and head to the MTP block.
    lender = random_model({**config, "num_hidden_layers": 3}, seed=4)
    tensors = release_tensors(main.state_dict())
    borrowed = release_tensors(lender.state_dict())
    block = {k.replace("layers.2.", "mtp.0."): v for k, v in borrowed.items() if k.startswith("layers.2.")}
    head = {f"mtp.0.{k}": v for k, v in borrowed.items() if k.startswith(("norm.", "hc_head_"))}
    generator = torch.Generator().manual_seed(5)
    hidden = config["hidden_size"]
    shapes = {"e_proj": (hidden, hidden), "h_proj": (hidden, hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    extra = {f"mtp.0.{name}.weight": torch.randn(s, generator=generator) / 8 for name, s in shapes.items()}
    engine = load(write_checkpoint(tmp_path / "c", config, tensors | block | head | extra), simulation=False)
    ids = tokens(config, 30)
    output = engine.forward(ids[:, :29], engine.new_cache(1))
    found = engine.mtp_logits(output.hidden, ids[:, 1:], engine.new_mtp_cache(1))
    close(found, _mtp_by_hand(main, lender, extra, output.hidden, ids[:, 1:], config))


def _mtp_by_hand(
    main: "DeepseekV4ForCausalLM",
    lender: "DeepseekV4ForCausalLM",
    extra: dict[str, torch.Tensor],
    h: torch.Tensor,
    ids: torch.Tensor,
    config: dict[str, Any],
) -> torch.Tensor:
    eps, weight = config["rms_norm_eps"], {k.split(".")[2]: v for k, v in extra.items()}
    embedded = main.model.embed_tokens(ids)
    x = F.linear(rms(embedded, weight["enorm"], eps), weight["e_proj"]).unsqueeze(2)
    x = x + F.linear(rms(h, weight["hnorm"], eps), weight["h_proj"])
    layer: DeepseekV4DecoderLayer = lender.model.layers[2]
    head: DeepseekV4HyperHead = lender.model.hc_head
    positions = torch.arange(ids.shape[1])[None]
    rotary = {kind: lender.model.rotary_emb(x, positions, layer_type=kind) for kind in ("main", "compress")}
    distance = positions[0][:, None] - positions[0][None]
    visible = (distance >= 0) & (distance < config["sliding_window"])
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
    with torch.no_grad():
        out = layer(x, position_embeddings=rotary, position_ids=positions, attention_mask=mask, input_ids=ids)
        return main.lm_head(lender.model.norm(head(out)))
