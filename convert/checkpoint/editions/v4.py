"""DeepSeek-V4, Flash and Pro, Base and DSpark: the keys that a config must have, and the tensors that follow from them.

One line per tensor. Shapes are in elements; scales are not listed, they follow from how a weight is stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dsv4.convert.checkpoint.config import Config, compress_ratios, config_count, config_value
from dsv4.errors import InputError

from .engine_config import EngineConfig
from .kv_cache import CacheLayout, Compressed, Keeping, Widths
from .spellings import YARN_KEYS

MAX_EXPERTS = 1_000_000  # V4-Pro has 23808 in all; a hostile config must not make us list billions of names
COPY_CONFIG = "Copy config.json from the release."
# Keys without which no engine can compute the model; those of `rope_scaling` only if a layer compresses.
KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "compress_ratios", "index_n_heads", "index_head_dim",
    "index_topk", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "num_hash_layers",
    "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta",
    "compress_rope_theta", "max_position_embeddings",
)  # fmt: skip
# What config.json of a release says of how weights are stored.
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
_ENGINE_KEYS = (
    ("vocab_size", "vocab_size"),
    ("dim", "hidden_size"),
    ("moe_inter_dim", "moe_intermediate_size"),
    ("n_layers", "num_hidden_layers"),
    ("n_hash_layers", "num_hash_layers"),
    ("n_mtp_layers", ""),  # config.json says 1 also where there are three stages
    ("dspark_block_size", "dspark_block_size"),
    ("dspark_noise_token_id", "dspark_noise_token_id"),
    ("dspark_target_layer_ids", "dspark_target_layer_ids"),
    ("dspark_markov_rank", "dspark_markov_rank"),
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
    ("o_groups", "o_groups"),
    ("o_lora_rank", "o_lora_rank"),
    ("window_size", "sliding_window"),
    ("original_seq_len", "rope_scaling.original_max_position_embeddings"),
    ("rope_theta", "rope_theta"),
    ("rope_factor", "rope_scaling.factor"),
    ("beta_fast", "rope_scaling.beta_fast"),
    ("beta_slow", "rope_scaling.beta_slow"),
    ("index_n_heads", "index_n_heads"),
    ("index_head_dim", "index_head_dim"),
    ("index_topk", "index_topk"),
    ("hc_mult", "hc_mult"),
    ("hc_sinkhorn_iters", "hc_sinkhorn_iters"),
    ("dtype", ""),
    ("scale_fmt", "quantization_config.scale_fmt"),
    ("expert_dtype", "expert_dtype"),
    ("compress_rope_theta", "compress_rope_theta"),
    ("compress_ratios", "compress_ratios"),
)
_VISION_KEYS = tuple(
    (f"vision_{name}", f"vision_{name}")
    for name in (
        "n_layers", "dim", "n_heads", "inter_dim", "patch_size", "rope_theta", "downsample_ratio", "max_n_token",
        "min_pixels", "max_wh_ratio",
    )
)  # fmt: skip
ENGINE = EngineConfig(
    keys=_ENGINE_KEYS,
    optional=frozenset(
        key for key, _ in _ENGINE_KEYS if key.startswith("dspark_") or key in ("n_mtp_layers", "dtype", "expert_dtype")
    ),
    release={
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "deepseek_v4",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "quantization_config": QUANTIZATION,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "yarn"},
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
)
# Of the edition with vision, whose config.json says how many stages there are.
_SAID = tuple((key, "num_nextn_predict_layers" if key == "n_mtp_layers" else path) for key, path in _ENGINE_KEYS)
ENGINE_WITH_VISION = replace(
    ENGINE,
    sign="vision_n_layers",
    keys=(*_SAID, ("norm_eps", "rms_norm_eps"), *_VISION_KEYS),
    optional=ENGINE.optional | {"norm_eps", *(key for key, _ in _VISION_KEYS)},
)
SCALING_KEYS = tuple(f"rope_scaling.{key}" for key in YARN_KEYS)

Shape = tuple[int, ...]


def missing_keys(config: Config) -> list[str]:
    """Keys that computing a V4 checkpoint requires and the config lacks."""
    ratios = compress_ratios(config)
    keys = KEYS if ratios is not None and not any(ratios) else (*KEYS, *SCALING_KEYS)
    return [key for key in keys if config_value(config, key) is None]


def counts_of(config: Config, keys: Iterable[str]) -> dict[str, int]:
    """The counts that a config has under some keys. Raises InputError naming those that are missing or not counts."""
    values = {key: config_count(config, key) for key in keys}
    missing = [key for key, value in values.items() if value is None]
    zero = ("o_groups",) if values["o_groups"] == 0 else ()
    if missing or zero:
        raise InputError(f"config.json lacks {', '.join([*missing, *zero])}", COPY_CONFIG)
    return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Dimensions:
    """The widths that the shapes follow from, under the names of config.json."""

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
    def read(cls, config: Config) -> "Dimensions":
        """The dimensions in a config. Raises InputError naming the keys that are missing or not counts."""
        return cls(**counts_of(config, cls.__dataclass_fields__))


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
    yield from experts(d.n_routed_experts, d.hidden_size, d.moe_intermediate_size)


def experts(count: int, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    """The shared expert and `count` routed ones of a block, `hidden` wide outside and `inner` inside."""
    for expert in ("shared_experts", *(f"experts.{i}" for i in range(count))):
        yield f"ffn.{expert}.w1.weight", (inner, hidden)
        yield f"ffn.{expert}.w2.weight", (hidden, inner)
        yield f"ffn.{expert}.w3.weight", (inner, hidden)


def hyper_connection(name: str, rows: int, scales: int, width: int) -> Iterator[tuple[str, Shape]]:
    """The parameters of a hyper-connection over streams of `width` elements together."""
    yield f"{name}_fn", (rows, width)
    yield f"{name}_base", (rows,)
    yield f"{name}_scale", (scales,)


def _block(ratio: int, hashed: bool, d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Tensors of one block, without `layers.{L}.` before their names."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield "ffn_norm.weight", (d.hidden_size,)
    for part in ("attn", "ffn"):
        yield from hyper_connection(f"hc_{part}", (2 + d.hc_mult) * d.hc_mult, 3, d.hc_mult * d.hidden_size)
    yield from _attention(ratio, d)
    yield from _experts(hashed, d)


def _head(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """The end of a stack: its last norm, and the hyper-connection that joins the streams."""
    yield "norm.weight", (d.hidden_size,)
    yield from hyper_connection("hc_head", d.hc_mult, 1, d.hc_mult * d.hidden_size)


def _globals(d: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Tensors outside the blocks."""
    yield "embed.weight", (d.vocab_size, d.hidden_size)
    yield "head.weight", (d.vocab_size, d.hidden_size)
    yield from _head(d)


