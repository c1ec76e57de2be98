"""The dimensions of a small DeepSeek-V4 checkpoint, and the two config files that describe them.

The fields have the names of the release's config.json. The defaults keep every mechanism of the architecture
(a hash layer and score layers, a layer without compression and both compressors, the indexer, an MTP block)
at a size that is written and run in about a second.
"""

from dataclasses import dataclass
from typing import Any

VISION_WIDTH, VISION_PATCH, VISION_DOWNSAMPLE = 32, 14, 3


@dataclass(frozen=True)
class DSpark:
    """Draft stages of the DSpark editions, under the names of config.json without `dspark_`."""

    block_size: int = 5
    noise_token_id: int = 509
    target_layer_ids: tuple[int, ...] = (1, 2, 3)
    markov_rank: int = 64
    stages: int = 3  # the release has no key for it: num_nextn_predict_layers says 1

    def config(self) -> dict[str, Any]:
        """Its keys, the same in both config files."""
        return {
            "dspark_block_size": self.block_size,
            "dspark_noise_token_id": self.noise_token_id,
            "dspark_target_layer_ids": list(self.target_layer_ids),
            "dspark_markov_rank": self.markov_rank,
        }


@dataclass(frozen=True)
class Geometry:
    """Dimensions of a checkpoint. `compress_ratios` has one entry per layer and one more per draft stage.

    The draft stages are those of `dspark`, or MTP blocks, as many as `num_nextn_predict_layers` says.

    Every input width that FP4 weights see (`hidden_size`, `moe_intermediate_size`) must be a multiple of 32.
    """

    vocab_size: int = 512
    hidden_size: int = 256
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 0)
    num_nextn_predict_layers: int = 1
    num_hash_layers: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = 128
    num_attention_heads: int = 4
    head_dim: int = 128
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 128
    index_n_heads: int = 8
    index_head_dim: int = 128
    index_topk: int = 8
    sliding_window: int = 128
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 512
    rope_factor: int = 8
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    rms_norm_eps: float = 1e-6
    dspark: DSpark | None = None
    vision: bool = False  # what Vision-Exp has beside the text model

    @property
    def draft_stages(self) -> int:
        """Blocks `mtp.{M}` of either kind."""
        return self.num_nextn_predict_layers if self.dspark is None else self.dspark.stages

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the main stack, draft stages not counted."""
        return len(self.compress_ratios) - self.draft_stages


VISION_CONFIG = {
    "vision_n_layers": 1,
    "vision_dim": VISION_WIDTH,
    "vision_n_heads": 1,
    "vision_inter_dim": 2 * VISION_WIDTH,
    "vision_patch_size": VISION_PATCH,
    "vision_rope_theta": 10000.0,
    "vision_downsample_ratio": VISION_DOWNSAMPLE,
    "vision_max_n_token": 384,
    "vision_min_pixels": 147456,
    "vision_max_wh_ratio": 8,
}


def _quantization_config() -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }


def _rope_scaling(geometry: Geometry) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": geometry.rope_factor,
        "original_max_position_embeddings": geometry.original_max_position_embeddings,
        "type": "yarn",
    }


def config(geometry: Geometry, expert_dtype: str = "fp4") -> dict[str, Any]:
    """config.json of the release: its keys, in its order."""
    values = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": expert_dtype,
        "hc_eps": 1e-06,
        "hc_mult": geometry.hc_mult,
        "hc_sinkhorn_iters": geometry.hc_sinkhorn_iters,
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "index_head_dim": geometry.index_head_dim,
        "index_n_heads": geometry.index_n_heads,
        "index_topk": geometry.index_topk,
        "initializer_range": 0.02,
        "max_position_embeddings": geometry.max_position_embeddings,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": geometry.moe_intermediate_size,
        "n_routed_experts": geometry.n_routed_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": geometry.num_attention_heads,
        "num_experts_per_tok": geometry.num_experts_per_tok,
        "num_hidden_layers": geometry.num_hidden_layers,
        "num_hash_layers": geometry.num_hash_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": geometry.num_nextn_predict_layers,
        "o_groups": geometry.o_groups,
        "o_lora_rank": geometry.o_lora_rank,
        "q_lora_rank": geometry.q_lora_rank,
        "qk_rope_head_dim": geometry.qk_rope_head_dim,
        "quantization_config": _quantization_config(),
        "rms_norm_eps": geometry.rms_norm_eps,
        "rope_scaling": _rope_scaling(geometry),
        "rope_theta": 10000,
        "routed_scaling_factor": geometry.routed_scaling_factor,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": geometry.sliding_window,
        "swiglu_limit": geometry.swiglu_limit,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": geometry.vocab_size,
        "compress_rope_theta": 160000,
        "compress_ratios": list(geometry.compress_ratios),
    }
    drafts = {} if geometry.dspark is None else geometry.dspark.config()
    return values | drafts | (VISION_CONFIG if geometry.vision else {})


def inference_config(geometry: Geometry, expert_dtype: str = "fp4") -> dict[str, Any]:
    """inference/config.json, which the release's own engine reads. For FP8 experts it has no `expert_dtype`."""
    values: dict[str, Any] = {
        "vocab_size": geometry.vocab_size,
        "dim": geometry.hidden_size,
        "moe_inter_dim": geometry.moe_intermediate_size,
        "n_layers": geometry.num_hidden_layers,
        "n_hash_layers": geometry.num_hash_layers,
        **({} if geometry.dspark is None else {"n_mtp_layers": geometry.dspark.stages, **geometry.dspark.config()}),
        "n_heads": geometry.num_attention_heads,
        "n_routed_experts": geometry.n_routed_experts,
        "n_shared_experts": 1,
        "n_activated_experts": geometry.num_experts_per_tok,
        "score_func": "sqrtsoftplus",
        "route_scale": geometry.routed_scaling_factor,
        "swiglu_limit": geometry.swiglu_limit,
        "q_lora_rank": geometry.q_lora_rank,
        "head_dim": geometry.head_dim,
        "rope_head_dim": geometry.qk_rope_head_dim,
        "o_groups": geometry.o_groups,
        "o_lora_rank": geometry.o_lora_rank,
        "window_size": geometry.sliding_window,
        "original_seq_len": geometry.original_max_position_embeddings,
        "rope_theta": 10000,
        "rope_factor": geometry.rope_factor,
        "beta_fast": 32,
        "beta_slow": 1,
        "index_n_heads": geometry.index_n_heads,
        "index_head_dim": geometry.index_head_dim,
        "index_topk": geometry.index_topk,
        "hc_mult": geometry.hc_mult,
        "hc_sinkhorn_iters": geometry.hc_sinkhorn_iters,
        "dtype": "fp8",
        "scale_fmt": "ue8m0",
    }
    if expert_dtype == "fp4":
        values["expert_dtype"] = "fp4"
    return values | {"compress_rope_theta": 160000, "compress_ratios": list(geometry.compress_ratios)}
