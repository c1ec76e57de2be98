"""What every layer is made of: arithmetic mode, rotary embedding, hyper-connection, head.

`Arithmetic` carries the one decision that every part needs: with simulation, activations are bfloat16, the inputs of
quantized layers pass through FP8, and keys and indexer through FP8 and FP4, as in the release. Without, everything is
float32 and nothing is quantized; the weights are the same.
Activations are flat, [T, ...]: the tokens of all sequences of a call, without padding.
"""

import math
from dataclasses import dataclass

import torch

from dsv4.model.config import Config
from dsv4.model.kernels.deterministic import sigmoid, sqrt
from dsv4.model.kernels.reference import Operations
from dsv4.model.parallel import ALONE, Group
from dsv4.model.weight_store import Scope
from dsv4.model.weights import Matrix
from dsv4.quant.activation import FP8_GROUP

POSITIONS_PER_CHUNK = 256


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes: simulated quantization or float32, and by which row of the table of operations."""

    simulation: bool
    operations: Operations
    group: Group = ALONE  # of the ranks that compute together

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and keys."""
        return torch.bfloat16 if self.simulation else torch.float32

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] as quantized layers see it: the release quantizes their input to FP8 in groups of 128."""
        return self.operations.simulate_fp8(x, FP8_GROUP) if self.simulation else x

    def product(self, quantized: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A quantized layer on what `quantize` made of its input: [T, in] -> [T, out] in `dtype`."""
        return self.operations.linear(quantized, matrix, dtype=self.dtype)

    def quantized_linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A quantized layer from its input: [T, in] -> [T, out] in `dtype`."""
        return self.product(self.quantize(x), matrix)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A layer whose input stays as it is: [T, in] -> float32 [T, out]."""
        return self.operations.linear(x, matrix)


def rotary_frequencies(config: Config, compressed: bool) -> torch.Tensor:
    """Angle per position of each pair, float32 [r / 2]. Layers with a ratio have their own theta, and YaRN."""
    r = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    frequencies = 1.0 / (theta ** (torch.arange(0, r, 2, dtype=torch.float32) / r))
    scaling = config.rope_scaling
    if not compressed or scaling is None:
        return frequencies

    def correction(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return r * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high: float = min(math.ceil(correction(scaling.beta_slow)), r - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(r // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return frequencies / scaling.factor * (1 - keep) + frequencies * keep


class Rotary:
    """Cosines and sines by position, in chunks of fixed shape: a position's bits never depend on the others."""

    def __init__(self, frequencies: torch.Tensor, device: torch.device, operations: Operations) -> None:
        self._frequencies, self._device, self._rotate = frequencies, device, operations.rotate
        self._cos = torch.empty(0, len(frequencies), device=device)
        self._sin = torch.empty(0, len(frequencies), device=device)

    def _grow(self, positions: int) -> None:
        starts = range(len(self._cos), positions, POSITIONS_PER_CHUNK)
        angles = [
            torch.arange(start, start + POSITIONS_PER_CHUNK, dtype=torch.float32)[:, None] * self._frequencies
            for start in starts
        ]
        self._cos = torch.cat((self._cos, *(torch.cos(a).to(self._device) for a in angles)))
        self._sin = torch.cat((self._sin, *(torch.sin(a).to(self._device) for a in angles)))

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [n, r / 2] each, of int64 positions [n]."""
        if len(positions) and int(positions.max()) >= len(self._cos):
            self._grow(int(positions.max()) + 1)
        return self._cos[positions], self._sin[positions]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """x [n, ..., c] with the last r dims rotated by their position, back if `inverse`; x's dtype out."""
        cos, sin = self.table(positions)
        width = x.shape[-1]
        return self._rotate(x.reshape(len(x), -1, width), cos, -sin if inverse else sin).view(x.shape)


def _stream_mixes(h: torch.Tensor, fn: Matrix, arithmetic: Arithmetic, eps: float) -> torch.Tensor:
    """h [T, n, D] -> float32 [T, out]: the projection of all streams, over their root mean square."""
    x = h.flatten(1)
    return arithmetic.linear(x, fn) * (1.0 / sqrt(arithmetic.operations.mean_square(x) + eps)).unsqueeze(-1)


class HyperConnection:
    """mHC around one sublayer: n streams in, one vector to the sublayer, n streams out."""

    def __init__(self, config: Config, weights: Scope, part: str, arithmetic: Arithmetic) -> None:
        self._config, self._weights, self._part, self._arithmetic = config, weights, part, arithmetic

    def enter(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [T, n, D] -> the sublayer's input [T, D], and post and comb for `leave`."""
        config, prefix = self._config, f"hc_{self._part}_"
        mixes = _stream_mixes(h, self._weights.matrix(prefix + "fn"), self._arithmetic, config.rms_norm_eps)
        scale, base = self._weights.vector(prefix + "scale"), self._weights.vector(prefix + "base")
        operations = self._arithmetic.operations
        pre, post, comb = operations.split_mixes(
            mixes, scale, base, config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps
        )
        return operations.collapse(pre, h), post, comb

    def leave(self, output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        """output [T, D], old h [T, n, D] -> new h: post_k * output + sum_j comb[j, k] h_j."""
        return self._arithmetic.operations.expand(output, h, post, comb)


class Head:
    """The end of a stack: collapse the streams, norm, logits."""

    def __init__(self, config: Config, weights: Scope, shared: Scope, arithmetic: Arithmetic) -> None:
        self._config, self._weights, self._shared, self._arithmetic = config, weights, shared, arithmetic

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h [T, n, D] -> logits float32 [T, V]. The vocabulary is what tensor parallelism splits here."""
        config = self._config
        mixes = _stream_mixes(h, self._weights.matrix("hc_head_fn"), self._arithmetic, config.rms_norm_eps)
        scale, base = self._weights.vector("hc_head_scale"), self._weights.vector("hc_head_base")
        pre = sigmoid(mixes * scale + base) + config.hc_eps
        operations = self._arithmetic.operations
        x = operations.collapse(pre, h)
        x = operations.rms_norm(x, self._weights.vector("norm.weight"), config.rms_norm_eps)
        return self._arithmetic.group.gather(self._arithmetic.linear(x, self._shared.matrix("head.weight")))
