"""Reads a folder with the library compressed-tensors: which modules it takes for quantized, and their values.

And has it compress values itself.

The library takes seconds to import: only where it is called.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from exact_values import read_json, tensors_of
from raw_safetensors import Raw

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


def quantization_of(folder: Path) -> "QuantizationConfig":
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(read_json(folder / "config.json")["quantization_config"])


@cache
def _linear() -> torch.nn.Module:
    return torch.nn.Linear(1, 1)


def scheme_of(config: "QuantizationConfig", module: str) -> "QuantizationScheme | None":
    """The scheme of a Linear module of that name; None if it is not quantized."""
    from compressed_tensors.utils.match import match_targets

    if match_targets(module, _linear(), config.ignore):
        return None
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    matched = match_targets(module, _linear(), list(schemes))
    return schemes[matched[0]] if matched else None


def _tensor(raw: Raw) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw.data), dtype=DTYPES[raw.dtype]).reshape(raw.shape)


def decompressed(folder: Path) -> dict[str, np.ndarray]:
    """float64 values of every quantized matrix, under the name that it has before compression."""
    from compressed_tensors.compressors import BaseCompressor

    config, tensors, found = quantization_of(folder), tensors_of(folder), {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last != "weight_scale":
            continue
        scheme = scheme_of(config, module)
        assert scheme is not None, f"{module} is taken for unquantized"
        state = {key: _tensor(tensors[f"{module}.{key}"]) for key in ("weight", "weight_packed", "weight_scale")
                 if f"{module}.{key}" in tensors}  # fmt: skip
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"].double().numpy()
    return found


def linear_modules(folder: Path) -> set[str]:
    """Modules whose matrix has no scale and is no embedding."""
    tensors = tensors_of(folder)
    stems = {name.rpartition(".")[0] for name, tensor in tensors.items() if name.endswith(".weight")
             and len(tensor.shape) == 2 and not name.endswith("embed.weight")}  # fmt: skip
    return {stem for stem in stems if f"{stem}.weight_scale" not in tensors}


def compressed_anew(folder: Path, exact: dict[str, np.ndarray]) -> dict[str, Raw]:
    """The quantized tensors of a folder as the library makes them of exact values, with scales of its own choice."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    config, tensors, found = quantization_of(folder), tensors_of(folder), {}
    for module in [name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")]:
        scheme = scheme_of(config, module)
        assert scheme is not None and scheme.weights is not None
        weight = torch.from_numpy(exact[f"{module}.weight"]).float()
        groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        state = {"weight": weight.bfloat16(), "weight_scale": scale.bfloat16()}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for key, tensor in compressor.compress(state, scheme).items():
            if (name := f"{module}.{key}") in tensors:
                assert tensor.shape == tensors[name].shape
                found[name] = tensors[name].like(tensor.view(torch.uint8).numpy())
    return found
