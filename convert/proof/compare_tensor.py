"""Compare one piece of one tensor: read both sides, compare exactly, count.

A `Piece` is some rows of one `ComparedTensor` and independent of every other piece. Its `Tally` adds up with the
tallies of the tensor's other pieces, in any order, on any machine. Within a piece, bands of rows are read into buffers
that each thread reuses, so memory does not grow with the checkpoint.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil

from dsv4.convert.proof.forms import tables
from dsv4.convert.proof.forms.packing import Packing
from dsv4.convert.proof.values.compare import (
    RowBand,
    Scales,
    compare,
    e8m0_scales,
    errors,
    float_scales,
    no_scales,
    product_scales,
    same_bytes,
)
from dsv4.convert.proof.values.formats import E2M1, E4M3, Array
from dsv4.convert.proof.values.inverse import rebuild
from dsv4.errors import MachineError, UsageError
from dsv4.text import human_bytes

from .files import DTYPE_BITS, Entry, Files
from .layout import Tensor
from .plan import E8M0_DTYPES, ComparedTensor, Weight, coarse_block, row_bytes
from .tally import (
    FIRST_DIFFERENCES,
    Tally,
    count_blocks,
    count_codes,
    count_scales,
    count_spans,
    first_differences,
    raw_difference,
    special_codes,
)

PIECE_BYTES = 64 << 20  # of the output's rows
BAND_BYTES = 1 << 20  # of the larger side: it fits a core's cache, and makes calls few
# Memory of a thread, measured: for the largest band, buffers, table positions and masks; where values are decoded to
# integers, a number of elements that does not depend on the band.
BYTES_PER_BAND_BYTE = 28
LEAST_THREAD_BYTES = 12 << 20
TABLES_BYTES = 16 << 20
MIN_BAND_BYTES = 1 << 16
COUNTED_BANDS = 8  # codes are counted in the first of this many bands: counting costs as much as comparing


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of the compared tensor number `tensor`, and `size`: bytes to read on both sides.

    `row_bytes` is the size of a row where bytes are compared, and 0 where values are.
    """

    tensor: int
    start: int
    stop: int
    size: int
    row_bytes: int = 0


