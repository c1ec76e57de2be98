"""The interface of all architectures: the arguments of a stack of layers, its result, its methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from dsv4.model.cache import Cache, LayerCache
from dsv4.model.config import Config
from dsv4.model.drafting.dspark import DSpark
from dsv4.model.layers.attention import Segment
from dsv4.model.layers.numerics import Numerics
from dsv4.model.weight_store import WeightStore
from dsv4.model.weights import DraftStages

Trace = Callable[[str, torch.Tensor], None]
"""Called with each module's name and output, [T, ...] for the T tokens of a piece, as soon as it is computed."""


def _no_trace(name: str, output: torch.Tensor) -> None:
    pass


class Call:
    """The tokens of one call as one flat list, the caches they belong to, and the trace of their modules."""

    def __init__(
        self, cache: Cache, starts: list[int], counts: list[int], device: torch.device, trace: Trace | None = None
    ) -> None:
        self.cache, self.trace = cache, trace or _no_trace
        self.segments: list[Segment] = []
        self._starts, self._device, total = starts, device, 0
        for sequence, count in enumerate(counts):
            if count:
                self.segments.append(Segment(sequence, total, count, cache.sequences[sequence].length))
            total += count
        self.positions = self._joined([torch.arange(s.position, s.position + s.count) for s in self.segments])

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        joined = parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        return joined.to(self._device)

    @cached_property
    def sequence(self) -> torch.Tensor:
        """The row of each token in the call's token ids, int64 [T]."""
        return self._joined([torch.full((s.count,), s.sequence) for s in self.segments])

    @cached_property
    def column(self) -> torch.Tensor:
        """Its column there, int64 [T]."""
        starts = [self._starts[s.sequence] for s in self.segments]
        return self._joined(
            [torch.arange(first, first + s.count) for first, s in zip(starts, self.segments, strict=True)]
        )

    def layer_caches(self, layer: int) -> list[LayerCache]:
        """Entry `layer` of the caches, for each segment."""
        return [self.cache.sequences[s.sequence].layers[layer] for s in self.segments]

    def finish(self) -> None:
        """Advance the caches by the tokens of the call."""
        for segment in self.segments:
            self.cache.advance(segment.sequence, segment.count)


class Streams(NamedTuple):
    """The end of a stack: `last` is the input of its head, `hidden` [T, *hidden_shape] that of draft stages."""

    last: torch.Tensor
    hidden: torch.Tensor


class DraftBlock(Protocol):
    """A block that drafts one token further."""

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From the result of a call to logits float32 [T, V]."""

    def __call__(self, h: torch.Tensor, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> torch.Tensor:
        """Hidden states [T, *hidden_shape], embeddings [T, D] of the next tokens and their ids [T] -> for `head`."""


class Stack(Protocol):
    """The layers of one architecture, from embeddings to logits."""

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From `Streams.last` to logits float32 [T, V]."""

    @property
    def mtp(self) -> Sequence[DraftBlock]:
        """The MTP blocks that the engine runs, none or one."""

    @property
    def dspark(self) -> DSpark | None:
        """The draft stages of DSpark, if the checkpoint has them and they are loaded."""

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Shape of one token's row of `Streams.hidden`."""

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for the main stack."""

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block, which has its own keys."""

    def reserve(self, positions: int) -> None:
        """Make the rotary tables reach positions [0, positions), for the main stack and for drafts."""

    def __call__(self, embedded: torch.Tensor, token_ids: torch.Tensor, call: Call) -> Streams:
        """Embeddings [T, D] of the call's tokens and their ids int64 [T] -> the end of the stack."""


@dataclass(frozen=True)
class Architecture:
    """How to read a config of the architecture, and how to build its stack from that and some draft stages."""

    read_config: Callable[[Mapping[str, Any]], Config]
    build: Callable[[Any, DraftStages, WeightStore, Numerics], Stack]
