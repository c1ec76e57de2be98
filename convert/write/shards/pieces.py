"""The work of a thread: compute a piece by its recipe, and hash it while it is in the cache.

Tensors are hashed with BLAKE3, which takes a third of the time that SHA-256 does where the processor has instructions
for SHA-256, and a tenth where it has none. SHA-256 is for files, because hubs list it (pipeline.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import Piece, PieceResult, Scan


@dataclass
class HashedPiece:
    """A computed piece; with the digests of whole tensors already taken, where the piece is a whole tensor."""

    piece: Piece
    result: PieceResult
    digest: str = ""
    source_digest: str = ""


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The memory of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def compute_piece(checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> HashedPiece:
    """Read, compute and hash one piece. Raises InputError for invalid scales or codes."""
    result = piece.tensor.recipe.compute(checkpoint, piece, scan)
    hashed = HashedPiece(piece, result)
    if piece.is_whole:
        hashed.digest = blake3(bytes_of(result.data)).hexdigest()
        if result.source is not None:
            hashed.source_digest = blake3(bytes_of(result.source)).hexdigest()
    return hashed
