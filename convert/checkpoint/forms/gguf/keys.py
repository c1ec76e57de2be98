"""The keys of a `deepseek4` or `dflash` file and of config.json: one table, for writing and for reading.

`dflash` is llama.cpp's architecture of draft stages that read the main model's layers; where it has keys of
hyper-connections, its blocks are those of V4.
"""

import json
from typing import Any

import numpy as np

from dsv4.convert.checkpoint.config import Config, config_value
from dsv4.errors import InputError

from .container import BOOL, F32, I32, TEXT, U32, Entry

ARCHITECTURE = "deepseek4"
STAGES_ARCHITECTURE = "dflash"
PREFIX, STAGES_PREFIX = f"{ARCHITECTURE}.", f"{STAGES_ARCHITECTURE}."
NOISE = "tokenizer.ggml.mask_token_id"
MARKOV = "markov_w1.weight"  # a tensor of draft stages; its rows are as wide as `dspark_markov_rank` says
RELEASED_DTYPES = "dsv4.released_dtypes"  # JSON, name -> dtype: tensors that the release has in another dtype
SQUARE_ROOT_OF_SOFTPLUS = 4  # of expert_gating_func
FILE_TYPE = 38  # general.file_type, MOSTLY_MXFP4_MOE
# Key of the file without PREFIX, its type, key of config.json.
KEYS = (
    ("vocab_size", U32, "vocab_size"),
    ("context_length", U32, "max_position_embeddings"),
    ("embedding_length", U32, "hidden_size"),
    ("attention.head_count", U32, "num_attention_heads"),
    ("attention.key_length", U32, "head_dim"),
    ("attention.value_length", U32, "head_dim"),
    ("attention.q_lora_rank", U32, "q_lora_rank"),
    ("attention.sliding_window", U32, "sliding_window"),
    ("attention.layer_norm_rms_epsilon", F32, "rms_norm_eps"),
    ("attention.indexer.head_count", U32, "index_n_heads"),
    ("attention.indexer.key_length", U32, "index_head_dim"),
    ("attention.indexer.top_k", U32, "index_topk"),
    ("attention.output_group_count", U32, "o_groups"),
    ("attention.output_lora_rank", U32, "o_lora_rank"),
    ("attention.compress_rope_freq_base", F32, "compress_rope_theta"),
    ("rope.dimension_count", U32, "qk_rope_head_dim"),
    ("rope.freq_base", F32, "rope_theta"),
    ("expert_count", U32, "n_routed_experts"),
    ("expert_used_count", U32, "num_experts_per_tok"),
    ("expert_feed_forward_length", U32, "moe_intermediate_size"),
    ("expert_weights_scale", F32, "routed_scaling_factor"),
    ("hyper_connection.count", U32, "hc_mult"),
    ("hyper_connection.sinkhorn_iterations", U32, "hc_sinkhorn_iters"),
    ("hyper_connection.epsilon", F32, "hc_eps"),
    ("hash_layer_count", U32, "num_hash_layers"),
)
SCALING_KEYS = (
    ("rope.scaling.factor", F32, "factor"),
    ("rope.scaling.original_context_length", U32, "original_max_position_embeddings"),
    ("rope.scaling.yarn_beta_fast", F32, "beta_fast"),
    ("rope.scaling.yarn_beta_slow", F32, "beta_slow"),
)
# With the value that a release has where its config does not say it.
OPTIONAL_KEYS = (
    ("attention.head_count_kv", U32, "num_key_value_heads", 1),
    ("expert_shared_count", U32, "n_shared_experts", 1),
    ("expert_weights_norm", BOOL, "norm_topk_prob", True),
)


def _number(config: Config, path: str, kind: int) -> Any:
    value = config_value(config, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind == U32 and type(value) is not int):
        raise InputError(
            f"config.json: {path} is {value!r}; a GGUF file needs it", "Copy config.json from the release."
        )
    return float(value) if kind == F32 else value


def _common(config: Config, prefix: str, blocks: int, changed: Config) -> list[Entry]:
    """The keys that files of both architectures have. changed: keys of the config with other values in this file."""
    config = {**config, **changed}
    found = [Entry(prefix + key, kind, _number(config, path, kind)) for key, kind, path in KEYS]
    found += [Entry(prefix + key, kind, config.get(path, usual)) for key, kind, path, usual in OPTIONAL_KEYS]
    if config.get("rope_scaling"):
        found.append(Entry(prefix + "rope.scaling.type", TEXT, "yarn"))
        found += [
            Entry(prefix + key, kind, _number(config, f"rope_scaling.{path}", kind)) for key, kind, path in SCALING_KEYS
        ]
    limit, ratios = _number(config, "swiglu_limit", F32), list(config["compress_ratios"])
    return [
        *found,
        Entry(prefix + "block_count", U32, blocks),
        Entry(prefix + "expert_gating_func", U32, SQUARE_ROOT_OF_SOFTPLUS),
        Entry(prefix + "swiglu_clamp_exp", F32, [limit] * blocks),
        Entry(prefix + "swiglu_clamp_shexp", F32, [limit] * blocks),
        Entry(prefix + "attention.compress_ratios", I32, ratios + [0] * (blocks - len(ratios))),
    ]


