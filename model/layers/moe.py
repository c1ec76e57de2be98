"""The mixture of experts: gate, chosen experts, shared expert.

The gate scores are `sqrt(softplus(W x))`. On the first `num_hash_layers` layers a table says which experts a token id
uses; elsewhere the top k of score + bias are chosen. In both cases an expert's weight is its score WITHOUT the bias,
over the sum of the chosen scores, and it multiplies the activation BEFORE the expert's last matrix.
Experts are added up in the order of their number. Ranks that compute together have whole experts each, and bring the
outputs together before anything is added, so that the order is the same for any number of ranks.
"""

import torch

from dsv4.model.config import Config
from dsv4.model.kernels.deterministic import tree_sum
from dsv4.model.parallel import SINGLE
from dsv4.model.weight_store import WeightView

from .numerics import Numerics


class Gate:
    """Which experts each token uses, and how much."""

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
        return experts, chosen / tree_sum(chosen).unsqueeze(-1) * self._config.routed_scaling_factor


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
        gate, up = (numerics.product(x, weights.matrix(name)) for name in ("w1.weight", "w3.weight"))
        activation = numerics.kernels.swiglu(gate, up, self._config.swiglu_limit, share)
        return ranks.all_gather(numerics.quantized_linear(ranks.all_gather(activation), weights.matrix("w2.weight")))

    def _routed(self, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Outputs of the chosen experts for quantized x, [T, k, D] in its dtype, by the ranks that have them."""
        outputs = torch.zeros(*experts.shape, x.shape[-1], dtype=x.dtype, device=x.device)
        mine = self._numerics.group.experts(self._config)
        for expert in sorted(set(experts.flatten().tolist()) & set(mine)):
            rows, slot = (experts == expert).nonzero(as_tuple=True)
            weights = self._weights.view(f"experts.{expert}.")
            outputs[rows, slot] = self._expert(x[rows], weights, shares[rows, slot])
        return self._numerics.group.all_reduce_disjoint(outputs)

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], ids [T] -> output [T, D] and the experts chosen [T, k]."""
        experts, shares = self.gate(x, token_ids)
        quantized = self._numerics.quantize(x)
        outputs = self._routed(quantized, experts, shares)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(experts.flatten().tolist())):
            rows, slot = (experts == expert).nonzero(as_tuple=True)
            total[rows] += outputs[rows, slot].to(torch.float32)
        shared = self._expert(quantized, self._weights.view("shared_experts."), None)
        return (total + shared.to(torch.float32)).to(x.dtype), experts
