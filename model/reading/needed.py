"""What a run reads of a checkpoint: the weights that every token needs, experts that tokens choose, single rows.

Known from the headers, before anything is read: what it costs to run a checkpoint that is fetched as it is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.convert.checkpoint.names import block_of, expert_of, is_expert_matrix
from dsv4.convert.checkpoint.reader import Span
from dsv4.convert.checkpoint.weights import Weight
from dsv4.model.config import Config
from dsv4.model.weight_store import is_table
from dsv4.model.weights import EMBEDDING

from .matrices import spans_of


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: the bytes of each, in ascending order, and how many of them a token chooses."""

    sizes: tuple[int, ...]
    chosen: int

    def least(self) -> int:
        """Bytes at least, whatever the number of tokens: all of them may choose the same experts."""
        return sum(self.sizes[: self.chosen])

    def most(self, tokens: int | None) -> int:
        """Bytes at most for so many tokens; None for any number."""
        count = len(self.sizes) if tokens is None else min(len(self.sizes), tokens * self.chosen)
        return sum(self.sizes[len(self.sizes) - count :])


@dataclass(frozen=True)
class Needed:
    """always: bytes that every run reads. experts: bytes of all experts.

    row_bytes: of single rows, for each token at most.
    """

    always: list[Span]
    experts: list[Span]
    layers: list[Experts]
    row_bytes: int

    def experts_least(self) -> int:
        """Bytes of experts that a run reads at least."""
        return sum(layer.least() for layer in self.layers)

    def experts_most(self, tokens: int | None) -> int:
        """Bytes of experts that so many tokens read at most; None for any number of tokens."""
        return sum(layer.most(tokens) for layer in self.layers)


def _spans(weights: Iterable[Weight]) -> list[Span]:
    return [span for weight in weights for span in spans_of(weight)]


def bytes_of(spans: Iterable[Span]) -> int:
    """How many bytes these are."""
    return sum(stop - start for _, start, stop in spans)


def _by_layer(experts: Iterable[Weight], config: Config) -> list[Experts]:
    chosen = {"layers": config.num_experts_per_tok, "mtp": config.of_stages().num_experts_per_tok}
    sizes: dict[tuple[str, int], dict[int, int]] = {}
    for weight in experts:
        block, expert = block_of(weight.name), expert_of(weight.name)
        assert block is not None and expert is not None, "an expert is in a block"
        layer = sizes.setdefault((block.stack, block.number), {})
        layer[expert.number] = layer.get(expert.number, 0) + bytes_of(spans_of(weight))
    return [Experts(tuple(sorted(layer.values())), chosen[stack]) for (stack, _), layer in sizes.items()]


def _row_bytes(weights: dict[str, Weight], config: Config) -> int:
    """Bytes of the rows that a token reads: one of the embedding, several of each n-gram table."""
    found = 0
    for name, weight in weights.items():
        if name == EMBEDDING or is_table(name):
            found += (config.rows_per_table if is_table(name) else 1) * bytes_of(spans_of(weight, (0, 1)))
    return found


def needed_of(weights: dict[str, Weight], config: Config) -> Needed:
    """What a run of these weights reads, see `check_loadable`."""
    experts = [weight for name, weight in weights.items() if is_expert_matrix(name)]
    always = [w for name, w in weights.items() if not (is_expert_matrix(name) or is_table(name) or name == EMBEDDING)]
    return Needed(_spans(always), _spans(experts), _by_layer(experts, config), _row_bytes(weights, config))
