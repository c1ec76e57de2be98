"""The numerics of a model, decided once for every layer: with or without simulated quantization.

With simulation, activations are bfloat16, the inputs of quantized layers pass through FP8, and keys and indexer through
FP8 and FP4, as in the release. Without, everything is float32 and nothing is quantized; the weights are the same.
Activations are flat, [T, ...]: the tokens of all sequences of a call, without padding.
"""

from dataclasses import dataclass

import torch

from dsv4.model.kernels.table import KernelTable
from dsv4.model.parallel import SINGLE, TensorParallelGroup
from dsv4.model.weights import Matrix
from dsv4.quant.activation import FP8_GROUP


@dataclass(frozen=True)
class Numerics:
    """How a model computes: simulated quantization or float32, and by which row of the kernel table."""

    simulation: bool
    kernels: KernelTable
    group: TensorParallelGroup = SINGLE  # of the ranks that compute together
    fp8_group: int = FP8_GROUP  # of the inputs of quantized layers
    released_index_keys: bool = False  # V4.1: hand over index keys at single steps as the released code does

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and keys."""
        return torch.bfloat16 if self.simulation else torch.float32

    @property
    def input_group(self) -> int:
        """The FP8 group of the inputs of quantized layers; 0 without simulation."""
        return self.fp8_group if self.simulation else 0

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] as quantized layers see it: the release quantizes their input to FP8, in groups of 128 or 32."""
        return self.kernels.simulate_fp8(x, self.fp8_group) if self.simulation else x

    def product(self, quantized: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A quantized layer on input that `quantize` returned: [T, in] -> [T, out] in `dtype`."""
        return self.kernels.linear(quantized, matrix, dtype=self.dtype)

    def quantized_linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A quantized layer from its input: [T, in] -> [T, out] in `dtype`."""
        return self.product(self.quantize(x), matrix)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """A layer whose input stays as it is: [T, in] -> float32 [T, out]."""
        return self.kernels.linear(x, matrix)
