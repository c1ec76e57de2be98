"""The MTP block of the first releases: one token further, from the main model's streams and the token that follows."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from dsv4.model.cache import Cache, select

from .drafter import Continuation


class MtpModel(Protocol):
    """The methods of `Transformer` that the drafter uses."""

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block."""

    def mtp_logits(
        self,
        hidden: torch.Tensor,
        next_token_ids: torch.Tensor,
        mtp_cache: Cache,
        *,
        lengths: list[int],
        rows: Literal["last", "none"],
    ) -> torch.Tensor | None:
        """Logits of the token after the next one, float32 [B, 1, V], or None for `rows` "none"."""


class MtpDrafter:
    """Drafts for one batch; see Drafter."""

    width = 1

    def __init__(self, model: MtpModel, batch_size: int) -> None:
        self._model, self._cache = model, model.new_mtp_cache(batch_size)

    def draft(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Add the new positions of some rows, and draft one token after each."""
        hidden = pad_sequence([c.hidden for c in continuations], batch_first=True)
        following = pad_sequence([torch.tensor(list(c.following)) for c in continuations], batch_first=True)
        logits = self._model.mtp_logits(
            hidden,
            following,
            select(self._cache, [c.row for c in continuations]),
            lengths=[len(c.following) for c in continuations],
            rows="last" if any(c.count for c in continuations) else "none",
        )
        if logits is None:
            return [[] for _ in continuations]
        pairs = zip(continuations, logits[:, 0], strict=True)
        return [[c.choose(row, 0)] if c.count else [] for c, row in pairs]
