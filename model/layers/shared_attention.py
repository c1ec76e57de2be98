"""V4.1's attention: as V4's over a window and chosen compressed keys, but keys and choice come from source layers.

No head is normed, and a window key is quantized as a whole, rotary dims included.
"""

from typing import NamedTuple

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import Config
from dsv4.model.weight_store import WeightView

from .attention import Segment, WindowAttention, joined
from .numerics import Numerics
from .rotary import Rotary
from .shared_keys import IndexSource, KeySource, Selection


class Shared(NamedTuple):
    """What the layers of one call share, per segment, for a layer that sees compressed keys.

    keys: cache of the layer's KV source. handed_over: cache whose index keys stand in where a step finishes no group,
    as in the released code; None to use the source's own. selections: of the latest index source, replaced by the next.
    """

    keys: list[LayerCache]
    handed_over: list[LayerCache] | None
    selections: list[Selection]


class SharedKeyAttention(WindowAttention):
    """One attention sublayer of V4.1. `source`, `indexer`: what the layer makes for itself and for later ones."""

    norm_heads, key_group = False, 32

    def __init__(
        self,
        config: Config,
        weights: WeightView,
        rotary: Rotary,
        numerics: Numerics,
        source: KeySource | None,
        indexer: IndexSource | None,
    ) -> None:
        super().__init__(config, weights, rotary, numerics)
        self._source, self._indexer = source, indexer

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        segments: list[Segment],
        caches: list[LayerCache],
        shared: Shared | None,
    ) -> torch.Tensor:
        """x [T, D] with absolute positions int64 [T]; caches one per segment, advanced here. -> [T, D]."""
        qr, q, kv = self.queries_and_keys(x, positions)
        for segment, cache in zip(segments, caches, strict=True):
            cache.window.append(kv[segment.rows])
        if self._source is not None:
            raw = self._source.raw(x)
            for segment, cache in zip(segments, caches, strict=True):
                self._source.advance(cache, raw[segment.rows], segment.position)
        if self._indexer is not None and shared is not None:
            self._choose(self._indexer, *self._indexer.queries(x, qr, positions), segments, shared)
        outputs = []
        for number, (segment, cache) in enumerate(zip(segments, caches, strict=True)):
            compressed, chosen = _chosen_keys(number, segment, cache, shared)
            outputs.append(self._attend_cached(q[segment.rows], segment, cache, compressed, chosen))
        return self.project(joined(outputs), positions)

    def _quantized_dims(self) -> int:
        return self._config.head_dim

    def _choose(
        self, indexer: IndexSource, q: torch.Tensor, weights: torch.Tensor, segments: list[Segment], shared: Shared
    ) -> None:
        """Replace the selections by this layer's."""
        for number, segment in enumerate(segments):
            state = shared.keys[number].indexer
            assert state is not None, "a KV source has index keys"
            if shared.handed_over is not None and segment.count == 1 and (segment.position + 1) % state.ratio:
                state = shared.handed_over[number].indexer
                assert state is not None, "only a KV source hands over"
            rows, before = segment.rows, shared.selections[number]
            keys = state.entries.rows()
            shared.selections[number] = indexer.choose(q[rows], weights[rows], keys, segment.position, before)


def _chosen_keys(
    number: int, segment: Segment, cache: LayerCache, shared: Shared | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compressed keys of a segment, [groups, c], and which of them each query attends to."""
    if shared is None:
        return cache.window.rows()[:0], torch.empty(segment.count, 0, dtype=torch.int32)
    state = shared.keys[number].compressor
    assert state is not None, "a KV source has compressed keys"
    return state.entries.rows(), shared.selections[number].chosen
