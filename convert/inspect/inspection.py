"""The contents of a checkpoint, from its headers alone: a few MB are read, even of V4-Pro's 865 GB.

`inspect_checkpoint` collects facts; the command prints them. Parameters, layer kinds and formats are counted from the
tensors; only what tensors do not show is taken from config.json.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dsv4.convert.checkpoint.config import (
    architecture_name,
    compress_ratios,
    config_count,
    config_string,
    expert_dtype,
    weight_block,
)
from dsv4.convert.checkpoint.editions.kv_cache import CacheLayout, Keeping
from dsv4.convert.checkpoint.editions.table import edition_of
from dsv4.convert.checkpoint.forms.rank_files import RANK_FILES
from dsv4.convert.checkpoint.names import block_of, draft_stages, is_routed_expert
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.checkpoint.weights import Alike, expert_formats, find_alike, find_weights
from dsv4.convert.plan.sizes import sizes_after_conversion
from dsv4.errors import InputError
from dsv4.machine import collection_paused

from .findings import Finding, check_checkpoint
from .kv_cache import cache_sizes, shares_of_v3_2
from .parameters import FAMILIES, Parameters, count_parameters, family, parameters_of

Attention = Literal["sliding", "csa", "hca", "compressed"]  # the last: ratios that V4 does not have
Routing = Literal["hash", "score", "none"]
RANKS = "rank files of the reference engine"


@dataclass(frozen=True)
class Layer:
    """One layer of the main stack. `ratio` is None if neither tensors nor config give it."""

    index: int
    ratio: int | None
    attention: Attention
    routing: Routing
    experts: int  # number of routed experts present

    @property
    def indexed(self) -> bool:
        """Whether a lightning indexer selects this layer's compressed entries."""
        return self.attention == "csa"


@dataclass(frozen=True)
class Amount:
    """Tensors of one dtype or family."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.tensors + other.tensors, self.parameters + other.parameters, self.bytes + other.bytes)

    def as_json(self) -> dict[str, int]:
        """The three counts by name."""
        return {"tensors": self.tensors, "parameters": self.parameters, "bytes": self.bytes}


@dataclass(frozen=True)
class Inspection:
    """Everything `dsv4 inspect` shows. For a single file `config` is empty and fields that need it are None."""

    label: str
    form: str  # of another tool, or RANKS; "" for the release's own
    config: dict[str, Any]
    shards: int
    total: Amount
    parameters: Parameters
    dtypes: dict[str, Amount]
    families: dict[str, Amount]
    layers: list[Layer]
    mtp_blocks: int
    expert_formats: list[str]
    cache: CacheLayout | None
    sizes: dict[str, int] | None  # after each conversion; None where none is possible
    findings: list[Finding]


def _label(checkpoint: Checkpoint) -> str:
    """The name to show: the path of the file if it is one file without a config, else that of the folder."""
    label = checkpoint.storage.label
    return label if checkpoint.config else f"{label}/{next(iter(checkpoint.shards))}"


def _layer(index: int, inner: Mapping[str, Alike], declared_ratio: int | None) -> Layer:
    ape = inner.get("attn.compressor.ape")
    ratio = ape.info.shape[0] if ape and ape.info.shape else declared_ratio
    indexed = any(name.startswith("attn.indexer.") for name in inner)
    compressed = bool(ratio) or any(name.startswith("attn.compressor.") for name in inner)
    known: Attention = "csa" if indexed else "hca" if compressed else "sliding"
    attention: Attention = known if ratio in (None, 0, 4, 128) else "compressed"
    routing: Routing = "hash" if "ffn.gate.tid2eid" in inner else "score" if "ffn.gate.weight" in inner else "none"
    experts: set[int] = set().union(*(alike.numbers for name, alike in inner.items() if is_routed_expert(name)))
    return Layer(index, ratio, attention, routing, len(experts))


def _layers(tensors: Iterable[Alike], config: dict[str, Any]) -> tuple[list[Layer], int]:
    """The layers of the main stack in order, and how many MTP blocks there are."""
    inner: dict[int, dict[str, Alike]] = {}
    for alike in tensors:
        block = block_of(alike.name)
        if block and block.stack == "layers":
            inner.setdefault(block.number, {})[block.inner] = alike
    ratios = compress_ratios(config) or ()
    layers = [_layer(i, names, ratios[i] if i < len(ratios) else None) for i, names in sorted(inner.items())]
    return layers, len(draft_stages(alike.name for alike in tensors))


def _amount(alike: Alike) -> Amount:
    parameters = 0 if alike.weight is None else parameters_of(alike.weight)
    return Amount(alike.count, alike.count * parameters, alike.count * alike.info.nbytes)


def _amounts(tensors: Iterable[Alike]) -> tuple[dict[str, Amount], dict[str, Amount]]:
    """By dtype, the largest first, and by family."""
    dtypes: dict[str, Amount] = {}
    families = {name: Amount() for name in FAMILIES}
    for alike in tensors:
        amount, dtype = _amount(alike), alike.info.dtype
        dtypes[dtype] = dtypes.get(dtype, Amount()) + amount
        families[family(alike.name)] += amount
    by_bytes = sorted(dtypes.items(), key=lambda item: -item[1].bytes)
    return dict(by_bytes), {name: amount for name, amount in families.items() if amount.tensors}


def _sizes(checkpoint: Checkpoint, tensors: list[Alike]) -> dict[str, int] | None:
    try:
        return sizes_after_conversion(checkpoint, tensors)
    except InputError:
        return None  # the findings name the fault


def _inspect(checkpoint: Checkpoint) -> Inspection:
    config = checkpoint.config
    weights = find_weights(checkpoint.tensors, config)
    tensors = find_alike(checkpoint.tensors, weights)
    layers, mtp_blocks = _layers(tensors, config)
    chosen = config_count(config, "num_experts_per_tok")
    drafting = config_count(config, "dspark_num_experts_per_tok")
    dtypes, families = _amounts(tensors)
    keeping = [Keeping(layer.ratio or 0, layer.indexed) for layer in layers]
    experts = expert_formats(alike.weight for alike in tensors if alike.weight is not None)
    return Inspection(
        label=_label(checkpoint),
        form=RANKS if checkpoint.form is RANK_FILES else checkpoint.form.name,
        config=config,
        shards=len(checkpoint.shards),
        total=sum(dtypes.values(), Amount()),
        parameters=count_parameters(tensors, chosen, chosen if drafting is None else drafting),
        dtypes=dtypes,
        families=families,
        layers=layers,
        mtp_blocks=mtp_blocks,
        expert_formats=sorted(experts.every),
        cache=edition_of(config).kv_cache(config, keeping),
        sizes=_sizes(checkpoint, tensors) if config else None,
        findings=check_checkpoint(checkpoint, weights, experts) if config else [],
    )


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Facts and findings about an opened checkpoint; for a single file only the facts."""
    with collection_paused():
        return _inspect(checkpoint)


