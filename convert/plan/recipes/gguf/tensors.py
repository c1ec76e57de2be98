"""The tensors of GGUF files, and how each is computed from the release's.

routed experts of a layer   one stack for each matrix, MXFP4: codes and scales of the release in blocks of 32
FP8 weights                 BF16; exact, because E4M3 has four significant bits
BF16 matrices, float32      their bytes
BF16 vectors                float32, in which llama.cpp wants them
tid2eid                     int32
"""

from typing import Any

import numpy as np

from dsv4.convert.checkpoint.forms.gguf.container import data_bytes
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.recipes import bf16
from dsv4.convert.plan.recipes.copy import copied
from dsv4.convert.plan.recipes.recipe import Array, Counts, OutputTensor, Piece, PieceResult, Recipe, Scan, with_error
from dsv4.convert.plan.recipes.rows import check_scale, read_rows
from dsv4.convert.plan.settings import Settings
from dsv4.errors import InputError
from dsv4.quant.blocks import GROUP_SIZE
from dsv4.quant.gguf.mxfp4_blocks import CODE_BYTES, to_blocks


class Stacked(Recipe):
    """FP4 matrices of a layer's experts, one after the other, in blocks of MXFP4. A piece is some experts."""

    def takes(self, weight: Weight) -> bool:
        """Matrices of routed experts."""
        return weight.is_routed_expert

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """Of one matrix; `stack` makes the tensor of a layer."""
        return [stack(weight.name, [weight])]

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Blocks of some experts. Raises InputError for a scale that is NaN, which MXFP4 does not have."""
        reads = piece.tensor.reads
        parts = [_blocks(checkpoint, reads[2 * e], reads[2 * e + 1]) for e in range(piece.start, piece.stop)]
        return PieceResult(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _blocks(checkpoint: Checkpoint, codes: TensorInfo, scale: TensorInfo) -> Array:
    raw = read_rows(checkpoint, scale, 0, scale.shape[0])
    check_scale(raw, scale)
    packed = read_rows(checkpoint, codes, 0, codes.shape[0])
    return to_blocks(packed.reshape(-1, CODE_BYTES), raw.reshape(-1))


class Projections(Recipe):
    """e_proj and h_proj of a draft block side by side, in BF16."""

    def takes(self, weight: Weight) -> bool:
        """None: it takes two at once."""
        return False

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """None by itself: `projections` makes the tensor."""
        raise NotImplementedError("two weights make one tensor")

    def _parts(self, piece: Piece) -> list[Piece]:
        tensor = piece.tensor
        width = tensor.shape[1] // 2
        weights = [tensor.weight._replace(info=codes, scale=scale) for codes, scale in _pairs(tensor.reads)]
        parts = [tensor._replace(recipe=bf16.RECIPE, weight=w, shape=(tensor.shape[0], width)) for w in weights]
        return [Piece(part, piece.start, piece.stop) for part in parts]

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Both."""
        counts = Counts()
        for part in self._parts(piece):
            counts.add(bf16.RECIPE.scan(checkpoint, part).counts)
        return Scan(counts)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Some rows of both."""
        found = [bf16.RECIPE.compute(checkpoint, part, scan) for part in self._parts(piece)]
        counts = Counts()
        for one in found:
            counts.add(one.counts)
        return PieceResult(np.concatenate([one.data for one in found], axis=1), counts)


class Converted(Recipe):
    """Plain tensors that llama.cpp has in another dtype: BF16 vectors as float32, int64 tables as int32."""

    def takes(self, weight: Weight) -> bool:
        """Plain tensors."""
        return weight.format is Format.PLAIN

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The tensor in the other dtype."""
        dtype = "I32" if weight.info.dtype == "I64" else "F32"
        return [OutputTensor(weight.name, dtype, weight.info.shape, self, weight, (weight.info,))]

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Some rows. Raises InputError for a number that int32 has not."""
        info = piece.tensor.source
        raw = read_rows(checkpoint, info, piece.start, piece.stop)
        if info.dtype == "BF16":
            return PieceResult(raw.view(np.uint16).astype(np.uint32) << np.uint32(16))
        wide = raw.view(np.int64)
        narrow = wide.astype(np.int32)
        if not np.array_equal(narrow, wide):
            raise InputError(f"'{info.name}' holds numbers beyond int32", "Expert ids are small: download it again.")
        return PieceResult(narrow)


class Rounded(Recipe):
    """FP8 weights in Q8_0, for `--dense q8_0`: 32 elements as signed bytes under a float16. Elements that change count.

    As ggml does it, to the bit: the factor is the largest magnitude / 127, elements are divided by it in float32 and
    rounded half away from zero.
    """

    def takes(self, weight: Weight) -> bool:
        """FP8 weights."""
        return weight.format is Format.FP8

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """One tensor in blocks."""
        assert weight.scale is not None and weight.block is not None
        shape, reads = weight.logical_shape, (weight.info, weight.scale)
        size = _size("Q8_0", shape, weight)
        return [
            OutputTensor(weight.name, "Q8_0", shape, self, weight, reads, row_unit=weight.block.rows, stored_bytes=size)
        ]

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Blocks of some rows."""
        exact = bf16.RECIPE.compute(checkpoint, piece, None)
        bits = exact.data.view(np.uint16).reshape(-1, GROUP_SIZE).astype(np.uint32) << np.uint32(16)
        blocks, counts = to_q8_0(bits.view(np.float32))
        counts.changed = max(counts.changed, exact.counts.changed)
        return PieceResult(blocks, counts)

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """How many elements changed, and by how much."""
        return with_error(super().entry(tensor, counts, scan), counts)


