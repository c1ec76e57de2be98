"""Comparing one piece of one unit: read both sides, compare exactly, count.

A `Piece` is some rows of one `Unit`, independent of every other; its `Tally` adds up with the tallies of the unit's
other pieces, in any order, on any machine. Within a piece, bands of rows are read into buffers that each thread
keeps, so memory does not grow with the checkpoint.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .compare_values import Band, Comparison, Scales, compare, e8m0_scales, float_scales, no_scales
from .differences import FIRST_DIFFERENCES, first_differences, raw_difference
from .files import DTYPE_BITS
from .formats import E2M1, E4M3, Array
from .inverse import rebuild
from .layout import Tensor
from .plan import Unit, Weight, coarse_block, row_bytes
from .reader import Reader
from .tally import Tally, count_blocks, count_codes, count_scales, count_spans, special_codes

PIECE_BYTES = 64 << 20  # how much of a tensor is one piece of work
COUNTED_BANDS = 8  # codes are counted in the first of this many bands: counting costs as much as comparing


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a unit. `row_bytes` is 0 for values; for bytes, the granularity of the rows."""

    unit: int
    start: int
    stop: int
    row_bytes: int = 0


def _band_rows(unit: Unit, band_bytes: int) -> int:
    """Rows compared at once: whole blocks of both sides, about `band_bytes` of the larger one."""
    weights = [weight for weight in (unit.source_weight, unit.output_weight) if weight is not None]
    block = math.lcm(*(weight.block[0] for weight in weights if weight.scale is not None), 1)
    step = max(weight.row_bytes for weight in weights)
    return max(block, band_bytes // max(step, 1) // block * block)


def plan_pieces(index: int, unit: Unit, band_bytes: int) -> Iterator[Piece]:
    """The unit's pieces; none when there is nothing to read or to say about its bytes."""
    if unit.kind == "bytes":
        assert unit.source is not None and unit.output is not None
        step = 1 if unit.source.axis == unit.output.axis == 0 else row_bytes(unit.output)
        rows, per_piece = unit.output.size // max(step, 1), max(1, PIECE_BYTES // max(step, 1))
    elif unit.output_weight is not None:
        step, rows = 0, unit.output_weight.rows
        band = _band_rows(unit, band_bytes)
        per_piece = max(band, PIECE_BYTES // max(unit.output_weight.row_bytes, 1) // band * band)
    else:
        return
    for start in range(0, rows, per_piece):
        yield Piece(index, start, min(start + per_piece, rows), step)


def piece_bytes(unit: Unit, piece: Piece) -> int:
    """Bytes of a piece on both sides. Over all pieces of a unit they add up to its size."""
    if piece.row_bytes:
        assert unit.output is not None
        rows = unit.output.size // piece.row_bytes
    else:
        assert unit.output_weight is not None
        rows = unit.output_weight.rows
    return unit.size * piece.stop // max(rows, 1) - unit.size * piece.start // max(rows, 1)


@dataclass
class PieceWork:
    """One piece at work: knows the unit, reads its bands, fills a tally."""

    unit: Unit
    reader: Reader
    band_bytes: int
    inverse: bool

    def _scales(self, side: str, tally: Tally, weight: Weight, start: int, stop: int) -> Scales:
        scale = weight.scale
        if scale is None:
            return no_scales()
        top, bottom = start // weight.block[0], -(-stop // weight.block[0])
        step = row_bytes(scale)
        data = self.reader.rows(side, "scale", scale, step, top, bottom)
        tally.copies_differ |= self.reader.copies_differ(side, scale, top * step, data)
        scales = e8m0_scales(data) if scale.dtype == "F8_E8M0" else float_scales(data.view("<u4"))
        count_scales(tally, side, scales)
        return scales

    def _band(self, side: str, tally: Tally, weight: Weight, start: int, stop: int) -> Band:
        data = self.reader.rows(side, "data", weight.tensor, weight.row_bytes, start, stop)
        tally.copies_differ |= self.reader.copies_differ(side, weight.tensor, start * weight.row_bytes, data)
        scales = self._scales(side, tally, weight, start, stop)
        return Band(weight.number_format, data, weight.columns, scales, weight.block)

    def _same_codes(self, source: Band, output: Band) -> bool:
        """Equal bytes in one format under equal scales: nothing to multiply out."""
        if source.number_format is not output.number_format or source.block != output.block:
            return False
        if source.scales.mantissa is not None or output.scales.mantissa is not None:
            scales = source.scales.mantissa, output.scales.mantissa
            if scales[0] is None or scales[1] is None or not np.array_equal(scales[0], scales[1]):
                return False
        if (source.scales.bad is not None or output.scales.bad is not None) and self._scale_bytes_differ(
            source, output
        ):
            return False
        same = np.array_equal(source.scales.exponent, output.scales.exponent)
        return same and np.array_equal(source.data, output.data)

    def _record(self, tally: Tally, result: Comparison, start: int, source: Band, output: Band) -> None:
        tally.lost_sign += result.lost_sign
        tally.gained_sign += result.gained_sign
        if result.different is None:
            return
        tally.different += int(np.count_nonzero(result.different))
        if block := coarse_block(self.unit):
            tally.blocks.update(count_blocks(result.different, start, block))
        if len(tally.first) < FIRST_DIFFERENCES:
            tally.first += first_differences(result.different, start, source, output)
            del tally.first[FIRST_DIFFERENCES:]

    def _scale_bytes_differ(self, source: Band, output: Band) -> bool:
        a, b = source.scales.raw, output.scales.raw
        return (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b))

    def _compare_band(self, tally: Tally, start: int, stop: int, counted: bool) -> None:
        assert self.unit.source_weight is not None and self.unit.output_weight is not None
        source = self._band("source", tally, self.unit.source_weight, start, stop)
        output = self._band("output", tally, self.unit.output_weight, start, stop)
        tally.elements += source.rows * source.columns
        tally.scale_bytes_differ |= self._scale_bytes_differ(source, output)
        same = self._same_codes(source, output)
        if not same:
            tally.bytes_differ |= not np.array_equal(source.data, output.data)
            self._record(tally, compare(source, output), start, source, output)
        self._statistics(tally, source, output, counted)

    def _statistics(self, tally: Tally, source: Band, output: Band, counted: bool) -> None:
        for side, band in (("source", source), ("output", output)):
            if band.number_format is E4M3 or tally.different:
                tally.special[side] += special_codes(band)
            if counted:
                count_codes(tally, side, band)
        fp4_first = source.number_format is E2M1
        fp4, fp8 = (source, output) if fp4_first else (output, source)
        if fp4.number_format is E2M1 and fp8.number_format is E4M3:
            count_spans(tally, fp4, fp8)
        if self.inverse and fp4_first and output.number_format is not E2M1:
            tally.rebuilt.update(rebuild(source, output))

    def _scan_band(self, tally: Tally, start: int, stop: int, counted: bool) -> None:
        assert self.unit.output_weight is not None
        band = self._band("output", tally, self.unit.output_weight, start, stop)
        tally.elements += band.rows * band.columns
        tally.special["output"] += special_codes(band)
        if counted:
            count_codes(tally, "output", band)

    def values(self, piece: Piece, tally: Tally, stopped: threading.Event) -> Iterator[int]:
        """Fill the tally band by band; yields the elements of each, so that progress moves."""
        assert self.unit.output_weight is not None
        step = _band_rows(self.unit, self.band_bytes)
        work = self._compare_band if self.unit.kind == "values" else self._scan_band
        for number, start in enumerate(range(piece.start, piece.stop, step)):
            if stopped.is_set():
                return
            stop = min(start + step, piece.stop)
            work(tally, start, stop, number % COUNTED_BANDS == 0)
            yield (stop - start) * self.unit.output_weight.columns

    def bytes(self, piece: Piece, tally: Tally, stopped: threading.Event) -> Iterator[int]:
        """Byte for byte: elements that differ are counted and shown by their position in the tensor."""
        source, output = self.unit.source, self.unit.output
        assert source is not None and output is not None
        rows = max(1, self.band_bytes // piece.row_bytes) if piece.row_bytes > 1 else self.band_bytes // 8 * 8
        size = max(1, DTYPE_BITS[output.dtype] // 8)
        for start in range(piece.start, piece.stop, rows):
            if stopped.is_set():
                return
            stop = min(start + rows, piece.stop)
            a = self.reader.rows("source", "data", source, piece.row_bytes, start, stop).reshape(-1)
            b = self.reader.rows("output", "data", output, piece.row_bytes, start, stop).reshape(-1)
            offset = start * piece.row_bytes
            tally.elements += a.size // size
            tally.copies_differ |= self.reader.copies_differ("source", source, offset, a)
            tally.copies_differ |= self.reader.copies_differ("output", output, offset, b)
            if not np.array_equal(a, b):
                self._record_bytes(tally, output, offset // size, a.reshape(-1, size), b.reshape(-1, size))
            yield a.size // size

    def _record_bytes(self, tally: Tally, output: Tensor, first: int, a: Array, b: Array) -> None:
        different = (a != b).any(axis=1)
        tally.bytes_differ = True
        tally.different += int(np.count_nonzero(different))
        for position in np.flatnonzero(different)[: FIRST_DIFFERENCES - len(tally.first)]:
            at = np.unravel_index(first + int(position), output.shape or (1,))
            codes = [side[position].tobytes()[::-1].hex() for side in (a, b)]
            tally.first.append(raw_difference([int(i) for i in at], codes, output.dtype))
