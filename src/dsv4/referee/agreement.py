"""Decides whether a server's log-probabilities differ from dsv4's by more than noise.

Two floors are measured in the same run, per position: the server against itself (the same request twice), and dsv4
with the release's simulated quantizations against dsv4 in float32. An engine that computes the right model may differ
from us by about as much. The verdict is DIFFERS if the mean difference exceeds twice the larger floor's mean, or any
position exceeds three times the largest difference that a floor has anywhere, or the server's floor exceeds twice ours.

The KL divergence is over the tokens that the server lists, with all others as one bucket, so it is a lower bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .scores import Scores, likeliest

MEAN_FACTOR, WORST_FACTOR = 2.0, 3.0
ROUNDING = 1e-3  # nats; servers may print few decimals
CHANCE_NATS = 1.5  # so near to a uniform guess, or worse, counts as chance
PERCENTILES = (50, 95, 99)
MOST_SHIFT = 2


@dataclass(frozen=True)
class Ours:
    """dsv4's log-probabilities for one prompt: its tokens', those a server listed, and the likeliest token."""

    actual: list[float]
    top: list[dict[int, float]]
    best: list[int]


@dataclass(frozen=True)
class PromptAgreement:
    """One prompt, by position. NaN: not compared, because the server does not list the token. top1: same likeliest."""

    difference: list[float]
    kl: list[float]
    top1: list[bool]


@dataclass(frozen=True)
class Floor:
    """Differences that are noise, over all positions compared."""

    mean: float
    worst: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Floor":
        """Of some differences, NaN left out."""
        usable = [value for value in differences if math.isfinite(value)]
        return cls(fmean(usable), max(usable)) if usable else cls(0.0, 0.0)


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """|a - b| per position; NaN where a token was not listed on one side."""
    pairs = zip(one, other, strict=True)
    return [abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.nan for a, b in pairs]


def kl_lower_bound(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """KL(ours || theirs) in nats over the tokens both list and one bucket for the rest; NaN if none is listed."""
    shared = [token for token in theirs if token in ours and math.isfinite(theirs[token])]
    if not shared:
        return math.nan
    p, q = ([math.exp(side[token]) for token in shared] for side in (ours, theirs))
    rest = max(1.0 - math.fsum(p), 0.0), max(1.0 - math.fsum(q), 1e-12)
    pairs = [*zip(p, q, strict=True), rest]
    return max(0.0, math.fsum(a * math.log(a / max(b, 1e-300)) for a, b in pairs if a > 0))


def compare_prompt(ours: Ours, theirs: Scores) -> PromptAgreement:
    """All positions of one prompt."""
    kl = [kl_lower_bound(a, b) for a, b in zip(ours.top, theirs.top, strict=True)]
    top1 = [likeliest(listed) == best for listed, best in zip(theirs.top, ours.best, strict=True) if listed]
    return PromptAgreement(differences(ours.actual, theirs.actual), kl, top1)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Agreement:
    """The result over all prompts. `cause` says what a difference looks like, "" for no known pattern."""

    agrees: bool
    cause: str
    prompts: list[PromptAgreement]
    server_floor: Floor
    own_floor: Floor
    mean_limit: float
    worst_limit: float
    first_off: tuple[int, int] | None  # prompt, position

    @property
    def compared(self) -> list[float]:
        """The differences of all positions that could be compared."""
        return [value for prompt in self.prompts for value in prompt.difference if math.isfinite(value)]

    def as_json(self) -> dict[str, Any]:
        """Numbers in sum and by position; null for what was not compared."""
        values, kl = self.compared, [v for prompt in self.prompts for v in prompt.kl if math.isfinite(v)]
        top1 = [same for prompt in self.prompts for same in prompt.top1]
        return {
            "agrees": self.agrees,
            "cause": self.cause or None,
            "positions_compared": len(values),
            "mean_difference": fmean(values) if values else None,
            "max_difference": max(values, default=None),
            "percentiles": {str(p): percentile(values, p) for p in PERCENTILES} if values else None,
            "top1_agreement": fmean(top1) if top1 else None,
            "mean_kl_lower_bound": fmean(kl) if kl else None,
            "floors": {"server": vars(self.server_floor), "dsv4": vars(self.own_floor)},
            "limits": {"mean": self.mean_limit, "position": self.worst_limit},
            "first_off": self.first_off and {"prompt": self.first_off[0], "position": self.first_off[1]},
            "prompts": [
                {name: [None if isinstance(v, float) and math.isnan(v) else v for v in column]
                 for name, column in vars(prompt).items()}
                for prompt in self.prompts
            ],
        }  # fmt: skip


def _first_off(prompts: Sequence[PromptAgreement], limit: float) -> tuple[int, int] | None:
    for number, prompt in enumerate(prompts):
        for position, value in enumerate(prompt.difference):
            if value > limit:
                return number, position
    return None


def _other_tokens(theirs: Sequence[Scores]) -> str:
    for number, scores in enumerate(theirs):
        if scores.other_tokens is not None:
            return (
                f"the server scored other tokens than were sent, from position {scores.other_tokens} of prompt "
                f"{number} on: it changes the prompt, by a token in front (BOS) or a template of its own"
            )
        if (position := scores.not_a_number) is not None:
            where = f"position {position} of prompt {number}"
            return f"the server computed no number at {where}: a NaN in its weights or kernels"
    return ""


def _contradicts_itself(server: Floor, own: Floor) -> str:
    """Whether the same request twice gives numbers so different that nothing can be compared with them."""
    if server.mean <= MEAN_FACTOR * own.mean + ROUNDING:
        return ""
    return (
        f"the server contradicts itself: the same request twice differs by a mean of {server.mean:.3g} nats, the "
        f"release's quantizations by {own.mean:.3g}: unstable kernels, or other requests and a cache change them"
    )


def _mean(values: Sequence[float]) -> float:
    usable = [value for value in values if math.isfinite(value)]
    return fmean(usable) if usable else 0.0


def _shifted(ours: Sequence[Ours], theirs: Sequence[Scores], limit: float) -> str:
    """Whether the server's numbers are ours of a neighbouring position."""
    for shift in (shift for step in range(1, MOST_SHIFT + 1) for shift in (step, -step)):
        moved = []
        for one, other in zip(ours, theirs, strict=True):
            a, b = (one.actual, other.actual) if shift > 0 else (other.actual, one.actual)
            moved += differences(a[: -abs(shift)], b[abs(shift) :])
        if len(moved) > 4 and _mean(moved) <= limit:
            where = "later" if shift > 0 else "earlier"
            return f"the server's numbers are dsv4's {abs(shift)} position(s) {where}: the prompt is shifted"
    return ""


