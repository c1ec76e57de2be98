"""Comparing one piece of one unit: read both sides, compare exactly, count.

A `Piece` is some rows of one `Unit`, independent of every other; its `Tally` adds up with the tallies of the unit's
other pieces, in any order, on any machine. Within a piece, bands of rows are read into buffers that each thread
keeps, so memory does not grow with the checkpoint.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .verify_files import DTYPE_BITS, Entry, Files
from .verify_formats import E2M1, E4M3, F32, Array, Format, decode, unpack
from .verify_inverse import rebuild
from .verify_layout import Tensor
from .verify_plan import Unit, Weight, row_bytes
from .verify_values import Band, Comparison, Scales, compare, e8m0_scales, float_scales, has_special, no_scales

PIECE_BYTES = 64 << 20  # how much of a tensor is one piece of work
FIRST_DIFFERENCES = 5
COUNTED_BANDS = 8  # codes are counted in the first of this many bands: counting costs as much as comparing
E4M3_SPAN = 14  # FP4 scales of a block may differ by 2^14 before a code can lose its exact FP8 form


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a unit. `row_bytes` is 0 for values; for bytes, the granularity of the rows."""

    unit: int
    start: int
    stop: int
    row_bytes: int = 0


@dataclass
class Tally:
    """Counts over some rows of a unit; `add` merges another one of the same unit.

    The two histograms at the end are not merged per unit: `Statistics` takes them out of every finished tally.
    """

    elements: int = 0
    different: int = 0
    bytes_differ: bool = False
    scale_bytes_differ: bool = False
    copies_differ: set[str] = field(default_factory=set)
    lost_sign: int = 0
    gained_sign: int = 0
    special: Counter[str] = field(default_factory=Counter)  # side -> NaN or infinite codes
    bad_scales: Counter[str] = field(default_factory=Counter)
    odd_scales: Counter[str] = field(default_factory=Counter)  # float32 scales that are no powers of two
    blocks: Counter[tuple[int, int]] = field(default_factory=Counter)  # FP8 block -> elements that differ
    first: list[dict[str, Any]] = field(default_factory=list)
    spans: Counter[int] = field(default_factory=Counter)
    other_scale: int = 0
    rebuilt: Counter[str] = field(default_factory=Counter)  # --inverse: codes, sign, wrong
    codes: dict[tuple[str, str], Array] = field(default_factory=dict)  # (side, format) -> uses of each code
    scale_codes: dict[str, Array] = field(default_factory=dict)  # side -> uses of each scale exponent + 127

    def add(self, other: "Tally") -> None:
        """Merge the tally of other rows."""
        for name in ("elements", "different", "lost_sign", "gained_sign", "other_scale"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bytes_differ |= other.bytes_differ
        self.scale_bytes_differ |= other.scale_bytes_differ
        self.copies_differ |= other.copies_differ
        for name in ("special", "bad_scales", "odd_scales", "blocks", "spans", "rebuilt"):
            getattr(self, name).update(getattr(other, name))
        self.first = sorted(self.first + other.first, key=lambda d: d["at"])[:FIRST_DIFFERENCES]


class Reader:
    """Reads rows of whole tensors into this thread's buffers, whatever parts they are stored in."""

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
        if len(buffer):
            files.read_into(entry.shard, entry.offset + offset, buffer.data.cast("B"))

    def _flat(self, side: str, tensor: Tensor, offset: int, buffer: Array) -> None:
        """Parts along the first axis are one stream of bytes."""
        done, begin = 0, 0
        for part in tensor.parts:
            inside = offset + done - begin
            if done < len(buffer) and 0 <= inside < part.size:
                count = min(part.size - inside, len(buffer) - done)
                self._into(side, part, inside, buffer[done : done + count])
                done += count
            begin += part.size

    def rows(self, side: str, key: str, tensor: Tensor, step: int, start: int, stop: int) -> Array:
        """Rows `start` to `stop`, `step` bytes each, as uint8 `[stop - start, step]`, valid until the next call."""
        buffer = self._buffer(side + key, (stop - start) * step)
        if tensor.axis == 0:
            self._flat(side, tensor, start * step, buffer)
            return buffer.reshape(-1, step)
        table, column = buffer.reshape(-1, step), 0
        for part in tensor.parts:
            width = part.size // max(part.shape[0], 1)
            piece = self._buffer("part", (stop - start) * width)
            self._into(side, part, start * width, piece)
            table[:, column : column + width] = piece.reshape(-1, width)
            column += width
        return table

    def copies_differ(self, side: str, tensor: Tensor, start: int, wanted: Array) -> set[str]:
        """Files whose copy of the tensor has other bytes at `start`."""
        found = set()
        for copy in tensor.copies:
            buffer = self._buffer("part", wanted.size)
            self._into(side, copy, start, buffer)
            if not np.array_equal(buffer, wanted.reshape(-1)):
                found.add(copy.shard)
        return found


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


def _value_text(number_format: Format, code: int, scale_mantissa: int, scale_exponent: int) -> str:
    values = decode(number_format, np.array([code]))
    if values.special[0]:
        return "not a number"
    mantissa, exponent = int(values.mantissa[0]) * scale_mantissa, int(values.exponent[0]) + scale_exponent
    number = math.ldexp(mantissa, exponent) * (-1 if values.negative[0] else 1)
    return repr(number)


def _element(band: Band, row: int, column: int) -> dict[str, Any]:
    """Code, scale and value of one element, for a message."""
    code = int(unpack(band.number_format, band.data[row : row + 1])[0, column])
    width = band.number_format.bits // 4
    shown: dict[str, Any] = {"code": f"0x{code:0{width}x}"}
    scales = band.scales
    if scales.raw is None:
        return {**shown, "scale": None, "value": _value_text(band.number_format, code, 1, 0)}
    at = min(row // band.block[0], scales.exponent.shape[0] - 1), column // band.block[1]
    raw, exponent = int(scales.raw[at]), int(scales.exponent[at])
    mantissa = 1 if scales.mantissa is None else int(scales.mantissa[at])
    bad = scales.bad is not None and bool(scales.bad[at])
    text = f"0x{raw:0{2 * scales.raw.itemsize}x}"
    scale = (
        f"{text} (not a scale)"
        if bad
        else f"{text} (2^{exponent})"
        if mantissa == 1
        else f"{text} ({mantissa}*2^{exponent})"
    )
    value = "not a number" if bad else _value_text(band.number_format, code, mantissa, exponent)
    return {**shown, "scale": scale, "value": value}


def _first_differences(different: Array, row0: int, source: Band, output: Band) -> list[dict[str, Any]]:
    rows, columns = np.unravel_index(np.flatnonzero(different)[:FIRST_DIFFERENCES], different.shape)
    return [
        {
            "at": [row0 + int(r), int(c)],
            "source": _element(source, int(r), int(c)),
            "output": _element(output, int(r), int(c)),
        }
        for r, c in zip(rows, columns, strict=True)
    ]


def coarse_block(unit: Unit) -> tuple[int, int] | None:
    """The larger block of the two sides, in which differences are located; None when neither has scales."""
    blocks = [w.block for w in (unit.source_weight, unit.output_weight) if w is not None and w.scale is not None]
    return max(blocks, key=lambda block: block[0] * block[1], default=None)


def _reduce_blocks(operation: np.ufunc, values: Array, rows: int, columns: int) -> Array:
    """`operation` over tiles of `rows` x `columns`, ragged at the edges."""
    down = operation.reduceat(values, np.arange(0, values.shape[0], rows), axis=0)
    reduced: Array = operation.reduceat(down, np.arange(0, values.shape[1], columns), axis=1)
    return reduced


def _count_blocks(different: Array, row0: int, block: tuple[int, int]) -> Counter[tuple[int, int]]:
    """Differing elements per block; the band starts with a row of blocks."""
    if block[1] >= different.shape[1]:
        block = block[0], different.shape[1]
    counts = _reduce_blocks(np.add, different.astype(np.int64), *block)
    rows, columns = np.nonzero(counts)
    top = row0 // block[0]
    return Counter({(top + int(r), int(c)): int(counts[r, c]) for r, c in zip(rows, columns, strict=True)})


def _count_spans(tally: Tally, fp4: Band, fp8: Band) -> None:
    """How far the FP4 scales of each FP8 block lie apart, and whether its scale is the reference's (largest - 6)."""
    if fp4.scales.bad is not None or fp8.scales.bad is not None or fp8.block[1] % fp4.block[1]:
        return
    tile = fp8.block[0] // fp4.block[0], fp8.block[1] // fp4.block[1]
    largest = _reduce_blocks(np.maximum, fp4.scales.exponent, *tile)
    smallest = _reduce_blocks(np.minimum, fp4.scales.exponent, *tile)
    spans, counts = np.unique(largest - smallest, return_counts=True)
    tally.spans.update({int(span): int(count) for span, count in zip(spans, counts, strict=True)})
    other = fp8.scales.exponent != np.maximum(largest - 6, -127)
    if fp8.scales.mantissa is not None:
        other |= fp8.scales.mantissa != 1
    tally.other_scale += int(np.count_nonzero(other))


def _count_codes(tally: Tally, side: str, band: Band) -> None:
    kind = band.number_format
    if kind is E2M1:
        bytes_used = np.bincount(band.data.reshape(-1), minlength=256).reshape(16, 16)
        uses = bytes_used.sum(axis=0) + bytes_used.sum(axis=1)
    elif kind is E4M3:
        uses = np.bincount(band.data.reshape(-1), minlength=256)
    else:
        return
    tally.codes[side, kind.name] = tally.codes.get((side, kind.name), 0) + uses


def _count_scales(tally: Tally, side: str, scales: Scales) -> None:
    if scales.raw is None:
        return
    good = scales.exponent if scales.bad is None else scales.exponent[~scales.bad]
    uses = np.bincount(np.clip(good.reshape(-1) + 127, 0, 254), minlength=255)
    tally.scale_codes[side] = tally.scale_codes.get(side, 0) + uses
    if scales.bad is not None:
        tally.bad_scales[side] += int(np.count_nonzero(scales.bad))
    if scales.mantissa is not None:
        tally.odd_scales[side] += int(np.count_nonzero(scales.mantissa != 1))


def _special_codes(band: Band) -> int:
    if not has_special(band):
        return 0
    return int(np.count_nonzero(decode(band.number_format, unpack(band.number_format, band.data)).special))


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
        _count_scales(tally, side, scales)
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
            tally.blocks.update(_count_blocks(result.different, start, block))
        if len(tally.first) < FIRST_DIFFERENCES:
            tally.first += _first_differences(result.different, start, source, output)
            del tally.first[FIRST_DIFFERENCES:]

    def _scale_bytes_differ(self, source: Band, output: Band) -> bool:
        a, b = source.scales.raw, output.scales.raw
        return (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b))

    def _compare_band(self, tally: Tally, start: int, stop: int, count_codes: bool) -> None:
        assert self.unit.source_weight is not None and self.unit.output_weight is not None
        source = self._band("source", tally, self.unit.source_weight, start, stop)
        output = self._band("output", tally, self.unit.output_weight, start, stop)
        tally.elements += source.rows * source.columns
        tally.scale_bytes_differ |= self._scale_bytes_differ(source, output)
        same = self._same_codes(source, output)
        if not same:
            tally.bytes_differ |= not np.array_equal(source.data, output.data)
            self._record(tally, compare(source, output), start, source, output)
        self._statistics(tally, source, output, count_codes)

    def _statistics(self, tally: Tally, source: Band, output: Band, count_codes: bool) -> None:
        for side, band in (("source", source), ("output", output)):
            if band.number_format is E4M3 or tally.different:
                tally.special[side] += _special_codes(band)
            if count_codes:
                _count_codes(tally, side, band)
        fp4_first = source.number_format is E2M1
        fp4, fp8 = (source, output) if fp4_first else (output, source)
        if fp4.number_format is E2M1 and fp8.number_format is E4M3 and fp4.scales.raw is not None:
            _count_spans(tally, fp4, fp8)
        if self.inverse and fp4_first and output.number_format is not E2M1:
            tally.rebuilt.update(rebuild(source, output))

    def _scan_band(self, tally: Tally, start: int, stop: int, count_codes: bool) -> None:
        assert self.unit.output_weight is not None
        band = self._band("output", tally, self.unit.output_weight, start, stop)
        tally.elements += band.rows * band.columns
        tally.special["output"] += _special_codes(band)
        if count_codes:
            _count_codes(tally, "output", band)

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
            tally.first.append(_raw_difference([int(i) for i in at], codes, output.dtype))


def _raw_difference(at: list[int], codes: list[str], dtype: str) -> dict[str, Any]:
    """One element of a tensor that is compared by bytes: codes, and values where the dtype has them."""
    shown = []
    for code in codes:
        number = int(code, 16)
        if dtype in ("F32", "BF16"):
            value = _value_text(F32, number << 16 if dtype == "BF16" else number, 1, 0)
        else:
            value = str(int.from_bytes(bytes.fromhex(code), "big", signed=dtype.startswith("I")))
        shown.append({"code": f"0x{code}", "scale": None, "value": value})
    return {"at": at, "source": shown[0], "output": shown[1]}