Stage = Callable[[Config, Dimensions, int, int], Iterator[tuple[str, Shape]]]


def mtp_stage(config: Config, d: Dimensions, stage: int, stages: int) -> Iterator[tuple[str, Shape]]:
    """Tensors of a draft stage of Flash and Pro besides its block; names without `mtp.{M}.`."""
    yield "e_proj.weight", (d.hidden_size, d.hidden_size)
    yield "h_proj.weight", (d.hidden_size, d.hidden_size)
    yield "enorm.weight", (d.hidden_size,)
    yield "hnorm.weight", (d.hidden_size,)
    yield from _head(d)


def dspark_stage(config: Config, d: Dimensions, stage: int, stages: int) -> Iterator[tuple[str, Shape]]:
    """Tensors of stage `stage` of the `stages` of a DSpark edition besides its block; names without `mtp.{M}.`.

    Raises InputError naming a key of the config that is missing.
    """
    rank, targets = config_count(config, "dspark_markov_rank"), config.get("dspark_target_layer_ids")
    if rank is None or not isinstance(targets, list):
        key = "dspark_markov_rank" if rank is None else "dspark_target_layer_ids"
        raise InputError(f"config.json lacks {key}", COPY_CONFIG)
    if stage == 0:
        yield "main_norm.weight", (d.hidden_size,)
        yield "main_proj.weight", (d.hidden_size, len(targets) * d.hidden_size)
    if stage == stages - 1:
        yield from _head(d)
        yield "confidence_head.proj.weight", (1, d.hidden_size + rank)
        yield "markov_head.markov_w1.weight", (d.vocab_size, rank)
        yield "markov_head.markov_w2.weight", (d.vocab_size, rank)


def ratios_of(config: Config, layers: int) -> tuple[int, ...]:
    """The compress ratios, one for each of `layers` layers at least. Raises InputError."""
    ratios = compress_ratios(config)
    if ratios is None or len(ratios) < layers:
        found = "no list of counts" if ratios is None else f"{len(ratios)} entries"
        raise InputError(f"compress_ratios: {found}; one for each of {layers} layers needed")
    return ratios


def require_believable(blocks: int, experts: int) -> None:
    """Raise InputError for more experts than any model has, in all blocks together."""
    if blocks * max(experts, 1) > MAX_EXPERTS:
        raise InputError(f"{blocks} layers of {experts} experts are not believable")


def v4_tensors(config: Config, stages: int, stage_tensors: Stage) -> dict[str, Shape]:
    """Every weight that a V4 checkpoint with `stages` draft stages must have, by name, with its shape in elements.

    Raises InputError for what the config lacks, and for dimensions that no model has.
    """
    d = Dimensions.read(config)
    ratios = ratios_of(config, d.num_hidden_layers)
    blocks = d.num_hidden_layers + stages
    require_believable(blocks, d.n_routed_experts)
    found = dict(_globals(d))
    for layer in range(d.num_hidden_layers):
        block = _block(ratios[layer], layer < d.num_hash_layers, d)
        found |= {f"layers.{layer}.{name}": shape for name, shape in block}
    for stage in range(stages):
        ratio = ratios[d.num_hidden_layers + stage] if d.num_hidden_layers + stage < len(ratios) else 0
        for part in (_block(ratio, False, d), stage_tensors(config, d, stage, stages)):
            found |= {f"mtp.{stage}.{name}": shape for name, shape in part}
    return found


def v4_cache(config: Config, layers: Sequence[Keeping]) -> CacheLayout | None:
    """The KV cache as the release counts it: entries in FP8 with their rotary dims in bfloat16, index keys in FP4.

        entry      448 dims in float8_e4m3fn, 64 rotary dims in bfloat16                448 + 2 * 64 = 576 bytes
        index key  float4_e2m1fn and one float8_e8m0fnu scale per 32 dims               128 / 2 + 4  =  68 bytes

    A layer with an indexer keeps an index key for each compressed entry. Scales of the FP8 part (one per 64 dims, 1%)
    and the state of each compressor's unfinished block are not counted, as in the release's figures, nor is the window
    of a draft block. None where the config lacks a width.
    """
    if (widths := Widths.read(config)) is None:
        return None
    entry, index_key = widths.head_dim - widths.rope_dim + 2 * widths.rope_dim, widths.index_key_bytes
    grows = tuple(Compressed(layer.ratio, entry + index_key * layer.indexed) for layer in layers if layer.ratio)
    formats = "FP8 keys with BF16 rotary part, FP4 index keys"
    return CacheLayout(len(layers), widths.sliding_window, entry, entry, index_key, grows, formats)
