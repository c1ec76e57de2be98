"""config.json as transformers 5, V4.1 and hand edits write it: read as the release's, and never half of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_values import convert, edit_config, read_json

from dsv4.convert.checkpoint.editions.spellings import contradictions
from dsv4.convert.checkpoint.editions.table import check_config, edition_of
from dsv4.convert.checkpoint.editions.view import release_view
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.doctor.diagnosis import diagnose
from dsv4.convert.inspect.inspection import inspect_checkpoint
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.geometry import config as release_config
from dsv4.errors import InputError
from dsv4.model.loading import load

SMALL = Geometry(compress_ratios=(0, 4, 128, 0), n_routed_experts=4)
DSPARK = {
    "dspark_block_size": 5, "dspark_markov_rank": 8, "dspark_noise_token_id": 3, "dspark_target_layer_ids": [0, 1, 2],
}  # fmt: skip
Json = dict[str, Any]


def saved_by_transformers(config: Json, folder: Path) -> Json:
    """What `save_pretrained` makes of a release's config.json."""
    from transformers import DeepseekV4Config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    DeepseekV4Config.from_pretrained(folder).save_pretrained(folder / "saved")
    return dict(read_json(folder / "saved" / "config.json"))


@pytest.mark.parametrize("dspark", [False, True])
@pytest.mark.slow
def test_what_transformers_saves_is_read_as_the_release(dspark: bool, tmp_path: Path) -> None:
    stages = (0, 0, 0) if dspark else (0,)
    config = release_config(Geometry(compress_ratios=(128, 128, 4, 128, 4, *stages), num_nextn_predict_layers=1))
    config |= {"num_hidden_layers": 5, **(DSPARK if dspark else {})}
    saved = saved_by_transformers(config, tmp_path / "t")
    renamed = {"rope_scaling", "compress_ratios", "num_hash_layers", "torch_dtype"}
    assert not renamed & saved.keys(), "transformers has other names for these"
    view = release_view(saved)
    assert contradictions(view) == [] and edition_of(view).missing_keys(view) == []
    same = config.keys() - {"transformers_version", "quantization_config"}  # expert_dtype is said there too
    assert {key: view.get(key) for key in same} == {key: config[key] for key in same}
    assert view["quantization_config"] == config["quantization_config"] | {"expert_dtype": "fp4"}


YARN = {"factor": 8, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 512}
WINDOW, COMPRESSED = {"rope_type": "default", "rope_theta": 10000}, {**YARN, "rope_type": "yarn", "rope_theta": 160000}
SPELLINGS: dict[str, Json] = {
    "main and compress": {"main": WINDOW, "compress": COMPRESSED},
    "by layer type": {
        "sliding_attention": WINDOW,
        "compressed_sparse_attention": COMPRESSED,
        "heavily_compressed_attention": COMPRESSED,
    },
    "one of all": {**YARN, "rope_type": "yarn", "rope_theta": 10000},
    "an older word": {**YARN, "type": "yarn", "rope_theta": 10000},
    "a factor that changes nothing": {"main": WINDOW, "compress": {**COMPRESSED, "attention_factor": 1.0}},
}


def renamed(config: Json, parameters: Json) -> Json:
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    return {**kept, "rope_parameters": parameters}


@pytest.mark.parametrize("parameters", SPELLINGS.values(), ids=SPELLINGS)
def test_rope_parameters(parameters: Json) -> None:
    view = release_view(renamed(release_config(SMALL), parameters))
    assert view["rope_scaling"] == {"type": "yarn", **YARN}
    assert (view["rope_theta"], view["compress_rope_theta"]) == (10000, 160000)
    check_config(view)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"rope_parameters": {"main": WINDOW, "compress": {**COMPRESSED, "factor": 4}}}, "rope_scaling"),
        ({"rope_parameters": {"main": WINDOW, "compress": {**COMPRESSED, "attention_factor": 1.2}}}, "rope_scaling"),
        ({"rope_parameters": {"main": {**WINDOW, "rope_theta": 5000}, "compress": COMPRESSED}}, "rope_theta"),
        ({"rope_parameters": {"main": WINDOW, "compress": {**COMPRESSED, "rope_theta": 5}}}, "compress_rope_theta"),
        ({"rope_parameters": {"main": COMPRESSED | {"rope_theta": 10000}, "compress": COMPRESSED}}, "window"),
        ({"layer_types": ["sliding_attention"] * 3}, "compress_ratios"),
        ({"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}, "num_hash_layers"),
        ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim"),
        ({"dtype": "float16"}, "torch_dtype"),
        ({"num_local_experts": 5}, "n_routed_experts"),
    ],
)
@pytest.mark.fast_cases(4)
def test_two_spellings_that_contradict_each_other(keys: Json, names: str, folder: Path) -> None:
    edit_config(folder, **keys)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=rf"config\.json: .*{names}"):
        check_config(checkpoint.config)
    assert any(names in finding.text for finding in inspect_checkpoint(checkpoint).findings)
    assert any(names in check.text for check in diagnose(folder, "vllm").checks)
    with pytest.raises(InputError, match=names):
        load(folder)


