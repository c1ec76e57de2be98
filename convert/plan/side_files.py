"""The files beside the shards: which are copied into the output, and which are written anew.

Loaders need the tokenizer, the generation config and the `encoding/` folder; people need the licence and the model
card. An allow-list names them, because a folder of downloads may hold any file.
"""

import re
from typing import Any

from dsv4.convert.checkpoint.names import count_draft_stages
from dsv4.convert.checkpoint.other_files import misnamed
from dsv4.convert.checkpoint.reader import CONFIG_NAME, MAX_CONFIG_BYTES, Checkpoint, read_json
from dsv4.convert.checkpoint.weights import Format
from dsv4.convert.plan.recipes.registry import recipe_of
from dsv4.errors import InputError

from .config_edit import dump, make_inference_config, with_quantized_wo_a
from .plan import Plan

TOKENIZER = re.compile(r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|vocab[^/]*|merges\.txt")
BESIDE_WEIGHTS = re.compile(
    r"generation_config\.json|(pre)?processor_config\.json|chat_template[^/]*|[^/]*\.jinja|[^/]*\.py"
    r"|(LICENSE|NOTICE)[^/]*|[^/]*\.md|(encoding|inference|assets|figures)/.*"
)
NEVER = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)|.*\.index\.json")
INFERENCE_CONFIG = "inference/config.json"


def copied_files(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Names of the side files that the output gets from the source, sorted."""
    names = sorted(n for n in checkpoint.files if not NEVER.fullmatch(n))
    if plan.settings.layout == "mp":
        return [n for n in names if TOKENIZER.fullmatch(n)]
    return [n for n in names if TOKENIZER.fullmatch(n) or BESIDE_WEIGHTS.fullmatch(n)]


def read_side_file(checkpoint: Checkpoint, name: str, plan: Plan) -> bytes:
    """Content of a copied file, as it will be in the output."""
    content = checkpoint.storage.read(name, 0, checkpoint.files[name])
    if name != INFERENCE_CONFIG:
        return content
    config = read_json(checkpoint.storage, name, checkpoint.files[name], MAX_CONFIG_BYTES)
    edited = recipe_of(plan.settings.to).edit_inference_config(config)
    return content if edited == config else dump(edited)


def _engine_config(checkpoint: Checkpoint, plan: Plan) -> bytes:
    """The reference engine's config.json: the source's inference config if it has one, else made from config.json."""
    if INFERENCE_CONFIG in checkpoint.files:
        return read_side_file(checkpoint, INFERENCE_CONFIG, plan)
    planned = (tensor for shard in plan.shards for tensor in shard.tensors)
    fp4_experts = any(tensor.format is Format.FP4 and tensor.weight.is_routed_expert for tensor in planned)
    return dump(make_inference_config(checkpoint.released, fp4_experts, count_draft_stages(checkpoint.tensors)))


def _edited_config(checkpoint: Checkpoint, plan: Plan, some_kept: bool = False) -> dict[str, Any]:
    recipe = recipe_of(plan.settings.to)
    edited = recipe.edit_config(checkpoint.released_json, plan.settings, some_kept)
    if plan.settings.wo_a == "fp8" and not some_kept:
        edited = with_quantized_wo_a(edited)
    return recipe.describe_storage(edited, [tensor for shard in plan.shards for tensor in shard.tensors])


def made_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """The files that the recipe adds, by name."""
    if plan.settings.layout == "mp":
        return {}
    return recipe_of(plan.settings.to).side_files(_edited_config(checkpoint, plan))


def config_file(checkpoint: Checkpoint, plan: Plan, some_kept: bool = False) -> bytes:
    """Content of the output's config.json; the source's own bytes if nothing in it changes."""
    if plan.settings.layout == "mp":
        return _engine_config(checkpoint, plan)
    edited = _edited_config(checkpoint, plan, some_kept)
    if edited == checkpoint.config_json:
        return checkpoint.storage.read(CONFIG_NAME, 0, checkpoint.files[CONFIG_NAME])
    return dump(edited)


def check_configs(checkpoint: Checkpoint, plan: Plan) -> None:
    """Make the config files before the work starts, so that a fault shows at once.

    Raises InputError for a missing key, and for a file to copy that is a git-LFS pointer or a web page.
    """
    copied = {name: checkpoint.files[name] for name in copied_files(checkpoint, plan)}
    for name, kind in misnamed(checkpoint.storage, copied).items():
        raise InputError(f"{checkpoint.storage.label}/{name}: {kind.words}", kind.hint)
    config_file(checkpoint, plan)
    if INFERENCE_CONFIG in checkpoint.files:
        read_side_file(checkpoint, INFERENCE_CONFIG, plan)
