"""The MTP block of the first releases: from the main model's streams and the token that follows, one token further.

To draft several tokens, the block goes on from itself: its own streams stand for the main model's, and the token that
it proposed for the one that follows. It was not trained for that, so each further token is right less often; engines
chain it in this way, and three tokens are what they use for such models.

What it computes from itself is kept in a branch of its cache and then dropped. So its keys of a position come from the
main model's streams, and a rejected draft leaves no trace.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from dsv4.model.cache import Cache, select

from .drafter import Continuation

WIDTH = 3


class MtpOutput(Protocol):
    """What `Transformer.mtp_forward` returns."""

    @property
    def logits(self) -> torch.Tensor | None:
        """Of the token after the next one, float32 [B, 1, V]; None for rows "none"."""

    @property
    def hidden(self) -> torch.Tensor:
        """The block's streams that the logits come from, [B, 1, n, D]."""


class MtpModel(Protocol):
    """The methods of `Transformer` that the drafter uses."""

    def new_mtp_cache(self, batch_size: int) -> Cache:
        """An empty cache for the MTP block."""

    def mtp_forward(
        self,
        hidden: torch.Tensor,
        next_token_ids: torch.Tensor,
        mtp_cache: Cache,
        *,
        lengths: list[int],
        rows: Literal["last", "none"],
    ) -> MtpOutput:
        """Append positions to the cache and compute the last of each row; see Transformer."""


class MtpDrafter:
    """Drafts for one batch; see Drafter."""

    def __init__(self, model: MtpModel, batch_size: int, most: int) -> None:
        """`most`: the largest number of tokens that the main model's cache can remove again."""
        self._model, self._cache, self.width = model, model.new_mtp_cache(batch_size), min(WIDTH, most)

    def draft(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Add the new positions of some rows, and draft up to `count` tokens after each."""
        output = self._model.mtp_forward(
            pad_sequence([c.hidden for c in continuations], batch_first=True),
            pad_sequence([torch.tensor(list(c.following)) for c in continuations], batch_first=True),
            select(self._cache, [c.row for c in continuations]),
            lengths=[len(c.following) for c in continuations],
            rows="last" if any(c.count for c in continuations) else "none",
        )
        return self._chain(continuations, output)

    def _chain(self, wanted: Sequence[Continuation], output: MtpOutput) -> list[list[int]]:
        """The tokens of each draft, from the block's output after the new positions, and then from its own."""
        drafts: list[list[int]] = [[] for _ in wanted]
        counts = [min(c.count, self.width) for c in wanted]
        branch = select(self._cache, [c.row for c in wanted]).branch()
        for ahead in range(max(counts)):
            lengths = [int(count > ahead) for count in counts]
            if ahead:
                before = torch.tensor([draft[-1:] or [0] for draft in drafts])
                output = self._model.mtp_forward(output.hidden, before, branch, lengths=lengths, rows="last")
            assert output.logits is not None
            for draft, continuation, logits, more in zip(drafts, wanted, output.logits[:, 0], lengths, strict=True):
                if more:
                    draft.append(continuation.choose(logits, ahead))
        return drafts
