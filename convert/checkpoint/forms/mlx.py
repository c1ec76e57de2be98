"""MXFP4 and MXFP8 as MLX stores them: the same bytes, seen as 32-bit words.

    X.weight  U32 [out, in/8] of FP4 codes, the low nibble first, or [out, in/4] of FP8 codes
    X.scales  U8  [out, in/32]: E8M0 bytes

The matrices of all experts of a layer are one tensor, [experts, out, ...], and the output projection wo_a has a
dimension for its groups. `quantization` in config.json has a mode for the model and others for single modules; mlx-lm
itself believes the shapes, and so does this reader. The release's own keys lie beside it, under RELEASED_KEY.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.convert.checkpoint.config import Config, config_string
from dsv4.convert.checkpoint.editions import v4, v41
from dsv4.convert.checkpoint.names import WEIGHT_SUFFIX, is_wo_a, scale_name
from dsv4.errors import InputError

from .form import MX_BLOCK
from .mlx_names import is_stack, released_name
from .tensor import TensorInfo

SCALE_SUFFIX = ".scales"
QUANTIZATION = "quantization"
RELEASED_KEY = "released_quantization"  # of config.json: the keys that the release has for how weights are stored
WORD = 4  # bytes of a U32
MODES = {4: "mxfp4", 8: "mxfp8"}  # bits of a weight -> mode
CODES = {4: "I8", 8: "F8_E4M3"}  # the dtype of the codes in a release


def quantization_of(bits: int) -> dict[str, Any]:
    """What `quantization` says of a module whose weight has so many bits."""
    return {"group_size": MX_BLOCK[1], "bits": bits, "mode": MODES[bits]}


def is_mlx(config: Config) -> bool:
    """Whether a config.json is of a checkpoint all of whose quantized weights are MXFP4 or MXFP8 of MLX."""
    inner = config.get(QUANTIZATION)
    if not isinstance(inner, dict) or inner.get("mode") not in MODES.values():
        return False
    modules = [module for module in inner.values() if isinstance(module, dict)]
    return all(module.get("mode") in MODES.values() for module in modules)


def _bits(weight: TensorInfo, scales: TensorInfo) -> int:
    """Bits of a weight, by the shapes. Raises InputError for what is neither MXFP4 nor MXFP8."""
    words, groups = weight.shape[-1:], scales.shape[-1:]
    bits = words[0] // groups[0] if words and groups and groups[0] and words[0] % groups[0] == 0 else 0
    if (weight.dtype, scales.dtype) != ("U32", "U8") or weight.shape[:-1] != scales.shape[:-1] or bits not in CODES:
        raise InputError(
            f"'{weight.name}' is {weight.dtype} {list(weight.shape)} with scales {scales.dtype} {list(scales.shape)}; "
            "of MLX, dsv4 reads mxfp4 and mxfp8: U32 words with a U8 scale for 32 elements",
        )
    return bits


def _part(info: TensorInfo, index: int, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Tensor `index` of a stack."""
    (extent,) = info.extents
    size = extent.nbytes // info.shape[0]
    extents = (extent._replace(offset=extent.offset + index * size, nbytes=size),)
    return info._replace(name=name, dtype=dtype, shape=shape, extents=extents)


def _released(info: TensorInfo, dtype: str, is_scale: bool) -> Iterator[TensorInfo]:
    """The tensors of a release that a stored one holds. dtype: theirs, of bytes where the file has words."""
    shape = (*info.shape[:-1], info.shape[-1] * WORD) if info.dtype == "U32" and dtype != "U32" else info.shape
    stored = info.name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX if is_scale else info.name
    if is_stack(info.name) and len(shape) == 3:
        for expert in range(shape[0]):
            name = released_name(stored, expert)
            yield _part(info, expert, scale_name(name) if is_scale else name, dtype, shape[1:])
        return
    name = released_name(stored)
    if is_wo_a(name) and len(shape) == 3:
        shape = math.prod(shape[:2]), shape[2]
    yield info._replace(name=scale_name(name) if is_scale else name, dtype=dtype, shape=shape)


class Mlx:
    """Reads MXFP4 and MXFP8 of MLX as the release's tensors."""

    name = "MLX"

    def tensor_name(self, name: str) -> str:
        """The release's name; of a stack, of its first expert."""
        if name.endswith(SCALE_SUFFIX):
            return scale_name(released_name(name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX))
        return released_name(name)

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
        """Stacks as single matrices, words as codes. Raises InputError, naming the tensor, for other quantizations."""
        owners = {
            name: name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX for name in stored if name.endswith(SCALE_SUFFIX)
        }
        for name, info in stored.items():
            scales = (
                stored.get(name.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIX) if name.endswith(WEIGHT_SUFFIX) else None
            )
            if scales is not None:
                yield from _released(info, CODES[_bits(info, scales)], is_scale=False)
            elif owners.get(name) in stored:
                yield from _released(info, "F8_E8M0", is_scale=True)
            elif name in owners or (info.dtype == "U32" and name.endswith(WEIGHT_SUFFIX)):
                missing = owners.get(name) or name.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIX
                raise InputError(f"'{name}' has no '{missing}' beside it", "Download the checkpoint again.")
            else:
                yield from _released(info, info.dtype, is_scale=False)

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The release's config with 1x32 blocks."""
        released = self.released_config(config)
        inner = {**released["quantization_config"], "weight_block_size": list(MX_BLOCK)}
        return {**released, "quantization_config": inner}

    def released_config(self, config: Config) -> dict[str, Any]:
        """The config with the release's keys for formats, from RELEASED_KEY or as the edition has them."""
        kept = config.get(RELEASED_KEY)
        released = {key: value for key, value in config.items() if key not in (QUANTIZATION, RELEASED_KEY)}
        if isinstance(kept, dict) and isinstance(kept.get("quantization_config"), dict):
            return {**released, **kept}
        if (config_string(config, "model_type") or "").startswith("deepseek_v41"):
            return {**released, "quantization_config": v41.QUANTIZATION}
        return {"expert_dtype": "fp4", **released, "quantization_config": v4.QUANTIZATION}


MLX = Mlx()
