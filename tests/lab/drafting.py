"""Small checkpoints with DSpark stages, and one whose drafts are accepted as often as the test wants to see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from exact_values import edit_tensors, tensors_of, values
from raw_safetensors import Raw, Tensors, raw

from dsv4.convert.synthetic.checkpoint import DSpark, Geometry, make_checkpoint

WINDOW = 16
STAGES = DSpark(noise_token_id=61, target_layer_ids=(1, 2, 3), markov_rank=32)
# Every kind of layer, a window that short texts pass, and widths that two ranks can share.
SMALL = Geometry(
    vocab_size=64, hidden_size=128, compress_ratios=(0, 4, 128, 4, 0, 0, 0), n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=64, num_attention_heads=4, head_dim=64, qk_rope_head_dim=32, q_lora_rank=64, o_lora_rank=128,
    index_n_heads=4, index_head_dim=64, index_topk=3, hc_sinkhorn_iters=4, sliding_window=WINDOW,
    max_position_embeddings=400, dspark=STAGES,
)  # fmt: skip
QUIETER = 5  # powers of two by which the sublayers of the agreeable checkpoint count less


def bfloat16(x: np.ndarray) -> Raw:
    """The nearest bfloat16 of each number, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return raw("BF16", ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def random_drafts(folder: Path) -> Path:
    """Stages that know nothing: nearly all of their drafts are wrong."""
    return make_checkpoint(folder, geometry=SMALL, seed=3, tokenizer=False)


def quieter(tensors: Tensors) -> Tensors:
    """The scales of the sublayers' last matrices, so that these count less."""
    names = (name for name in tensors if name.endswith((".wo_b.scale", ".w2.scale")))
    return {name: raw("F8_E8M0", tensors[name].array() - QUIETER) for name in names}


def agreeable_mtp(folder: Path) -> Path:
    """An MTP block whose drafts are right more often than not, also those that it chains to its own.

    As below the next token nearly follows from the last one. The block passes the embedding of the last one on, by a
    unit matrix, and no stream of the main model; its norm is the main model's.
    """
    hidden = SMALL.hidden_size
    make_checkpoint(folder, geometry=replace(SMALL, compress_ratios=(0, 4, 128, 4, 0), dspark=None), seed=3)
    tensors = tensors_of(folder)
    new = quieter(tensors)
    new["mtp.0.e_proj.weight"] = raw("F8_E4M3", np.eye(hidden, dtype=np.uint8) * 0b0_0111_000)  # 1.0
    new["mtp.0.e_proj.scale"] = raw("F8_E8M0", np.full((1, 1), 127, np.uint8))
    new["mtp.0.h_proj.weight"] = raw("F8_E4M3", np.zeros((hidden, hidden), np.uint8))
    new["mtp.0.enorm.weight"] = bfloat16(np.ones(hidden))
    new["mtp.0.norm.weight"] = tensors["norm.weight"]
    edit_tensors(folder, new)
    return folder


def agreeable_drafts(folder: Path) -> Path:
    """Drafts that are right more often than not.

    The sublayers hardly move the streams, so the main model's next token nearly follows from the last one alone, and
    the Markov tables hold that rule: W1 is the normed embedding, W2 the output matrix, and the stages' own logits
    count little.
    """
    hidden = SMALL.hidden_size
    make_checkpoint(
        folder, geometry=replace(SMALL, dspark=replace(STAGES, markov_rank=hidden)), seed=3, tokenizer=False
    )
    tensors = tensors_of(folder)
    new = quieter(tensors)
    embedding = values("embed.weight", tensors)
    size = np.sqrt((embedding * embedding).mean(-1, keepdims=True))
    new["mtp.2.markov_head.markov_w1.weight"] = bfloat16(embedding / size * values("norm.weight", tensors))
    new["mtp.2.markov_head.markov_w2.weight"] = tensors["head.weight"]
    new["mtp.2.norm.weight"] = bfloat16(values("mtp.2.norm.weight", tensors) / 16)
    edit_tensors(folder, new)
    return folder
