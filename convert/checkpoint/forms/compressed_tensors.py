"""MXFP8 and MXFP4 as the library compressed-tensors stores them, one of them or both in one checkpoint.

    mxfp8-quantized       X.weight F8_E4M3 [out, in], X.weight_scale U8 [out, in/32]
    mxfp4-pack-quantized  X.weight_packed U8 [out, in/2], low nibble first, X.weight_scale U8 [out, in/32]

The scale bytes are E8M0. `quantization_config.config_groups` says which modules have which format. The library ignores
keys that it does not know there, so the release's own config can lie beside them, under RELEASED_KEY.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.convert.checkpoint.config import Config, config_value, quantization
from dsv4.convert.checkpoint.editions import v4
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, scale_name

from .form import MX_BLOCK
from .tensor import TensorInfo

METHOD = "compressed-tensors"
MXFP4, MXFP8, MIXED = "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"
RELEASED_KEY = "released"  # of quantization_config: the keys that the release has for how weights are stored
PACKED_SUFFIX, SCALE_SUFFIX = ".weight_packed", ".weight_scale"
DTYPES = {PACKED_SUFFIX: "I8", SCALE_SUFFIX: "F8_E8M0"}  # of a release, where the file has U8
FORMATS = {8: MXFP8, 4: MXFP4}  # bits of a weight -> format


def _bits(group: Any) -> int | None:
    """8 or 4 for a config group whose weights are MXFP8 or MXFP4; None for any other."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or (weights.get("type"), weights.get("group_size")) != ("float", 32):
        return None
    return weights["num_bits"] if weights.get("num_bits") in FORMATS else None


def _groups(config: Config) -> list[int | None]:
    groups = quantization(config).get("config_groups")
    return [_bits(group) for group in groups.values()] if isinstance(groups, dict) else []


def is_mx(config: Config) -> bool:
    """Whether a config.json is of a checkpoint all of whose quantized weights are MXFP8 or MXFP4."""
    inner, groups = quantization(config), _groups(config)
    named = inner.get("quant_method") == METHOD and inner.get("format") in (*FORMATS.values(), MIXED)
    return named and bool(groups) and None not in groups


class CompressedTensors:
    """Reads MXFP8 and MXFP4 of compressed-tensors as the release's tensors."""

    name = METHOD

    def tensor_name(self, name: str) -> str:
        """`X.weight_packed` -> `X.weight`, `X.weight_scale` -> the release's name of the scale."""
        if name.endswith(PACKED_SUFFIX):
            return name.removesuffix(PACKED_SUFFIX) + WEIGHT_SUFFIX
        if name.endswith(SCALE_SUFFIX):
            return scale_name(name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX)
        return name

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
        """Each under the release's name: I8 for packed FP4 and F8_E8M0 for scales, which are U8 here."""
        for name, info in stored.items():
            ending = "." + name.rpartition(".")[2]
            dtype = DTYPES.get(ending, info.dtype) if info.dtype == "U8" else info.dtype
            yield info._replace(name=self.tensor_name(name), dtype=dtype)

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The release's config with 1x32 blocks and the experts' format here."""
        released = self.released_config(config)
        inner = {**released["quantization_config"], "weight_block_size": list(MX_BLOCK)}
        inner.pop("expert_dtype", None)
        return {**released, "expert_dtype": "fp4" if 4 in _groups(config) else "fp8", "quantization_config": inner}

    def released_config(self, config: Config) -> dict[str, Any]:
        """The config with the release's keys for formats, from RELEASED_KEY or as V4 has them."""
        said = config_value(config, f"quantization_config.{RELEASED_KEY}")
        kept = said if isinstance(said, dict) else {}
        keys = {"quantization_config": v4.QUANTIZATION, "expert_dtype": "fp4", **kept}
        released = {key: keys.get(key, value) for key, value in config.items()}
        if "expert_dtype" not in released and (not kept or "expert_dtype" in kept):
            released["expert_dtype"] = keys["expert_dtype"]
        return released


COMPRESSED_TENSORS = CompressedTensors()
