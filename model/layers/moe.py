"""The mixture of experts: gate, chosen experts, shared expert.

The gate scores are `sqrt(softplus(W x))`. On the first `num_hash_layers` layers a table says which experts a token id
uses; elsewhere the top k of score + bias are chosen. In both cases an expert's weight is its score WITHOUT the bias,
over the sum of the chosen scores (V4.1 adds 1e-20 to it), and it multiplies the activation BEFORE the expert's last
matrix.
Outputs of experts are added in the order of the experts' numbers. Each rank has whole experts, and the ranks exchange
the outputs before they are added, so the order is the same for any number of ranks.
Experts that are not in memory are read from the files while the shared expert and those before them are computed.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from dsv4.model.config import Config
from dsv4.model.kernels.reference import Expert, Experts, Product
from dsv4.model.parallel import SINGLE
from dsv4.model.weight_store import WeightView

from .numerics import Numerics

EXPERT_MATRICES = ("w1.weight", "w3.weight", "w2.weight")  # in the order of use, as in `Expert`
ROWS_TOGETHER = 64  # of tokens times experts; with more, a matrix is enough work for one call


def matrices_of(expert: int) -> list[str]:
    """The names of a routed expert's matrices."""
    return [f"experts.{expert}.{name}" for name in EXPERT_MATRICES]