def test_compressed_layers_with_different_scaling(folder: Path) -> None:
    sets = SPELLINGS["by layer type"] | {"heavily_compressed_attention": {**COMPRESSED, "factor": 2}}
    (folder / "config.json").write_text(json.dumps(renamed(release_config(SMALL), sets)))
    with pytest.raises(InputError, match="rope_parameters and rope_scaling contradict"):
        check_config(Checkpoint.open(folder).config)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("spellings") / "source", geometry=SMALL)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "folder"))


def logits(folder: Path) -> torch.Tensor:
    model = load(folder, simulation=False)
    result = model.forward(torch.arange(5, 45)[None], model.new_cache(1)).logits
    assert result is not None
    return result


@pytest.mark.slow
def test_the_same_model_runs(source: Path, folder: Path, tmp_path: Path) -> None:
    saved = saved_by_transformers(read_json(folder / "config.json"), tmp_path / "t")
    (folder / "config.json").write_text(json.dumps(saved))
    assert torch.equal(logits(folder), logits(source))
    (finding,) = inspect_checkpoint(Checkpoint.open(folder)).findings
    assert finding.level == "note"
    for spelling in ("rope_parameters for rope_scaling", "layer_types for compress_ratios"):
        assert spelling in finding.text


NEEDED = (
    "rope_scaling", "rope_theta", "compress_rope_theta", "compress_ratios", "num_hash_layers", "qk_rope_head_dim",
    "swiglu_limit", "routed_scaling_factor", "hc_eps", "sliding_window", "index_topk",
)  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.fast_cases(4)
def test_what_the_edition_needs_and_the_config_lacks(key: str, folder: Path) -> None:
    edit_config(folder, **{key: None})
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=rf"config\.json: {key}"):
        load(folder)
    lacking = [finding for finding in inspect_checkpoint(checkpoint).findings if finding.level == "problem"]
    assert any(key in finding.text for finding in lacking)
    assert diagnose(folder, "vllm").loads is False
    assert any(key in check.text for check in diagnose(folder, "vllm").checks)


def test_without_compression_nothing_is_scaled() -> None:
    config = release_config(Geometry(compress_ratios=(0, 0)))
    del config["rope_scaling"]
    check_config(release_view(config))


@pytest.mark.slow
def test_conversions_keep_the_spelling_of_the_source(folder: Path, tmp_path: Path) -> None:
    saved = saved_by_transformers(read_json(folder / "config.json"), tmp_path / "t")
    (folder / "config.json").write_text(json.dumps(saved, indent=3))
    convert(folder, tmp_path / "same", "--to", "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    convert(folder, tmp_path / "fp8", "--to", "fp8")
    assert read_json(tmp_path / "fp8" / "config.json")["rope_parameters"] == saved["rope_parameters"]


@pytest.mark.slow
def test_the_reference_engine_gets_its_config_from_either(source: Path, folder: Path, tmp_path: Path) -> None:
    """Made, where the source has no inference/config.json."""
    saved = saved_by_transformers(read_json(folder / "config.json"), tmp_path / "t")
    expected = Path(shutil.copytree(source, tmp_path / "release"))
    for path in (folder, expected):
        (path / "inference" / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(saved))
    for path, name in ((folder, "found"), (expected, "expected")):
        convert(path, tmp_path / name, "--to", "same", "--layout", "mp", "--model-parallel", 1)
    assert read_json(tmp_path / "found" / "config.json") == read_json(tmp_path / "expected" / "config.json")
