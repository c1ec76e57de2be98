"""The reference engine's config.json, beside its rank files: its own keys for what the keys of releases say.

A folder in the release's layout usually has that config too, as `inference/config.json`. Where it has none, or is the
side that was made, its config.json is compared with the engine's through this table. Keys about storage (`dtype`,
`expert_dtype`, `scale_fmt`) are compared with the tensors instead, and so are the draft stages that `n_mtp_layers`
counts.
"""

from typing import Any

RELEASED = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "original_seq_len": "rope_scaling.original_max_position_embeddings",
    "rope_factor": "rope_scaling.factor",
    "beta_fast": "rope_scaling.beta_fast",
    "beta_slow": "rope_scaling.beta_slow",
}
SAME = (
    "vocab_size", "n_routed_experts", "n_shared_experts", "swiglu_limit", "q_lora_rank", "head_dim", "o_groups",
    "o_lora_rank", "rope_theta", "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters",
    "compress_rope_theta", "compress_ratios", "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids",
    "dspark_markov_rank",
)  # fmt: skip
KEYS = {key: key for key in SAME} | RELEASED


def as_released(config: dict[str, Any]) -> dict[str, Any]:
    """What an engine's config says, by the keys of the releases; nested ones are dotted."""
    return {released: config[key] for key, released in KEYS.items() if key in config}
