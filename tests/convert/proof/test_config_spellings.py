"""A config that transformers 5 saved says the same as the release's, and a changed value in it is found by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert import verify
from dsv4.convert.synthetic.checkpoint import AnyGeometry, make_checkpoint
from dsv4.convert.synthetic.geometry import Geometry
from dsv4.convert.synthetic.v41 import V41Geometry

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("spellings") / "release", tokenizer=False)


@pytest.fixture(scope="module")
def saved(release: Path) -> dict[str, Any]:
    """config.json as transformers' own `save_pretrained` writes it."""
    from transformers import AutoConfig  # takes seconds

    folder = release.parent / "saved"
    AutoConfig.from_pretrained(release).save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def with_config(release: Path, folder: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(release, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
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
@pytest.mark.slow
def test_a_changed_value_is_found(
    change: Change, key: str, release: Path, saved: dict[str, Any], tmp_path: Path
) -> None:
    config: dict[str, Any] = json.loads(json.dumps(saved))
    change(config)
    found = verify(release, with_config(release, tmp_path / "other", config))
    assert found.exit_code == 1
    texts = [problem.text for problem in found.problems if problem.severity == "difference"]
    assert texts and any(text.startswith(key) for text in texts), texts


def without(*path: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        for step in path[:-1]:
            config = config[step]
        del config[path[-1]]

    return change


@pytest.mark.parametrize("geometry", [Geometry(), V41Geometry()], ids=["V4", "V4.1"])
@pytest.mark.parametrize(("change", "key"), [
    (without("rope_scaling"), "rope_scaling"),
    (without("rope_scaling", "factor"), "rope_scaling.factor"),
    (deep("rope_scaling", value=None), "rope_scaling"),
    (without("swiglu_limit"), "swiglu_limit"),
])  # fmt: skip
@pytest.mark.fast_cases(2)
def test_a_key_that_the_model_needs(change: Change, key: str, geometry: AnyGeometry, tmp_path: Path) -> None:
    """Alone it is a problem. Beside a source that lacks it too it is not: both are the same model."""
    folder = make_checkpoint(tmp_path / "folder", geometry=geometry, tokenizer=False)
    assert verify(folder).exit_code == 0
    config = json.loads((folder / "config.json").read_text())
    change(config.get("text_config", config))
    (folder / "config.json").write_text(json.dumps(config))
    found = verify(folder)
    assert found.exit_code == 1 and found.verdict.startswith("NOT SOUND")
    (problem,) = found.problems
    assert problem.area == "config" and problem.text.startswith(f"lacks {key}:")
    assert verify(folder, folder).exit_code == 0


@pytest.mark.parametrize(("change", "keys"), [
    (deep("rope_parameters", "compress", "rope_type", value="default"), ["rope_scaling"]),
    (without("rope_parameters", "compress", "beta_fast"), ["rope_scaling.beta_fast"]),
    (without("rope_parameters"), ["rope_scaling"]),
    (without("layer_types"), ["compress_ratios"]),
])  # fmt: skip
@pytest.mark.slow
def test_a_key_that_the_model_needs_in_the_other_spelling(
    change: Change, keys: list[str], release: Path, saved: dict[str, Any], tmp_path: Path
) -> None:
    assert verify(with_config(release, tmp_path / "saved", saved)).exit_code == 0
    config: dict[str, Any] = json.loads(json.dumps(saved))
    change(config)
    found = verify(with_config(release, tmp_path / "other", config))
    (problem,) = found.problems
    assert found.exit_code == 1 and problem.text.startswith(f"lacks {', '.join(keys)}:")


def test_a_model_without_compressed_keys_needs_no_yarn(tmp_path: Path) -> None:
    geometry = Geometry(compress_ratios=(0, 0), num_nextn_predict_layers=0)
    folder = make_checkpoint(tmp_path / "folder", geometry=geometry, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    assert verify(folder).exit_code == 0
