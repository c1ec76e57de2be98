"""The architectures that this engine runs, by the name that a row of EDITIONS gives.

A new architecture is a file beside this one and a row here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.convert.checkpoint.editions.table import EDITIONS, check_signs, edition_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.errors import InputError
from dsv4.model.config import Config
from dsv4.model.layers.numerics import Numerics
from dsv4.model.weight_store import WeightStore
from dsv4.model.weights import DraftStages

from .stack import Stack
from .v4 import V4
from .v41 import V41
from .v41_config import V41Config


@dataclass(frozen=True)
class Architecture:
    """How to read a config of the architecture, and how to build its stack from that and some draft stages."""

    read_config: Callable[[Mapping[str, Any]], Config]
    build: Callable[[Any, DraftStages, WeightStore, Numerics], Stack]


ARCHITECTURES = {
    "v4": Architecture(Config.from_json, V4),
    "v41": Architecture(V41Config.from_json, V41),
}


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint. Raises InputError, naming the model type, for one that the engine does not run.

    A config that names no model type is read as V4, whose keys it must then have. Raises InputError, too, for tensors
    of another architecture than the config's.
    """
    config = checkpoint.config
    name = edition_of(config).architecture if "model_type" in config else "v4"
    if name not in ARCHITECTURES:
        known = (kind for edition in EDITIONS if edition.architecture in ARCHITECTURES for kind in edition.model_types)
        raise InputError(
            f"config.json: model_type is {config['model_type']!r}, this engine runs {', '.join(dict.fromkeys(known))}",
            "Everything else works: `dsv4 inspect`, `dsv4 convert`, `dsv4 verify`.",
        )
    check_signs(config, checkpoint.tensors)
    return ARCHITECTURES[name]
