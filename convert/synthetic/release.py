"""The parts of a small checkpoint that depend on its architecture: what a file of an architecture offers here."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

Tensors = dict[str, torch.Tensor]


class AnyGeometry(Protocol):
    """The dimensions of a checkpoint. Each architecture has others."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the main stack."""


class Release(NamedTuple):
    """How the releases of one architecture look. Functions of a geometry, and of what else their names say.

    geometry: the class of the dimensions. encoder: file and text of the prompt encoder. special_tokens: of the
    tokenizer, beside those that all have. editions: a geometry for each edition that `dsv4 demo` can show, by name.
    """

    geometry: type
    count: Callable[[Any], int]
    shards: Callable[[Any, int, bool], Iterator[Tensors]]
    config: Callable[[Any, str], dict[str, Any]]
    inference_config: Callable[[Any, str], dict[str, Any]]
    encoder: Callable[[Any], tuple[str, str]]
    special_tokens: Callable[[Any], tuple[str, ...]]
    editions: dict[str, AnyGeometry]
