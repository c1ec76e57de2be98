"""The editions of DeepSeek-V4, one row each: how a config is recognised, and what its checkpoint consists of.

A new edition is a new row of EDITIONS and, where its blocks are new, a file of formulas like v4.py. The row names the
files that the engine has for it: the forward pass, and the protocol of messages.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsv4.convert.checkpoint.config import Config, config_count, config_string
from dsv4.errors import InputError

from . import v4, v41
from .engine_config import EngineConfig
from .kv_cache import CacheLayout, Keeping
from .spellings import contradictions
from .v4 import COPY_CONFIG, Shape, dspark_stage, missing_keys, mtp_stage, v4_cache, v4_tensors

FAMILY = "deepseek_v4"  # the beginning of every release's model type
V4_TYPES = ("deepseek_v4", "deepseek_ref")  # the second: third-party conversions of the same architecture
ENCODER = "encoding/encoding_dsv4.py"  # the prompt encoder of a release
# Draft stages, vision, and the router biases of the vision edition.
OPTIONAL = re.compile(r"mtp\..*|(vision|aligner)\..*|image_.*|.*\.ffn\.gate\.bias(_vl)?")
V4_SIGNS = re.compile(r"(?:.*\.)?hc_head_fn|.*\.compressor\.ape|.*\.gate\.tid2eid")
V41_SIGNS = re.compile(r".*\.engram\..*|.*\.indexer\.(?:wk|k_norm)\.weight")


@dataclass(frozen=True)
class Edition:
    """How an edition is recognised, and what its checkpoint must contain.

    model_types: values of `model_type`. key: a count that the config has and that of another edition of the same type
    has not. blocks: FP8 weights whose block is not the config's `weight_block_size`: a pattern of the whole name, and
    (rows, columns). quantization: `quantization_config` of the releases. tensors: from the config and the number of
    draft stages, every required weight with its shape in elements; raises InputError if the config lacks a key; None if
    they are not known. optional: names of further weights that a checkpoint may have. missing_keys: required keys that
    a config lacks. signs: names of tensors that tell the architecture: another one that has them, too, lists them among
    its own. kv_cache: from the config and what each layer keeps, the terms of the KV cache's size; None if a width is
    missing, or they are not known. architecture: the file of the forward pass in `model/architectures/`; "" if there is
    none. encoder: the file of the prompt encoder. protocol: the file of the
    messages in `model/chat/editions/`. engines: the
    reference engine's config, one for each kind of it; one without a sign comes last.
    """

    name: str
    model_types: tuple[str, ...] = ()
    key: str = ""
    blocks: tuple[tuple[re.Pattern[str], tuple[int, int]], ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Config, int], dict[str, Shape]] | None = None
    optional: re.Pattern[str] = re.compile("")
    missing_keys: Callable[[Config], list[str]] = lambda config: []
    signs: re.Pattern[str] = re.compile("")
    kv_cache: Callable[[Config, Sequence[Keeping]], CacheLayout | None] = lambda config, layers: None
    architecture: str = ""
    encoder: str = ENCODER
    protocol: str = ""
    engines: tuple[EngineConfig, ...] = ()

    def describes(self, config: Config) -> bool:
        """Whether a config is of this edition."""
        known = config_string(config, "model_type") in self.model_types
        return known and (not self.key or config_count(config, self.key) is not None)


# The n-gram tables have one scale per 32 elements of a row although they are FP8.
ENGRAM_TABLE = re.compile(r"(?:.*\.)?engram\.embed\.weight")
ENGRAM_BLOCKS = ((ENGRAM_TABLE, (1, 32)),)

# The first row that describes a config counts. Later editions come first.
EDITIONS = (
    Edition(
        "V4.1",
        ("deepseek_v41",),
        blocks=ENGRAM_BLOCKS,
        quantization=v41.QUANTIZATION,
        tensors=v41.v41_tensors,
        optional=OPTIONAL,
        missing_keys=v41.missing_keys,
        signs=V41_SIGNS,
        kv_cache=v41.v41_cache,
        architecture="v41",
        encoder="encoding/encoding.py",
        protocol="v41",
        engines=(v41.ENGINE,),
    ),
    Edition(
        "V4 with DSpark",
        V4_TYPES,
        "dspark_block_size",
        quantization=v4.QUANTIZATION,
        tensors=partial(v4_tensors, stage_tensors=dspark_stage),
        optional=OPTIONAL,
        missing_keys=missing_keys,
        signs=V4_SIGNS,
        kv_cache=v4_cache,
        architecture="v4",
        protocol="release_0731",
        engines=(v4.ENGINE_WITH_VISION, v4.ENGINE),
    ),
    Edition(
        "V4",
        V4_TYPES,
        quantization=v4.QUANTIZATION,
        tensors=partial(v4_tensors, stage_tensors=mtp_stage),
        optional=OPTIONAL,
        missing_keys=missing_keys,
        signs=V4_SIGNS,
        kv_cache=v4_cache,
        architecture="v4",
        protocol="preview",
        engines=(v4.ENGINE_WITH_VISION, v4.ENGINE),
    ),
)
# For a config of no known edition, known tensor names keep their meaning.
UNKNOWN = Edition("unknown", blocks=tuple(row for edition in EDITIONS for row in edition.blocks))


def edition_of(config: Config) -> Edition:
    """The edition that a config describes; UNKNOWN if there is none."""
    return next((edition for edition in EDITIONS if edition.describes(config)), UNKNOWN)


def engine_of(config: Config) -> EngineConfig:
    """The reference engine's config for the edition of a config, which may be that itself; of one not known, V4's."""
    return next(engine for edition in EDITIONS for engine in edition.engines if engine.describes(config))


def tensors_of(config: Config, stages: int) -> dict[str, Shape]:
    """Every weight that the edition of a config asks for, with its shape; of one that is not known, as V4.

    Raises InputError for what the config lacks.
    """
    tensors = edition_of(config).tensors
    return v4_tensors(config, stages, mtp_stage) if tensors is None else tensors(config, stages)


def check_signs(config: Config, names: Iterable[str]) -> None:
    """Raises InputError, naming both, for tensors of another architecture than the one that the config describes."""
    described = edition_of(config)
    others = [e for e in EDITIONS if described.architecture and e.architecture != described.architecture]
    for name in names:
        for edition in others:
            if edition.signs.fullmatch(name) and not described.signs.fullmatch(name):
                raise InputError(
                    f"config.json describes {described.name} (model_type is {config.get('model_type')!r}), "
                    f"'{name}' is a tensor of {edition.name}",
                    "The config belongs to another checkpoint: copy the one that came with the tensors.",
                )


def is_another_model(config: Config) -> bool:
    """Whether the config is that of another model, which `convert` takes with --any-model only.

    One that names no model type is taken for V4's. A model type of the family that has no row yet is a later edition:
    what dtypes and names say holds for it, too.
    """
    kind = config_string(config, "model_type")
    return kind is not None and not kind.startswith(FAMILY) and edition_of(config) is UNKNOWN


def require_known_edition(config: Config) -> None:
    """Raises InputError for the config of another model."""
    if is_another_model(config):
        raise InputError(
            f"config.json: model_type is '{config_string(config, 'model_type')}': this is no DeepSeek-V4 checkpoint",
            "--any-model converts it anyway: FP4 and FP8 with block scales by dtype and name, the rest copied.",
        )


def describes_v4(config: Config) -> bool:
    """Whether a config is of V4, in any of its editions: their layers are alike."""
    return config_string(config, "model_type") in V4_TYPES


def check_config(config: Config) -> None:
    """Raises InputError, naming the key, for what the edition needs and the config lacks or says in two ways."""
    missing = edition_of(config).missing_keys(config)
    if missing:
        raise InputError(f"config.json: {missing[0]} is missing", COPY_CONFIG)
    for fault in contradictions(config):
        raise InputError(f"config.json: {fault}", COPY_CONFIG)


def block_by_name(weight: str, config: Config) -> tuple[int, int] | None:
    """(rows, columns) of the block of an FP8 weight that has one of its own; None for the config's."""
    blocks = edition_of(config).blocks
    return next((block for pattern, block in blocks if pattern.fullmatch(weight)), None)
