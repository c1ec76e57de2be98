"""The kernel table: which function does each hot operation, on which device.

    REFERENCE      the plain forms that define the result to the bit
    CPU            compiled C with the same bits, where a library can be built (`cpu.library`)
    TORCH_DEVICE   every other device: torch's own functions, the same within the noise of float32
    CUDA           the same, with products of bfloat16 on the tensor cores and Triton's kernels (`cuda.py`)

One row is selected, once, when a model is loaded. Nothing else in the engine asks which device it computes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch

from dsv4.quant.activation import simulate_fp8

from . import cpu, reference, torch_device
from . import reference_small as small
from .reference import Product

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class KernelTable:
    """One row of the table. Signatures, shapes and dtypes are those of the reference forms, which are the defaults."""

    linear: Callable[..., torch.Tensor] = reference.linear
    at_once: Callable[[Sequence[Product], Sequence[torch.Tensor]], None] | None = None  # `linears_into`
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


REFERENCE = KernelTable()

CPU = KernelTable(
    linear=cpu.linear,
    at_once=cpu.linears_into,
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
    return REFERENCE if cpu.library() is None else CPU
