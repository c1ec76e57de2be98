"""The keys that transformers 5 writes for keys of the releases, so that a config saved by it can be compared.

    rope_parameters                rope_theta, compress_rope_theta, rope_scaling
    layer_types, compress_rates    compress_ratios, of the main layers
    mlp_layer_types                num_hash_layers
    dtype, num_local_experts       torch_dtype, n_routed_experts
    partial_rotary_factor          qk_rope_head_dim

A value that follows from such a key takes its place in the comparison. A key that cannot be translated stays as it is,
and is a difference by its own name. Keys that transformers adds and that change no forward pass are in `ADDED`.
"""

from typing import Any

ALIASES = {"dtype": "torch_dtype", "num_local_experts": "n_routed_experts"}
YARN = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", *YARN}
RATES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
# Key: the only value that changes nothing, or None where no value does.
ADDED: dict[str, Any] = {
    "mlp_bias": False,
    "output_router_logits": None,
    "pad_token_id": None,
    "router_aux_loss_coef": None,
    "router_jitter_noise": None,
}


def is_harmless(key: str, value: Any) -> bool:
    """Whether a key that only one side has is one that transformers adds, with a value that changes nothing."""
    return key in ADDED and ADDED[key] in (None, value)


def _rope(parameters: dict[str, Any], rotary_factor: Any) -> dict[str, Any] | None:
    """Release keys of `rope_parameters`; None for a form that is not known, or that says more than these keys can."""
    main, compress = parameters.get("main"), parameters.get("compress")
    if set(parameters) != {"main", "compress"} or not isinstance(main, dict) or not isinstance(compress, dict):
        return None
    for found in (main, compress):
        if set(found) - ROPE_KEYS or found.get("partial_rotary_factor", rotary_factor) != rotary_factor:
            return None
    if main.get("rope_type", "default") != "default" or compress.get("attention_factor", 1) not in (1, None):
        return None
    found = {"rope_theta": main.get("rope_theta"), "compress_rope_theta": compress.get("rope_theta")}
    kind = compress.get("rope_type", "default")
    if kind != "default":
        found["rope_scaling"] = {"type": kind} | {key: compress[key] for key in YARN if key in compress}
    return found


def _ratios(config: dict[str, Any]) -> list[Any] | None:
    layers, rates = config.get("layer_types"), config.get("compress_rates", {})
    known = RATES | (rates if isinstance(rates, dict) else {})
    return [known.get(layer, layer) for layer in layers] if isinstance(layers, list) else None


def _hash_layers(kinds: Any) -> int | None:
    """The number of hash layers, which come first; None for another order."""
    if not isinstance(kinds, list):
        return None
    count = kinds.count("hash_moe")
    return None if "hash_moe" in kinds[count:] else count


def _translated(config: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Release key -> (keys that say it, value)."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for alias, key in ALIASES.items():
        if alias in config:
            found[key] = (alias,), config[alias]
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        for key, value in (_rope(parameters, config.get("partial_rotary_factor")) or {}).items():
            found[key] = ("rope_parameters",), value
    if (ratios := _ratios(config)) is not None:
        found["compress_ratios"] = ("layer_types", "compress_rates"), ratios
    if (count := _hash_layers(config.get("mlp_layer_types"))) is not None:
        found["num_hash_layers"] = ("mlp_layer_types",), count
    factor, head_dim = config.get("partial_rotary_factor"), config.get("head_dim")
    if isinstance(factor, int | float) and isinstance(head_dim, int):
        found["qk_rope_head_dim"] = ("partial_rotary_factor",), int(head_dim * factor)
    return found


def as_released(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of the releases instead of those that say the same, compared with `other`.

    A key that the file has itself is not replaced; if its other spelling says something else, both stay.
    """
    view, kept = dict(config), set[str]()
    for key, (sources, value) in _translated(config).items():
        stated = config.get(key)
        if key == "compress_ratios":  # transformers leaves out the entries of draft stages
            listed = stated if isinstance(stated, list) else other.get(key)
            if isinstance(listed, list) and listed[: len(value)] == value and not any(listed[len(value) :]):
                value = listed
        if stated is None or stated == value:
            view[key] = value
        else:
            kept.update(sources)
    replaced = {source for sources, _ in _translated(config).values() for source in sources}
    return {key: value for key, value in view.items() if key not in replaced - kept}
