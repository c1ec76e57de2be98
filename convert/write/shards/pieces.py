"""What a worker does: compute a piece by its recipe, and hash it while it lies in the cache."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.plan.recipes.recipe import Piece, PieceResult, Scan


@dataclass
class HashedPiece:
    """A computed piece; with the digests of whole tensors already taken, where the piece is a whole tensor."""

    piece: Piece
    result: PieceResult
    sha256: str = ""
    source_sha256: str = ""


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The memory of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def compute_piece(checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> HashedPiece:
    """Read, compute and hash one piece. Raises InputError for what the source should not hold."""
    result = piece.tensor.recipe.compute(checkpoint, piece, scan)
    hashed = HashedPiece(piece, result)
    if piece.is_whole:
        hashed.sha256 = hashlib.sha256(bytes_of(result.data)).hexdigest()
        if result.source is not None:
            hashed.source_sha256 = hashlib.sha256(bytes_of(result.source)).hexdigest()
    return hashed
