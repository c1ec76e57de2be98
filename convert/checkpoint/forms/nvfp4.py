"""NVFP4 experts as NVIDIA's ModelOpt stores them, beside the dense weights of a release.

    X.weight          U8       [out, in/2]   FP4 codes, the low nibble first
    X.weight_scale    F8_E4M3  [out, in/16]
    X.weight_scale_2  F32      []
    X.input_scale     F32      []            for activations

A value is code * weight_scale * weight_scale_2. NVFP4 that was made from a release has powers of two in both, and equal
scales for each 32 elements: it is read as FP4 with E8M0 scales. Any other has no form in a release: its scales are
refused when they are read, by name (`dsv4 verify` reads them, too).

`quantization_config` stays the release's, with further keys for the experts; hf_quant_config.json repeats these.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsv4.convert.checkpoint.config import Config, config_string, expert_dtype, quantization
from dsv4.convert.checkpoint.editions import v4
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, scale_name
from dsv4.errors import InputError

from .tensor import Array, Encoding, TensorInfo

NAME = "NVFP4"
SCALE_SUFFIX, SECOND_SUFFIX, INPUT_SUFFIX = ".weight_scale", ".weight_scale_2", ".input_scale"
CONFIG_FILE = "hf_quant_config.json"
SMALLEST, LARGEST = -9, 8  # exponents of the powers of two that E4M3 has
IGNORED = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
KEYS = ("moe_quant_algo", "quant_algo", "group_size", "quantized_layers", "ignore", "producer", "kv_cache_quant_algo")
_BIAS, _NO_POWER = 127, 1000


def quantization_of(modules: list[str]) -> dict[str, Any]:
    """The keys beside the release's. modules: `layers.0.ffn.experts` and so on."""
    each = {"quant_algo": NAME, "group_size": 16}
    return {
        "moe_quant_algo": NAME,
        "quant_algo": "MIXED_PRECISION",
        "group_size": 16,
        "quantized_layers": dict.fromkeys(modules, each),
        "ignore": list(IGNORED),
    }


def file_config(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """The content of hf_quant_config.json, from the keys of config.json."""
    keys = {key: quantization_config[key] for key in ("quant_algo", "moe_quant_algo", "group_size", "quantized_layers")}
    return {"producer": {"name": "dsv4"}, "quantization": {**keys, "exclude_modules": quantization_config["ignore"]}}


def is_nvfp4(config: Config) -> bool:
    """Whether a config.json is of a release with NVFP4 experts."""
    inner = quantization(config)
    named = config_string(inner, "moe_quant_algo") or config_string(inner, "quant_algo") or ""
    return inner.get("quant_method") == "fp8" and named.upper() == NAME


def _exponents() -> Array:
    """The exponent of every E4M3 code that is a power of two, int16 [256]; _NO_POWER for the others."""
    found = np.full(256, _NO_POWER, np.int16)
    for exponent in range(SMALLEST, LARGEST + 1):
        found[1 << (exponent + 9) if exponent < -6 else (exponent + 7) << 3] = exponent
    return found


_EXPONENTS = _exponents()


def _e8m0(raw: Array, second: bytes) -> Array:
    """Scales uint8 [n, 2] of two groups of 16 -> the E8M0 byte of 32 elements [n, 1]. Raises ValueError if none is."""
    significand, exponent = math.frexp(float(np.frombuffer(second, "<f4")[0]))
    bytes_of = _EXPONENTS[raw] + np.int16(exponent - 1 + _BIAS)
    if significand != 0.5 or (bytes_of[:, 0] != bytes_of[:, 1]).any() or ((bytes_of < 0) | (bytes_of > 254)).any():
        raise ValueError("NVFP4 scales that are not powers of two, equal for 32 elements: no release has them")
    return bytes_of[:, :1].astype(np.uint8)


def _scale(info: TensorInfo, second: TensorInfo | None) -> TensorInfo:
    """The scale of a release for that of 16 elements."""
    if second is None or (second.dtype, math.prod(second.shape)) != ("F32", 1) or info.dtype != "F8_E4M3":
        found = f"{info.dtype}, with {second.dtype + ' ' + str(list(second.shape)) if second else 'nothing'} beside it"
        raise InputError(f"'{info.name}' is {found}; NVFP4 has F8_E4M3 and one F32 in '{SECOND_SUFFIX[1:]}'")
    if len(info.shape) != 2 or info.shape[1] % 2:
        raise InputError(f"'{info.name}' has shape {list(info.shape)}; two scales for each 32 elements expected")
    encoding = Encoding(2, 1, _e8m0, second.extents[0])
    name = scale_name(info.name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX)
    shape = info.shape[0], info.shape[1] // 2
    return info._replace(name=name, dtype="F8_E8M0", shape=shape, encoding=encoding)


class Nvfp4:
    """Reads NVFP4 experts as the release's."""

    name = NAME

    def tensor_name(self, name: str) -> str:
        """`X.weight_scale` -> the release's name of the scale."""
        if name.endswith(SCALE_SUFFIX):
            return scale_name(name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX)
        return name

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
        """Codes and scales under the release's names and dtypes; what is for activations is left out."""
        for name, info in stored.items():
            stem, _, last = name.rpartition(".")
            ending = "." + last
            if ending in (SECOND_SUFFIX, INPUT_SUFFIX) and stem + SCALE_SUFFIX in stored:
                continue
            if ending == SCALE_SUFFIX and stem + WEIGHT_SUFFIX in stored:
                yield _scale(info, stored.get(stem + SECOND_SUFFIX))
            elif ending == WEIGHT_SUFFIX and stem + SCALE_SUFFIX in stored:
                yield info._replace(dtype="I8")
            else:
                yield info

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The release's config: the experts are read as FP4."""
        return self.released_config(config)

    def released_config(self, config: Config) -> dict[str, Any]:
        """The config without the keys that ModelOpt adds."""
        inner = {key: value for key, value in quantization(config).items() if key not in KEYS}
        released = {**config, "quantization_config": {**v4.QUANTIZATION, **inner} if len(inner) < 2 else inner}
        return released if expert_dtype(released) else {**released, "expert_dtype": "fp4"}


NVFP4 = Nvfp4()
