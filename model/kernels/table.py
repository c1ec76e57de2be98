"""The kernel table: which function does each hot operation, on which device.

    REFERENCE      the plain forms that define the result to the bit
    CPU            compiled C with the same bits, where a library can be built (`binding.library`)
    TORCH_DEVICE   every other device: torch's own functions, the same within the noise of float32
    CUDA           the same, with products of bfloat16 on the tensor cores and Triton's kernels (`cuda.py`)

One row is selected, once, when a model is loaded. Nothing else in the engine asks which device it computes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch

from dsv4.model.weights import Matrix
from dsv4.quant.activation import simulate_fp8

from . import binding, cpu, cpu_layers, reference, torch_device
from . import reference_small as small
from .reference import Experts, Product

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class KernelTable:
    """One row of the table. Signatures, shapes and dtypes are those of the reference forms, which are the defaults."""

    linear: Callable[..., torch.Tensor] = reference.linear
    # The methods below in one call each, where a row has it; None is returned where it has no form.
    at_once: Callable[[Sequence[Product], Sequence[torch.Tensor]], None] | None = None  # `linears_into`
    gate_at_once: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
    mixes_at_once: Callable[..., Tensors | None] | None = None
    experts_at_once: Callable[..., torch.Tensor | None] | None = None
    raw_at_once: Callable[..., torch.Tensor | None] | None = None
    head_at_once: Callable[..., torch.Tensor | None] | None = None
    # The same for what layers/attention.py does in single operations where a matrix may be read from the files.
    queries_at_once: Callable[..., Tensors | None] | None = None
    project_at_once: Callable[..., torch.Tensor | None] | None = None
    index_queries_at_once: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
    sparse_attention: Callable[..., torch.Tensor] = reference.sparse_attention
    index_scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = reference.index_scores
    simulate_index: Callable[[torch.Tensor], torch.Tensor] = small.simulate_index
    simulate_fp8: Callable[[torch.Tensor, int], torch.Tensor] = simulate_fp8
    simulate_key: Callable[[torch.Tensor, int, int], torch.Tensor] = small.simulate_key
    inverse_rms: Callable[[torch.Tensor, float], torch.Tensor] = small.inverse_rms
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = small.rms_norm
    head_norm: Callable[[torch.Tensor, float], torch.Tensor] = small.head_norm
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = small.rotate
    hc_split_sinkhorn: Callable[..., Tensors] = small.hc_split_sinkhorn
    hc_head_weights: Callable[..., torch.Tensor] = small.hc_head_weights
    hc_pre: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = small.hc_pre
    hc_input: Callable[..., torch.Tensor] = small.hc_input
    hc_post: Callable[..., torch.Tensor] = small.hc_post
    swiglu: Callable[..., torch.Tensor] = small.swiglu
    sqrtsoftplus: Callable[[torch.Tensor], torch.Tensor] = small.sqrtsoftplus
    pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = small.pool
    best_in_reach: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = small.best_in_reach
    list_keys: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = small.list_keys
    choose_experts: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = small.choose_experts
    expert_weights: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor] = small.expert_weights
    add_experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = small.add_experts
    engram_gate: Callable[..., torch.Tensor] = small.engram_gate

    def linears_into(self, products: Sequence[Product], results: Sequence[torch.Tensor]) -> None:
        """Products that do not depend on each other, into results [M, out]: as `linear` computes each in that dtype.

        A result may be a part of a larger tensor; the last dimension must be dense.
        """
        if self.at_once is not None:
            self.at_once(products, results)
            return
        for product, result in zip(products, results, strict=True):
            result.copy_(self.linear(*product, result.dtype))

    def gate(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        bias: torch.Tensor | None,
        experts: torch.Tensor | None,
        count: int,
        eps: float,
        factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] -> `count` experts of each token, int64 [T, count], and their weights float32 [T, count].

        The scores are sqrt(softplus) of the product with the matrix [E, D]. Either `bias` float32 [E] is given, which
        is added to them for the choice only, or `experts`.
        """
        if self.gate_at_once is not None and (found := self.gate_at_once(x, matrix, bias, experts, count, eps, factor)):
            return found
        scores = self.sqrtsoftplus(self.linear(x, matrix))
        if experts is None:
            assert bias is not None, "one of them is given"
            experts = self.choose_experts(scores, bias, count)
        return experts, self.expert_weights(scores, experts, eps, factor)

    def hc_mixes(
        self,
        h: torch.Tensor,
        fn: Matrix,
        scale: torch.Tensor,
        base: torch.Tensor,
        iterations: int,
        rms_eps: float,
        eps: float,
    ) -> Tensors:
        """Streams h [T, n, D] -> pre [T, n], post [T, n], comb [T, n, n], float32: `hc_split_sinkhorn` of `mixes`."""
        if self.mixes_at_once is not None and (
            found := self.mixes_at_once(h, fn, scale, base, iterations, rms_eps, eps)
        ):
            return found
        return self.hc_split_sinkhorn(self.mixes(h, fn, rms_eps), scale, base, h.shape[1], iterations, eps)

    def mixes(self, h: torch.Tensor, fn: Matrix, eps: float) -> torch.Tensor:
        """Streams h [T, n, D] -> float32 [T, out]: the projection of all streams, over their root mean square."""
        x = h.flatten(1)
        return self.linear(x, fn) * self.inverse_rms(x, eps).unsqueeze(-1)

    def head_vector(
        self, h: torch.Tensor, fn: Matrix, scale: torch.Tensor, base: torch.Tensor, rms_eps: float, eps: float
    ) -> torch.Tensor:
        """Streams h [T, n, D] at the end of a stack as one, [T, D]; scale float32 [1], base float32 [n]."""
        if self.head_at_once is not None and (found := self.head_at_once(h, fn, scale, base, rms_eps, eps)) is not None:
            return found
        return self.hc_pre(self.hc_head_weights(self.mixes(h, fn, rms_eps), scale, base, eps), h)

    def raw_keys(
        self, x: torch.Tensor, wkv: Matrix, wgate: Matrix, ape: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """x [T, D] -> float32 [T, 2, out], what a compressor takes from each token: the product with wkv, and that with
        wgate plus the row of ape float32 [ratio, out] of its position, int64 [T], modulo ratio."""
        if self.raw_at_once is not None and (found := self.raw_at_once(x, wkv, wgate, ape, positions)) is not None:
            return found
        raw = torch.empty(len(x), 2, wkv.shape[0], dtype=torch.float32, device=x.device)
        self.linears_into([Product(x, wkv), Product(x, wgate)], raw.unbind(1))
        raw[:, 1] += ape[positions % len(ape)]
        return raw

    def token_experts(
        self, x: torch.Tensor, experts: Experts, chosen: torch.Tensor, shares: torch.Tensor, limit: float, group: int
    ) -> torch.Tensor:
        """The mixture of experts of one token: x [1, D], chosen int64 [1, k], shares float32 [1, k] -> [1, D].

        x and the activations in front of w2 are quantized to FP8 in groups of `group`, or not if it is 0.
        """
        if self.experts_at_once is not None:
            found = self.experts_at_once(x, experts, chosen, shares, limit, group)
            if found is not None:
                return found
        used = [*(experts.matrices[i] for i in chosen[0].tolist()), experts.matrices[-1]]
        x = self.simulate_fp8(x, group) if group else x
        gate, up = x.new_empty(2, len(used), used[0].w1.shape[0])
        products = [*(Product(x, expert.w1) for expert in used), *(Product(x, expert.w3) for expert in used)]
        self.linears_into(products, [*torch.split(gate, 1), *torch.split(up, 1)])
        activation = self.swiglu(gate, up, limit, torch.cat((shares[0], shares.new_ones(1))))
        activation = self.simulate_fp8(activation, group) if group else activation
        outputs = x.new_empty(len(used), x.shape[1])
        products = [Product(row, expert.w2) for row, expert in zip(torch.split(activation, 1), used, strict=True)]
        self.linears_into(products, torch.split(outputs, 1))
        return self.add_experts(outputs[:-1].unsqueeze(0), chosen, outputs[-1:])


REFERENCE = KernelTable()

CPU = KernelTable(
    linear=cpu.linear,
    at_once=cpu.linears_into,
    gate_at_once=cpu_layers.gate,
    mixes_at_once=cpu_layers.hc_mixes,
    experts_at_once=cpu_layers.token_experts,
    queries_at_once=cpu_layers.queries_and_keys,
    raw_at_once=cpu_layers.raw_keys,
    head_at_once=cpu_layers.head_vector,
    project_at_once=cpu_layers.project,
    index_queries_at_once=cpu_layers.index_queries,
    simulate_index=cpu.simulate_index,
    sqrtsoftplus=cpu.sqrtsoftplus,
    pool=cpu.pool,
    sparse_attention=cpu.sparse_attention,
    index_scores=cpu.index_scores,
    simulate_fp8=cpu.simulate_fp8,
    simulate_key=cpu.simulate_key,
    inverse_rms=cpu.inverse_rms,
    rms_norm=cpu.rms_norm,
    head_norm=cpu.head_norm,
    rotate=cpu.rotate,
    hc_split_sinkhorn=cpu.hc_split_sinkhorn,
    hc_pre=cpu.hc_pre,
    hc_input=cpu.hc_input,
    hc_post=cpu.hc_post,
    swiglu=cpu.swiglu,
    best_in_reach=cpu.best_in_reach,
    list_keys=cpu.list_keys,
    choose_experts=cpu.choose_experts,
    expert_weights=cpu.expert_weights,
    add_experts=cpu.add_experts,
)


def _device_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


_DEVICE_RMS_NORM = partial(small.rms_norm, sqrt=torch.sqrt, total=_device_sum)

TORCH_DEVICE = KernelTable(
    linear=torch_device.linear,
    sparse_attention=torch_device.sparse_attention,
    index_scores=torch_device.index_scores,
    inverse_rms=partial(small.inverse_rms, sqrt=torch.sqrt, total=_device_sum),
    rms_norm=_DEVICE_RMS_NORM,
    hc_input=partial(small.hc_input, normed=_DEVICE_RMS_NORM),
    head_norm=partial(small.head_norm, sqrt=torch.sqrt, total=_device_sum),
    hc_split_sinkhorn=partial(small.hc_split_sinkhorn, exp=torch.exp, total=_device_sum),
    hc_head_weights=partial(small.hc_head_weights, exp=torch.exp),
    swiglu=partial(small.swiglu, exp=torch.exp),
    sqrtsoftplus=partial(small.sqrtsoftplus, softplus=torch.nn.functional.softplus, sqrt=torch.sqrt),
    pool=partial(small.pool, exp=torch.exp, total=_device_sum),
    engram_gate=partial(small.engram_gate, exp=torch.exp, sqrt=torch.sqrt, total=_device_sum),
)


def _cuda() -> KernelTable:
    """Tensor cores for products, and Triton's kernels where there is Triton; torch's CUDA builds bring it."""
    if find_spec("triton") is None:
        return replace(TORCH_DEVICE, linear=partial(torch_device.linear, product=torch_device.product_cuda))
    from . import cuda

    return replace(
        TORCH_DEVICE,
        linear=cuda.linear,
        simulate_fp8=cuda.simulate_fp8,
        simulate_key=partial(small.simulate_key, simulate=cuda.simulate_fp8),
        inverse_rms=cuda.inverse_rms,
        rms_norm=cuda.rms_norm,
        hc_split_sinkhorn=cuda.hc_split_sinkhorn,
        hc_pre=cuda.hc_pre,
        hc_input=partial(small.hc_input, as_one=cuda.hc_pre, normed=cuda.rms_norm),
        hc_post=cuda.hc_post,
        swiglu=cuda.swiglu,
    )


def select_kernels(device: torch.device) -> KernelTable:
    """The fastest row that works for `device` on this machine."""
    if device.type == "cuda":
        return _cuda()
    if device.type != "cpu":
        return TORCH_DEVICE
    return REFERENCE if binding.library() is None else CPU
