"""The reference engine's rank files: the release's names and numbers, FP4 tagged F4, and a config of the engine's own.

config.json of the release is made again from the engine's, see editions/engine_config.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dsv4.convert.checkpoint.config import Config
from dsv4.convert.checkpoint.editions.engine_config import is_engine_config
from dsv4.convert.checkpoint.editions.table import engine_of

from .form import Released
from .tensor import TensorInfo


def _packed(info: TensorInfo) -> TensorInfo:
    """FP4 as a release tags it: bytes of two codes, I8."""
    if info.dtype != "F4" or not info.shape or info.shape[-1] % 2:
        return info
    return info._replace(dtype="I8", shape=(*info.shape[:-1], info.shape[-1] // 2))


class RankFiles(Released):
    """Reads the tensors and the config as a release has them."""

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
        """The same tensors; FP4 as I8."""
        return map(_packed, stored.values())

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The release's: weights are stored as there."""
        return self.released_config(config)

    def released_config(self, config: Config) -> dict[str, Any]:
        """config.json of the release; a config that is not the engine's is taken as it is."""
        return engine_of(config).released(config) if is_engine_config(config) else dict(config)


RANK_FILES = RankFiles()
