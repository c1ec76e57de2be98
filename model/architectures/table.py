"""The architectures that this engine runs: a row of EDITIONS names a file of this room, which has an ARCHITECTURE."""

from importlib import import_module

from dsv4.convert.checkpoint.editions.table import EDITIONS, check_signs, edition_of
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.errors import InputError

from .stack import Architecture as Architecture


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint. Raises InputError, naming the model type, for one that the engine does not run.

    A config that names no model type is read as V4, whose keys it must then have. Raises InputError, too, for tensors
    of another architecture than the config's.
    """
    config = checkpoint.config
    name = edition_of(config).architecture if "model_type" in config else "v4"
    if not name:
        known = (kind for edition in EDITIONS if edition.architecture for kind in edition.model_types)
        raise InputError(
            f"config.json: model_type is {config['model_type']!r}, this engine runs {', '.join(dict.fromkeys(known))}",
            "Everything else works: `dsv4 inspect`, `dsv4 convert`, `dsv4 verify`.",
        )
    check_signs(config, checkpoint.tensors)
    found: Architecture = import_module(f".{name}", __package__).ARCHITECTURE
    return found
