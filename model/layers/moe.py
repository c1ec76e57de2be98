"""The mixture of experts: gate, chosen experts, shared expert.

The gate scores are `sqrt(softplus(W x))`. On the first `num_hash_layers` layers a table says which experts a token id
uses; elsewhere the top k of score + bias are chosen. In both cases an expert's weight is its score WITHOUT the bias,
over the sum of the chosen scores (V4.1 adds 1e-20 to it), and it multiplies the activation BEFORE the expert's last
matrix.
Outputs of experts are added in the order of the experts' numbers. Each rank has whole experts, and the ranks exchange
the outputs before they are added, so the order is the same for any number of ranks.
Experts that are not in memory are read from the files while the shared expert and those before them are computed.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from dsv4.model.config import Config
from dsv4.model.kernels.deterministic import tree_sum
from dsv4.model.kernels.reference import Product
from dsv4.model.parallel import SINGLE
from dsv4.model.weight_store import WeightView

from .numerics import Numerics

EXPERT_MATRICES = ("w1.weight", "w3.weight", "w2.weight")  # in the order of use
ROWS_TOGETHER = 64  # of tokens times experts; with more, a matrix is enough work for one call


class Gate:
    """The gate: the experts of each token and their weights."""

    def __init__(self, config: Config, layer: int, weights: WeightView, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self._hash = layer < config.num_hash_layers

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], ids [T] -> experts int64 [T, k], weights float32 [T, k]."""
        scores = self._numerics.kernels.sqrtsoftplus(self._numerics.linear(x, self._weights.matrix("weight")))
        if self._hash:
            experts = self._weights.vector("tid2eid")[token_ids]
        else:
            biased = scores + self._weights.vector("bias")
            experts = biased.sort(dim=-1, descending=True, stable=True).indices[:, : self._config.num_experts_per_tok]
        chosen = scores.gather(1, experts)
        return experts, chosen / (
            tree_sum(chosen).unsqueeze(-1) + self._config.gate_epsilon
        ) * self._config.routed_scaling_factor


def by_expert(experts: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """experts int64 [T, k], numbers below `count` -> each that occurs, ascending, and its places in the flat list.

    The numbers come to the host in one transfer, so that a device waits once a layer and not once an expert.
    """
    numbers, order = experts.flatten().sort(stable=True)
    edges = torch.searchsorted(numbers, torch.arange(count + 1, device=experts.device)).tolist()
    for expert, (first, last) in enumerate(pairwise(edges)):
        if last > first:
            yield expert, order[first:last]


def in_order_of_experts(outputs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """outputs [T, k, D] of the chosen experts -> float32 [T, D], their sum in the order of the experts' numbers."""
    order = experts.sort(dim=1, stable=True).indices.unsqueeze(-1)
    total = torch.zeros(len(outputs), outputs.shape[2], dtype=torch.float32, device=outputs.device)
    for slot in range(outputs.shape[1]):
        chosen = order[:, slot : slot + 1].expand(-1, -1, outputs.shape[2])
        total += outputs.gather(1, chosen).squeeze(1)
    return total


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
        gate, up = (numerics.product(x, weights.matrix(name)) for name in inward)
        activation = numerics.kernels.swiglu(gate, up, self._config.swiglu_limit, share)
        return ranks.all_gather(numerics.quantized_linear(ranks.all_gather(activation), weights.matrix(outward)))

    def _mine(self, experts: torch.Tensor) -> dict[int, torch.Tensor]:
        """The chosen experts that this rank has, ascending: places of each in the flat list of experts [T, k].

        Their matrices are read from now on, if they are in the files.
        """
        config = self._config
        found, mine = by_expert(experts, config.n_routed_experts), self._numerics.group.experts(config)
        chosen = {expert: places for expert, places in found if expert in mine}
        self._weights.expect([f"experts.{expert}.{name}" for expert in chosen for name in EXPERT_MATRICES])
        return chosen

    def _experts_together(self, rows: dict[int, torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
        """What `_expert` gives for each routed expert's rows [t, D], in that order, by few calls of the kernels.

        shares: of all rows. Returns [sum of t, D].
        """
        numerics, linears = self._numerics, self._numerics.kernels.linears
        views = {expert: self._weights.view(f"experts.{expert}.") for expert in rows}

        def products(inputs: Iterable[torch.Tensor], name: str) -> list[Product]:
            return [Product(x, view.matrix(name)) for x, view in zip(inputs, views.values(), strict=True)]

        both = linears([*products(rows.values(), "w1.weight"), *products(rows.values(), "w3.weight")], numerics.dtype)
        gate, up = torch.cat(both[: len(rows)]), torch.cat(both[len(rows) :])
        activation = numerics.quantize(numerics.kernels.swiglu(gate, up, self._config.swiglu_limit, shares))
        parts = torch.split(activation, [len(x) for x in rows.values()])
        return torch.cat(linears(products(parts, "w2.weight"), numerics.dtype))

    def _routed(self, x: torch.Tensor, experts: dict[int, torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
        """Outputs of the chosen experts for quantized x, [T, k, D] in its dtype, by the ranks that have them."""
        outputs = torch.zeros(shares.numel(), x.shape[-1], dtype=x.dtype, device=x.device)
        if self._weights.keep_everything and outputs.shape[0] <= ROWS_TOGETHER and experts:
            places = torch.cat(list(experts.values()))
            rows = {expert: x[places // shares.shape[1]] for expert, places in experts.items()}
            outputs[places] = self._experts_together(rows, shares.flatten()[places])
        else:
            for expert, places in experts.items():
                weights = self._weights.view(f"experts.{expert}.")
                outputs[places] = self._expert(x[places // shares.shape[1]], weights, shares.flatten()[places])
        return self._numerics.group.all_reduce_disjoint(outputs.view(*shares.shape, -1))

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], ids [T] -> output [T, D] and the experts chosen [T, k]."""
        experts, shares = self.gate(x, token_ids)
        mine = self._mine(experts)
        quantized = self._numerics.quantize(x)
        shared = self._expert(quantized, self._weights.view("shared_experts."), None)
        total = in_order_of_experts(self._routed(quantized, mine, shares), experts)
        return (total + shared.to(torch.float32)).to(x.dtype), experts
