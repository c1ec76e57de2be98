"""What a V4.1 checkpoint can have wrong, and what its prompts may not hold, by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_values import dsv4
from images import IMAGE
from safetensors.torch import load_file, save_file

from dsv4.convert.synthetic.checkpoint import EDITIONS, Geometry, V41Geometry, make_checkpoint
from dsv4.errors import InputError
from dsv4.model import load

G = V41Geometry()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("v41") / "c", geometry=G)


def changed(folder: Path, copy: Path, **values: Any) -> Path:
    """The checkpoint with other values in `text_config`; ... takes a key out."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    text = {key: value for key, value in (config["text_config"] | values).items() if value is not ...}
    (copy / "config.json").write_text(json.dumps(config | {"text_config": text}))
    return copy


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"engram_n_heads": ...}, "engram_n_heads is missing"),
    ({"compress_ratios": [0, 0, 4, 4, 4, 4, 4, 4]}, "compress_ratios must be a list of"),
    ({"kv_source_layer_ids": [2, 3, 4, 5]}, "a layer of kv_source_layer_ids is not in index_source_layer_ids"),
    ({"kv_source_layer_ids": [4, 5]}, "layer 2 has no layer of kv_source_layer_ids with its ratio at or before it"),
    ({"kv_source_layer_ids": [2, 4]}, "layer 5 has no layer of kv_source_layer_ids with its ratio"),
    ({"kv_source_layer_ids": [4, 2, 5]}, "kv_source_layer_ids must be in ascending order"),
    ({"index_source_layer_ids": [1, 2, 4, 5, 6]}, "layer 1 is in index_source_layer_ids, its compress ratio is 0"),
    ({"index_source_layer_ids": [2, 4, 5, 60]}, "index_source_layer_ids name a layer that does not exist"),
    ({"candidate_source_layer_id": 7}, "candidate_source_layer_id is not in index_source_layer_ids"),
    ({"candidate_source_layer_id": 4}, "is behind candidate_source_layer_id, whose groups are others"),
    ({"candidate_source_layer_id": "x"}, "candidate_source_layer_id must be a layer, or -1"),
    ({"candidate_topk_blocks": 2}, "the candidate blocks hold 5 groups, fewer than index_topk"),
    ({"q_lora_rank": 80}, "q_lora_rank is not a multiple of 32"),
    ({"engram_pad_token_id": 512}, "engram_pad_token_id is not in the vocabulary"),
    ({"engram_pad_token_id": -1}, "engram_pad_token_id must be a token id"),
    ({"engram_num_embeddings": [1362]}, "engram_num_embeddings must have a count for each of engram_layer_ids"),
    ({"engram_layer_ids": [1, 80]}, "name a layer that does not exist"),
    ({"engram_n_heads": 1_000_000}, "the engram tables are larger than any model's"),
    ({"engram_compressed_vocab_size": 99}, "its tokens make 472 classes, config.json: engram_compressed_vocab_size is"),
    ({"engram_vocab_size": 100}, r"engram_num_embeddings says 1362 rows for layer 1, its primes .* make"),
    ({"n_routed_experts": 7}, "'layers.0.ffn.experts.6.w1.weight' is missing"),
    ({"engram_head_dim": 32}, "'layers.1.engram.embed.weight' is F8_E4M3"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS, ids=[str(v)[:60] for v, _ in CONFIGS])
@pytest.mark.fast_cases(6)
def test_config(folder: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(changed(folder, tmp_path / "c", **values))


def test_without_the_tokenizer_the_tables_have_no_addresses(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "c")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json is missing: the n-gram tables"):
        load(copy)


def test_a_damaged_row_of_a_table_is_noticed_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "c")
    (shard,) = (path for path in copy.glob("*.safetensors") if "layers.1.engram.embed.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["layers.1.engram.embed.weight"].view(torch.uint8)[:] = 0x7F
    save_file(tensors, shard)
    model = load(copy)
    with pytest.raises(InputError, match=r"'layers.1.engram.embed.weight' holds a NaN"):
        model.forward(torch.tensor([[1, 2]]), model.new_cache(1))


def test_vision_exp_computes_text_as_without_its_vision_part(tmp_path: Path) -> None:
    """Its hash layers have a bias, too, and all layers one for images; text uses neither."""
    seeing = EDITIONS["vision-exp"]
    assert isinstance(seeing, Geometry)
    folders = (make_checkpoint(tmp_path / str(g.vision), geometry=g) for g in (seeing, replace(seeing, vision=False)))
    models, ids = [load(folder) for folder in folders], torch.tensor([[5, 6, 7, 8, 9]])
    assert any(name.startswith("vision.") for name in models[0].store.checkpoint.tensors)
    one, other = (model.forward(ids, model.new_cache(1)).logits for model in models)
    assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("edition", ["v4.1", "vision-exp"])
def test_images_are_refused_by_name(folder: Path, edition: str, tmp_path: Path) -> None:
    source = folder if edition == "v4.1" else make_checkpoint(tmp_path / "vision", geometry=EDITIONS[edition])
    (tmp_path / "messages.json").write_text(json.dumps(IMAGE))
    code, _, err = dsv4("run", source, "--messages", tmp_path / "messages.json")
    assert code == 3 and "message 0 (user): images cannot be encoded" in err and "inference folder" in err


def test_the_token_of_an_image_is_refused(folder: Path) -> None:
    for prompt in (["--tokens", f"4,{G.image_token_id}"], ["--raw", "-p", "a<｜deepseek_image｜>"]):
        code, _, err = dsv4("run", folder, *prompt)
        assert code == 3 and f"token 1 of the prompt is {G.image_token_id}, which stands for an image" in err
    assert dsv4("run", folder, "--tokens", "4,5", "--max-new-tokens", "1")[0] == 0