def to_q8_0(values: Array) -> tuple[Array, Counts]:
    """float32 [n, 32] -> blocks uint8 [n, 34], and what changed."""
    factor = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), factor, out=np.zeros_like(factor), where=factor != 0)
    scaled = values * inverse
    whole = np.floor(np.abs(scaled))
    rounded = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))  # half away from zero
    stored = factor.astype(np.float16)
    error = (rounded * stored.astype(np.float32)).astype(np.float64) - values
    counts = Counts(
        changed=int(np.count_nonzero(error)), squared_error=float((error**2).sum()),
        squared_value=float((values.astype(np.float64) ** 2).sum()), max_error=float(np.abs(error).max(initial=0)),
    )  # fmt: skip
    return np.concatenate((stored.view(np.uint8), rounded.astype(np.int8).view(np.uint8)), axis=1), counts


STACKED, PROJECTIONS, CONVERTED, ROUNDED = Stacked(), Projections(), Converted(), Rounded()


def _pairs(reads: tuple[TensorInfo, ...]) -> list[tuple[TensorInfo, TensorInfo]]:
    return list(zip(reads[::2], reads[1::2], strict=True))


def stack(name: str, experts: list[Weight]) -> OutputTensor:
    """The matrices of all experts of a layer as one tensor. Raises InputError naming one that differs."""
    first = experts[0]
    for weight in experts:
        if weight.format is not Format.FP4 or weight.logical_shape != first.logical_shape:
            raise InputError(
                f"'{weight.name}' is {weight.stored} {list(weight.logical_shape)}; FP4 "
                f"{list(first.logical_shape)} expected: experts are stacked in MXFP4",
                "FP8 experts go back to FP4 with --to fp4, where that is exact.",
            )
    shape = len(experts), *first.logical_shape
    reads = tuple(info for weight in experts for info in (weight.info, weight.scale) if info is not None)
    return OutputTensor(
        name, "MXFP4", shape, STACKED, first, reads, Format.FP4, stored_bytes=_size("MXFP4", shape, first)
    )


def _size(kind: str, shape: tuple[int, ...], weight: Weight) -> int:
    try:
        return data_bytes(kind, shape)
    except ValueError as error:
        raise InputError(f"'{weight.name}': {error}") from None


def projections(name: str, parts: list[Weight]) -> OutputTensor:
    """e_proj and h_proj as one tensor."""
    first, second = parts
    (rows, columns), block = first.logical_shape, first.block
    if (first.format, second.format) != (Format.FP8, Format.FP8) or second.logical_shape != (rows, columns):
        raise InputError(f"'{first.name}' and '{second.name}' are not two FP8 weights of one shape")
    assert first.scale is not None and second.scale is not None and block is not None
    reads = first.info, first.scale, second.info, second.scale
    return OutputTensor(name, "BF16", (rows, 2 * columns), PROJECTIONS, first, reads, scanned=True, row_unit=block.rows)


def tensor_of(name: str, weight: Weight, settings: Settings, config: dict[str, Any]) -> OutputTensor:
    """Any other tensor, under its name in the file. Raises InputError for a dtype that GGUF does not have."""
    if weight.format is Format.FP8 and settings.dense == "q8_0":
        return ROUNDED.outputs(weight, settings, config)[0]._replace(name=name)
    if weight.format is not Format.PLAIN:
        (decoded,) = bf16.RECIPE.outputs(weight, settings, config)
        _size("BF16", weight.logical_shape, weight)
        return decoded._replace(name=name)
    dtype, vector = weight.info.dtype, len(weight.info.shape) < 2
    if dtype == "I64" or (dtype == "BF16" and vector):
        return CONVERTED.outputs(weight, settings, config)[0]._replace(name=name)
    if dtype in ("F32", "BF16", "I32"):
        return copied(weight)._replace(name=name)
    raise InputError(f"'{weight.name}' is {dtype}, which llama.cpp's {name} cannot be")
