"""NVFP4 as ModelOpt and compressed-tensors store it, as `verify` reads it: two scales, whose product is taken exactly.

    ModelOpt             X.weight,        X.weight_scale E4M3 for 16 elements, X.weight_scale_2 F32: a factor
    compressed-tensors   X.weight_packed, X.weight_scale E4M3 for 16 elements, X.weight_global_scale F32: a divisor

`input_scale` and its like are for activations: nothing of a release corresponds to them, so they are counted in a note,
and looked at for numbers that no engine can use. `quantization_config` of ModelOpt names the modules.
"""

import fnmatch
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from dsv4.convert.proof.files import Entry, Files, RemoteFiles, parse_json, read_bytes
from dsv4.convert.proof.layout import Checkpoint, Tensor

FILE = "hf_quant_config.json"
_FACTORS = {"weight_scale_2": False, "weight_global_scale": True}  # ending -> whether it divides
_INPUTS = ("input_scale", "input_global_scale")
_KEYS = ("moe_quant_algo", "quant_algo", "group_size", "quantized_layers", "ignore", "producer", "kv_cache_quant_algo")
_MAX_FILE = 10_000_000


def is_described(config: dict[str, Any]) -> bool:
    """Whether a config.json says that experts are NVFP4 of ModelOpt."""
    inner = config.get("quantization_config")
    return isinstance(inner, dict) and "NVFP4" in (inner.get("moe_quant_algo"), inner.get("quant_algo"))


def without_storage(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that ModelOpt adds; any other config as it is."""
    if not is_described(config):
        return config
    inner = {key: value for key, value in config["quantization_config"].items() if key not in _KEYS}
    return {**config, "quantization_config": inner}


def _number(files: Files, entry: Entry) -> float:
    value: float = struct.unpack("<f", read_bytes(files, entry.shard, entry.offset, 4))[0]
    return value


def _is_usable(number: float) -> bool:
    return 0 < number < float("inf")


def _check_inputs(checkpoint: Checkpoint, inputs: Iterable[Tensor]) -> None:
    """Record those that no engine can use. In a repository the numbers are not looked at: that would fetch shards."""
    count, is_remote = 0, isinstance(checkpoint.files, RemoteFiles)
    for tensor in inputs:
        count += 1
        entry = tensor.slices[0]
        if tensor.dtype != "F32" or tensor.size != 4:
            checkpoint.problem("codes", f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, one F32 expected")
        elif not is_remote and not _is_usable(number := _number(checkpoint.files, entry)):
            checkpoint.problem("codes", f"{tensor.name} is {number}: no engine can scale activations by it")
    if count:
        text = f"{count} scales of activations, which come from a calibration, are not compared"
        checkpoint.problem("codes", text, "note")


def join_scales(checkpoint: Checkpoint) -> None:
    """Make the second scale of each matrix a part of its first one, and take out what is for activations."""
    tensors = checkpoint.tensors
    by_ending: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        by_ending.setdefault(name.rpartition(".")[2], []).append(tensor)
    for ending, divides in _FACTORS.items():
        for tensor in by_ending.get(ending, []):
            scale = tensors.get(tensor.name.removesuffix(ending) + "scale")
            if scale is None or scale.dtype != "F8_E4M3" or (tensor.dtype, tensor.size) != ("F32", 4):
                continue  # it is then a tensor too many, by its name
            tensors[scale.name] = replace(scale, factor=replace(tensor.slices[0]), divides=divides)
            del tensors[tensor.name]
            checkpoint.repacked = True
    if checkpoint.repacked:
        inputs = [tensor for ending in _INPUTS for tensor in by_ending.get(ending, [])]
        for tensor in inputs:
            del tensors[tensor.name]
        _check_inputs(checkpoint, inputs)


def _named(files: Files) -> Any:
    """`quantized_layers` of hf_quant_config.json; None if there is no such file or key."""
    size = files.sizes().get(FILE)
    if size is None or size > _MAX_FILE:
        return None
    try:
        found = parse_json(read_bytes(files, FILE, 0, size))
    except ValueError:
        return {}
    inner = found.get("quantization") if isinstance(found, dict) else None
    return inner.get("quantized_layers") if isinstance(inner, dict) else {}


def faults(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Iterator[str]:
    """Sentences about modules of which config and tensors differ. A loader believes the config."""
    scales = (t.name for t in checkpoint.tensors.values() if t.factor is not None)
    matrices = [name.removesuffix(".scale") for name in scales]
    stored = {
        matrix.rpartition(".experts.")[0] + ".experts" if ".experts." in matrix else matrix for matrix in matrices
    }
    said = quantization.get("quantized_layers")
    if isinstance(said, dict):
        for module in sorted(said.keys() ^ stored):
            found = "is NVFP4" if module in stored else "is not NVFP4"
            yield f"quantized_layers {'names' if module in said else 'does not name'} {module}, which {found}"
    ignored = quantization.get("ignore")
    for module in sorted(stored):
        if isinstance(ignored, list) and any(isinstance(p, str) and fnmatch.fnmatchcase(module, p) for p in ignored):
            yield f"ignore takes out {module}, which is NVFP4"
    if (other := _named(checkpoint.files)) is not None and isinstance(said, dict) and other != said:
        yield f"{FILE} names other quantized_layers than config.json"