def _chance(ours: Sequence[Ours], theirs: Sequence[Scores], vocabulary: int) -> str:
    server = _mean([value for scores in theirs for value in scores.actual])
    own = _mean([value for each in ours for value in each.actual])
    if server < CHANCE_NATS - math.log(vocabulary) and own > server + CHANCE_NATS:
        return (
            "the server guesses at chance level from the first token: its weights are not the model's, as when block "
            "scales are read in the wrong dtype, or a weight is loaded without its scale"
        )
    return ""


def _course(prompts: Sequence[PromptAgreement], limit: float) -> str:
    """The course of the difference along the longest prompt, as a phrase."""
    longest = max(prompts, key=lambda prompt: len(prompt.difference)).difference
    quarter = len(longest) // 4
    if quarter < 4:
        return ""
    first, last = _mean(longest[:quarter]), _mean(longest[-quarter:])
    if first <= limit and last > 3 * max(first, limit / 3):
        return (
            "the difference grows with the position: as when YaRN (rope_scaling) is lost, or the window or the "
            "compressed keys are cut"
        )
    if last <= limit and first > 3 * max(last, limit / 3):
        return (
            "only the beginning differs: the server's prompt starts otherwise, as with another reasoning prefix or a "
            "token in front"
        )
    return ""


def judge(
    ours: Sequence[Ours],
    theirs: Sequence[Scores],
    server_noise: Sequence[float],
    own_noise: Sequence[float],
    vocabulary: int,
) -> Agreement:
    """The verdict over all prompts, and the cause of a difference where its pattern is known."""
    prompts = [compare_prompt(one, other) for one, other in zip(ours, theirs, strict=True)]
    server, own = Floor.of(server_noise), Floor.of(own_noise)
    mean_limit = MEAN_FACTOR * max(server.mean, own.mean) + ROUNDING
    worst_limit = WORST_FACTOR * max(server.worst, own.worst) + ROUNDING
    first_off = _first_off(prompts, worst_limit)
    broken = _other_tokens(theirs) or _contradicts_itself(server, own)
    agrees = not broken and first_off is None and _mean([v for p in prompts for v in p.difference]) <= mean_limit
    cause = "" if agrees else broken or _shifted(ours, theirs, mean_limit) or _chance(ours, theirs, vocabulary)
    if not agrees and not cause:
        cause = _course(prompts, mean_limit)
    return Agreement(agrees, cause, prompts, server, own, mean_limit, worst_limit, first_off)
