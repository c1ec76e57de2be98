"""V4.1-Flash's tensors as they follow from its config: as many, and as many bytes, as the release publishes."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from dsv4.convert.checkpoint.editions.table import edition_of
from dsv4.convert.checkpoint.editions.view import release_view
from dsv4.convert.synthetic.checkpoint import V41Geometry
from dsv4.convert.synthetic.v41 import config

TENSORS, PAYLOAD = 96_085, 510_286_023_000  # of model.safetensors.index.json
FLASH = replace(
    V41Geometry(), vocab_size=129280, hidden_size=5120, compress_ratios=(0, 0, *[2] * 18, *[1] * 20, 0, 0, 0),
    kv_source_layer_ids=(2, 8, 14, 20), index_source_layer_ids=(2, 8, 14, 20, 24, 28, 32, 36),
    candidate_source_layer_id=20, candidate_topk_blocks=2048, candidate_block_size=8, n_routed_experts=384,
    num_experts_per_tok=6, moe_intermediate_size=2304, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64,
    q_lora_rank=1280, o_groups=8, o_lora_rank=1024, index_n_heads=32, index_head_dim=128, index_topk=512,
    sliding_window=128, engram_layer_ids=(1, 14), engram_num_embeddings=(384006168, 384016682), engram_n_heads=8,
    engram_head_dim=256, engram_vocab_size=16000000, engram_compressed_vocab_size=99092,
    dspark_target_layer_ids=(37, 38, 39), dspark_markov_rank=256, dspark_n_routed_experts=128,
    dspark_num_experts_per_tok=3,
)  # fmt: skip
FP8 = re.compile(r".*\.(wq_a|wq_b|wkv|wo_a|wo_b|main_proj|w[123])\.weight")
PLAIN_WKV = re.compile(r".*\.compressor\.wkv\.weight")
FLOAT32 = re.compile(r".*(hc_(attn|ffn)_(fn|base|scale)|attn_sink|gate\.bias)")


def stored(name: str, shape: tuple[int, ...]) -> Iterator[int]:
    """Bytes of a weight as the release stores it, and of its scale if it has one."""
    elements = math.prod(shape)
    if ".experts." in name:
        yield from (elements // 2, elements // 32)
    elif name.endswith("engram.embed.weight"):
        yield from (elements, elements // 32)
    elif FP8.fullmatch(name) and not PLAIN_WKV.fullmatch(name):
        yield from (elements, math.prod(-(-n // 32) for n in shape))
    else:
        yield elements * (4 if FLOAT32.fullmatch(name) else 2)


def beside_the_text_model() -> list[int]:
    """Bytes of each tensor that a text model leaves alone: the vision tower, the aligner, vectors and biases, BF16."""
    width, inner, hidden = 1024, 2816, 5120
    block = [3 * width * width, 3 * width, width * width, width, 2 * inner * width, inner * width, width, width]
    tower = [*(block * 32), width * 588, width, width]
    aligner = [hidden * 9216, hidden, hidden * hidden, hidden]
    biases = [4 * experts for experts in [*[384] * 40, *[128] * 3]]
    return [2 * n for n in (*tower, *aligner, *[hidden] * 3)] + biases


def test_tensors_and_bytes_are_those_of_the_release() -> None:
    view = release_view(config(FLASH))
    edition = edition_of(view)
    assert edition.name == "V4.1" and edition.tensors is not None and not edition.missing_keys(view)
    sizes = [n for name, shape in edition.tensors(view, 3).items() for n in stored(name, shape)]
    sizes += beside_the_text_model()
    assert len(sizes) == TENSORS
    assert sum(sizes) == PAYLOAD
