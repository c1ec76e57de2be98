"""A small DeepSeek-V4.1 checkpoint: its dimensions, its two config files and its tensors.

Every mechanism is there: windows only, groups of 2 and of 1 token with their sources, an index source that is no KV
source, candidate blocks, n-gram tables (one of them in front of a KV source), three DSpark stages with experts of their
own, and a vision tower, which a text model leaves alone. FP8 blocks are 32 x 32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .geometry import VISION_DOWNSAMPLE, VISION_PATCH, VISION_WIDTH
from .release import Release
from .tensors import Block, ModuleSource
from .tokenizer import small_tokenizer

ENGRAM_BLOCK = Block(1, 32)
STAGES = 3

# `encoding/encoding.py`, as far as it tells the edition.
ENCODER_FILE = "encoding/encoding.py"
ENCODER = '''"""The release keeps its prompt encoder here. This file has only the literals that tell the edition."""

DEFAULT_REASONING_EFFORT = "high"
REASONING_EFFORT_MAPPINGS = {"low": 50, "high": 75, "max": 100}
'''
IMAGE_TOKEN = "<｜deepseek_image｜>"
SPECIAL_TOKENS = ("<｜System｜>", IMAGE_TOKEN)


@dataclass(frozen=True)
class V41Geometry:
    """Dimensions of a checkpoint. `compress_ratios` has one entry per layer and one more per draft stage.

    image_token_id and engram_compressed_vocab_size are those of the tokenizer that is written beside the weights, and
    engram_num_embeddings is the sum of the primes from engram_vocab_size on.
    """

    vocab_size: int = 512
    image_token_id: int = 305
    hidden_size: int = 160
    compress_ratios: tuple[int, ...] = (0, 0, 2, 2, 2, 1, 1, 1, 0, 0, 0)
    kv_source_layer_ids: tuple[int, ...] = (2, 4, 5)
    index_source_layer_ids: tuple[int, ...] = (2, 4, 5, 6)
    candidate_source_layer_id: int = 5
    candidate_topk_blocks: int = 4
    candidate_block_size: int = 4
    n_routed_experts: int = 6
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 96
    num_attention_heads: int = 4
    head_dim: int = 64
    qk_rope_head_dim: int = 32
    q_lora_rank: int = 96
    o_groups: int = 2
    o_lora_rank: int = 64
    index_n_heads: int = 4
    index_head_dim: int = 64
    index_topk: int = 8
    sliding_window: int = 16
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    max_position_embeddings: int = 1024
    original_max_position_embeddings: int = 64
    rope_factor: int = 16
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    rms_norm_eps: float = 1e-20
    engram_layer_ids: tuple[int, ...] = (1, 4)
    engram_num_embeddings: tuple[int, ...] = (1362, 1552)
    engram_max_ngram_size: int = 4
    engram_n_heads: int = 2
    engram_head_dim: int = 64
    engram_vocab_size: int = 211
    engram_pad_token_id: int = 2
    engram_compressed_vocab_size: int = 472
    dspark_block_size: int = 5
    dspark_noise_token_id: int = 509
    dspark_target_layer_ids: tuple[int, ...] = (5, 6, 7)
    dspark_markov_rank: int = 32
    dspark_n_routed_experts: int = 4
    dspark_num_experts_per_tok: int = 2

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the main stack, draft stages not counted."""
        return len(self.compress_ratios) - STAGES


# Keys of config.json, in its order, that are fields of the geometry; and the engine's names for some of them.
_FIELDS = (
    "kv_source_layer_ids", "index_source_layer_ids", "index_n_heads", "index_head_dim", "index_topk",
    "candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size", "hc_mult", "hc_sinkhorn_iters",
    "engram_layer_ids", "engram_num_embeddings", "engram_max_ngram_size", "engram_vocab_size", "engram_n_heads",
    "engram_head_dim", "engram_pad_token_id", "engram_compressed_vocab_size", "dspark_block_size",
    "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank", "dspark_n_routed_experts",
    "dspark_num_experts_per_tok",
)  # fmt: skip
_ENGINE_NAMES = {
    "kv_source_layer_ids": "kv_source_layers",
    "index_source_layer_ids": "index_source_layers",
    "candidate_source_layer_id": "candidate_source_layer",
    "engram_pad_token_id": "engram_pad_id",
    "dspark_num_experts_per_tok": "dspark_n_activated_experts",
}


def special_tokens(g: V41Geometry) -> tuple[str, ...]:
    """Of the tokenizer, which has a token for each id, as the release's: place holders fill the vocabulary.

    The classes of n-grams are counted over all ids; one without a token would be of a class of its own.
    """
    empty = range(g.vocab_size - small_tokenizer(SPECIAL_TOKENS).get_vocab_size())
    return (*SPECIAL_TOKENS, *(f"<｜place▁holder▁no▁{number}｜>" for number in empty))


