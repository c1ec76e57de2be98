"""Hashes token classes to rows of an n-gram table.

The n-gram that ends in a token is hashed by each of several heads: the products of its classes with odd multipliers,
joined by XOR, modulo a prime of the head. All primes of all layers differ, and a layer's heads have their rows one
after the other in its table.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from dsv4.errors import InputError

SEED_PER_LAYER = 10007
RELEASED_CLASSES = 99092
# The numbers of numpy's generator for the released number of classes, as constants: a seed's numbers may change between
# versions.
RELEASED_MULTIPLIERS = {
    1: (76632096046245, 4839876093313, 35959672319349, 73987337458391),
    14: (67716810739261, 51510806800915, 30921347202721, 82619226485591),
}


@dataclass(frozen=True)
class Engrams:
    """The n-gram tables in the config; `layers` and `rows` have an entry per table."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    longest: int
    heads: int
    width: int
    vocabulary: int
    pad_token: int
    classes: int

    @property
    def columns(self) -> int:
        """Rows that a token reads of a table."""
        return (self.longest - 1) * self.heads


def multipliers(layer: int, classes: int, count: int) -> torch.Tensor:
    """The odd multipliers of a layer, int64 [count]; times a class they stay below 2**63."""
    if classes == RELEASED_CLASSES and layer in RELEASED_MULTIPLIERS and count == len(RELEASED_MULTIPLIERS[layer]):
        return torch.tensor(RELEASED_MULTIPLIERS[layer], dtype=torch.int64)
    most = (2**63 - 1) // classes // 2
    drawn = np.random.default_rng(SEED_PER_LAYER * layer).integers(0, most, count)
    return torch.from_numpy(2 * drawn + 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@functools.cache
def primes_of_tables(engrams: Engrams) -> tuple[torch.Tensor, ...]:
    """The primes of each table, int64 [n-grams, heads]: the first ones from `vocabulary` on, none twice."""
    candidate = engrams.vocabulary
    found: list[int] = []
    count = len(engrams.layers) * engrams.columns
    while len(found) < count:
        if _is_prime(candidate):
            found.append(candidate)
        candidate += 1
    tables = torch.tensor(found, dtype=torch.int64).view(len(engrams.layers), engrams.longest - 1, engrams.heads)
    return tuple(tables)


class NGramHash:
    """The hash of one table."""

    def __init__(self, engrams: Engrams, table: int) -> None:
        self._multipliers = multipliers(engrams.layers[table], engrams.classes, engrams.longest)
        self._primes = primes_of_tables(engrams)[table]
        total = int(self._primes.sum())
        if total != engrams.rows[table]:
            raise InputError(
                f"config.json: engram_num_embeddings says {engrams.rows[table]} rows for layer "
                f"{engrams.layers[table]}, its primes from engram_vocab_size {engrams.vocabulary} on make {total}",
                "Copy config.json from the release.",
            )
        sizes = self._primes.flatten()
        self._offsets = (sizes.cumsum(0) - sizes).view(self._primes.shape)

    def rows(self, classes: torch.Tensor) -> torch.Tensor:
        """classes int64 [T, n], column i that of the token i places back -> rows of the table, int64 [T, columns]."""
        joined = classes[:, 0] * self._multipliers[0]
        found = []
        for i in range(1, classes.shape[1]):
            joined = joined ^ (classes[:, i] * self._multipliers[i])
            found.append(joined[:, None] % self._primes[i - 1] + self._offsets[i - 1])
        return torch.cat(found, dim=1)


def look_back(known: torch.Tensor, own: torch.Tensor, length: int, pad: int) -> torch.Tensor:
    """Classes of a sequence's tokens, int64 [T, length]: column i that of the token i places back, `pad` before it.

    known: the classes of the tokens before `own` [T]: all of them, or `length` - 1 at least.
    """
    padded = torch.cat((torch.full((length - 1,), pad, dtype=torch.int64), known, own))
    return padded.unfold(0, length, 1)[len(known) :].flip(-1)
