"""Two checkpoints on the same tokens: bit-equal, or how far apart and from which module on.

They run one after the other, so that each has all the memory. Only logits and fingerprints of the first run are kept.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dsv4.errors import InputError

from .logits import Evaluation
from .trace import Fingerprints

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Run:
    """The result of one checkpoint on the tokens; of logits that were read from a file there are no fingerprints."""

    evaluation: Evaluation
    fingerprints: Fingerprints | None = None


@dataclass(frozen=True)
class Comparison:
    """Per position: largest |difference| of logits, KL(first || second) in nats, whether the likeliest token agrees.

    `max_difference` is over all positions; `mtp_max_difference` over the draft stages', None without them in both.
    `first_module` is the first module whose output differs in any bit, at `first_position`.
    """

    bit_equal: bool
    max_difference: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    mtp_max_difference: float | None
    first_module: str | None
    first_position: int | None
    difference: list[float]
    kl: list[float]
    top1: list[bool]

    def within(self, tolerance: float) -> bool:
        """Whether the two count as the same: bit-equal, or every logit within `tolerance`."""
        differences = [self.max_difference, self.mtp_max_difference or 0.0]
        return self.bit_equal or all(d <= tolerance for d in differences)

    def as_json(self) -> dict[str, Any]:
        """Every field, for `--json`."""
        return asdict(self)


def _same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.to(torch.float64), dim=-1)


def _by_rows(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], one: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """`measure` of every row, some rows at a time: float64 copies of all logits take several times their memory."""
    count = -(-len(one) // ROWS_AT_ONCE)
    pieces = zip(one.tensor_split(count), other.tensor_split(count), strict=True)
    return torch.cat([measure(*rows) for rows in pieces])


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(one || other) of each row, float64 [n], at least 0: rounding can give a tiny negative sum."""
    first, second = _log_probabilities(one), _log_probabilities(other)
    return (first.exp() * (first - second)).sum(-1).clamp(min=0)


def _difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Largest |difference| of each row; a NaN on one side only is infinitely far."""
    far = (one.to(torch.float64) - other.to(torch.float64)).abs()
    both = (one == other) | (one.isnan() & other.isnan())
    return far.masked_fill(both, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).amax(-1)


def compare(one: Run, other: Run) -> Comparison:
    """The comparison of two runs on the same tokens. Raises InputError if their vocabularies differ."""
    a, b = one.evaluation, other.evaluation
    if a.logits.shape != b.logits.shape:
        raise InputError(
            f"the vocabularies have {a.logits.shape[-1]} and {b.logits.shape[-1]} tokens",
            "Only checkpoints of the same model can be compared.",
        )
    difference, kl = _by_rows(_difference, a.logits, b.logits), _by_rows(_kl, a.logits, b.logits)
    top1 = a.logits.argmax(-1) == b.logits.argmax(-1)
    drafts, mtp = (a.draft_logits, b.draft_logits), None
    if drafts[0] is not None and drafts[1] is not None and drafts[0].shape == drafts[1].shape:
        mtp = float(_by_rows(_difference, drafts[0], drafts[1]).max())
    traced = one.fingerprints is not None and other.fingerprints is not None
    parted = one.fingerprints.first_difference(other.fingerprints) if traced else None  # type: ignore[union-attr, arg-type]
    return Comparison(
        bit_equal=_same_bits(a.logits, b.logits) and _same_bits(*drafts),
        max_difference=float(difference.max()),
        mean_kl=float(np.mean(kl.numpy())),
        max_kl=float(kl.max()),
        top1_agreement=float(top1.to(torch.float64).mean()),
        mtp_max_difference=mtp,
        first_module=parted[0] if parted else None,
        first_position=parted[1] if parted else None,
        difference=difference.tolist(),
        kl=kl.tolist(),
        top1=top1.tolist(),
    )
