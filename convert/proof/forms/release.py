"""The keys that a release's config.json must have: without one of them nobody can compute the model as it was trained.

YaRN is the reason for the check: a config that another tool saved may lack it, and loaders then compute without it, and
say nothing. The list is the proof's own, apart from the converter's. Other editions are compared without this
check, and a note says so. The reference engine's config is not checked: that engine has a default for each key.
"""

from typing import Any

from .transformers import YARN, as_released

OF_ALL = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "compress_ratios", "index_n_heads", "index_head_dim",
    "index_topk", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor",
    "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta",
    "max_position_embeddings",
)  # fmt: skip
V4 = (*OF_ALL, "num_hash_layers")
V41 = (
    *OF_ALL, "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id", "candidate_topk_blocks",
    "candidate_block_size", "engram_layer_ids", "engram_num_embeddings", "engram_max_ngram_size", "engram_n_heads",
    "engram_head_dim", "engram_vocab_size", "engram_pad_token_id", "engram_compressed_vocab_size",
)  # fmt: skip
FAMILY = "deepseek_v4"  # the beginning of every release's model type
BY_TYPE = {"deepseek_v4": V4, "deepseek_ref": V4, "deepseek_v41": V41}  # of `model_type`


def missing_keys(config: dict[str, Any]) -> list[str]:
    """Keys that the model needs and a config lacks in every spelling; none for a model type that is not known.

    Positions are scaled by YaRN only where a layer has compressed keys.
    """
    kind, nested = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind not in BY_TYPE:
        return []
    view = as_released({**(nested if isinstance(nested, dict) else {}), **config}, {})
    missing = [key for key in BY_TYPE[kind] if view.get(key) is None]
    ratios, scaling = view.get("compress_ratios"), view.get("rope_scaling")
    if isinstance(ratios, list) and not any(ratios):
        return missing
    if not isinstance(scaling, dict):
        return [*missing, "rope_scaling"]
    return missing + [f"rope_scaling.{key}" for key in YARN if scaling.get(key) is None]