def _band_rows(compared: ComparedTensor, band_bytes: int) -> int:
    """Rows compared at once: whole blocks of both sides, about `band_bytes` of the larger one."""
    weights = [weight for weight in (compared.source_weight, compared.output_weight) if weight is not None]
    block = math.lcm(*(weight.block[0] for weight in weights if weight.scale is not None), 1)
    step = max(weight.row_bytes for weight in weights)
    return max(block, band_bytes // max(step, 1) // block * block)


def largest_band(compared: list[ComparedTensor], band_bytes: int) -> int:
    """Bytes of the largest band of any of the tensors. At least one row of blocks, so it may exceed `band_bytes`."""
    largest = 0
    for one in compared:
        weights = [weight for weight in (one.source_weight, one.output_weight) if weight is not None]
        if weights:
            rows = min(_band_rows(one, band_bytes), weights[0].rows)
            largest = max(largest, rows * max(weight.row_bytes for weight in weights))
        elif one.kind == "bytes":
            largest = max(largest, min(band_bytes, one.size))
    return largest


def threads_and_band(workers: int, max_memory: int | None, compared: list[ComparedTensor]) -> tuple[int, int]:
    """(threads, bytes of a band) with which the whole process stays within `max_memory`, now that headers are read.

    At most `workers` threads. Bands become smaller first, then threads fewer. Raises UsageError if not even one fits.
    """
    if max_memory is None:
        return workers, BAND_BYTES
    used = psutil.Process().memory_info().rss + TABLES_BYTES
    free = max_memory - used
    band = min(max(free // workers // BYTES_PER_BAND_BYTE, MIN_BAND_BYTES), BAND_BYTES)
    thread = max(BYTES_PER_BAND_BYTE * largest_band(compared, band), LEAST_THREAD_BYTES)
    if free < thread:
        needed = math.ceil((used + thread) / 10**6)
        raise UsageError(f"--max-memory {human_bytes(max_memory)} is too little", f"Give at least {needed}MB.")
    return min(workers, free // thread), band


def rows_per_piece(compared: ComparedTensor) -> tuple[int, int, int]:
    """(rows of the tensor, rows of a piece, `row_bytes` of a piece). No rows: there is nothing to read."""
    if compared.kind == "bytes":
        assert compared.source is not None and compared.output is not None
        flat = compared.source.axis == compared.output.axis == 0
        step = 1 if flat else row_bytes(compared.output)
        return compared.output.size // max(step, 1), max(1, PIECE_BYTES // max(step, 1)), step
    if compared.output_weight is None:
        return 0, 1, 0
    band = _band_rows(compared, BAND_BYTES)
    per_piece = PIECE_BYTES // max(compared.output_weight.row_bytes, 1) // band * band
    return compared.output_weight.rows, max(band, per_piece), 0


def plan_pieces(number: int, compared: ComparedTensor) -> Iterator[Piece]:
    """The pieces of the compared tensor number `number`. Their sizes add up to the tensor's.

    They do not depend on threads or memory: several processes plan the same ones.
    """
    rows, per_piece, step = rows_per_piece(compared)
    for start in range(0, rows, per_piece):
        stop = min(start + per_piece, rows)
        size = compared.size * stop // rows - compared.size * start // rows
        yield Piece(number, start, stop, size, step)


class Reader:
    """Reads rows of whole tensors, from one file or from the ranks' slices, into buffers that each thread reuses."""

    def __init__(self, source: Files | None, output: Files) -> None:
        self._files = {"source": source, "output": output}
        self._local = threading.local()

    def _buffer(self, key: str, size: int) -> Array:
        buffers = self._local.__dict__
        if key not in buffers or len(buffers[key]) < size:
            buffers[key] = np.empty(size, dtype=np.uint8)
        buffer: Array = buffers[key][:size]
        return buffer

    def _into(self, side: str, entry: Entry, offset: int, buffer: Array) -> None:
        files = self._files[side]
        assert files is not None
        if len(buffer) and entry.packing is not None:
            self._unpack_into(files, entry, entry.packing, offset, buffer)
        elif len(buffer):
            files.read_into(entry.shard, entry.offset + offset, buffer.data.cast("B"))

    def _unpack_into(self, files: Files, entry: Entry, packing: Packing, offset: int, buffer: Array) -> None:
        first, stop = offset // packing.unpacked, -(-(offset + len(buffer)) // packing.unpacked)
        raw = self._buffer("packed", (stop - first) * packing.packed)
        files.read_into(entry.shard, entry.offset + first * packing.packed, raw.data.cast("B"))
        unpacked = packing.unpack(raw.reshape(-1, packing.packed)).reshape(-1)
        skipped = offset - first * packing.unpacked
        buffer[:] = unpacked[skipped : skipped + len(buffer)]

    def _read_flat(self, side: str, tensor: Tensor, offset: int, buffer: Array) -> None:
        """Fill `buffer` from byte `offset` on. Slices along the first axis follow each other."""
        done, begin = 0, 0
        for entry in tensor.slices:
            inside = offset + done - begin
            if done < len(buffer) and 0 <= inside < entry.size:
                count = min(entry.size - inside, len(buffer) - done)
                self._into(side, entry, inside, buffer[done : done + count])
                done += count
            begin += entry.size

    def rows(self, side: str, key: str, tensor: Tensor, step: int, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of `step` bytes each: uint8 `[stop - start, step]`.

        The array is valid until this thread's next call with the same side and `key`.
        """
        buffer = self._buffer(side + key, (stop - start) * step)
        if tensor.axis == 0:
            self._read_flat(side, tensor, start * step, buffer)
            return buffer.reshape(-1, step)
        table, column = buffer.reshape(-1, step), 0
        for entry in tensor.slices:
            width = entry.size // max(entry.shape[0], 1)
            piece = self._buffer("slice", (stop - start) * width)
            self._into(side, entry, start * width, piece)
            table[:, column : column + width] = piece.reshape(-1, width)
            column += width
        return table

    def factor(self, side: str, entry: Entry) -> Array:
        """The bits of one float32: uint32 [1, 1]."""
        bits = np.empty((1, 4), np.uint8)
        self._into(side, entry, 0, bits.reshape(-1))
        return bits.view("<u4")

    def copies_differ(self, side: str, tensor: Tensor, start: int, wanted: Array) -> set[str]:
        """Names of the files whose copy of the tensor has other bytes than `wanted` at byte `start`."""
        found = set()
        for copy in tensor.copies:
            buffer = self._buffer("slice", wanted.size)
            self._into(side, copy, start, buffer)
            if not np.array_equal(buffer, wanted.reshape(-1)):
                found.add(copy.shard)
        return found

    def wrong_filling(self, side: str, tensor: Tensor) -> Counter[tuple[str, str, str]]:
        """Bytes that fill the ranks' slices of a tensor up, and are not as they should be, see `Tally.bad_filling`."""
        found = Counter[tuple[str, str, str]]()
        for entry in tensor.filling:
            buffer = self._buffer("filling", entry.size)
            self._into(side, entry, 0, buffer)
            found[side, tensor.name, entry.shard] = tables.wrong_bytes(tensor.name, entry.dtype, buffer)
        return +found


def _scale_bytes_differ(source: RowBand, output: RowBand) -> bool:
    a, b = source.scales.raw, output.scales.raw
    return (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b))


def _same_mantissas(a: Scales, b: Scales) -> bool:
    if a.mantissa is None or b.mantissa is None:
        return a.mantissa is b.mantissa
    return np.array_equal(a.mantissa, b.mantissa)


def _same_codes(source: RowBand, output: RowBand) -> bool:
    """Whether both bands have equal codes in one format and equal scales, so that no value needs to be computed."""
    if source.number_format is not output.number_format or source.block != output.block:
        return False
    if not _same_mantissas(source.scales, output.scales):
        return False
    bad = source.scales.bad is not None or output.scales.bad is not None
    if bad and _scale_bytes_differ(source, output):
        return False
    same = np.array_equal(source.scales.exponent, output.scales.exponent)
    return same and np.array_equal(source.data, output.data)


@dataclass
class PieceComparison:
    """The comparison of one piece. `run` fills `tally`, and returns early once `stopped` is set."""

    compared: ComparedTensor
    piece: Piece
    reader: Reader
    band_bytes: int
    inverse: bool
    stopped: threading.Event
    tally: Tally = field(default_factory=Tally)

    def run(self) -> Tally:
        """Compare band by band. The first piece also checks what belongs to no piece."""
        if not self.piece.start:
            for side, tensor in self.compared.tensors():
                self.tally.bad_filling.update(self.reader.wrong_filling(side, tensor))
        if self.compared.kind == "bytes":
            step = self.band_bytes // 8 * 8 if self.piece.row_bytes == 1 else self.band_bytes // self.piece.row_bytes
            work = self._compare_bytes
        else:
            step = _band_rows(self.compared, self.band_bytes)
            work = self._compare_values if self.compared.kind == "values" else self._scan
        for start in range(self.piece.start, self.piece.stop, max(step, 1)):
            if self.stopped.is_set():
                break
            work(start, min(start + max(step, 1), self.piece.stop))
        return self.tally

    def _is_counted(self, start: int) -> bool:
        """Whether the codes of the band that starts at row `start` are counted."""
        band = (start - self.piece.start) // _band_rows(self.compared, self.band_bytes)
        return band % COUNTED_BANDS == 0

    def _read_scales(self, side: str, weight: Weight, start: int, stop: int) -> Scales:
        scale = weight.scale
        if scale is None:
            return no_scales()
        top, bottom = start // weight.block[0], -(-stop // weight.block[0])
        step = row_bytes(scale)
        data = self.reader.rows(side, "scale", scale, step, top, bottom)
        self.tally.copies_differ |= self.reader.copies_differ(side, scale, top * step, data)
        if scale.factor is not None:
            factor = self.reader.factor(side, scale.factor)
            scales = product_scales(data, factor, scale.divides)
        else:
            scales = e8m0_scales(data) if scale.dtype in E8M0_DTYPES else float_scales(data.view("<u4"))
        count_scales(self.tally, side, scales)
        return scales

    def _read_band(self, side: str, weight: Weight, start: int, stop: int) -> RowBand:
        data = self.reader.rows(side, "data", weight.tensor, weight.row_bytes, start, stop)
        self.tally.copies_differ |= self.reader.copies_differ(side, weight.tensor, start * weight.row_bytes, data)
        scales = self._read_scales(side, weight, start, stop)
        return RowBand(weight.number_format, data, weight.columns, scales, weight.block)

    def _compare_values(self, start: int, stop: int) -> None:
        assert self.compared.source_weight is not None and self.compared.output_weight is not None
        source = self._read_band("source", self.compared.source_weight, start, stop)
        output = self._read_band("output", self.compared.output_weight, start, stop)
        self.tally.elements += source.rows * source.columns
        self.tally.scale_bytes_differ |= _scale_bytes_differ(source, output)
        if not _same_codes(source, output):
            self.tally.bytes_differ |= not np.array_equal(source.data, output.data)
            self._record_values(start, source, output)
        self._count(start, source, output)

    def _record_values(self, start: int, source: RowBand, output: RowBand) -> None:
        result = compare(source, output)
        self.tally.lost_sign += result.lost_sign
        self.tally.gained_sign += result.gained_sign
        if result.different is None:
            return
        self.tally.different += int(np.count_nonzero(result.different))
        largest, total = errors(source, output, result.different)
        self.tally.largest_error = max(self.tally.largest_error, largest)
        self.tally.error_sum += total
        if block := coarse_block(self.compared):
            self.tally.blocks.update(count_blocks(result.different, start, block))
        if len(self.tally.first) < FIRST_DIFFERENCES:
            self.tally.first += first_differences(result.different, start, source, output)
            del self.tally.first[FIRST_DIFFERENCES:]

    def _count(self, start: int, source: RowBand, output: RowBand) -> None:
        """Count codes that are not finite, uses of codes, spans of scales, and codes that can be rebuilt."""
        for side, band in (("source", source), ("output", output)):
            if band.number_format is E4M3 or self.tally.different:
                self.tally.special[side] += special_codes(band)
            if self._is_counted(start):
                count_codes(self.tally, side, band)
        fp4_first = source.number_format is E2M1
        fp4, fp8 = (source, output) if fp4_first else (output, source)
        if fp4.number_format is E2M1 and fp8.number_format is E4M3 and fp4.block != fp8.block:
            count_spans(self.tally, fp4, fp8)
        if self.inverse and fp4_first and output.number_format is not E2M1:
            self.tally.rebuilt.update(rebuild(source, output))

    def _scan(self, start: int, stop: int) -> None:
        """For one checkpoint alone: check the output's codes and scales."""
        assert self.compared.output_weight is not None
        band = self._read_band("output", self.compared.output_weight, start, stop)
        self.tally.elements += band.rows * band.columns
        self.tally.special["output"] += special_codes(band)
        if self._is_counted(start):
            count_codes(self.tally, "output", band)

    def _compare_bytes(self, start: int, stop: int) -> None:
        source, output = self.compared.source, self.compared.output
        assert source is not None and output is not None
        step, size = self.piece.row_bytes, max(1, DTYPE_BITS[output.dtype] // 8)
        a = self.reader.rows("source", "data", source, step, start, stop).reshape(-1)
        b = self.reader.rows("output", "data", output, step, start, stop).reshape(-1)
        self.tally.elements += a.size // size
        self.tally.copies_differ |= self.reader.copies_differ("source", source, start * step, a)
        self.tally.copies_differ |= self.reader.copies_differ("output", output, start * step, b)
        if not same_bytes(a, b):
            self._record_bytes(output, start * step // size, a.reshape(-1, size), b.reshape(-1, size))

    def _record_bytes(self, output: Tensor, first: int, a: Array, b: Array) -> None:
        """Elements that differ, `[elements, bytes of one]` of both sides; `first` is the position of the first one."""
        different = (a != b).any(axis=1)
        self.tally.bytes_differ = True
        self.tally.different += int(np.count_nonzero(different))
        for position in np.flatnonzero(different)[: FIRST_DIFFERENCES - len(self.tally.first)]:
            at = np.unravel_index(first + int(position), output.shape or (1,))
            codes = [side[position].tobytes()[::-1].hex() for side in (a, b)]
            self.tally.first.append(raw_difference([int(i) for i in at], codes, output.dtype))


def confirmed(compare: Callable[[], Tally]) -> Tally:
    """The tally of a piece that is read by range requests, whose bytes no hash covers: a difference is read twice.

    Raises MachineError if the second reading finds something else: then the bytes changed on their way.
    """
    tally = compare()
    if tally.different:
        again = compare()
        if (again.different, again.blocks, again.first) != (tally.different, tally.blocks, tally.first):
            raise MachineError("bytes of a range request arrived damaged", "Run the same command again.")
    return tally