class Gate:
    """The gate: the experts of each token and their weights."""

    def __init__(self, config: Config, layer: int, weights: WeightView, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self._hash = layer < config.num_hash_layers

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], ids [T] -> experts int64 [T, k], weights float32 [T, k]."""
        config, weights = self._config, self._weights
        experts = weights.vector("tid2eid")[token_ids] if self._hash else None
        bias = None if self._hash else weights.vector("bias")
        return self._numerics.kernels.gate(
            x, weights.matrix("weight"), bias, experts, config.num_experts_per_tok, config.gate_epsilon,
            config.routed_scaling_factor,
        )  # fmt: skip


class Chosen(NamedTuple):
    """Experts that tokens chose, ascending, how often each was, and its places in the flat list [T, k], one after the
    other."""

    experts: list[int]
    counts: list[int]
    places: torch.Tensor  # int64 [sum of counts]


def by_expert(experts: torch.Tensor, mine: range) -> Chosen:
    """experts int64 [T, k] -> those of them that are in `mine`.

    The numbers come to the host in one transfer, so that a device waits once a layer and not once an expert.
    """
    numbers, order = experts.flatten().sort(stable=True)
    edges = torch.searchsorted(numbers, torch.arange(mine.start, mine.stop + 1, device=experts.device)).tolist()
    counts = {expert: last - first for expert, (first, last) in zip(mine, pairwise(edges), strict=True) if last > first}
    return Chosen(list(counts), list(counts.values()), order[edges[0] : edges[-1]])


class MixtureOfExperts:
    """One feed-forward sublayer."""

    def __init__(self, config: Config, layer: int, weights: WeightView, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self.gate = Gate(config, layer, weights.view("gate."), numerics)

    def _expert(self, x: torch.Tensor, weights: WeightView, share: torch.Tensor | None) -> torch.Tensor:
        """Quantized x [t, D] -> [t, D]; `share` [t] multiplies the activation before w2, None for the shared expert.

        Of the shared expert each rank has some rows of each matrix, of a routed one all or nothing.
        """
        numerics, ranks = self._numerics, self._numerics.group if share is None else SINGLE
        *inward, outward = EXPERT_MATRICES
        if self._weights.keep_everything:
            products = [Product(x, weights.matrix(name)) for name in inward]
            gate, up = x.new_empty(2, len(x), products[0].matrix.shape[0])
            numerics.kernels.linears_into(products, [gate, up])
        else:  # each may need the memory of the one before it
            gate, up = (numerics.product(x, weights.matrix(name)) for name in inward)
        activation = numerics.kernels.swiglu(gate, up, self._config.swiglu_limit, share)
        return ranks.all_gather(numerics.quantized_linear(ranks.all_gather(activation), weights.matrix(outward)))

    def foresee(self, x: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Announce what the gate chooses for an input [T, D] which resembles that of the next call: the surer half.

        Before attention a layer of random weights foresees 76 to 92 % of its experts, and nearly always the first one.
        """
        experts, shares = self.gate(x, token_ids)
        sums = torch.zeros(self._config.n_routed_experts, device=x.device)
        sums.index_add_(0, experts.flatten(), shares.flatten())
        mine = self._numerics.group.experts(self._config)
        values, order = sums.sort(descending=True)
        surest = [expert for expert in order[values > 0].tolist() if expert in mine]
        half = surest[: -(-len(surest) // 2)]
        self._weights.foresee(name for expert in half for name in matrices_of(expert))

    def _mine(self, experts: torch.Tensor) -> tuple[Chosen, list[int]]:
        """The chosen experts that this rank has, and the order in which they will be in memory.

        Their matrices are read from now on, if they are in the files.
        """
        chosen = by_expert(experts, self._numerics.group.experts(self._config))
        return chosen, self._weights.expect([matrices_of(expert) for expert in chosen.experts])

    def _together(
        self,
        folders: Sequence[str],
        inputs: Sequence[torch.Tensor],
        shares: torch.Tensor,
        results: Iterable[torch.Tensor],
    ) -> None:
        """What `_expert` gives for several experts, one after the other, by few calls of the kernels.

        Of each expert: where its matrices are, quantized x [t, D], and the result [t, D]; shares [sum of t].
        """
        numerics, into = self._numerics, self._numerics.kernels.linears_into
        w1, w3, w2 = ([self._weights.matrix(folder + name) for folder in folders] for name in EXPERT_MATRICES)
        counts = [len(x) for x in inputs]
        gate, up = inputs[0].new_empty(2, sum(counts), w1[0].shape[0])
        inward = [Product(x, matrix) for matrices in (w1, w3) for x, matrix in zip(inputs, matrices, strict=True)]
        into(inward, [*torch.split(gate, counts), *torch.split(up, counts)])
        activation = numerics.quantize(numerics.kernels.swiglu(gate, up, self._config.swiglu_limit, shares))
        into([Product(x, w) for x, w in zip(torch.split(activation, counts), w2, strict=True)], list(results))

    def _routed(self, x: torch.Tensor, chosen: Chosen, order: list[int], shares: torch.Tensor) -> torch.Tensor:
        """Outputs of the chosen experts for quantized x, [T, k, D] in its dtype, by the ranks that have them."""
        fresh = x.new_empty if self._numerics.group.count == 1 else x.new_zeros  # where one rank writes every row
        outputs, own = fresh(shares.numel(), x.shape[-1]), shares.flatten()[chosen.places]
        tokens = chosen.places // shares.shape[1]
        if self._weights.keep_everything and outputs.shape[0] <= ROWS_TOGETHER and chosen.experts:
            rows, folders = x[tokens], [f"experts.{expert}." for expert in chosen.experts]
            result = torch.empty_like(rows)
            self._together(folders, torch.split(rows, chosen.counts), own, torch.split(result, chosen.counts))
            outputs[chosen.places] = result
        else:
            parts = [torch.split(part, chosen.counts) for part in (chosen.places, tokens, own)]
            for number in order:
                places, some, share = (part[number] for part in parts)
                rows = torch.index_select(x, 0, some)  # copies whole rows, which indexing does not
                outputs[places] = self._expert(rows, self._weights.view(f"experts.{chosen.experts[number]}."), share)
        return self._numerics.group.all_reduce_disjoint(outputs.view(*shares.shape, -1))

    @cached_property
    def _all(self) -> Experts:
        """Every expert, where all stay in memory."""
        folders = [*(f"experts.{expert}." for expert in range(self._config.n_routed_experts)), "shared_experts."]
        return Experts([Expert(*(self._weights.matrix(f + name) for name in EXPERT_MATRICES)) for f in folders])

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], ids [T] -> output [T, D] and the experts chosen [T, k]."""
        numerics, (experts, shares) = self._numerics, self.gate(x, token_ids)
        if len(x) == 1 and numerics.group.count == 1 and self._weights.keep_everything:
            limit, group = self._config.swiglu_limit, numerics.input_group
            return numerics.kernels.token_experts(x, self._all, experts, shares, limit, group), experts
        chosen, order = self._mine(experts)
        quantized = numerics.quantize(x)
        shared = self._expert(quantized, self._weights.view("shared_experts."), None)
        return numerics.kernels.add_experts(self._routed(quantized, chosen, order, shares), experts, shared), experts
