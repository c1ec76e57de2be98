"""DeepSeek-V4.1: the keys that a config must have, and the tensors that follow from them.

Differences from V4: a few source layers have compressed keys, which the others read; some layers have their own top-k
lists of the indexer; two layers are preceded by n-gram tables (engram); no stack ends in a hyper-connection.
One line per tensor. Shapes are in elements; scales are not listed, they follow from how a weight is stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv4.convert.checkpoint.config import Config, config_count, config_value
from dsv4.errors import InputError

from .engine_config import EngineConfig
from .kv_cache import CacheLayout, Compressed, Keeping, Widths
from .v4 import COPY_CONFIG, SCALING_KEYS, Shape, counts_of, experts, hyper_connection, ratios_of, require_believable

# Keys without which no engine can compute the model.
KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "compress_ratios", "kv_source_layer_ids",
    "index_source_layer_ids", "index_n_heads", "index_head_dim", "index_topk", "candidate_source_layer_id",
    "candidate_topk_blocks", "candidate_block_size", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
    "rms_norm_eps", "rope_theta", "compress_rope_theta", "max_position_embeddings", "engram_layer_ids",
    "engram_num_embeddings", "engram_max_ngram_size", "engram_n_heads", "engram_head_dim", "engram_vocab_size",
    "engram_pad_token_id", "engram_compressed_vocab_size", *SCALING_KEYS,
)  # fmt: skip
# What config.json of a release says of how weights are stored.
QUANTIZATION = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
}
_ENGINE_KEYS = (
    ("vocab_size", "vocab_size"),
    ("dim", "hidden_size"),
    ("moe_inter_dim", "moe_intermediate_size"),
    ("n_layers", "num_hidden_layers"),
    ("n_mtp_layers", "num_nextn_predict_layers"),
    ("dspark_block_size", "dspark_block_size"),
    ("dspark_noise_token_id", "dspark_noise_token_id"),
    ("dspark_target_layer_ids", "dspark_target_layer_ids"),
    ("dspark_markov_rank", "dspark_markov_rank"),
    ("dspark_n_routed_experts", "dspark_n_routed_experts"),
    ("dspark_n_activated_experts", "dspark_num_experts_per_tok"),
    ("n_heads", "num_attention_heads"),
    ("n_routed_experts", "n_routed_experts"),
    ("n_shared_experts", "n_shared_experts"),
    ("n_activated_experts", "num_experts_per_tok"),
    ("score_func", "scoring_func"),
    ("route_scale", "routed_scaling_factor"),
    ("swiglu_limit", "swiglu_limit"),
    ("q_lora_rank", "q_lora_rank"),
    ("head_dim", "head_dim"),
    ("rope_head_dim", "qk_rope_head_dim"),
    ("norm_eps", "rms_norm_eps"),
    ("o_groups", "o_groups"),
    ("o_lora_rank", "o_lora_rank"),
    ("window_size", "sliding_window"),
    ("kv_source_layers", "kv_source_layer_ids"),
    ("index_source_layers", "index_source_layer_ids"),
    ("original_seq_len", "rope_scaling.original_max_position_embeddings"),
    ("rope_theta", "rope_theta"),
    ("rope_factor", "rope_scaling.factor"),
    ("beta_fast", "rope_scaling.beta_fast"),
    ("beta_slow", "rope_scaling.beta_slow"),
    ("index_n_heads", "index_n_heads"),
    ("index_head_dim", "index_head_dim"),
    ("index_topk", "index_topk"),
    ("candidate_source_layer", "candidate_source_layer_id"),
    ("candidate_topk_blocks", "candidate_topk_blocks"),
    ("candidate_block_size", "candidate_block_size"),
    ("hc_mult", "hc_mult"),
    ("hc_sinkhorn_iters", "hc_sinkhorn_iters"),
    ("hc_eps", "hc_eps"),
    ("engram_layer_ids", "engram_layer_ids"),
    ("engram_vocab_size", "engram_vocab_size"),
    ("engram_num_embeddings", "engram_num_embeddings"),
    ("engram_max_ngram_size", "engram_max_ngram_size"),
    ("engram_pad_id", "engram_pad_token_id"),
    ("engram_compressed_vocab_size", "engram_compressed_vocab_size"),
    ("dtype", ""),
    ("expert_dtype", "quantization_config.expert_dtype"),
    ("compress_rope_theta", "compress_rope_theta"),
    ("compress_ratios", "compress_ratios"),
    ("vision_n_layers", "vision_config.num_hidden_layers"),
    ("vision_dim", "vision_config.hidden_size"),
    ("vision_n_heads", "vision_config.num_attention_heads"),
    ("vision_inter_dim", "vision_config.intermediate_size"),
    ("vision_patch_size", "vision_config.patch_size"),
    ("vision_downsample_ratio", "vision_config.downsample_ratio"),
    ("vision_max_n_token", "vision_config.max_image_tokens"),
    ("vision_min_pixels", "vision_config.min_pixels"),
    ("vision_max_wh_ratio", "vision_config.max_wh_ratio"),
    ("image_token_id", "image_token_id"),
    ("engram_n_heads", "engram_n_heads"),
    ("engram_head_dim", "engram_head_dim"),
    ("vision_rope_theta", "vision_config.rope_theta"),
)
ENGINE = EngineConfig(
    sign="engram_layer_ids",
    keys=_ENGINE_KEYS,
    optional=frozenset(
        key
        for key, _ in _ENGINE_KEYS
        if key.startswith(("dspark_", "vision_")) or key in ("dtype", "expert_dtype", "image_token_id")
    ),
    nullable=frozenset({"vision_max_wh_ratio"}),
    release={
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "image_token_id": 129264,
        "quantization_config": {key: value for key, value in QUANTIZATION.items() if key != "expert_dtype"},
        "text_config": {
            "model_type": "deepseek_v41_text",
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "yarn"},
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
        },
        "vision_config": {"model_type": "deepseek_v41_vision"},
    },
)


def missing_keys(config: Config) -> list[str]:
    """Keys that computing a V4.1 checkpoint requires and the config lacks."""
    return [key for key in KEYS if config_value(config, key) is None]


def _layer_ids(config: Config, key: str) -> tuple[int, ...]:
    """A list of layers or counts. Raises InputError."""
    value = config.get(key)
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise InputError(f"config.json: {key} must be a list of counts", COPY_CONFIG)
    return tuple(value)


@dataclass(frozen=True)
class Dimensions:
    """The widths that the shapes follow from, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    n_routed_experts: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    hc_mult: int
    engram_max_ngram_size: int
    engram_n_heads: int
    engram_head_dim: int

    @classmethod
    def read(cls, config: Config) -> "Dimensions":
        """The dimensions in a config. Raises InputError naming the keys that are missing or not counts."""
        return cls(**counts_of(config, cls.__dataclass_fields__))


