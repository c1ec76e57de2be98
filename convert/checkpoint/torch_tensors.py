"""Turns bytes of a file into torch tensors. The other modules of this folder work without torch."""

import torch

from dsv4.errors import InputError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F4": torch.uint8,
}  # fmt: skip


def typed(data: torch.Tensor, dtype: str, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Bytes (uint8, one dimension) as the tensor of a safetensors dtype and shape. F4: bytes of two codes each.

    Raises InputError, which names the tensor, for a dtype that torch does not have.
    """
    kind = TORCH_DTYPES.get(dtype)
    if kind is None:
        raise InputError(f"'{name}' has dtype {dtype}, which torch cannot hold")
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    return data.view(kind).view(shape) if len(data) else torch.empty(shape, dtype=kind)


def as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """As `typed`, of a bytearray, whose memory the tensor shares."""
    return typed(
        torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8), dtype, shape, name
    )
