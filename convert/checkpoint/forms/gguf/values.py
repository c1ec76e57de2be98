"""The values of a GGUF file as the release's bytes: codes and scales of MXFP4 blocks, and other dtypes."""

import numpy as np

from dsv4.convert.checkpoint.forms.tensor import Array, Encoding
from dsv4.quant.gguf.mxfp4_blocks import BLOCK_BYTES, CODE_BYTES, codes_of_blocks

GROUP = 32  # elements of a block


def scales_of_blocks(blocks: Array) -> Array:
    """Blocks uint8 [n, 17] -> their E8M0 bytes [n, 1]."""
    return np.ascontiguousarray(blocks[:, :1])


def _halves(raw: Array) -> Array:
    """float32 -> bfloat16. Raises ValueError for a value that is none."""
    halves = raw.view(np.uint16).reshape(-1, 2)
    if halves[:, 0].any():
        raise ValueError("a float32 value that is no BF16, though the release has BF16 there")
    return np.ascontiguousarray(halves[:, 1:]).view(np.uint8)


def _widened(raw: Array) -> Array:
    return raw.view(np.int32).astype(np.int64).view(np.uint8).reshape(-1, 8)


def _of_q8_0(raw: Array) -> Array:
    """Q8_0 -> float32: a float16 factor and 32 signed bytes. Exact: 11 and 7 significant bits."""
    factor = np.ascontiguousarray(raw[:, :2]).view(np.float16).astype(np.float32)
    values: Array = factor * np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32)
    return values.view(np.uint8)


CODES = Encoding(BLOCK_BYTES, CODE_BYTES, codes_of_blocks)
SCALES = Encoding(BLOCK_BYTES, 1, scales_of_blocks)
Q8_0 = Encoding(34, 4 * GROUP, _of_q8_0)
BF16_AS_F32 = Encoding(4, 2, _halves)
I64_AS_I32 = Encoding(4, 8, _widened)


def column_range(row_bytes: int, start: int, stop: int) -> Encoding:
    """Bytes [start, stop) of every row of `row_bytes`."""
    return Encoding(row_bytes, stop - start, lambda raw: np.ascontiguousarray(raw[:, start:stop]))


def q8_0_columns(row_bytes: int, start: int, stop: int) -> Encoding:
    """The same of rows in Q8_0, as float32. The columns are whole blocks."""
    made = (stop - start) // Q8_0.stored * Q8_0.decoded

    def decode(raw: Array) -> Array:
        blocks = np.ascontiguousarray(raw[:, start:stop]).reshape(-1, Q8_0.stored)
        return _of_q8_0(blocks).reshape(len(raw), made)

    return Encoding(row_bytes, made, decode)
