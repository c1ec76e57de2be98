"""The cast of fp4_to_fp8.py, compiled: the same codes from one pass over memory, at about half the speed of a copy.

`fp4_to_fp8.c` is part of the compiled library (compiled.py). Where that is missing, on a processor without a byte
shuffle, and on devices other than the CPU, the form in torch does the work. Both are compared on each code with each k.
"""

import ctypes
from functools import cache

import torch

from dsv4 import compiled

from . import e2m1, fp4_to_fp8
from .block_scales import FP4_BLOCK, Block, scale_shape


@cache
def _library() -> ctypes.CDLL | None:
    """The library with the cast; None where there is none or this processor cannot run it."""
    library = compiled.library()
    if library is None or not library.dsv4_fp4_to_fp8_works():
        return None
    pointer, count, limit = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.dsv4_fp4_to_fp8.restype = count
    library.dsv4_fp4_to_fp8.argtypes = [
        pointer, pointer, pointer, pointer, limit, limit, pointer, count, count, count, count,
    ]  # fmt: skip
    return library


@cache
def _tables() -> torch.Tensor:
    return fp4_to_fp8.e4m3_by_exponent(torch.device("cpu")).contiguous()


def _fits(
    packed: torch.Tensor, scale_bytes: torch.Tensor, block_bytes: torch.Tensor, block: Block, out: torch.Tensor
) -> bool:
    """Whether C can walk over them: matrices of whole groups in plain memory, each as large as the others ask for."""
    tensors = (packed, scale_bytes, block_bytes, out)
    if not all(t.device.type == "cpu" and t.dtype == torch.uint8 and t.dim() == 2 for t in tensors):
        return False
    rows, columns = out.shape
    shapes = (rows, columns // 2), scale_shape((rows, columns), FP4_BLOCK), scale_shape((rows, columns), block)
    whole = columns % e2m1.GROUP_SIZE == 0 and block.columns % e2m1.GROUP_SIZE == 0
    return whole and all(t.is_contiguous() for t in tensors) and tuple(tuple(t.shape) for t in tensors[:3]) == shapes


def cast_into(
    packed: torch.Tensor,
    scale_bytes: torch.Tensor,
    block_bytes: torch.Tensor,
    block: Block,
    out: torch.Tensor,
) -> int:
    """See fp4_to_fp8.cast_into. Rows that are not whole groups, and stacks of matrices, are left to it."""
    library = _library()
    if library is None or not _fits(packed, scale_bytes, block_bytes, block, out):
        return fp4_to_fp8.cast_into(packed, scale_bytes, block_bytes, block, out)
    # Held until C is done with it: two threads that are first at once make a table each, and the cache drops one.
    tables = _tables()
    rows, groups = scale_bytes.shape
    zeros: int = library.dsv4_fp4_to_fp8(
        packed.data_ptr(), scale_bytes.data_ptr(), block_bytes.data_ptr(), tables.data_ptr(),
        fp4_to_fp8.TABLE_K_MIN, fp4_to_fp8.TABLE_K_MAX, out.data_ptr(),
        rows, groups, block.rows, block.columns // e2m1.GROUP_SIZE,
    )  # fmt: skip
    return zeros


def is_compiled() -> bool:
    """Whether the compiled form is there and runs on this machine."""
    return _library() is not None


def best_kernel() -> fp4_to_fp8.CastInto:
    """The form of the cast to take on this machine."""
    return cast_into if is_compiled() else fp4_to_fp8.cast_into
