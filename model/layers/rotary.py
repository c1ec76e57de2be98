"""Rotary position embedding: angles per position, with YaRN on layers that have a compress ratio."""

import math

import torch

from dsv4.model.config import Config
from dsv4.model.kernels.table import KernelTable

POSITIONS_PER_CHUNK = 256


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

    def __init__(self, frequencies: torch.Tensor, device: torch.device, kernels: KernelTable) -> None:
        self._frequencies, self._device, self._rotate = frequencies, device, kernels.rotate
        self._cos = torch.empty(0, len(frequencies), device=device)
        self._sin = torch.empty(0, len(frequencies), device=device)
        self._latest: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def reserve(self, positions: int) -> None:
        """Make the tables reach positions [0, positions): before a call, because asking a device later would wait."""
        if positions <= len(self._cos):
            return
        starts = range(len(self._cos), max(positions, len(self._cos) * 9 // 8), POSITIONS_PER_CHUNK)
        angles = [
            torch.arange(start, start + POSITIONS_PER_CHUNK, dtype=torch.float32)[:, None] * self._frequencies
            for start in starts
        ]
        self._cos = torch.cat((self._cos, *(torch.cos(a).to(self._device) for a in angles)))
        self._sin = torch.cat((self._sin, *(torch.sin(a).to(self._device) for a in angles)))

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [n, r / 2] each, of int64 positions [n] that are reserved."""
        return self._cos[positions], self._sin[positions]

    def both_ways(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosines, sines and their negatives; kept, because all layers of a call ask for the same positions."""
        if self._latest is None or self._latest[0] is not positions:
            cos, sin = self.table(positions)
            self._latest = positions, cos, sin, -sin
        return self._latest[1:]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """x [n, ..., c] with the last r dims rotated by their position, back if `inverse`; x's dtype out.

        x may be overwritten.
        """
        cos, sin, negative = self.both_ways(positions)
        width = x.shape[-1]
        return self._rotate(x.reshape(len(x), -1, width), cos, negative if inverse else sin).view(x.shape)
