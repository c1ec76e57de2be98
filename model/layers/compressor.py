"""The compressor: one key for every block of `ratio` tokens.

Each token gives a raw `kv = wkv x` and a gate `g = wgate x + ape[t mod ratio]`, float32. A block's key is the sum of
its tokens' kv, weighted per dimension by the softmax of g over the block. With ratio 4 blocks overlap: a key sees
eight tokens, the PREVIOUS block's four through the first half of the dimensions and its own four through the second
half; before the first block there is nothing, which is a gate of -inf. The key takes the rotary position of its
block's FIRST token. A block enters the cache when its last token does.
"""

import torch

from dsv4.model.cache import CompressorState
from dsv4.model.config import Config
from dsv4.model.weight_store import WeightView

from .numerics import Numerics
from .rotary import Rotary

RAW = ("wkv.weight", "wgate.weight")
KEY_GROUP = 64  # FP8 group of the dimensions of a key that carry no position


def simulate_key(x: torch.Tensor, rope_dims: int, numerics: Numerics) -> torch.Tensor:
    """A key [..., c] as the FP8 cache would hold it: all but the rotary dims quantized in groups of 64."""
    if not numerics.simulation:
        return x
    return numerics.kernels.simulate_key(x, x.shape[-1] - rope_dims, KEY_GROUP)


def simulate_index(x: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """A query or key of the indexer [..., d]: Hadamard rotation, then FP4. Rotating both changes no dot product."""
    return numerics.kernels.simulate_index(x) if numerics.simulation else x


class Compressor:
    """One compressor; `index` says that its keys are for the indexer."""

    def __init__(
        self, config: Config, weights: WeightView, rotary: Rotary, numerics: Numerics, index: bool = False
    ) -> None:
        self._config, self._weights, self._rotary = config, weights, rotary
        self._numerics, self._index = numerics, index

    def raw(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> float32 [T, 2, width]: kv and gate of each token."""
        wkv, wgate = (self._weights.matrix(name) for name in RAW)
        return self._numerics.kernels.raw_keys(x, wkv, wgate, self._weights.vector("ape"), positions)

    def advance(self, state: CompressorState, raw: torch.Tensor, position: int) -> None:
        """Add the raw tokens of one sequence, the first at `position`, and compress the blocks they finish."""
        state.raw.append(raw)
        first, last = state.entries.length, (position + len(raw)) // state.ratio
        if last > first:
            state.entries.append(self._compress(_slots(state, first, last), first, last, state.ratio))

    def _compress(self, slots: torch.Tensor, first: int, last: int, ratio: int) -> torch.Tensor:
        """Slots float32 [blocks, 2, dims, tokens] -> keys [blocks, dims]."""
        kernels = self._numerics.kernels
        pooled = kernels.pool(slots[:, 0], slots[:, 1]).to(self._numerics.dtype)
        normed = kernels.rms_norm(pooled, self._weights.vector("norm.weight"), self._config.rms_norm_eps)
        starts = torch.arange(first, last, device=normed.device) * ratio
        key = self._rotary.rotate(normed, starts)
        if self._index:
            return simulate_index(key, self._numerics)
        return simulate_key(key, self._config.qk_rope_head_dim, self._numerics)


def _slots(state: CompressorState, first: int, last: int) -> torch.Tensor:
    """The tokens that blocks [first, last) see: float32 [blocks, 2, dims, tokens]."""
    ratio, raw, start = state.ratio, state.raw.rows(), state.raw.start
    own = torch.unflatten(raw[first * ratio - start : last * ratio - start], 0, (last - first, ratio))
    if not state.overlap:
        return own.permute(0, 2, 3, 1)
    dims = own.shape[-1] // 2
    before = own.new_zeros(1, *own.shape[1:])
    before[:, :, 1] = -torch.inf
    if first:
        before = raw[(first - 1) * ratio - start : first * ratio - start].unsqueeze(0)
    previous = torch.cat((before, own[:-1]))
    return torch.cat((previous[..., :dims], own[..., dims:]), dim=1).permute(0, 2, 3, 1)
