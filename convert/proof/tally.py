"""What is counted while tensors are compared."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .compare_values import Band, Scales, has_special
from .differences import FIRST_DIFFERENCES
from .formats import E2M1, E4M3, Array, unpack

E4M3_SPAN = 14  # FP4 scales of a block may differ by 2^14 before a code can lose its exact FP8 form


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


def _reduce_blocks(operation: np.ufunc, values: Array, rows: int, columns: int) -> Array:
    """`operation` over tiles of `rows` x `columns`, ragged at the edges."""
    down = operation.reduceat(values, np.arange(0, values.shape[0], rows), axis=0)
    reduced: Array = operation.reduceat(down, np.arange(0, values.shape[1], columns), axis=1)
    return reduced


def count_blocks(different: Array, row0: int, block: tuple[int, int]) -> Counter[tuple[int, int]]:
    """Differing elements per block; the band starts with a row of blocks."""
    if block[1] >= different.shape[1]:
        block = block[0], different.shape[1]
    counts = _reduce_blocks(np.add, different.astype(np.int64), *block)
    rows, columns = np.nonzero(counts)
    top = row0 // block[0]
    return Counter({(top + int(r), int(c)): int(counts[r, c]) for r, c in zip(rows, columns, strict=True)})


def count_spans(tally: Tally, fp4: Band, fp8: Band) -> None:
    """How far the FP4 scales of each FP8 block lie apart, and whether its scale is the reference's (largest - 6)."""
    if fp4.scales.raw is None or fp8.scales.raw is None or fp8.block[1] % fp4.block[1]:
        return
    if fp4.scales.bad is not None or fp8.scales.bad is not None:
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


def count_codes(tally: Tally, side: str, band: Band) -> None:
    """Use of each FP4 or FP8 code."""
    kind = band.number_format
    if kind is E2M1:
        bytes_used = np.bincount(band.data.reshape(-1), minlength=256).reshape(16, 16)
        uses = bytes_used.sum(axis=0) + bytes_used.sum(axis=1)
    elif kind is E4M3:
        uses = np.bincount(band.data.reshape(-1), minlength=256)
    else:
        return
    tally.codes[side, kind.name] = tally.codes.get((side, kind.name), 0) + uses


def count_scales(tally: Tally, side: str, scales: Scales) -> None:
    """Use of each scale exponent, and scales that are none or no powers of two."""
    if scales.raw is None:
        return
    good = scales.exponent if scales.bad is None else scales.exponent[~scales.bad]
    uses = np.bincount(np.clip(good.reshape(-1) + 127, 0, 254), minlength=255)
    tally.scale_codes[side] = tally.scale_codes.get(side, 0) + uses
    if scales.bad is not None:
        tally.bad_scales[side] += int(np.count_nonzero(scales.bad))
    if scales.mantissa is not None:
        tally.odd_scales[side] += int(np.count_nonzero(scales.mantissa != 1))


def special_codes(band: Band) -> int:
    """NaN and infinite codes of a band."""
    kind = band.number_format
    if not has_special(band):
        return 0
    return int(np.count_nonzero((unpack(kind, band.data) & (kind.sign - 1)) >= kind.first_special))
