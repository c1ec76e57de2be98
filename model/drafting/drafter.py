"""The interface of `generate` to the draft stages of a checkpoint, MTP or DSpark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

NO_DRAFTS = "this checkpoint has no draft stages, neither MTP nor DSpark"

Choose = Callable[[torch.Tensor, int], int]
"""Called with logits float32 [V] and how many tokens ahead of the next one they are for; returns a token."""


@dataclass(frozen=True)
class Continuation:
    """Positions of one row that the main model has computed and that stay, and the draft wanted after them.

    row: its place in the batch. hidden: the main model's hidden states at each position, [n, ...].
    following: the n tokens after these positions, of which the last is not computed yet.
    count: how many tokens to draft at most, 0 for none. choose: takes a token from the logits of a draft.
    """

    row: int
    hidden: torch.Tensor
    following: Sequence[int]
    count: int
    choose: Choose


class Drafter(Protocol):
    """The draft stages for one batch. `width`: the largest number of tokens of a draft."""

    width: int

    def draft(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Take over the new positions of some rows; for each the tokens expected after `following`."""
        ...
