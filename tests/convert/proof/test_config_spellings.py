"""A config that transformers 5 saved says the same as the release's, and a changed value in it is found by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dsv4.convert import verify
from dsv4.convert.synthetic.checkpoint import make_checkpoint

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("spellings") / "release", tokenizer=False)


@pytest.fixture(scope="module")
def saved(release: Path) -> dict[str, Any]:
    """config.json as transformers' own `save_pretrained` writes it."""
    folder = release.parent / "saved"
    AutoConfig.from_pretrained(release).save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def with_config(release: Path, folder: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(release, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_transformers_saves_is_the_same_config(release: Path, saved: dict[str, Any], tmp_path: Path) -> None:
    assert "rope_scaling" not in saved and "compress_ratios" not in saved and "rope_parameters" in saved
    other = with_config(release, tmp_path / "other", saved)
    for pair in ((release, other), (other, release), (other, other)):
        found = verify(*pair)
        assert found.exit_code == 0, found.problems


def deep(*path: str, value: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        for step in path[:-1]:
            config = config[step]
        config[path[-1]] = value

    return change


def hashed_later(config: dict[str, Any]) -> None:
    config["mlp_layer_types"] = config["mlp_layer_types"][::-1]


@pytest.mark.parametrize(("change", "key"), [
    (deep("rope_parameters", "compress", "factor", value=9), "rope_scaling.factor"),
    (deep("rope_parameters", "compress", "rope_type", value="default"), "rope_scaling"),
    (deep("rope_parameters", "compress", "rope_theta", value=1), "rope_parameters"),
    (deep("rope_parameters", "main", "rope_theta", value=1), "rope_parameters"),
    (deep("rope_parameters", "main", "rope_type", value="yarn"), "rope_parameters"),
    (deep("rope_parameters", "compress", "attention_factor", value=2.0), "rope_parameters"),
    (deep("rope_parameters", "compress", "mscale", value=2.0), "rope_parameters"),
    (deep("rope_parameters", "compress", "partial_rotary_factor", value=0.25), "rope_parameters"),
    (deep("rope_parameters", value={}), "rope_scaling"),
    (deep("layer_types", value=["sliding_attention"] * 4), "compress_ratios"),
    (deep("compress_rates", "heavily_compressed_attention", value=64), "compress_ratios"),
    (deep("mlp_layer_types", value=["moe"] * 4), "num_hash_layers"),
    (hashed_later, "mlp_layer_types"),
    (deep("dtype", value="float32"), "torch_dtype"),
    (deep("partial_rotary_factor", value=0.25), "partial_rotary_factor"),
    (deep("mlp_bias", value=True), "mlp_bias"),
    (deep("rope_scaling", value={"type": "yarn", "factor": 2}), "rope_scaling"),
    (deep("num_local_experts", value=5), "num_local_experts"),
])  # fmt: skip
def test_a_changed_value_is_found(
    change: Change, key: str, release: Path, saved: dict[str, Any], tmp_path: Path
) -> None:
    config: dict[str, Any] = json.loads(json.dumps(saved))
    change(config)
    found = verify(release, with_config(release, tmp_path / "other", config))
    assert found.exit_code == 1
    texts = [problem.text for problem in found.problems if problem.severity == "difference"]
    assert texts and any(text.startswith(key) for text in texts), texts
