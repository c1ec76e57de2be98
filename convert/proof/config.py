"""Config and side files: compares `config.json` with the tensors, and both sides' files with each other.

`config.json` may differ between the two sides only in keys that describe how weights are stored (`expert_dtype`,
`quantization_config`, `torch_dtype`); every other key describes the model. The keys about storage are compared with
the headers, not with a converter's choice. In the reference engine's layout `config.json` is the
engine's own, and is compared with the source's `inference/config.json`, or key by key with config.json.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

from dsv4.convert.proof.forms import compressed_tensors, engine, gguf, mlx, nvfp4
from dsv4.files import MAX_POINTER_BYTES, POINTER, PREFIX_BYTES, kind_of
from dsv4.text import some_of

from .files import INDEX_NAME, Files, Severity, parse_json, read_bytes
from .forms.release import BY_TYPE, FAMILY, missing_keys
from .forms.transformers import as_released, is_harmless
from .layout import Checkpoint
from .plan import Weight, understand

# Keys that may differ because weights are stored in another way; `check_config` compares these with the tensors.
_STORAGE_KEYS = {
    "expert_dtype",
    "quantization_config.expert_dtype",
    "quantization_config.scale_fmt",
    "quantization_config.weight_block_size",
}
MIXTURE = " (no config can describe both, and engines take all for one: a convert with --on-inexact keep does this)"
_SCALE_FORMATS = ("ue8m0", "float")
# Files that loaders read and that must be the source's. Others (model card, licence, inference code) may differ.
_NEEDED = re.compile(r"(tokenizer.*|special_tokens_map\.json|generation_config\.json|.*\.jinja|encoding/.*)")
_NEEDED_BY_ENGINE = re.compile(r"tokenizer(_config)?\.json")  # what the reference converter copies
_NOT_SIDE_FILES = {INDEX_NAME, "config.json", "dsv4.json"}
_EXPERT_WEIGHT = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\..*\.weight")
_CHUNK = 1 << 20
MAX_CONFIG_BYTES = 10_000_000
KEYS_SHOWN = 5


def file_hash(files: Files, name: str, size: int, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hex. `advance` is called with the number of bytes after each read."""
    digest = hashlib.sha256()
    buffer = bytearray(min(size, _CHUNK))
    for start in range(0, size, _CHUNK):
        view = memoryview(buffer)[: min(_CHUNK, size - start)]
        files.read_into(name, start, view)
        digest.update(view)
        advance(len(view))
    return digest.hexdigest()


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 in hex of the files that describe the checkpoint, and of its shards' headers."""
    sizes = checkpoint.files.sizes()
    found = {name: file_hash(checkpoint.files, name, sizes[name]) for name in _NOT_SIDE_FILES if name in sizes}
    return {"headers": checkpoint.headers_sha256} | dict(sorted(found.items()))


def check_side_files(checkpoint: Checkpoint) -> None:
    """Record side files that are git-LFS pointers, and those that loaders need and that are web pages."""
    for name, size in _side_files(checkpoint.files).items():
        is_needed = _NEEDED.fullmatch(name) is not None
        is_json = is_needed and name.endswith(".json")
        if not is_json and size > MAX_POINTER_BYTES:
            continue
        kind = kind_of(read_bytes(checkpoint.files, name, 0, min(size, PREFIX_BYTES)))
        if kind is not None and (is_json or kind.prefix == POINTER):
            severity: Severity = "unreadable" if is_needed else "note"
            checkpoint.problem("side file", f"{name} is {kind}", severity)


def read_config(
    checkpoint: Checkpoint, name: str = "config.json", limit: int = MAX_CONFIG_BYTES
) -> dict[str, Any] | None:
    """A JSON object of the checkpoint. None if there is no such file, or, with a problem, if it cannot be read.

    A file of more than `limit` bytes is not read.
    """
    size = checkpoint.files.sizes().get(name)
    if size is None:
        return None
    if size > limit:
        checkpoint.problem("config", f"{name} has {size} bytes, at most {limit} are believable", "unreadable")
        return None
    try:
        value = parse_json(read_bytes(checkpoint.files, name, 0, size))
    except ValueError as error:
        checkpoint.problem("config", f"{name} cannot be used: {error}", "unreadable")
        return None
    if not isinstance(value, dict):
        checkpoint.problem("config", f"{name} is not a JSON object", "unreadable")
        return None
    return value


def _side_files(files: Files) -> dict[str, int]:
    return {
        name: size
        for name, size in files.sizes().items()
        if name not in _NOT_SIDE_FILES and not name.endswith((".safetensors", ".gguf"))
    }


def _same_file(source: Files, output: Files, name: str) -> bool:
    sizes = source.sizes()[name], output.sizes()[name]
    return sizes[0] == sizes[1] and file_hash(source, name, sizes[0]) == file_hash(output, name, sizes[1])


