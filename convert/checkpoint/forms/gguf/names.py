"""Names of tensors in the release and in llama.cpp's architectures `deepseek4` and `dflash`: one table, both ways.

Routed experts are stacked, one tensor for each of the three matrices of a layer; the rest is one to one. There are
three kinds of files:

the model       `layers.3.` is `blk.3.`
a draft block   `mtp.0.` (MTP) is the block after the layers, beside copies of embedding, head and the norm before it
draft stages    `mtp.2.` (DSpark) is `blk.2.` of architecture `dflash`; what only the first or the last stage has stands
                outside of blocks, and embedding and head are the model's
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    "ffn.gate.bias_vl": "exp_probs_b_vl.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    **{f"hc_{part}_{what}": f"hc_{part}_{what}.weight" for part in ("attn", "ffn") for what in ("fn", "base", "scale")},
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
# Of the draft block, beside those of a layer.
DRAFT = {
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
DRAFT_PROJECTION = "nextn.eh_proj.weight"  # e_proj and h_proj, side by side
PROJECTIONS = ("e_proj.weight", "h_proj.weight")
COPIES = ("embed.weight", "norm.weight", "head.weight")  # of the model, in the file of a draft block
HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale")
# Of draft stages, beside those of a layer: of the first one, and of the last.
FIRST_STAGE = {"main_proj.weight": "fc.weight", "main_norm.weight": "enc.output_norm.weight"}
LAST_STAGE = {
    **{inner: ROOT[inner] for inner in ("norm.weight", *HEAD)},
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
}
IMAGE_BIAS = "ffn.gate.bias_vl"  # of routers, for tokens of images, which draft stages do not see in llama.cpp

_EXPERTS_BACK = {new: old for old, new in EXPERTS.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class Place(NamedTuple):
    """Where the release has a tensor of a file: `prefix` is "" or `layers.3.`, then `inner`, or a stack of `matrix`.

    All three are "" for a tensor that the file repeats.
    """

    prefix: str = ""
    inner: str = ""
    matrix: str = ""


REPEATED = Place()


@dataclass(frozen=True)
class FileNames:
    """The names in one kind of file, by those of the release.

    whole: of tensors outside of blocks. blocks: the number of the block, by prefix. inner: of tensors in a block.
    repeats: of tensors outside of blocks that the file has once more.
    """

    whole: Mapping[str, str]
    blocks: Mapping[str, int]
    inner: Mapping[str, str]
    repeats: Mapping[str, str] = field(default_factory=dict)

    def of(self, prefix: str, inner: str) -> list[str]:
        """The names of a tensor in the file; [] if it has no place there."""
        full = prefix + inner
        found = [names[full] for names in (self.whole, self.repeats) if full in names]
        if prefix in self.blocks and inner in self.inner:
            found.append(self.in_block(prefix, self.inner[inner]))
        return found

    def in_block(self, prefix: str, name: str) -> str:
        """`blk.3.attn_kv.weight`."""
        return f"blk.{self.blocks[prefix]}.{name}"

    @cached_property
    def _back(self) -> tuple[dict[str, Place], dict[int, str], dict[str, str]]:
        whole = {new: Place(inner=old) for old, new in self.whole.items()} | dict.fromkeys(
            self.repeats.values(), REPEATED
        )
        return whole, {n: prefix for prefix, n in self.blocks.items()}, {new: old for old, new in self.inner.items()}

    def place_of(self, name: str) -> Place | None:
        """Where the release has a tensor of the file; None for a name that this kind of file does not have."""
        whole, prefixes, inner = self._back
        match = _BLOCK.fullmatch(name)
        if match is None:
            return whole.get(name)
        prefix, rest = prefixes.get(int(match[1])), match[2]
        if prefix is None:
            return None
        if rest in _EXPERTS_BACK:
            return Place(prefix, matrix=_EXPERTS_BACK[rest])
        return Place(prefix, inner[rest]) if rest in inner else None


def model_names(layers: int) -> FileNames:
    """Of the files of the model."""
    return FileNames(ROOT, {f"layers.{n}.": n for n in range(layers)}, LAYER)


def draft_block_names(layers: int) -> FileNames:
    """Of the file of an MTP block."""
    whole = {f"mtp.0.{inner}": ROOT[inner] for inner in HEAD}
    inner = LAYER | DRAFT | {DRAFT_PROJECTION: DRAFT_PROJECTION}
    return FileNames(whole, {"mtp.0.": layers}, inner, {name: ROOT[name] for name in COPIES})


def draft_stage_names(stages: int) -> FileNames:
    """Of the file of DSpark's stages. Files of others may repeat embedding and head."""
    whole = {f"mtp.0.{inner}": name for inner, name in FIRST_STAGE.items()}
    whole |= {f"mtp.{stages - 1}.{inner}": name for inner, name in LAST_STAGE.items()}
    layer = {old: new for old, new in LAYER.items() if old != IMAGE_BIAS}
    repeats = {name: ROOT[name] for name in ("embed.weight", "head.weight")}
    return FileNames(whole, {f"mtp.{n}.": n for n in range(stages)}, layer, repeats)