def _fields(g: V41Geometry) -> dict[str, Any]:
    values = ((name, getattr(g, name)) for name in _FIELDS)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def _text_config(g: V41Geometry) -> dict[str, Any]:
    return {
        "model_type": "deepseek_v41_text",
        "vocab_size": g.vocab_size,
        "hidden_size": g.hidden_size,
        "moe_intermediate_size": g.moe_intermediate_size,
        "num_hidden_layers": g.num_hidden_layers,
        "num_attention_heads": g.num_attention_heads,
        "num_key_value_heads": 1,
        "head_dim": g.head_dim,
        "qk_rope_head_dim": g.qk_rope_head_dim,
        "q_lora_rank": g.q_lora_rank,
        "o_lora_rank": g.o_lora_rank,
        "o_groups": g.o_groups,
        "hidden_act": "silu",
        "swiglu_limit": g.swiglu_limit,
        "rms_norm_eps": g.rms_norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": g.max_position_embeddings,
        "rope_theta": 10000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": g.rope_factor,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": g.original_max_position_embeddings,
        },
        "n_routed_experts": g.n_routed_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": g.num_experts_per_tok,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": g.routed_scaling_factor,
        "sliding_window": g.sliding_window,
        "compress_ratios": list(g.compress_ratios),
        "compress_rope_theta": 160000,
        "hc_eps": 1e-06,
        "num_nextn_predict_layers": STAGES,
    } | _fields(g)


def config(g: V41Geometry, expert_dtype: str = "fp4") -> dict[str, Any]:
    """config.json of the release: the language model in `text_config`, quantization beside it."""
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        "transformers_version": "5.6.0",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "image_token_id": g.image_token_id,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": expert_dtype,
        },
        "text_config": _text_config(g),
        "vision_config": {
            "model_type": "deepseek_v41_vision",
            "num_hidden_layers": 1,
            "hidden_size": VISION_WIDTH,
            "num_attention_heads": 1,
            "intermediate_size": 2 * VISION_WIDTH,
            "patch_size": VISION_PATCH,
            "rope_theta": 10000,
            "downsample_ratio": VISION_DOWNSAMPLE,
            "max_image_tokens": 1024,
            "min_pixels": 295936,
            "max_wh_ratio": None,
        },
    }


def inference_config(g: V41Geometry, expert_dtype: str = "fp4") -> dict[str, Any]:
    """inference/config.json, which the release's own engine reads."""
    own = {_ENGINE_NAMES.get(name, name): value for name, value in _fields(g).items()}
    experts = {"expert_dtype": "fp4"} if expert_dtype == "fp4" else {}
    return own | {
        "vocab_size": g.vocab_size,
        "dim": g.hidden_size,
        "moe_inter_dim": g.moe_intermediate_size,
        "n_layers": g.num_hidden_layers,
        "n_mtp_layers": STAGES,
        "n_heads": g.num_attention_heads,
        "n_routed_experts": g.n_routed_experts,
        "n_shared_experts": 1,
        "n_activated_experts": g.num_experts_per_tok,
        "score_func": "sqrtsoftplus",
        "route_scale": g.routed_scaling_factor,
        "swiglu_limit": g.swiglu_limit,
        "q_lora_rank": g.q_lora_rank,
        "head_dim": g.head_dim,
        "rope_head_dim": g.qk_rope_head_dim,
        "norm_eps": g.rms_norm_eps,
        "o_groups": g.o_groups,
        "o_lora_rank": g.o_lora_rank,
        "window_size": g.sliding_window,
        "original_seq_len": g.original_max_position_embeddings,
        "rope_theta": 10000,
        "rope_factor": g.rope_factor,
        "beta_fast": 32,
        "beta_slow": 1,
        "hc_eps": 1e-06,
        "dtype": "fp8",
        **experts,
        "compress_rope_theta": 160000,
        "compress_ratios": list(g.compress_ratios),
        "vision_n_layers": 1,
        "vision_dim": VISION_WIDTH,
        "vision_n_heads": 1,
        "vision_inter_dim": 2 * VISION_WIDTH,
        "vision_patch_size": VISION_PATCH,
        "vision_downsample_ratio": VISION_DOWNSAMPLE,
        "vision_max_n_token": 1024,
        "vision_min_pixels": 295936,
        "vision_max_wh_ratio": None,
        "image_token_id": g.image_token_id,
        "vision_rope_theta": 10000,
    }


Named = Iterator[tuple[str, torch.Tensor]]


