"""What equal blocks say of those that were not compared.

If each block is broken with probability 1/K, independently of the draw, N blocks of which none is broken have the
probability (1 - 1/K)^N. The verdict names the K for which that is about one in a hundred. The formula takes no
credit for the finite number of blocks, so it never promises too much. It does assume that broken blocks are
scattered: where a fault breaks whole rows of blocks, a row counts as one block, and `missed_if_whole_rows_break`
in the JSON is the probability.
"""

import math
from dataclasses import dataclass
from typing import Any

MISSED = 0.01  # the probability for which the verdict names a K


def missed(drawn: int, one_in: int) -> float:
    """The probability that none of `drawn` blocks is broken if one in `one_in` is."""
    return (1 - 1 / one_in) ** drawn


def detectable(drawn: int) -> int:
    """The largest K, to two digits, for which `missed(drawn, K)` is at most MISSED; at least 2."""
    exact = -1 / math.expm1(math.log(MISSED) / max(drawn, 1))
    unit: int = 10 ** max(0, len(str(int(exact))) - 2)
    return max(2, int(exact) // unit * unit)


@dataclass(frozen=True)
class Audit:
    """A draw of blocks: `rows` rows of blocks in all; kinds: kind of tensor -> (blocks drawn, all blocks)."""

    share: float
    seed: int
    rows: int
    kinds: dict[str, tuple[int, int]]

    @property
    def drawn(self) -> int:
        """Blocks that are compared."""
        return sum(drawn for drawn, _ in self.kinds.values())

    @property
    def blocks(self) -> int:
        """All blocks."""
        return sum(blocks for _, blocks in self.kinds.values())

    @property
    def percent(self) -> float:
        """The blocks that are compared, in percent of all."""
        return 100 * self.drawn / max(self.blocks, 1)

    @property
    def described(self) -> str:
        """What is compared, in words."""
        return f"a sample of {self.drawn:,} blocks of {self.blocks:,}, seed {self.seed}"

    @property
    def words(self) -> str:
        """The numbers of the verdict."""
        one_in = detectable(self.drawn)
        chance = f"a converter that breaks 1 block in {one_in:,} is missed with probability "
        share = f"{self.percent:.3g} % of all"
        return f"in {self.drawn:,} blocks of {self.blocks:,} ({share}; {chance}{missed(self.drawn, one_in):.2g})"

    def to_json(self) -> dict[str, Any]:
        """All that is needed to repeat the draw, and what it says."""
        one_in = detectable(self.drawn)
        return {
            "share": self.share,
            "seed": self.seed,
            "blocks": self.drawn,
            "of_blocks": self.blocks,
            "percent": self.percent,
            "rows_of_blocks": self.rows,
            "broken_one_in": one_in,
            "missed": missed(self.drawn, one_in),
            "missed_if_whole_rows_break": missed(self.rows, one_in),
            "kinds": {kind: {"blocks": drawn, "of_blocks": blocks} for kind, (drawn, blocks) in self.kinds.items()},
        }
