"""Manifold-constrained hyper-connections (mHC): n residual streams around every sublayer.

Names are the reference's: `hc_pre` makes the streams one input, `hc_post` makes output and old streams new streams, and
`comb`, which mixes the streams, is made nearly doubly stochastic by Sinkhorn's iterations.
"""

import torch

from dsv4.model.config import Config
from dsv4.model.weight_store import WeightView

from .numerics import Numerics


def mean_of_streams(h: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """The mean of the streams: h [T, n, D] -> [T, D], which draft stages read."""
    share = torch.full(h.shape[:2], 1 / h.shape[1], dtype=torch.float32, device=h.device)
    return numerics.kernels.hc_pre(share, h)


class HyperConnection:
    """mHC around one sublayer, "attn" or "ffn": its weights from the streams that enter, and the streams that leave."""

    def __init__(self, config: Config, weights: WeightView, sublayer: str, numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self._prefix = f"hc_{sublayer}_"

    def mixes(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [T, n, D] -> pre [T, n], post [T, n], comb [T, n, n]: the weights for `hc_pre` and `hc_post`, float32."""
        config, weights, prefix = self._config, self._weights, self._prefix
        scale, base = weights.vector(prefix + "scale"), weights.vector(prefix + "base")
        iterations, mixes = config.hc_sinkhorn_iters, self._numerics.kernels.hc_mixes
        fn, eps = weights.matrix(prefix + "fn"), config.hc_eps
        return mixes(h, fn, scale, base, iterations, config.rms_norm_eps, eps)

    def post(self, output: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        """output [T, D], old h [T, n, D] -> new h: post_k * output + sum_j comb[j, k] h_j."""
        return self._numerics.kernels.hc_post(output, h, post, comb)
