"""Options and targets, resolved once: what is filled in, what is kept, what excludes what."""

from typing import Any, get_args

import pytest

from dsv4.convert.plan.engines import ENGINES, TARGETS, EngineName, TargetName, To
from dsv4.convert.plan.recipes.registry import recipe_of
from dsv4.convert.plan.settings import CONVERSIONS, resolve
from dsv4.errors import UsageError


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_fills_in_and_an_option_overrides(target: TargetName) -> None:
    settings = resolve(target=target)
    assert (settings.scale_dtype, settings.wo_a) == (TARGETS[target].scale_dtype, TARGETS[target].wo_a)
    for scale_dtype in ("e8m0", "f32"):
        assert resolve(target=target, scale_dtype=scale_dtype).scale_dtype == scale_dtype
    for choice in ("fp8", "bf16"):
        assert resolve(target=target, wo_a=choice).wo_a == choice


@pytest.mark.parametrize(
    ("options", "scale", "wo_a"),
    [
        ({}, "f32", "fp8"),
        ({"to": "same"}, None, None),
        ({"to": "same", "scale_dtype": "f32"}, "f32", None),
        ({"to": "same", "wo_a": "bf16"}, None, "bf16"),
        ({"to": "same", "target": "sglang"}, "e8m0", "fp8"),
        ({"to": "bf16"}, None, "bf16"),
        ({"to": "bf16", "target": "vllm"}, None, "bf16"),
        ({"to": "fp4"}, "e8m0", "fp8"),
        ({"to": "fp4", "target": "vllm"}, "f32", "fp8"),
        ({"to": "fp4", "scale_dtype": "f32"}, "f32", "fp8"),
        ({"layout": "mp", "model_parallel": 4}, None, "bf16"),
        ({"layout": "mp", "model_parallel": 4, "to": "same", "target": "reference"}, None, "bf16"),
    ],
)
def test_defaults(options: dict[str, Any], scale: str | None, wo_a: str | None) -> None:
    settings = resolve(**options)
    assert (settings.scale_dtype, settings.wo_a) == (scale, wo_a)


def test_json_has_the_names_of_the_options() -> None:
    assert resolve(layout="mp", model_parallel=8).to_json() == {
        "to": "fp8", "layout": "mp", "model_parallel": 8, "target": "reference", "scale_dtype": None, "wo_a": "bf16",
        "on_inexact": "error", "max_shard_size": 0,
    }  # fmt: skip
    assert resolve().to_json()["max_shard_size"] == 5_000_000_000


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layout": "mp"}, "--model-parallel"),
        ({"model_parallel": 2}, "--layout mp"),
        ({"layout": "mp", "model_parallel": 2, "target": "sglang"}, "--target sglang"),
        ({"layout": "mp", "model_parallel": 2, "to": "bf16"}, "--to bf16"),
        ({"layout": "mp", "model_parallel": 2, "to": "fp4"}, "--to fp4"),
        ({"layout": "mp", "model_parallel": 2, "wo_a": "bf16"}, "--wo-a"),
        ({"layout": "mp", "model_parallel": 2, "scale_dtype": "e8m0"}, "--scale-dtype"),
        ({"to": "bf16", "scale_dtype": "e8m0"}, "--scale-dtype"),
        ({"to": "bf16", "wo_a": "fp8"}, "bf16"),
        ({"layout": "mp", "model_parallel": 0}, "--model-parallel"),
        ({"layout": "mp", "model_parallel": True}, "--model-parallel"),
    ],
)
def test_what_excludes_what(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(**options)
    assert word in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("to", "int8"),
        ("to", None),
        ("layout", "xx"),
        ("target", "ollama"),
        ("scale_dtype", "f16"),
        ("wo_a", "fp4"),
        ("on_inexact", "ignore"),
    ],
)
def test_a_value_that_an_option_does_not_have(option: str, value: str | None) -> None:
    """In the words of the command line, which lists what there is."""
    with pytest.raises(UsageError) as caught:
        resolve(**{option: value})
    assert f"Invalid value for '--{option.replace('_', '-')}': {value!r} is not one of '" in str(caught.value)


def test_the_command_line_offers_what_resolve_takes() -> None:
    assert get_args(To) == tuple(CONVERSIONS) and get_args(TargetName) == tuple(TARGETS)
    assert get_args(EngineName) == tuple(ENGINES)
    for to in get_args(To):
        assert recipe_of(to) is not None
