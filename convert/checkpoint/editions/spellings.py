"""Translates config.json of other programs into the release's keys, once for all readers.

Two programs write the same values under other keys; a third is the reference engine, see engine_config.py:

    V4.1                  nests the language model's keys in `text_config`
    transformers 5        `rope_parameters`, `layer_types` with `compress_rates`, `mlp_layer_types`, `dtype`,
                          `partial_rotary_factor` where releases say `rope_scaling`, `compress_ratios`,
                          `num_hash_layers`, `torch_dtype`, `qk_rope_head_dim`

A key that the file has is never replaced. If it has both spellings with different values, `contradictions` names them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv4.convert.checkpoint.config import Config

from .engine_config import TEXT, is_engine_config

ALIASES = (("dtype", "torch_dtype"), ("num_local_experts", "n_routed_experts"))
YARN_KEYS = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
# Layer types of transformers, and the key that older versions have for the compress rate of each.
SLIDING = "sliding_attention"
RATES = (
    ("compressed_sparse_attention", "compress_rate_csa", 4),
    ("heavily_compressed_attention", "compress_rate_hca", 128),
)
COMPRESSED = tuple(layer_type for layer_type, _, _ in RATES)
HASH_LAYER = "hash_moe"


class Derived(NamedTuple):
    """A key of the release whose value follows from another key."""

    source: str
    key: str
    value: Any


def _dicts(value: Any) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _yarn(parameters: Config) -> dict[str, Any] | None:
    """`rope_scaling` of the release; None where positions are not scaled."""
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind in (None, "default"):
        return None
    scaling = {"type": kind, **{key: parameters[key] for key in YARN_KEYS if key in parameters}}
    if parameters.get("attention_factor", 1) not in (1, None):  # the release multiplies nothing: 1
        scaling["attention_factor"] = parameters["attention_factor"]
    return scaling


def _from_rope_parameters(config: Config) -> Iterator[Derived]:
    """One set of parameters, or one for the layers that attend in a window and one for those that compress."""
    source, parameters = "rope_parameters", config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    sets = _dicts(parameters)
    window = sets.get("main", sets.get(SLIDING)) if sets else parameters
    compressed = [sets[name] for name in ("compress", *COMPRESSED) if name in sets] if sets else [parameters]
    if window and "rope_theta" in window:
        yield Derived(source, "rope_theta", window["rope_theta"])
    for found in compressed:
        if (scaling := _yarn(found)) is not None:
            yield Derived(source, "rope_scaling", scaling)
        if sets and "rope_theta" in found:
            yield Derived(source, "compress_rope_theta", found["rope_theta"])


def _from_rotary_factor(config: Config) -> Iterator[Derived]:
    factor, head_dim = config.get("partial_rotary_factor"), config.get("head_dim")
    if isinstance(factor, int | float) and type(head_dim) is int and 0 < factor <= 1:
        yield Derived("partial_rotary_factor", "qk_rope_head_dim", int(head_dim * factor))


def _draft_stages(config: Config) -> int:
    """At least as many as the config can mean; `num_nextn_predict_layers` is too low in the DSpark editions."""
    count, targets = config.get("num_nextn_predict_layers"), config.get("dspark_target_layer_ids")
    return max(count if type(count) is int else 0, len(targets) if isinstance(targets, list) else 0)


def _from_layer_types(config: Config) -> Iterator[Derived]:
    layers = config.get("layer_types")
    rates = config.get("compress_rates")
    rates = rates if isinstance(rates, dict) else {}
    ratio = {name: rates.get(name, config.get(old, usual)) for name, old, usual in RATES} | {SLIDING: 0}
    if isinstance(layers, list) and all(isinstance(layer, str) and layer in ratio for layer in layers):
        # Draft stages attend in a window; transformers leaves their entries out.
        ratios = [ratio[layer] for layer in layers] + [0] * _draft_stages(config)
        yield Derived("layer_types", "compress_ratios", ratios)


def _from_mlp_layer_types(config: Config) -> Iterator[Derived]:
    layers = config.get("mlp_layer_types")
    if isinstance(layers, list):
        count = layers.count(HASH_LAYER)
        if HASH_LAYER not in layers[count:]:
            yield Derived("mlp_layer_types", "num_hash_layers", count)


def _derived(config: Config) -> Iterator[Derived]:
    for alias, key in ALIASES:
        if alias in config:
            yield Derived(alias, key, config[alias])
    yield from _from_rope_parameters(config)
    yield from _from_rotary_factor(config)
    yield from _from_layer_types(config)
    yield from _from_mlp_layer_types(config)


def respelled_view(config: Config) -> dict[str, Any]:
    """The config with every key of the releases that it has in a spelling of these programs."""
    nested = config.get(TEXT)
    view = {**(nested if isinstance(nested, dict) else {}), **config}
    for _, key, value in _derived(view):
        if view.get(key) is None:
            view[key] = value
    return view


def respelled(config: Config) -> list[tuple[str, str]]:
    """(key that the file has, key of the release that it lacks) for each fact that decides what a model computes."""
    if is_engine_config(config):
        return []
    found = [(source, key) for source, key, _ in _derived(config) if config.get(key) is None and key != "torch_dtype"]
    return list(dict.fromkeys(found))


def _same(key: str, stated: Any, value: Any) -> bool:
    if key == "compress_ratios" and isinstance(stated, list):
        return all(a == b for a, b in zip(stated, value, strict=False))
    if key == "rope_scaling" and isinstance(stated, dict):
        stated = {**stated, "type": stated.get("type", stated.get("rope_type"))}
        return all(stated.get(name) == wanted for name, wanted in value.items())
    return bool(stated == value)


def contradictions(view: Config) -> list[str]:
    """A sentence for each key of a `release_view` whose two spellings differ, or whose value no release has."""
    found = [
        f"{source} and {key} contradict each other"
        for source, key, value in _derived(view)
        if not _same(key, view.get(key), value)
    ]
    sets = _dicts(view.get("rope_parameters"))
    if _yarn(sets.get("main", sets.get(SLIDING, {}))) is not None:
        found.append("rope_parameters scale the layers that attend in a window only, which no release does")
    return list(dict.fromkeys(found))