def _attention(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    heads = d.num_attention_heads * d.head_dim
    yield "attn.attn_sink", (d.num_attention_heads,)
    yield "attn.q_norm.weight", (d.q_lora_rank,)
    yield "attn.kv_norm.weight", (d.head_dim,)
    yield "attn.wq_a.weight", (d.q_lora_rank, d.hidden_size)
    yield "attn.wq_b.weight", (heads, d.q_lora_rank)
    yield "attn.wkv.weight", (d.head_dim, d.hidden_size)
    yield "attn.wo_a.weight", (d.o_groups * d.o_lora_rank, heads // d.o_groups)
    yield "attn.wo_b.weight", (d.hidden_size, d.o_groups * d.o_lora_rank)


def _kv_source(ratio: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "attn.compressor.norm.weight", (d.head_dim,)
    yield "attn.compressor.wkv.weight", (d.head_dim, d.hidden_size)
    if ratio > 1:
        yield "attn.compressor.wgate.weight", (d.head_dim, d.hidden_size)
    yield "attn.indexer.wk.weight", (d.index_head_dim, d.head_dim)
    yield "attn.indexer.k_norm.weight", (d.index_head_dim,)


def _index_source(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "attn.indexer.wq_b.weight", (d.index_n_heads * d.index_head_dim, d.q_lora_rank)
    yield "attn.indexer.weights_proj.weight", (d.index_n_heads, d.hidden_size)


def _engram(rows: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    columns = (d.engram_max_ngram_size - 1) * d.engram_n_heads
    yield "engram.embed.weight", (rows, d.engram_head_dim)
    yield "engram.q_weight", (d.hc_mult, d.hidden_size)
    yield "engram.k_weight", (d.hc_mult, d.hidden_size)
    yield "engram.wkv.weight", ((d.hc_mult + 1) * d.hidden_size, columns * d.engram_head_dim)


def _block(experts_count: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Tensors of a block; names without `layers.{L}.`."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield "ffn_norm.weight", (d.hidden_size,)
    for part in ("attn", "ffn"):
        yield from hyper_connection(f"hc_{part}", (2 + d.hc_mult) * d.hc_mult, 3, d.hc_mult * d.hidden_size)
    yield from _attention(d)
    yield "ffn.gate.weight", (experts_count, d.hidden_size)
    yield "ffn.gate.bias", (experts_count,)
    yield from experts(experts_count, d.hidden_size, d.moe_intermediate_size)


def rows_of_tables(config: Config) -> dict[int, int]:
    """Rows of the n-gram table of each layer that has one. Raises InputError."""
    return dict(zip(_layer_ids(config, "engram_layer_ids"), _layer_ids(config, "engram_num_embeddings"), strict=False))


def _layer(config: Config, layer: int, ratio: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield from _block(d.n_routed_experts, d)
    if layer in _layer_ids(config, "kv_source_layer_ids"):
        yield from _kv_source(ratio, d)
    if layer in _layer_ids(config, "index_source_layer_ids"):
        yield from _index_source(d)
    if layer in (rows_of := rows_of_tables(config)):
        yield from _engram(rows_of[layer], d)


def _stage(config: Config, stage: int, stages: int, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Tensors of draft stage `stage` of `stages`; names without `mtp.{M}.`. Raises InputError for a missing key."""
    keys = ("dspark_n_routed_experts", "dspark_markov_rank")
    experts_count, rank = (config_count(config, key) for key in keys)
    if experts_count is None or rank is None:
        raise InputError(f"config.json lacks {keys[0] if experts_count is None else keys[1]}", COPY_CONFIG)
    yield from _block(experts_count, d)
    if stage == 0:
        targets = _layer_ids(config, "dspark_target_layer_ids")
        yield "main_norm.weight", (d.hidden_size,)
        yield "main_proj.weight", (d.hidden_size, len(targets) * d.hidden_size)
    if stage == stages - 1:
        yield "norm.weight", (d.hidden_size,)
        yield "confidence_head.proj.weight", (1, d.hidden_size + rank)
        yield "markov_head.embed.weight", (d.vocab_size, rank)
        yield "markov_head.head.weight", (d.vocab_size, rank)


def v41_tensors(config: Config, stages: int) -> dict[str, Shape]:
    """Every weight that a V4.1 checkpoint with `stages` draft stages must have, by name, with its shape in elements.

    Raises InputError for what the config lacks, and for dimensions that no model has.
    """
    d = Dimensions.read(config)
    ratios = ratios_of(config, d.num_hidden_layers)
    require_believable(d.num_hidden_layers + stages, d.n_routed_experts)
    found: dict[str, Shape] = {
        "embed.weight": (d.vocab_size, d.hidden_size),
        "head.weight": (d.vocab_size, d.hidden_size),
        "norm.weight": (d.hidden_size,),
    }
    for layer in range(d.num_hidden_layers):
        found |= {f"layers.{layer}.{name}": shape for name, shape in _layer(config, layer, ratios[layer], d)}
    for stage in range(stages):
        found |= {f"mtp.{stage}.{name}": shape for name, shape in _stage(config, stage, stages, d)}
    return found


def v41_cache(config: Config, layers: Sequence[Keeping]) -> CacheLayout | None:
    """The KV cache as the release counts it: compressed entries and index keys are in the KV source layers only.

        window     float8_e4m3fn, one float8_e8m0fnu scale per 32 dims                  512 + 16     = 528 bytes
        entry      float4_e2m1fn, one float8_e4m3fn scale per 16 dims                   512 / 2 + 32 = 288 bytes
        index key  as V4's                                                                              68 bytes

    None where the config lacks a width, or its sources are no list of layers.
    """
    widths, sources = Widths.read(config), config.get("kv_source_layer_ids")
    if widths is None or not isinstance(sources, list) or any(source not in range(len(layers)) for source in sources):
        return None
    width, index_key = widths.head_dim, widths.index_key_bytes
    window, entry = width + -(-width // 32), width // 2 + -(-width // 16)
    kept = (layers[source] for source in sources)
    grows = tuple(Compressed(layer.ratio, entry + index_key) for layer in kept if layer.ratio)
    formats = "FP8 window keys, FP4 compressed and index keys"
    return CacheLayout(len(layers), widths.sliding_window, window, entry, index_key, grows, formats)
