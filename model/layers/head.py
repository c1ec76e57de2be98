"""The end of a stack: the streams become one vector, then norm and logits."""

import torch

from dsv4.model.config import Config
from dsv4.model.weight_store import WeightView

from .numerics import Numerics


class OutputHead:
    """Norm and output matrix, which `shared` has: every stack ends in the same one."""

    def __init__(self, config: Config, weights: WeightView, shared: WeightView, numerics: Numerics) -> None:
        self._config, self._weights, self._shared, self._numerics = config, weights, shared, numerics

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> logits float32 [T, V]. The vocabulary is what tensor parallelism splits here."""
        x = self._numerics.kernels.rms_norm(x, self._weights.vector("norm.weight"), self._config.rms_norm_eps)
        return self._numerics.group.all_gather(self._numerics.linear(x, self._shared.matrix("head.weight")))


class Head(OutputHead):
    """The head of V4's main stack or of an MTP block, whose streams a hyper-connection makes one."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h [T, n, D] -> logits float32 [T, V]."""
        return super().__call__(self.vector(h))

    def vector(self, h: torch.Tensor) -> torch.Tensor:
        """The streams [T, n, D] as one vector [T, D], before the norm."""
        config, weights, head_vector = self._config, self._weights, self._numerics.kernels.head_vector
        scale, base = weights.vector("hc_head_scale"), weights.vector("hc_head_base")
        return head_vector(h, weights.matrix("hc_head_fn"), scale, base, config.rms_norm_eps, config.hc_eps)
