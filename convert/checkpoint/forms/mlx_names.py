"""Names of tensors in the release and in MLX's port, mlx-lm: one table, read both ways.

    layers.3.attn.wq_a.weight           model.layers.3.self_attn.q_a_proj.weight
    layers.3.ffn.experts.7.w1.weight    model.layers.3.mlp.experts.switch_mlp.gate_proj.weight, a stack of all experts

A name is translated part by part; a part that is not in the table stays. Vision tensors keep their names: mlx-lm's text
model does not have them. Some ports write `switch_mlp` without `experts` before it; it is read, too.
"""

import re

from dsv4.convert.checkpoint.names import expert_of

ROOT = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
PARTS = {
    "attn": "self_attn", "ffn": "mlp", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_sink": "sinks", "wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_proj", "wgate": "gate_proj",
    "wo_a": "o_a_proj", "wo_b": "o_b_proj", "q_norm": "q_a_norm", "wk": "k_proj",
}  # fmt: skip
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Parts whose meaning depends on the part before them.
PAIRS = {
    ("compressor", "norm"): "kv_norm",
    ("gate", "bias"): "e_score_correction_bias",
    ("gate", "bias_vl"): "e_score_correction_bias_vl",
    **{("shared_experts", old): new for old, new in MATRICES.items()},
}
HYPER_CONNECTION = re.compile(r"hc_(attn|ffn)_(\w+)")
KEPT = re.compile(r"(vision|aligner)\..*|image_.*")
PREFIX, STACK = "model.", "switch_mlp"

_ROOT_BACK = {new: old for old, new in ROOT.items()}
_PARTS_BACK = {new: old for old, new in PARTS.items()}
_PAIRS_BACK = {(before, new): old for (before, old), new in PAIRS.items()}
_MATRICES_BACK = {new: old for old, new in MATRICES.items()}
_STACK = re.compile(r"(.+?)\.(?:experts\.)?switch_mlp\.(\w+)\.(\w+)")
_CONNECTION_BACK = re.compile(r"(.+\.)(attn|ffn)_hc\.(\w+)")


def mlx_name(name: str) -> str:
    """MLX's name of a tensor of the release; of an expert's matrix, that of the stack."""
    if name in ROOT or KEPT.fullmatch(name):
        return ROOT.get(name, name)
    expert = expert_of(name)
    if expert is not None and (matrix := expert.inner.removesuffix(".weight")) in MATRICES:
        return f"{mlx_name(expert.module)}.experts.{STACK}.{MATRICES[matrix]}.weight"
    parts = name.removeprefix(PREFIX).split(".")
    before = ["", *parts]
    renamed = [PAIRS.get((last, part)) or PARTS.get(part, part) for last, part in zip(before, parts, strict=False)]
    renamed[-1] = HYPER_CONNECTION.sub(r"\1_hc.\2", renamed[-1])
    return PREFIX + ".".join(renamed)


def released_name(name: str, expert: int = 0) -> str:
    """The release's name of a tensor of MLX; of a stack, the matrix of one expert."""
    if name in _ROOT_BACK or KEPT.fullmatch(name):
        return _ROOT_BACK.get(name, name)
    if (stack := _STACK.fullmatch(name)) is not None:
        matrix = _MATRICES_BACK.get(stack[2], stack[2])
        return f"{released_name(stack[1])}.experts.{expert}.{matrix}.{stack[3]}"
    parts = _CONNECTION_BACK.sub(r"\1hc_\2_\3", name).removeprefix(PREFIX).split(".")
    before = ["", *parts]
    renamed = [
        _PAIRS_BACK.get((last, part)) or _PARTS_BACK.get(part, part) for last, part in zip(before, parts, strict=False)
    ]
    return ".".join(renamed)


def is_stack(name: str) -> bool:
    """Whether a tensor of MLX has those of all experts of a layer, along its first dimension."""
    return _STACK.fullmatch(name) is not None
