"""Draws the next token from logits: temperature, top-p and a seed.

This is computed on the CPU in float64 from one uniform number per token. So a token depends on the logits, the seed and
its place in the answer only, and not on the device, the batch, or drafts.
"""

from collections import deque
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
    """Draws the tokens of one sequence. Each `row` of a batch has random numbers of its own, one for each token."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, row])
        self._numbers: deque[float] = deque()  # of the next tokens, as far as drafts have looked

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from float32 logits [V]. The lower id wins among equals."""
        token = self.foresee(logits, 0)
        if self._numbers:
            self._numbers.popleft()
        return token

    def foresee(self, logits: torch.Tensor, ahead: int) -> int:
        """The token that `choose` takes from these logits after `ahead` others; nothing is drawn by it.

        A draft that is chosen with the number of its place agrees most often with the token that is drawn later.
        """
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        chance = probabilities(logits, self._sampling.temperature)
        number = self._number(ahead)
        if self._sampling.top_p == 1:
            return _drawn(np.cumsum(chance), number)  # sorting a vocabulary takes most of the time
        order = np.argsort(-chance, kind="stable")
        reached = np.cumsum(chance[order])
        kept = int(np.searchsorted(reached, self._sampling.top_p * reached[-1])) + 1
        return int(order[_drawn(reached[:kept], number)])

    def _number(self, ahead: int) -> float:
        """The random number of a later token, between 0 and 1."""
        while len(self._numbers) <= ahead:
            self._numbers.append(self._random.random())
        return self._numbers[ahead]


def _drawn(reached: np.ndarray, number: float) -> int:
    """An index, each as often as its step in the running sums `reached`."""
    found = int(np.searchsorted(reached, number * reached[-1], side="right"))
    return min(found, len(reached) - 1)
