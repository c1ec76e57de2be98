"""transformers: `from_pretrained` on the CPU, where it decodes FP8 and FP4 to BF16 while loading."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from .record import Record

# transformers' name -> the release's; each line is applied in turn.
NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^lm_head\.", "head."),
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.", "hc_head_"),
        (r"hc_head_hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    )
)


def released(name: str) -> str:
    """The release's name of a parameter."""
    for pattern, replacement in NAMES:
        name = pattern.sub(replacement, name)
    return name


def held(name: str, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the release in one parameter; routed experts are stacked, w1 over w3."""
    stem, _, leaf = released(name).rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        yield f"{stem}.{leaf}" if stem else leaf, values
        return
    for number, expert in enumerate(values):
        matrices = zip(("w1", "w3"), expert.chunk(2), strict=True) if leaf == "gate_up_proj" else (("w2", expert),)
        for matrix, one in matrices:
            yield f"{stem}.{number}.{matrix}.weight", one


def load(folder: str) -> Any:
    """(model, loading info). accelerate, which transformers asks for, has no part in loading on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    vars(quantizer_finegrained_fp8)["is_accelerate_available"] = lambda *args, **kwargs: True
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)


def probe(folder: str, record: Record) -> None:
    """Load the folder and record every weight."""
    record.stage = "import"
    import transformers

    record.version = transformers.__version__
    record.stage = "configuration"
    config = transformers.AutoConfig.from_pretrained(folder)
    record.choices["config"] = type(config).__name__
    quantization = getattr(config, "quantization_config", None) or {}
    record.choices["quantization"] = str(quantization.get("quant_method", "none"))
    record.stage = "loading"
    model, info = load(folder)
    record.choices["model"] = type(model).__name__
    record.stage = "reading back"
    never = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    buffers = ((name, tensor) for name, tensor in model.named_buffers() if "inv_freq" not in name)
    for name, tensor in (*model.named_parameters(), *buffers):
        for weight, values in held(name, tensor):
            record.weight(weight, values, name not in never)
    record.stage = "done"