def compare_side_files(source: Checkpoint, output: Checkpoint) -> None:
    """Compare tokenizer, generation config and encoding by hash. Other files that differ are only noted."""
    needed = _NEEDED_BY_ENGINE if output.layout == "mp" or source.layout == "mp" else _NEEDED
    expected, found = _side_files(source.files), _side_files(output.files)
    for name in sorted(expected.keys() | found.keys()):
        is_needed = needed.fullmatch(name)
        severity: Severity = "difference" if is_needed else "note"
        if name not in found:  # a GGUF file has a tokenizer of its own
            output.problem("side file", f"{name} is missing", "note" if output.layout == gguf.LAYOUT else severity)
        elif name not in expected:
            if is_needed:
                output.problem("side file", f"{name} is not in the source", "note")
        elif not _same_file(source.files, output.files, name):
            output.problem("side file", f"{name} differs from the source's", severity)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys, to name a difference."""
    if not isinstance(value, dict):
        return {prefix: value}
    found = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _compare_keys(output: Checkpoint, expected: dict[str, Any], found: dict[str, Any], name: str) -> None:
    # `check_config` compares quantization_config with the tensors.
    expected, found = (nvfp4.without_storage(mlx.without_storage(side)) for side in (expected, found))
    inner = [side.get("quantization_config") for side in (expected, found)]
    unquantized = None in inner or any(map(compressed_tensors.is_described, inner))
    expected, found = _flat(as_released(expected, found)), _flat(as_released(found, expected))
    _compare_flat(output, expected, found, name, unquantized)


def _compare_flat(
    output: Checkpoint, expected: dict[str, Any], found: dict[str, Any], name: str, unquantized: bool
) -> None:
    for key in sorted(expected.keys() | found.keys()):
        if key in _STORAGE_KEYS or (key in expected and key in found and expected[key] == found[key]):
            continue
        if unquantized and key.startswith("quantization_config."):
            continue
        was, now = (repr(side[key]) if key in side else "absent" for side in (expected, found))
        one_side = key in expected and key in found
        added = not one_side and is_harmless(key, found.get(key, expected.get(key)))
        severity: Severity = "note" if added or key == "transformers_version" else "difference"
        output.problem("config", f"{key} = {now} (source's {name}: {was})", severity)


def _unnested(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of its language model at the top."""
    nested = config.get("text_config")
    return {**(nested if isinstance(nested, dict) else {}), **config}


def _compare_with_engine(output: Checkpoint, expected: dict[str, Any], found: dict[str, Any], name: str) -> None:
    """Compare two configs of which one is the reference engine's, by the keys that both can say."""
    if output.layout == "mp":
        found = engine.as_released(found)
        expected = _flat(as_released(_unnested(expected), found))
    else:
        expected = engine.as_released(expected)
        found = _flat(as_released(_unnested(found), expected))
    expected, found = ({key: side[key] for key in engine.KEYS.values() if key in side} for side in (expected, found))
    _compare_flat(output, expected, found, name, unquantized=False)


def _has_config(checkpoint: Checkpoint) -> bool:
    return "config.json" in checkpoint.files.sizes()


def compare_configs(source: Checkpoint, output: Checkpoint) -> None:
    """Every key that describes the model must be equal on both sides."""
    of_engine = "inference/config.json"
    has_its_own = output.layout == "mp" and source.layout != "mp" and of_engine in source.files.sizes()
    name = of_engine if has_its_own else "config.json"
    expected, found = read_config(source, name), read_config(output)
    if expected is not None and found is not None:
        is_translated = (source.layout == "mp") != (output.layout == "mp") and not has_its_own
        (_compare_with_engine if is_translated else _compare_keys)(output, expected, found, name)
    elif expected is not None and output.layout not in ("mp", gguf.LAYOUT) and not _has_config(output):
        output.problem("config", "config.json is missing")
    for side in (source, output):
        if side.layout == gguf.LAYOUT and expected is not None:
            for text in gguf.key_faults(side.keys, expected):
                side.problem("config", text)


def _weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Every weight with a block scale, by name."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        scale = checkpoint.tensors.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if scale is not None:
            weight = understand(tensor, scale, packed=True)
            if isinstance(weight, Weight):
                found[name] = weight
    return found


def _expert_formats(checkpoint: Checkpoint, weights: dict[str, Weight]) -> set[str]:
    """Formats of the routed experts that the config has to name: fp4, fp8, or the dtype of weights without a scale.

    Draft stages whose experts are all BF16, unlike those of the main layers, are left out: loaders see that they have
    no scales.
    """
    names = {"E2M1": "fp4", "E4M3": "fp8"}
    main, draft = set[str](), set[str]()
    for name, tensor in checkpoint.tensors.items():
        if _EXPERT_WEIGHT.fullmatch(name):
            weight = weights.get(name)
            stored = names.get(weight.number_format.name, "") if weight else tensor.dtype.lower()
            (draft if name.startswith("mtp.") else main).add(stored)
    return main if main and draft == {"bf16"} else main | draft