def layer_counts(inspection: Inspection) -> dict[str, int]:
    """How many layers of each kind, by attention and by routing."""
    layers = inspection.layers
    return {
        "total": len(layers),
        **{kind: sum(layer.attention == kind for layer in layers) for kind in get_args(Attention)},
        **{kind: sum(layer.routing == kind for layer in layers) for kind in ("hash", "score")},
        "mtp": inspection.mtp_blocks,
    }


def _cache_json(cache: CacheLayout | None) -> dict[str, Any]:
    if cache is None:
        return {"kv_cache_bytes": None, "kv_cache": None}
    return {
        "kv_cache_bytes": {str(length): size for length, size in cache_sizes(cache).items()},
        "kv_cache": {
            "entry_bytes": cache.entry_bytes,
            "window_entry_bytes": cache.window_entry_bytes,
            "index_key_bytes": cache.index_key_bytes,
            "share_of_deepseek_v3_2_at_1048576": shares_of_v3_2(cache),
        },
    }


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The object that `--json` prints."""
    parameters, config = inspection.parameters, inspection.config
    block = weight_block(config)
    return {
        "checkpoint": inspection.label,
        "form": inspection.form or None,
        "architecture": architecture_name(config),
        "model_type": config_string(config, "model_type"),
        "shards": inspection.shards,
        "tensors": inspection.total.tensors,
        "bytes": inspection.total.bytes,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "mtp_total": parameters.mtp_total,
            "mtp_active": parameters.mtp_active,
        },
        "dtypes": {name: amount.as_json() for name, amount in inspection.dtypes.items()},
        "families": {name: amount.as_json() for name, amount in inspection.families.items()},
        "layers": layer_counts(inspection),
        "experts": {"stored": inspection.expert_formats, "declared": expert_dtype(config)},
        "weight_block_size": list(block) if block else None,
        **_cache_json(inspection.cache),
        "converted_bytes": inspection.sizes,
        "findings": [{"level": f.level, "text": f.text, "hint": f.hint} for f in inspection.findings],
    }
