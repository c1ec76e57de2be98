"""How large a checkpoint would be after each conversion, without a plan of every tensor.

Weights of one kind (same format, shape, scale and role) become tensors of one size, so one weight of each kind is
planned and counted: V4-Pro has 71424 expert matrices of two kinds.
"""

from collections import Counter
from collections.abc import Hashable, Iterable

from dsv4.convert.checkpoint.config import Config
from dsv4.convert.checkpoint.editions.table import block_by_name
from dsv4.convert.checkpoint.foreign import refuse_foreign
from dsv4.convert.checkpoint.names import is_released_in_fp8
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Alike, Weight
from dsv4.convert.plan.recipes.registry import outputs_of, recipe_of

from .classify import check_weights
from .engines import ENGINES, TARGETS, TargetName, To
from .settings import CONVERSIONS, Settings, resolve

# Options of `dsv4 convert` -> the arguments of `resolve` that they stand for.
OPTIONS: dict[str, tuple[To, TargetName | None]] = {
    f"--to {name}" + (f" --target {target}" if target else ""): (name, target)
    for name, conversion in CONVERSIONS.items()
    if not (conversion.keeps_codes or conversion.joins)
    for target in (None, *(name for name in TARGETS if name in ENGINES and ENGINES[name].layout == "hf"))
    if target is None or conversion.has_targets
}


def _kind(weight: Weight, config: Config) -> Hashable:
    scale = (weight.scale.dtype, weight.scale.shape) if weight.scale else None
    kind = weight.stored, weight.info.dtype, weight.info.shape, scale, weight.is_routed_expert, weight.is_wo_a
    if weight.stored != "bf16":
        return kind
    released = weight.info.released_dtype, is_released_in_fp8(weight.name), block_by_name(weight.name, config)
    return *kind, weight.is_draft, *released  # what a way back to the release's format depends on


def _cast_by(to: To) -> set[str]:
    """The formats of experts that a conversion casts, as `Weight.stored` has them."""
    cast = recipe_of(to).cast_format
    return ({cast.value} if cast else set()) | ({"bf16"} if CONVERSIONS[to].bf16_experts else set())


def _tensor_bytes(weights: list[Weight], counts: list[int], checkpoint: Checkpoint, settings: Settings) -> int:
    sizes = (sum(o.nbytes for o in outputs_of(weight, settings, checkpoint.released)) for weight in weights)
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def sizes_after_conversion(checkpoint: Checkpoint, tensors: Iterable[Alike]) -> dict[str, int]:
    """Bytes of all tensors after each conversion, by the options of `dsv4 convert`. Exactness is not checked.

    tensors: all of the checkpoint. Raises InputError for a checkpoint that cannot be converted.
    """
    alike = list(tensors)
    refuse_foreign(checkpoint.config, (some.name for some in alike))
    check_weights([some.weight for some in alike if some.weight is not None], checkpoint.config)
    counts: Counter[Hashable] = Counter()
    one_of: dict[Hashable, Weight] = {}
    for some in alike:
        if some.weight is not None:
            kind = _kind(some.weight, checkpoint.config)
            counts[kind] += some.count
            one_of[kind] = some.weight
    experts = {weight.stored for weight in one_of.values() if weight.is_routed_expert}
    return {
        options: _tensor_bytes(
            [one_of[kind] for kind in counts], list(counts.values()), checkpoint, resolve(to, target=target)
        )
        for options, (to, target) in OPTIONS.items()
        if not CONVERSIONS[to].way_back or experts & _cast_by(to)
    }
