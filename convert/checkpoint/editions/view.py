"""A config of any writer, in the release's keys: what everything else reads."""

from typing import Any

from dsv4.convert.checkpoint.config import Config

from .engine_config import is_engine_config
from .spellings import respelled_view
from .table import engine_of


def release_view(config: Config) -> dict[str, Any]:
    """The config with every key of the releases that the file has in any spelling.

    Never raises: a key that cannot be derived stays as it is.
    """
    return respelled_view(engine_of(config).released(config) if is_engine_config(config) else config)
