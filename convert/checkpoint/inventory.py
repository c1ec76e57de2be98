"""What config.json says about the architecture, and which tensors follow from it.

config.json comes from a stranger: every value is checked before it is used, and what is missing or of the wrong kind
becomes None, never an exception. The tensor lists are the release's inventory as formulas, one line per tensor; they
describe DeepSeek-V4 (Flash, Pro, their Base and DSpark editions). V4.1 has other blocks and is not described.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import config_count, config_string

KNOWN_MODEL_TYPES = ("deepseek_v4", "deepseek_ref")  # the second: third-party conversions of the same architecture


def describes_v4(config: dict[str, Any]) -> bool:
    """Whether the tensor lists below apply."""
    return config_string(config, "model_type") in KNOWN_MODEL_TYPES


@dataclass(frozen=True)
class Dimensions:
    """The widths that the shapes of a V4 checkpoint follow from, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_hash_layers: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    hc_mult: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Dimensions | list[str]":
        """The dimensions, or the names of the keys that are missing or not counts."""
        values = {key: config_count(config, key) for key in cls.__dataclass_fields__}
        missing = [key for key, value in values.items() if value is None]
        zero = ("o_groups",) if values["o_groups"] == 0 else ()
        if missing or zero:
            return [*missing, *zero]
        return cls(**{key: value for key, value in values.items() if value is not None})


Shape = tuple[int, ...]


def _compressor(name: str, ratio: int, width: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    wide = 2 * width if ratio == 4 else width  # overlapping blocks keep two halves
    yield f"{name}.ape", (ratio, wide)
    yield f"{name}.wkv.weight", (wide, d.hidden_size)
    yield f"{name}.wgate.weight", (wide, d.hidden_size)
    yield f"{name}.norm.weight", (width,)


def _attention(ratio: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    heads = d.num_attention_heads * d.head_dim
    yield "attn.attn_sink", (d.num_attention_heads,)
    yield "attn.q_norm.weight", (d.q_lora_rank,)
    yield "attn.kv_norm.weight", (d.head_dim,)
    yield "attn.wq_a.weight", (d.q_lora_rank, d.hidden_size)
    yield "attn.wq_b.weight", (heads, d.q_lora_rank)
    yield "attn.wkv.weight", (d.head_dim, d.hidden_size)
    yield "attn.wo_a.weight", (d.o_groups * d.o_lora_rank, heads // d.o_groups)
    yield "attn.wo_b.weight", (d.hidden_size, d.o_groups * d.o_lora_rank)
    if ratio:
        yield from _compressor("attn.compressor", ratio, d.head_dim, d)
    if ratio == 4:
        yield "attn.indexer.wq_b.weight", (d.index_n_heads * d.index_head_dim, d.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", (d.index_n_heads, d.hidden_size)
        yield from _compressor("attn.indexer.compressor", 4, d.index_head_dim, d)


def _experts(hashed: bool, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "ffn.gate.weight", (d.n_routed_experts, d.hidden_size)
    if hashed:
        yield "ffn.gate.tid2eid", (d.vocab_size, d.num_experts_per_tok)
    else:
        yield "ffn.gate.bias", (d.n_routed_experts,)
    for expert in ("shared_experts", *(f"experts.{i}" for i in range(d.n_routed_experts))):
        yield f"ffn.{expert}.w1.weight", (d.moe_intermediate_size, d.hidden_size)
        yield f"ffn.{expert}.w2.weight", (d.hidden_size, d.moe_intermediate_size)
        yield f"ffn.{expert}.w3.weight", (d.moe_intermediate_size, d.hidden_size)


def _hyper_connection(name: str, rows: int, scales: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield f"{name}_fn", (rows, d.hc_mult * d.hidden_size)
    yield f"{name}_base", (rows,)
    yield f"{name}_scale", (scales,)


def block_tensors(ratio: int, hashed: bool, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Weights of one block without `layers.{L}.`, with their shapes in elements; scales not listed."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield "ffn_norm.weight", (d.hidden_size,)
    for part in ("attn", "ffn"):
        yield from _hyper_connection(f"hc_{part}", (2 + d.hc_mult) * d.hc_mult, 3, d)
    yield from _attention(ratio, d)
    yield from _experts(hashed, d)


def global_tensors(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Tensors outside the blocks."""
    yield "embed.weight", (d.vocab_size, d.hidden_size)
    yield "head.weight", (d.vocab_size, d.hidden_size)
    yield "norm.weight", (d.hidden_size,)
    yield from _hyper_connection("hc_head", d.hc_mult, 1, d)


def expected_tensors(d: Dimensions, ratios: tuple[int, ...], mtp_stages: int) -> dict[str, Shape]:
    """Every weight that a V4 checkpoint must have: the main stack, and the block part of each MTP stage."""
    found = dict(global_tensors(d))
    for layer in range(d.num_hidden_layers):
        for name, shape in block_tensors(ratios[layer], layer < d.num_hash_layers, d):
            found[f"layers.{layer}.{name}"] = shape
    for stage in range(mtp_stages):
        for name, shape in block_tensors(0, False, d):
            found[f"mtp.{stage}.{name}"] = shape
    return found
