"""The base class of conversions, and the data that planning and writing exchange with it.

A recipe does three things. It lists the output tensors of a weight, with exact shapes, before any data is read. It
scans the weight before its shard is written, because the shard's header depends on whether an exact form exists. And
it computes the output piece by piece. A piece is a range of rows of one output tensor. Pieces are independent, so any
number of workers in any order gives the same bytes.

Planning reads headers only and does without torch, which takes a second to import: `scan` and `compute` import it, and
take the modules of `dsv4.quant` as its attributes.

A new kind of conversion is a new file with a subclass of `Recipe`, and a row of CONVERSIONS in settings.py.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dsv4.convert.checkpoint.forms.recorded_scales import Record
from dsv4.convert.checkpoint.header import tensor_bytes
from dsv4.convert.checkpoint.rank_layout import Slice
from dsv4.convert.checkpoint.reader import Checkpoint, TensorInfo, row_count
from dsv4.convert.checkpoint.weights import Format, Weight
from dsv4.convert.plan.settings import Settings
from dsv4.quant.blocks import Block

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 8 * 2**20  # of a piece, read or written: an expert matrix of V4-Flash is one
TASK_BYTES = 2**20  # of smaller pieces that are computed in one call: each call takes time
WORD = 8  # bytes; a multiple of the size of every scale

Array = np.ndarray[Any, np.dtype[Any]]


class OutputTensor(NamedTuple):
    """One tensor to write: its name, dtype and shape in the output, its source tensors, and how it is computed.

    reads: the source tensors that are needed; rows of the first correspond to rows of this one.
    format: how its elements are stored; a scale is PLAIN. is_scale: it is the scale of the weight, not its codes.
    scanned: whether its pieces are scanned before the shard is written.
    row_unit: pieces begin at multiples of this number of rows. bytewise: unless it is a slice, it may be cut anywhere.
    block: the block of an FP8 cast. rank_slice: the slice of one tensor-parallel rank.
    stored_bytes: bytes of data, where the dtype is one of a container and not of safetensors.
    made_by_scan_of: the output tensor whose scan computes this one while memory allows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: "Recipe"
    weight: Weight
    reads: tuple[TensorInfo, ...]
    format: Format = Format.PLAIN
    is_scale: bool = False
    scanned: bool = False
    row_unit: int = 1
    bytewise: bool = False
    block: Block | None = None
    rank_slice: Slice | None = None
    made_by_scan_of: str = ""
    stored_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data in the output."""
        return tensor_bytes(self.dtype, self.shape) if self.stored_bytes is None else self.stored_bytes

    @property
    def in_words(self) -> bool:
        """Whether pieces are counted in WORD bytes and not in rows: one row of a tensor may be all of it."""
        return self.bytewise and self.rank_slice is None

    @property
    def rows(self) -> int:
        """Rows that pieces are counted in, see `row_count`."""
        return -(-self.nbytes // WORD) if self.in_words else row_count(self.shape, self.nbytes)

    @property
    def own_rows(self) -> int:
        """Rows that are made from the source; those behind them fill a rank's slice up."""
        return self.rows - (self.rank_slice.filled if self.rank_slice else 0)

    @property
    def row_bytes(self) -> int:
        """Bytes that are read, or written if these are more, for a row of the output."""
        if self.in_words:
            return WORD
        return max(self.nbytes // self.rows, self.source.row_bytes)

    @property
    def source(self) -> TensorInfo:
        """The tensor whose rows the rows of this one correspond to."""
        return self.reads[0]


class Piece(NamedTuple):
    """Rows [start, stop) of an output tensor.

    is_last: whether it is the last of its tensor. place: where its first byte is in the output file, 0 if nobody writes
    it. A result in memory that begins where `place` does in a page is written without being copied (`placed` in
    rows.py).
    """

    tensor: OutputTensor
    start: int
    stop: int
    is_last: bool = False
    place: int = 0

    @property
    def is_filling(self) -> bool:
        """Whether it fills a rank's slice up. No piece does so in part."""
        return self.start >= self.tensor.own_rows


def split(tensor: OutputTensor, place: int = 0) -> Iterator[Piece]:
    """The pieces of an output tensor, in order, of about PIECE_BYTES and cut at its row unit. None if it is empty.

    They are also cut where the rows end that are made from the source.

    place: where its data begins in the output file.
    """
    if not tensor.nbytes:
        return
    rows, unit = tensor.rows, tensor.row_unit
    width = WORD if tensor.in_words else tensor.nbytes // rows
    step = max(unit, PIECE_BYTES // max(tensor.row_bytes, 1) // unit * unit)
    cuts = [*range(0, tensor.own_rows, step), *range(tensor.own_rows, rows, step), rows]
    for start, stop in pairwise(cuts):
        yield Piece(tensor, start, stop, stop == rows, place + start * width)


def tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in the same order, small ones that follow each other in one list of about TASK_BYTES."""
    task, size = list[Piece](), 0
    for piece in pieces:
        more = (piece.stop - piece.start) * piece.tensor.row_bytes
        if task and size + more > TASK_BYTES:
            yield task
            task, size = [], 0
        task.append(piece)
        size += more
    if task:
        yield task


def piece_memory(tensor: OutputTensor) -> int:
    """Memory to read and compute a piece: source, output and the intermediate tensors of a tile, for every recipe."""
    return 6 * max(PIECE_BYTES, tensor.row_unit * tensor.row_bytes if tensor.nbytes else 0)


@dataclass
class Counts:
    """Statistics of some pieces of a tensor, or of its scan; those of all pieces are added."""

    negative_zeros: int = 0  # of FP4 codes cast to FP8
    nan: int = 0  # E4M3 NaN codes copied
    changed: int = 0  # elements whose value is not the source's
    squared_error: float = 0.0  # of FP4 casts: sum of squares, and of the values themselves
    squared_value: float = 0.0
    max_error: float = 0.0
    blocks: int = 0  # FP8 blocks cast from FP4, by the scan
    max_span: int = 0  # largest minus smallest group exponent of a block
    rescaled_blocks: int = 0  # exact with another scale than the reference converter's
    inexact_blocks: int = 0  # without any exact scale

    def add(self, other: "Counts") -> None:
        """Include another piece's counts."""
        for name, join in _JOINS.items():
            setattr(self, name, join(getattr(self, name), getattr(other, name)))


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    f.name: max if f.name.startswith("max_") else operator.add for f in fields(Counts)
}


@dataclass
class PieceResult:
    """The bytes of a piece, what was counted on the way, and scales for the manifest (forms/recorded_scales.py)."""

    data: Array
    counts: Counts = field(default_factory=Counts)
    scales: Record = field(default_factory=dict)


ONE_SCALE = {"F8_E8M0": b"\x7f", "F32": b"\x00\x00\x80\x3f"}


def filling(piece: Piece) -> PieceResult:
    """What fills a slice up: codes of 0, and scales of 1."""
    tensor, size = piece.tensor, (piece.stop - piece.start) * (piece.tensor.nbytes // piece.tensor.rows)
    element = ONE_SCALE[tensor.dtype] if tensor.is_scale else b"\0"
    return PieceResult(np.frombuffer(element * (size // len(element)), np.uint8))


@dataclass(frozen=True)
class Scan:
    """The result of scanning some rows of a weight.

    needed: tensors that `compute` requires. spared: tensors that save it work; they are dropped if memory is short.
    All have one row for each scanned row, or row of blocks.
    """

    counts: Counts = field(default_factory=Counts)
    needed: dict[str, "torch.Tensor"] = field(default_factory=dict)
    spared: dict[str, "torch.Tensor"] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        """Whether every element has an exact form."""
        return not (self.counts.changed or self.counts.inexact_blocks)

    @property
    def spared_bytes(self) -> int:
        """Memory of the tensors that may be dropped."""
        return sum(tensor.nbytes for tensor in self.spared.values())


def _joined(parts: Sequence[dict[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor"]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def join_scans(scans: Sequence[Scan]) -> Scan:
    """The scan of a whole tensor from those of its pieces, in order. Without any: of a slice that is only filled."""
    if len(scans) < 2:
        return scans[0] if scans else Scan()
    counts = Counts()
    for scan in scans:
        counts.add(scan.counts)
    return Scan(counts, _joined([scan.needed for scan in scans]), _joined([scan.spared for scan in scans]))


def with_error(entry: dict[str, Any], counts: "Counts") -> dict[str, Any]:
    """A manifest entry with the error of the values, where a recipe measured it."""
    if counts.squared_value:
        entry["relative_rms_error"] = (counts.squared_error / counts.squared_value) ** 0.5
        entry["max_error"] = counts.max_error
    return entry


class Recipe(Protocol):
    """One kind of conversion. Subclass it; the defaults here are for a kind that is always exact.

    cast_format: format of the routed experts that it casts, None if any will do.
    drops_scales: whether its results have scales for the manifest.
    """

    cast_format: Format | None = None
    drops_scales: bool = False

    def takes(self, weight: Weight) -> bool:
        """Whether it converts a quantized weight. Other weights keep their codes."""
        ...

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """The tensors that a weight and its scale become, before any slicing. Raises InputError if they cannot."""
        ...

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Read and compute one piece. `scan`: of the whole weight, if one of its outputs is `scanned`.

        Raises InputError for scales and codes that are not valid.
        """
        ...

    def scan(self, checkpoint: Checkpoint, piece: Piece) -> Scan:
        """Read the source rows of a piece of a `scanned` tensor. Raises InputError as `compute` does."""
        return Scan()

    def describe_inexact(self, checkpoint: Checkpoint, tensor: OutputTensor, scan: Scan) -> str:
        """How a tensor without an exact form would change, for a message."""
        return f"{scan.counts.changed} elements change"

    def entry(self, tensor: OutputTensor, counts: Counts, scan: Scan | None) -> dict[str, Any]:
        """Further keys of a finished tensor's manifest entry, besides names, dtypes, shapes and the digest."""
        return {"changed_elements": counts.changed} if counts.changed else {}

    def edit_config(self, config: dict[str, Any], settings: Settings, some_kept: bool) -> dict[str, Any]:
        """config.json of the output, from the release's. some_kept: weights stayed under `--on-inexact keep`."""
        return config

    def describe_storage(self, config: dict[str, Any], tensors: Sequence[OutputTensor]) -> dict[str, Any]:
        """The edited config with what it must say of each tensor, for formats whose config names modules."""
        return config

    def side_files(self, config: dict[str, Any]) -> dict[str, bytes]:
        """Further files that the form has, by name. config: the edited config.json."""
        return {}

    def edit_inference_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A released inference/config.json for the output."""
        return config


class Joining(Recipe, Protocol):
    """A recipe that says itself what the shards are (`Joins` in plan/shards.py): other recipes compute their tensors.

    Subclass it. alone: the recipe of a weight without its stack, for the sizes that `inspect` prints.
    """

    cast_format: Format | None = Format.FP4
    alone: Recipe

    def takes(self, weight: Weight) -> bool:
        """Every weight."""
        return True

    def outputs(self, weight: Weight, settings: Settings, config: dict[str, Any]) -> list[OutputTensor]:
        """Of one weight, without a stack."""
        return self.alone.outputs(weight, settings, config)

    def compute(self, checkpoint: Checkpoint, piece: Piece, scan: Scan | None) -> PieceResult:
        """Of one weight, without a stack."""
        return self.alone.compute(checkpoint, piece, scan)
