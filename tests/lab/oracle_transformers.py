"""A random DeepseekV4ForCausalLM of transformers, and the same weights as a checkpoint in the release's format.

The weights are float32, so nothing is quantized and both programs compute the same function. The library takes seconds
to import: only where it is called.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

BASE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 128],
    "index_n_heads": 16,  # with few heads every ReLU can be 0, and a tie has no right answer
    "index_head_dim": 16,
    "index_topk": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.5,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
    "scoring_func": "sqrtsoftplus",
    "num_nextn_predict_layers": 0,
}

# transformers' module path -> the release's, longest first.
RENAMES = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"compressor\.kv_norm\.", "compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"compressor\.gate_proj\.", "compressor.wgate."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"shared_experts\.gate_proj\.", "shared_experts.w1."),
    (r"shared_experts\.down_proj\.", "shared_experts.w2."),
    (r"shared_experts\.up_proj\.", "shared_experts.w3."),
)


def random_model(config: dict[str, Any], seed: int) -> "DeepseekV4ForCausalLM":
    """The model in float32, eager attention, every parameter and buffer that matters set at random."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    scaling = config.get("rope_scaling")
    rope = {} if scaling is None else {"rope_parameters": {**scaling, "rope_type": scaling["type"]}}
    plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "rope_scaling")}
    settings = DeepseekV4Config(**plain, **rope, attn_implementation="eager", experts_implementation="eager")
    model = DeepseekV4ForCausalLM(settings).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                keys = torch.rand(len(tensor), config["n_routed_experts"], generator=generator)
                tensor.copy_(keys.argsort(-1)[:, : tensor.shape[1]])
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            else:
                width = tensor.shape[-1] if tensor.dim() > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / width**0.5))
    return model


def release_name(name: str) -> str:
    """The release's name of a transformers parameter."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def release_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers state dict under the release's names, one tensor per expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        name = release_name(name)
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, -1)).unbind(0)):
                tensors[f"{stem}{expert}.w1.weight"], tensors[f"{stem}{expert}.w3.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            tensors |= {f"{stem}{expert}.w2.weight": down for expert, down in enumerate(tensor.unbind(0))}
        else:
            tensors[name] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """One file of weights and a config.json. Returns the folder."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
