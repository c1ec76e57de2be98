"""Typed access to the keys of config.json. No other module of dsv4 reads keys from the raw file.

A config has the release's keys (editions/spellings.py) and is untrusted input. There are two groups of functions:

    describing   `config_count`, `config_string`, `weight_block`, … give None for a key that is absent or mistyped
    computing    `required_number`, `required_weight_block`, … raise InputError, which names the key
"""

from collections.abc import Mapping
from typing import Any

from dsv4.errors import InputError

Config = Mapping[str, Any]

LARGEST_COUNT = 2**40
LARGEST_BLOCK = 2**20
EXPERT_DTYPES = ("fp4", "fp8")
MAY_BE_ZERO = ("num_hash_layers",)


def config_value(config: Config, path: str) -> Any:
    """The value at a path of keys, such as `rope_scaling.factor`; None if it is absent."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def config_count(config: Config, key: str) -> int | None:
    """A non-negative whole number; None if the key is absent or something else."""
    value = config.get(key)
    return value if type(value) is int and 0 <= value < LARGEST_COUNT else None


def config_string(config: Config, key: str) -> str | None:
    """A string; None if the key is absent or something else."""
    value = config.get(key)
    return value if isinstance(value, str) else None


def architecture_name(config: Config) -> str | None:
    """The first of `architectures`, such as DeepseekV4ForCausalLM."""
    value = config.get("architectures")
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None


def compress_ratios(config: Config) -> tuple[int, ...] | None:
    """`compress_ratios` if it is a list of counts."""
    value = config.get("compress_ratios")
    if not isinstance(value, list) or not all(type(ratio) is int and 0 <= ratio < LARGEST_COUNT for ratio in value):
        return None
    return tuple(value)


def quantization(config: Config) -> Config:
    """`quantization_config`; {} if it is absent or something else."""
    value = config.get("quantization_config")
    return value if isinstance(value, dict) else {}


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST_BLOCK


def weight_block(config: Config) -> tuple[int, int] | None:
    """(rows, columns) of an FP8 block, `weight_block_size`; None if it is absent or something else."""
    value = quantization(config).get("weight_block_size")
    if not isinstance(value, list) or len(value) != 2:
        return None
    rows, columns = value
    return (rows, columns) if _is_side(rows) and _is_side(columns) else None


def ignored_layers(config: Config) -> tuple[str, ...]:
    """Names of the layers that `quantization_config.ignored_layers` leaves out; () if it does not say."""
    value = quantization(config).get("ignored_layers")
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def expert_dtype(config: Config) -> str | None:
    """`expert_dtype`, at the top level (V4) or inside `quantization_config` (V4.1); None if neither says it."""
    return config_string(config, "expert_dtype") or config_string(quantization(config), "expert_dtype")


def required_number(config: Config, key: str, integer: bool) -> Any:
    """A positive number, or zero for a count that may be zero. Raises InputError naming the key."""
    if key not in config:
        raise InputError(f"config.json: {key} is missing")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        kind = "an integer" if integer else "a number"
        raise InputError(f"config.json: {key} must be {kind}, it is {value!r}")
    if value < 0 or (value == 0 and key not in MAY_BE_ZERO):
        raise InputError(f"config.json: {key} must be positive, it is {value}")
    return value


def required_weight_block(config: Config) -> tuple[int, int]:
    """(rows, columns) of an FP8 block, `weight_block_size`. Raises InputError if it is absent or something else."""
    _check_quantization(config)
    block = weight_block(config)
    if block is None:
        size = quantization(config).get("weight_block_size")
        raise InputError(
            f"config.json: quantization_config.weight_block_size is {repr(size)[:60]}, two counts expected",
            "Copy config.json from the release: without it the FP8 scales cannot be placed.",
        )
    return block


def checked_expert_dtype(config: Config) -> str | None:
    """`expert_dtype`, or None if the config does not say it. Raises InputError for a value that is not known."""
    _check_quantization(config)
    value = config.get("expert_dtype", quantization(config).get("expert_dtype"))
    if value not in (None, *EXPERT_DTYPES):
        raise InputError(f"config.json: expert_dtype is {value!r}, 'fp4' or 'fp8' expected")
    return expert_dtype(config)


def _check_quantization(config: Config) -> None:
    if not isinstance(config.get("quantization_config", {}), dict):
        raise InputError("config.json: quantization_config must be an object")