def _check_experts(checkpoint: Checkpoint, config: dict[str, Any], weights: dict[str, Weight]) -> None:
    quantization = config.get("quantization_config")
    nested = quantization.get("expert_dtype") if isinstance(quantization, dict) else None
    stored = _expert_formats(checkpoint, weights)
    for place, said in (("expert_dtype", config.get("expert_dtype")), ("quantization_config.expert_dtype", nested)):
        if said is not None and stored and {said} != stored:
            found = " and ".join(sorted(stored)) + (MIXTURE if len(stored) > 1 else "")
            checkpoint.problem("config", f"{place} says '{said}', the routed experts are {found}")
    if config.get("expert_dtype") is None and nested is None and "fp4" in stored and checkpoint.layout != "mp":
        checkpoint.problem("config", "has no expert_dtype; some loaders take these FP4 experts for FP8", "note")


def _check_blocks(checkpoint: Checkpoint, quantization: dict[str, Any], weights: dict[str, Weight]) -> None:
    said = quantization.get("weight_block_size")
    known = said in ([128, 128], [32, 32])
    rows, columns = said if known and isinstance(said, list) else (1, 1)
    for name, weight in weights.items():
        # The engram embedding has its own 1x32 blocks, which no config key mentions.
        if weight.number_format.name != "E4M3" or weight.scale is None or ".engram." in name:
            continue
        if not known or weight.scale.shape != (-(-weight.rows // rows), -(-weight.columns // columns)):
            shown = f"{name} has {weight.block[0]}x{weight.block[1]} blocks"
            checkpoint.problem("config", f"weight_block_size says {said!r}, {shown}")
            return


def check_config(checkpoint: Checkpoint) -> None:
    """Compare the config with the tensors: expert dtype, block size, and whether any tensor is quantized."""
    config = read_config(checkpoint)
    if config is None:
        if not _has_config(checkpoint):
            checkpoint.problem("config", "there is no config.json", "note")
        return
    kind = config.get("model_type")
    if isinstance(kind, str) and kind not in BY_TYPE and kind.startswith(FAMILY):
        text = f"model_type is {kind!r}: whether the config has every key that this edition needs is not checked"
        checkpoint.problem("edition", text, "note")
    elif isinstance(kind, str) and kind not in BY_TYPE:
        text = f"model_type is {kind!r}, no DeepSeek-V4: names and shapes are not compared with the config"
        checkpoint.problem("model", text, "note")
    weights = _weights(checkpoint)
    _check_experts(checkpoint, config, weights)
    if checkpoint.layout == "mp":
        return
    if mlx.is_described(config):
        modules = {weight.tensor.slices[0].name.removesuffix(".weight"): weight for weight in weights.values()}
        for text in mlx.faults(config, {module: weight.number_format.bits for module, weight in modules.items()}):
            checkpoint.problem("config", text)
        return
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and compressed_tensors.is_described(quantization):
        for text in compressed_tensors.faults(quantization, checkpoint.tensors, weights):
            checkpoint.problem("config", text)
        return
    if isinstance(quantization, dict) and nvfp4.is_described(config):
        for text in nvfp4.faults(checkpoint, quantization):
            checkpoint.problem("config", text)
    fp8 = [name for name, weight in weights.items() if weight.number_format.name == "E4M3"]
    if isinstance(quantization, dict) and not weights:
        checkpoint.problem("config", "has a quantization_config, but no tensor is quantized")
    elif isinstance(quantization, dict):
        _check_blocks(checkpoint, quantization, weights)
        for key, known in (("quant_method", ("fp8",)), ("fmt", ("e4m3",)), ("scale_fmt", _SCALE_FORMATS)):
            if quantization.get(key, known[0]) not in known:
                checkpoint.problem("config", f"{key} says {quantization[key]!r}, expected {' or '.join(known)}")
    elif fp8:
        checkpoint.problem("config", f"has no quantization_config, but {len(fp8)} tensors are FP8 with block scales")


def check_needed_keys(checkpoint: Checkpoint) -> None:
    """Record the keys that the model needs and its config lacks.

    Only for a checkpoint that is checked alone: two that lack the same key are the same model.
    """
    config = None if checkpoint.layout == "mp" else read_config(checkpoint)
    if config is not None and (missing := missing_keys(config)):
        checkpoint.problem("config", f"lacks {some_of(missing, KEYS_SHOWN)}: the model cannot be computed as trained")


def declares_powers_of_two(checkpoint: Checkpoint) -> bool:
    """Whether the config says `scale_fmt: ue8m0`: every scale is a power of two, also if stored as float32."""
    config = read_config(checkpoint) or {}
    quantization = config.get("quantization_config")
    nested = quantization.get("scale_fmt") if isinstance(quantization, dict) else None
    return "ue8m0" in (config.get("scale_fmt"), nested)
