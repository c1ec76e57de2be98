"""Draws the next token from logits: temperature, top-p and a seed.

This is computed on the CPU in float64 from one uniform number per token. So a token depends on the logits, the seed and
its place in the answer only, and not on the device, the batch, or drafts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dsv4.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` keeps the likeliest tokens that reach that share."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, it is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, it is {self.top_p}")
        if self.seed < 0:
            raise UsageError(f"the seed must be 0 or more, it is {self.seed}")


def probabilities(logits: torch.Tensor, temperature: float) -> np.ndarray:
    """Softmax of float32 logits [V] divided by `temperature`, in float64."""
    scaled = logits.cpu().numpy().astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    shares: np.ndarray = weights / weights.sum()
    return shares


class Sampler:
    """Draws the tokens of one sequence. Each `row` of a batch has random numbers of its own."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, row])

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from float32 logits [V]. The lower id wins among equals."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        chance = probabilities(logits, self._sampling.temperature)
        if self._sampling.top_p == 1:
            return self._draw(np.cumsum(chance))  # sorting a vocabulary takes most of the time
        order = np.argsort(-chance, kind="stable")
        reached = np.cumsum(chance[order])
        kept = int(np.searchsorted(reached, self._sampling.top_p * reached[-1])) + 1
        return int(order[self._draw(reached[:kept])])

    def _draw(self, reached: np.ndarray) -> int:
        """An index, each as often as its step in the running sums `reached`."""
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return min(drawn, len(reached) - 1)