class V41TensorSource(ModuleSource[V41Geometry]):
    """Draws the tensors of one checkpoint, module by module."""

    fp8_block = Block(32, 32)

    def _sources(self, name: str, layer: int) -> Named:
        """What a KV source and an index source have beside the projections of attention."""
        g = self.g
        if layer in g.kv_source_layer_ids:
            yield self._bf16(f"{name}.compressor.wkv", g.head_dim, g.hidden_size)
            if g.compress_ratios[layer] > 1:
                yield self._bf16(f"{name}.compressor.wgate", g.head_dim, g.hidden_size, 1.2)
            yield self._norm(f"{name}.compressor.norm", g.head_dim)
            yield self._bf16(f"{name}.indexer.wk", g.index_head_dim, g.head_dim)
            yield self._norm(f"{name}.indexer.k_norm", g.index_head_dim)
        if layer in g.index_source_layer_ids:
            yield from self._fp8(f"{name}.indexer.wq_b", g.index_n_heads * g.index_head_dim, g.q_lora_rank)
            yield self._bf16(f"{name}.indexer.weights_proj", g.index_n_heads, g.hidden_size)

    def _experts(self, name: str, count: int) -> Named:
        yield self._bf16(f"{name}.gate", count, self.g.hidden_size, 2.0)
        yield self._normal(f"{name}.gate.bias", (count,), 0.3)
        yield self._image_bias(name, count)
        yield from self._shared_expert(f"{name}.shared_experts")
        for expert in range(count):
            yield from self._expert(f"{name}.experts.{expert}")

    def _block(self, name: str, experts: int) -> Named:
        yield self._norm(f"{name}.attn_norm", self.g.hidden_size)
        yield self._norm(f"{name}.ffn_norm", self.g.hidden_size)
        rows = (2 + self.g.hc_mult) * self.g.hc_mult
        yield from self._hyper_connection(f"{name}.hc_attn", rows, 3)
        yield from self._hyper_connection(f"{name}.hc_ffn", rows, 3)
        yield from self._projections(f"{name}.attn")
        yield from self._experts(f"{name}.ffn", experts)

    def embedding(self) -> Named:
        """`embed.weight`, unit variance, and the vectors around an image."""
        shape = (self.g.vocab_size, self.g.hidden_size)
        yield self._normal("embed.weight", shape, 1.0, dtype=torch.bfloat16)
        yield from self._image_vectors("start", "newline", "end")

    def layer(self, index: int) -> Named:
        """Every tensor of one layer of the main stack, its n-gram table aside."""
        yield from self._block(f"layers.{index}", self.g.n_routed_experts)
        yield from self._sources(f"layers.{index}.attn", index)

    def engram(self, index: int, rows: int) -> Named:
        """The n-gram table in front of a layer, and what mixes its rows into the streams."""
        g, name = self.g, f"layers.{index}.engram"
        yield from self._fp8(f"{name}.embed", rows, g.engram_head_dim, math.sqrt(g.engram_head_dim), ENGRAM_BLOCK)
        columns = (g.engram_max_ngram_size - 1) * g.engram_n_heads * g.engram_head_dim
        yield from self._fp8(f"{name}.wkv", (g.hc_mult + 1) * g.hidden_size, columns)
        for part in ("q_weight", "k_weight"):
            shape = (g.hc_mult, g.hidden_size)
            yield self._normal(f"{name}.{part}", shape, 0.3, 1.0, torch.bfloat16)

    def head(self) -> Named:
        """Final norm and output matrix; logits have a standard deviation of about 3."""
        yield self._norm("norm", self.g.hidden_size)
        yield self._bf16("head", self.g.vocab_size, self.g.hidden_size, 3.0)

    def draft_stage(self, index: int) -> Named:
        """Every tensor of one DSpark stage."""
        g, name = self.g, f"mtp.{index}"
        yield from self._block(name, g.dspark_n_routed_experts)
        if index == 0:
            yield self._norm(f"{name}.main_norm", g.hidden_size)
            yield from self._fp8(f"{name}.main_proj", g.hidden_size, len(g.dspark_target_layer_ids) * g.hidden_size)
        if index == STAGES - 1:
            yield self._norm(f"{name}.norm", g.hidden_size)
            yield self._bf16(f"{name}.confidence_head.proj", 1, g.hidden_size + g.dspark_markov_rank)
            shape = (g.vocab_size, g.dspark_markov_rank)
            yield self._normal(f"{name}.markov_head.embed.weight", shape, 1.0, dtype=torch.bfloat16)
            yield self._bf16(f"{name}.markov_head.head", *shape, 2.0)


def count_shards(g: V41Geometry) -> int:
    """How many shards there are: vision, embedding, layers, head, draft stages, n-gram tables."""
    return 3 + g.num_hidden_layers + STAGES + len(g.engram_layer_ids)


def shards(g: V41Geometry, seed: int, base: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each shard, in the release's order."""
    source = V41TensorSource(g, seed, base=base)
    yield dict(source.vision())
    yield dict(source.embedding())
    for layer in range(g.num_hidden_layers):
        yield dict(source.layer(layer))
    yield dict(source.head())
    for stage in range(STAGES):
        yield dict(source.draft_stage(stage))
    for layer, rows in zip(g.engram_layer_ids, g.engram_num_embeddings, strict=True):
        yield dict(source.engram(layer, rows))


RELEASE = Release(
    V41Geometry,
    count_shards,
    shards,
    config,
    inference_config,
    lambda g: (ENCODER_FILE, ENCODER),
    special_tokens,
    {"v4.1": V41Geometry()},
)
