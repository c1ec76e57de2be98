"""Options and targets, resolved once: what is filled in, what is kept, what excludes what."""

from typing import Any, get_args

import pytest

from dsv4.convert.plan.settings import TARGETS, TargetName, resolve
from dsv4.errors import UsageError

# The published FP8 checkpoints and loaders: scale dtype, wo_a, expert_dtype.
PUBLISHED = {
    "base": ("f32", "fp8", "fp8"),
    "vllm": ("f32", "fp8", "fp8"),
    "sglang": ("e8m0", "bf16", None),
    "transformers": ("e8m0", "fp8", "fp8"),
    "reference": ("e8m0", "fp8", None),
}


def test_every_target_is_a_row_of_the_table() -> None:
    rows = {name: (target.scale_dtype, target.wo_a, target.expert_dtype) for name, target in TARGETS.items()}
    assert rows == PUBLISHED and set(get_args(TargetName)) == set(PUBLISHED)


@pytest.mark.parametrize("target", PUBLISHED)
def test_a_target_fills_in_and_an_option_overrides(target: TargetName) -> None:
    scale, wo_a, _ = PUBLISHED[target]
    settings = resolve(target=target)
    assert (settings.scale_dtype, settings.wo_a) == (scale, wo_a)
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
        ({"to": "same", "target": "sglang"}, "e8m0", "bf16"),
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
    ],
)
def test_what_excludes_what(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(**options)
    assert word in str(caught.value) + caught.value.hint
