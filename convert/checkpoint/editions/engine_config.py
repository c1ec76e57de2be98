"""The reference engine's own config.json, beside its rank files: the release's values under other keys.

Each edition says its keys once, and both ways follow: the engine's config from config.json, and config.json from the
engine's. What the engine's config does not say is the same in every release of the edition, but for
`transformers_version`, which says who wrote the file.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.convert.checkpoint.config import Config, config_value
from dsv4.errors import InputError

TEXT = "text_config"


def is_engine_config(config: Config) -> bool:
    """Whether it is the reference engine's own config."""
    return "hidden_size" not in config and "dim" in config


def _place(found: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a path of keys; inside `text_config` if there is one and the first key is not beside it."""
    *outer, key = path.split(".")
    place = found if (outer or [key])[0] in found else found.get(TEXT, found)
    for name in outer:
        place = place.setdefault(name, {})
    place[key] = value


@dataclass(frozen=True)
class EngineConfig:
    """The reference engine's config in one edition.

    sign: a key that this engine's config has, and the release's, and that no edition further down the table has.
    keys: in the order of the released files, each with its path in a `release_view`; "" for one that has none.
    optional: keys that it may lack. nullable: keys that may be null. release: what config.json of every release says
    besides; a key of `keys` that is not at its top level belongs into its `text_config`, if it has that.
    """

    keys: tuple[tuple[str, str], ...]
    optional: frozenset[str]
    release: Mapping[str, Any]
    sign: str = ""
    nullable: frozenset[str] = frozenset()

    def describes(self, config: Config) -> bool:
        """Whether a config, the engine's or a `release_view`, has the sign."""
        return not self.sign or self.sign in config

    def missing(self, config: Config) -> list[str]:
        """Keys that the engine needs and its config lacks."""
        return [key for key, _ in self.keys if key not in config and key not in self.optional]

    def _value(self, key: str, path: str, view: Config) -> Any:
        value = config_value(view, path)
        if value is None and key not in self.optional:
            raise InputError(f"config.json: {path} is missing; the reference engine's config needs it")
        return value

    def made(self, view: Config, told: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's config from a `release_view`. told: values of keys that follow from the tensors, None for none.

        Raises InputError naming a key that is missing.
        """
        values = {key: told[key] if key in told else self._value(key, path, view) for key, path in self.keys}
        named = {key for key, path in self.keys if key in self.nullable and self._is_said(path, view)}
        return {key: value for key, value in values.items() if value is not None or key in named}

    def _is_said(self, path: str, view: Config) -> bool:
        outer, _, key = path.rpartition(".")
        place = config_value(view, outer) if outer else view
        return isinstance(place, Mapping) and key in place

    def released(self, config: Config) -> dict[str, Any]:
        """config.json of the release, from the engine's."""
        found = copy.deepcopy(dict(self.release))
        for key, path in self.keys:
            if key in config and path:
                _place(found, path, config[key])
        length, factor = config.get("original_seq_len"), config.get("rope_factor")
        if isinstance(length, int | float) and isinstance(factor, int | float):
            _place(found, "max_position_embeddings", int(length * factor))
        return found
