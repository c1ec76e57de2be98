"""Draws the blocks that `verify --sample` compares.

A block is 128 x 128 elements of a matrix, with the scales of both sides; of a tensor with one dimension, as many
elements. What is drawn are rows of blocks: 128 rows of a matrix, because these lie together in a file and take one
request for the weights and one for the scales. A block alone would take 128 requests.

The draw is stratified by kind of tensor (the name without its numbers): the share is taken of each kind, and at
least one row of blocks of every tensor. It depends only on the seed and on the names and shapes of the tensors, so
that anybody can repeat it: SHAKE-256 of `seed:name` is read as 64-bit little-endian numbers, two for each row of
blocks. The smallest of the first half chooses the tensor's own row; the smallest of the second half, over all other
rows of the kind, are added until the share is reached.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsv4.convert.proof.compare_tensor import Piece, rows_per_piece
from dsv4.convert.proof.files import DTYPE_BITS
from dsv4.convert.proof.plan import ComparedTensor, row_bytes
from dsv4.convert.proof.values.formats import Array

from .odds import Audit
from .sample import Sample

SIDE = 128  # rows and columns of a block
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class _Grid:
    """The rows of blocks of a compared tensor: `count` of them, of `step` rows of a piece, with `blocks` in each."""

    number: int
    rows: int
    step: int
    blocks: int
    row_bytes: int

    @property
    def count(self) -> int:
        return -(-self.rows // self.step)


def _grid(number: int, compared: ComparedTensor) -> _Grid | None:
    """None for a tensor of which nothing is read."""
    rows, _, step = rows_per_piece(compared)
    if not rows:
        return None
    weight, tensor = compared.output_weight, compared.output
    assert tensor is not None
    is_matrix = len(tensor.shape) > 1
    if weight is not None:
        return _Grid(number, rows, SIDE if is_matrix else SIDE * SIDE, -(-weight.columns // SIDE), step)
    if not is_matrix:
        return _Grid(number, rows, SIDE * SIDE * DTYPE_BITS[tensor.dtype] // 8, 1, step)
    blocks = -(-math.prod(tensor.shape[1:]) // SIDE)
    return _Grid(number, rows, SIDE * row_bytes(tensor) // step, blocks, step)


def kind_of(name: str) -> str:
    """`layers.3.ffn.experts.7.w1.weight` -> `layers.*.ffn.experts.*.w1.weight`."""
    return _NUMBER.sub(".*.", name)


def _numbers(seed: int, name: str, count: int) -> Array:
    """Two numbers for each row of blocks: uint64 `[2, count]`."""
    text = f"{seed}:{name}".encode("utf-8", "surrogatepass")
    return np.frombuffer(hashlib.shake_256(text).digest(16 * count), "<u8").reshape(2, count)


def _drawn(share: float, numbers: Sequence[Array]) -> list[Array]:
    """The drawn rows of blocks of each tensor of a kind, sorted. numbers: `[2, count]` of each tensor."""
    own = [int(first.argmin()) for first, _ in numbers]
    others = [np.delete(np.arange(len(first)), row) for row, (first, _) in zip(own, numbers, strict=True)]
    places = np.repeat(np.arange(len(numbers)), [len(some) for some in others])
    ranks = np.concatenate([second[some] for some, (_, second) in zip(others, numbers, strict=True)])
    more = max(0, math.ceil(share * sum(len(first) for first, _ in numbers)) - len(numbers))
    chosen = np.zeros(len(ranks), dtype=bool)
    chosen[np.argsort(ranks, kind="stable")[:more]] = True
    return [
        np.sort(np.append(some[chosen[places == number]], row))
        for number, (row, some) in enumerate(zip(own, others, strict=True))
    ]


def _pieces(grid: _Grid, rows: Array, compared: ComparedTensor) -> Iterator[Piece]:
    """The drawn rows of blocks of a tensor; neighbours are one piece."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        start, stop = int(run[0]) * grid.step, min((int(run[-1]) + 1) * grid.step, grid.rows)
        size = compared.size * stop // grid.rows - compared.size * start // grid.rows
        yield Piece(grid.number, start, stop, size, grid.row_bytes)


def draw(compared: Sequence[ComparedTensor], sample: Sample) -> tuple[list[Piece], Audit]:
    """The pieces of the drawn blocks, in the order of the tensors, and how many blocks of each kind they are."""
    kinds: dict[str, list[_Grid]] = {}
    for number, one in enumerate(compared):
        if (grid := _grid(number, one)) is not None:
            kinds.setdefault(kind_of(one.name), []).append(grid)
    pieces: list[Piece] = []
    counts, bands = {}, 0
    for kind, grids in kinds.items():
        numbers = [_numbers(sample.seed, compared[grid.number].name, grid.count) for grid in grids]
        drawn = _drawn(sample.share, numbers)
        for grid, rows in zip(grids, drawn, strict=True):
            pieces += _pieces(grid, rows, compared[grid.number])
        taken = sum(grid.blocks * len(rows) for grid, rows in zip(grids, drawn, strict=True))
        counts[kind] = taken, sum(grid.blocks * grid.count for grid in grids)
        bands += sum(map(len, drawn))
    pieces.sort(key=lambda piece: (piece.tensor, piece.start))
    return pieces, Audit(sample.share, sample.seed, bands, counts)
