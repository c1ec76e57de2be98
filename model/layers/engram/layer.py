"""The n-gram table of a layer: each stream adds the n-grams' value, weighted by its similarity to their key."""

import torch

from dsv4.model.cache import LayerCache
from dsv4.model.config import Config
from dsv4.model.layers.attention import Segment
from dsv4.model.layers.numerics import Numerics
from dsv4.model.weight_store import WeightView

from .hashing import Engrams, NGramHash, look_back


class Engram:
    """The n-gram table in front of one layer. Rows are read from the files when a token needs them."""

    def __init__(
        self,
        config: Config,
        engrams: Engrams,
        table: int,
        classes: torch.Tensor,
        weights: WeightView,
        numerics: Numerics,
    ) -> None:
        self._config, self._engrams, self._weights, self._numerics = config, engrams, weights, numerics
        self.classes, self._hash = classes, NGramHash(engrams, table)

    def __call__(
        self, h: torch.Tensor, token_ids: torch.Tensor, segments: list[Segment], caches: list[LayerCache]
    ) -> torch.Tensor:
        """Streams [T, n, D] and ids int64 [T] -> the streams with the n-grams added; histories are advanced here."""
        rows = self.rows(token_ids, segments, caches)
        read = self._weights.read_rows("embed.weight", rows.flatten()).to(self._numerics.dtype)
        mixed = self._numerics.quantized_linear(read.view(len(h), -1), self._weights.matrix("wkv.weight"))
        parts = torch.unflatten(mixed, 1, (-1, h.shape[-1]))
        keys, value = parts[:, :-1], parts[:, -1:].to(torch.float32)
        weight = self._weights.vector("q_weight") * self._weights.vector("k_weight")
        gate = self._numerics.kernels.engram_gate(h, keys, weight, self._config.rms_norm_eps)
        return (h.to(torch.float32) + gate.unsqueeze(-1) * value).to(h.dtype)

    def rows(self, token_ids: torch.Tensor, segments: list[Segment], caches: list[LayerCache]) -> torch.Tensor:
        """Rows of the table, int64 [T, columns] on the CPU."""
        own, pad = self.classes[token_ids.cpu()], int(self.classes[self._engrams.pad_token])
        found = []
        for segment, cache in zip(segments, caches, strict=True):
            history = cache.history
            assert history is not None, "a layer with a table has a history"
            found.append(look_back(history.classes, own[segment.rows], self._engrams.longest, pad))
            history.classes = torch.cat((history.classes, own[segment.rows]))
        return self._hash.rows(torch.cat(found))
