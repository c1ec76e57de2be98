"""The config of the output: one key changes, every other stays in its place."""

import copy
from typing import Any

import pytest

from dsv4.convert.plan.config_edit import dump, make_inference_config
from dsv4.convert.plan.recipes.registry import recipe_of
from dsv4.convert.plan.settings import Settings, resolve
from dsv4.convert.synthetic.checkpoint import Geometry
from dsv4.convert.synthetic.geometry import config, inference_config
from dsv4.errors import InputError

# Keys in no alphabetical order, so that sorting them would show.
TOP = {"z": None, "expert_dtype": "fp4", "quantization_config": {"fmt": "e4m3", "b": 2}, "a": 1}
INSIDE = {"a": 1, "quantization_config": {"fmt": "e4m3", "expert_dtype": "fp4", "b": 2}, "z": [1]}
NOWHERE = {"a": 1, "quantization_config": {"fmt": "e4m3", "b": 2}}
BOTH = {"expert_dtype": "fp4", "quantization_config": {"expert_dtype": "fp4"}, "z": 0}
QUANTIZATION = {"fmt": "e4m3", "b": 2}


def edit_config(config: dict[str, Any], settings: Settings, some_kept: bool = False) -> dict[str, Any]:
    return recipe_of(settings.to).edit_config(config, settings, some_kept)


def edit_inference_config(config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return recipe_of(settings.to).edit_inference_config(config)


@pytest.mark.parametrize(
    ("before", "options", "after"),
    [
        (TOP, {}, {"z": None, "expert_dtype": "fp8", "quantization_config": QUANTIZATION, "a": 1}),
        (TOP, {"target": "sglang"}, {"z": None, "quantization_config": QUANTIZATION, "a": 1}),
        (TOP, {"to": "same"}, TOP),
        (TOP, {"to": "same", "target": "sglang"}, TOP),
        (TOP, {"to": "fp4"}, TOP),
        (TOP, {"to": "bf16"}, {"z": None, "a": 1}),
        (INSIDE, {}, {"a": 1, "quantization_config": {"fmt": "e4m3", "expert_dtype": "fp8", "b": 2}, "z": [1]}),
        (INSIDE, {"target": "reference"}, {"a": 1, "quantization_config": QUANTIZATION, "z": [1]}),
        (INSIDE, {"to": "bf16"}, {"a": 1, "z": [1]}),
        (NOWHERE, {"target": "vllm"}, {"a": 1, "quantization_config": QUANTIZATION, "expert_dtype": "fp8"}),
        (NOWHERE, {"target": "sglang"}, NOWHERE),
        (NOWHERE, {"to": "fp4"}, {"a": 1, "quantization_config": QUANTIZATION, "expert_dtype": "fp4"}),
        (BOTH, {}, {"expert_dtype": "fp8", "quantization_config": {"expert_dtype": "fp8"}, "z": 0}),
        (BOTH, {"target": "sglang"}, {"quantization_config": {}, "z": 0}),
    ],
)
def test_edits(before: dict[str, Any], options: dict[str, Any], after: dict[str, Any]) -> None:
    given = copy.deepcopy(before)
    edited = edit_config(given, resolve(**options))
    assert dump(edited) == dump(after)  # as text: the order of the keys too
    assert given == before


def test_bf16_with_tensors_that_stayed_quantized_goes_on_saying_how() -> None:
    assert edit_config(TOP, resolve("bf16", on_inexact="keep"), some_kept=True) == TOP


def test_released_inference_configs() -> None:
    fp4, fp8 = inference_config(Geometry(), "fp4"), inference_config(Geometry(), "fp8")
    assert list(edit_inference_config(fp4, resolve()).items()) == list(fp8.items())
    assert edit_inference_config(fp4, resolve(to="same")) == fp4
    assert edit_inference_config(fp8, resolve(to="fp4")) == fp4
    assert "expert_dtype" not in edit_inference_config(fp4, resolve(to="bf16"))


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_made_as_the_release_makes_it(experts: str) -> None:
    made = make_inference_config(config(Geometry(), experts), experts == "fp4", 1)
    assert list(made.items()) == list(inference_config(Geometry(), experts).items())


def test_speculative_stages() -> None:
    given = config(Geometry()) | {"dspark_block_size": 5, "dspark_target_layer_ids": [1, 2]}
    made = make_inference_config(given, True, 3)
    assert (made["n_mtp_layers"], made["dspark_block_size"], made["dspark_target_layer_ids"]) == (3, 5, [1, 2])
    assert "dspark_markov_rank" not in made


@pytest.mark.parametrize("key", ["vocab_size", "compress_ratios", "rope_scaling", "quantization_config"])
def test_a_missing_key_is_named(key: str) -> None:
    given = config(Geometry())
    del given[key]
    with pytest.raises(InputError, match=key):
        make_inference_config(given, True, 1)


def test_text_is_not_escaped() -> None:
    assert dump({"name": "größe ｜"}) == '{\n  "name": "größe ｜"\n}\n'.encode()