def entries_of(config: Config, drafts: int) -> list[Entry]:
    """The keys of the model, of a file with `drafts` draft blocks after the layers. Raises InputError, naming a key."""
    blocks = _number(config, "num_hidden_layers", U32) + drafts
    width = _number(config, "hidden_size", U32) * _number(config, "hc_mult", U32)
    return [
        *_common(config, PREFIX, blocks, {}),
        Entry(PREFIX + "embedding_length_out", U32, width),
        *([Entry(PREFIX + "nextn_predict_layers", U32, drafts)] if drafts else []),
    ]


def stage_entries(config: Config, stages: int) -> list[Entry]:
    """The keys of DSpark's stages. target_layers is one more: llama.cpp reads the input of the layer after."""
    targets = config.get("dspark_target_layer_ids")
    if not isinstance(targets, list) or not all(type(layer) is int for layer in targets):
        raise InputError(f"config.json: dspark_target_layer_ids is {targets!r}; a list of layers expected",
                         "Copy config.json from the release.")  # fmt: skip
    return [
        *_common(config, STAGES_PREFIX, stages, {"compress_ratios": [], "num_hash_layers": 0}),
        Entry(STAGES_PREFIX + "block_size", U32, _number(config, "dspark_block_size", U32)),
        Entry(STAGES_PREFIX + "target_layers", I32, [layer + 1 for layer in targets]),
        Entry(NOISE, U32, _number(config, "dspark_noise_token_id", U32)),
    ]


def released_dtypes(keys: dict[str, Any]) -> dict[str, str]:
    """RELEASED_DTYPES of a file; {} where it has none, or no readable one."""
    try:
        value = json.loads(keys.get(RELEASED_DTYPES, "{}"))
    except (ValueError, TypeError):
        return {}
    return {name: dtype for name, dtype in value.items() if isinstance(dtype, str)} if isinstance(value, dict) else {}


def _shown(value: Any, kind: int) -> Any:
    """A float32 as the number that was written: 1e-06, and not what float32 makes of it."""
    return float(str(np.float32(value))) if kind == F32 and isinstance(value, float) else value


def stage_config(keys: dict[str, Any], markov_rank: int) -> dict[str, Any]:
    """What config.json says of DSpark's stages, by the keys of their file. Keys that the file lacks are absent."""
    targets = keys.get(STAGES_PREFIX + "target_layers")
    found = {
        "dspark_block_size": keys.get(STAGES_PREFIX + "block_size"),
        "dspark_noise_token_id": keys.get(NOISE),
        "dspark_target_layer_ids": [layer - 1 for layer in targets] if isinstance(targets, list) else None,
        "dspark_markov_rank": markov_rank,
    }
    return {key: value for key, value in found.items() if value is not None}


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """config.json of a file that has none beside it. Keys that the file lacks are absent."""
    names = [(key, kind, path) for key, kind, path, *_ in (*KEYS, *OPTIONAL_KEYS)]
    config = {path: _shown(keys[PREFIX + key], kind) for key, kind, path in names if PREFIX + key in keys}
    drafts = keys.get(PREFIX + "nextn_predict_layers", 0)
    if isinstance(blocks := keys.get(PREFIX + "block_count"), int):
        config["num_hidden_layers"] = blocks - (drafts if isinstance(drafts, int) else 0)
    if keys.get(PREFIX + "rope.scaling.type") == "yarn":
        scaling = {path: _shown(keys[PREFIX + k], kind) for k, kind, path in SCALING_KEYS if PREFIX + k in keys}
        config["rope_scaling"] = {"type": "yarn", **scaling}
    clamp = keys.get(PREFIX + "swiglu_clamp_exp")
    if isinstance(clamp, list) and clamp:
        config["swiglu_limit"] = _shown(clamp[0], F32)
    config["compress_ratios"] = keys.get(PREFIX + "attention.compress_ratios", [])
    config |= {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "scoring_func": "sqrtsoftplus"}
    return config | {"topk_method": "noaux_tc", "expert_dtype": "fp4", "torch_dtype": "bfloat16"}
