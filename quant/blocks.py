"""Which elements share a scale: the geometry of quantized tensors. Shapes only: reading headers takes no torch.

Three geometries occur in the releases, always over the last two dimensions [rows, columns] = [out, in]:

    FP4   1 x 32    one E8M0 scale per 32 consecutive elements of a row
    FP8   128 x 128 E8M0 scales (instruct checkpoints) or float32 ones (Base)
    FP8   32 x 32   the same, in younger members of the family

A block at the right or lower edge may be ragged: the scale tensor has ceil(rows / height) x ceil(columns / width)
entries.
"""

from typing import NamedTuple

GROUP_SIZE = 32  # elements of a row that share the scale of FP4


class Block(NamedTuple):
    """Height (rows) and width (columns) of the elements that share one scale."""

    rows: int
    columns: int


FP4_BLOCK = Block(1, GROUP_SIZE)


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scale tensor of a weight of `shape` [..., rows, columns]. Raises ValueError below rank 2."""
    if len(shape) < 2:
        raise ValueError(f"block scales need at least two dimensions, the shape is {list(shape)}")
    *batch, rows, columns = shape
    return (*batch, -(-rows // block.rows), -(-columns // block.columns))
