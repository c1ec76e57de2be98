"""Names of tensors in the release and in llama.cpp's architecture `deepseek4`: one table, read both ways.

Routed experts are stacked, one tensor for each of the three matrices of a layer; the rest is one to one. The draft
block of a release is block number `num_hidden_layers`, in a file of its own with copies of embedding and head.
"""

import re
from typing import NamedTuple

ROOT = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    **{f"hc_{part}_{what}": f"hc_{part}_{what}.weight" for part in ("attn", "ffn") for what in ("fn", "base", "scale")},
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
# Of the draft block, beside those of a layer. `norm.weight` is the file's output_norm too, hc_head_* its output_hc_*.
DRAFT = {
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
DRAFT_PROJECTION = "nextn.eh_proj.weight"  # e_proj and h_proj, side by side
PROJECTIONS = ("e_proj.weight", "h_proj.weight")
DRAFT_HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale")

_ROOT_BACK = {new: old for old, new in ROOT.items()}
_LAYER_BACK = {new: old for old, new in (LAYER | DRAFT).items()}
_EXPERTS_BACK = {new: old for old, new in EXPERTS.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class Place(NamedTuple):
    """What a tensor of a file is: of block `block` (None: of none), `inner` in the release; or a stack of `matrix`."""

    block: int | None
    inner: str = ""
    matrix: str = ""


def block_name(block: int, inner: str) -> str:
    """`blk.3.attn_kv.weight`."""
    return f"blk.{block}.{inner}"


def place_of(name: str) -> Place | None:
    """The place of a file's tensor; None for a name that the architecture does not have."""
    if name in _ROOT_BACK:
        return Place(None, _ROOT_BACK[name])
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    block, inner = int(match[1]), match[2]
    if inner in _EXPERTS_BACK:
        return Place(block, matrix=_EXPERTS_BACK[inner])
    if inner == DRAFT_PROJECTION:
        return Place(block, DRAFT_PROJECTION)
    return Place(block, _LAYER_BACK[inner]) if inner in _LAYER_BACK else None
