"""Log-probabilities of one prompt, and their conversion from a server's JSON.

A prompt of n tokens has n - 1 scored positions: position p holds the log-probability of token p + 1 after tokens 0..p,
and the likeliest tokens there. Numbers are natural logarithms. JSON has no NaN: a server that computed one sends `null`
or -9999, which become NaN here, and never a number that is averaged.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.errors import MachineError

UNLISTED = -math.inf  # the token was not among those that the server lists
NOT_A_LOGARITHM = -9000.0  # servers write -9999 or less for what they could not compute


@dataclass(frozen=True)
class Scores:
    """Of one prompt: log-probabilities of its tokens from the second on, and those of the likeliest at each position.

    `other_tokens` names the first position at which the server scored another token than was sent, None if nowhere.
    """

    actual: list[float]
    top: list[dict[int, float]]
    other_tokens: int | None = None

    @property
    def not_a_number(self) -> int | None:
        """The first position for which the server computed no number."""
        return next((p for p, value in enumerate(self.actual) if math.isnan(value)), None)


def number(value: Any) -> float:
    """A log-probability as JSON holds it. NaN for null, -9999, an infinity, and what is no number at all."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not NOT_A_LOGARITHM < value < math.inf:
        return math.nan
    return float(value)


def lacks(server: str, what: str, why: str = "") -> MachineError:
    """The error for an answer that this kind of server does not give."""
    return MachineError(
        f"{server} answered without {what}", why or "Check that it is this kind of server (--server names another)."
    )


def member(value: Any, server: str, *path: str | int) -> Any:
    """A part of an answer by names and indices. Raises MachineError that names the part which is missing."""
    for depth, step in enumerate(path):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            name = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in path[: depth + 1]).lstrip(".")
            raise lacks(server, f"'{name}'") from None
    return value


def complete(found: list[Any], wanted: int, server: str) -> list[Any]:
    """The list itself. Raises MachineError if the server scored fewer or more positions than there are."""
    if len(found) != wanted:
        raise MachineError(
            f"{server} scored {len(found)} of {wanted} tokens",
            "A limit on the context or on log-probabilities may cut the prompt: see how the server was started.",
        )
    return found


def refuse_constant(scores: Iterable[Scores], server: str) -> None:
    """Raise MachineError if every number is the same: some public APIs answer 0 or -9999 for all tokens."""
    values = [value for each in scores for value in each.actual]
    unusable = [value for value in values if math.isnan(value)]
    if len(values) > 1 and (len(unusable) == len(values) or (not unusable and len(set(values)) == 1)):
        said = "no number" if unusable else f"{values[0]:g}"
        raise MachineError(
            f"{server} gives {said} for every token: it does not compute log-probabilities of the prompt",
            "Ask the engine itself, not an API in front of it.",
        )


def likeliest(pairs: Mapping[int, float]) -> int | None:
    """The token with the largest log-probability, the smaller id of two that are equal."""
    usable = {token: value for token, value in pairs.items() if math.isfinite(value)}
    return min(usable, key=lambda token: (-usable[token], token)) if usable else None
