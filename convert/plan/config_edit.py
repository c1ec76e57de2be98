"""Edits of a config for the recipes: the format of the experts changes, every other key and the order stay.

Also makes the reference engine's config, which has the release's values under other keys
(checkpoint/editions/engine_config.py).
"""

import json
from typing import Any

from dsv4.convert.checkpoint.editions.table import edition_of, engine_of
from dsv4.convert.checkpoint.editions.view import release_view
from dsv4.convert.checkpoint.names import is_wo_a


def without_expert_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the key, at the top level and in quantization_config."""
    edited = {key: value for key, value in config.items() if key != "expert_dtype"}
    if "quantization_config" in edited:
        inner = edited["quantization_config"]
        edited["quantization_config"] = {key: value for key, value in inner.items() if key != "expert_dtype"}
    return edited


def with_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the release's quantization_config if it has none, as one of a BF16 checkpoint."""
    if config.get("quantization_config") is not None:
        return config
    found = edition_of(release_view(config)).quantization
    return {**config, "quantization_config": dict(found)} if found else config


def with_expert_dtype(config: dict[str, Any], value: str) -> dict[str, Any]:
    """Set the key where it is; at the end of the top level if it is nowhere."""
    edited = dict(config)
    inner = edited.get("quantization_config", {})
    if "expert_dtype" in inner:
        edited["quantization_config"] = {**inner, "expert_dtype": value}
    if "expert_dtype" in edited or "expert_dtype" not in inner:
        edited["expert_dtype"] = value
    return edited


def with_quantized_wo_a(config: dict[str, Any]) -> dict[str, Any]:
    """The config without wo_a among `quantization_config.ignored_layers`, where a BF16 wo_a may be named."""
    inner = config.get("quantization_config")
    ignored = inner.get("ignored_layers") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(ignored, list):
        return config
    left = [name for name in ignored if not is_wo_a(f"{name}.weight")]
    return {**config, "quantization_config": {**inner, "ignored_layers": left}}


def make_inference_config(config: dict[str, Any], experts_are_fp4: bool, mtp_stages: int) -> dict[str, Any]:
    """The reference engine's config from a `release_view`. Raises InputError naming a key that is missing."""
    engine = engine_of(config)
    stages = mtp_stages if mtp_stages > 1 or "n_mtp_layers" not in engine.optional else None
    told = {"dtype": "fp8", "n_mtp_layers": stages, "expert_dtype": "fp4" if experts_are_fp4 else None}
    return engine.made(config, told)


def dump(config: dict[str, Any]) -> bytes:
    """Bytes of a config file."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
