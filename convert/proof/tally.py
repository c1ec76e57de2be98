"""Counters filled while tensors are compared: a `Tally` per tensor, `Statistics` over all of them."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.convert.proof.values import compiled
from dsv4.convert.proof.values.compare import RowBand, Scales, has_special
from dsv4.convert.proof.values.formats import E2M1, E4M3, F32, Array, Format, decode, unpack

from .plan import ComparedTensor

E4M3_SPAN = 14  # FP4 scales of a block may differ by 2^14 before a code can lose its exact FP8 form
FIRST_DIFFERENCES = 5  # elements listed per tensor
COUNTED_IN_PAIRS = 2**18  # bytes; for fewer, the table of all pairs takes longer than it saves
_MODULE = re.compile(r"((?:layers|mtp)\.\d+)\..*")


@dataclass
class Tally:
    """Counts over some rows of a compared tensor.

    `add` merges the counts of other rows, without the two histograms at the end: `Statistics.take_histograms` moves
    those out of every finished tally.
    """

    elements: int = 0
    different: int = 0
    largest_error: float = 0.0  # of the elements that differ, as far as both sides are numbers
    error_sum: float = 0.0
    bytes_differ: bool = False
    scale_bytes_differ: bool = False
    copies_differ: set[str] = field(default_factory=set)
    lost_sign: int = 0
    gained_sign: int = 0
    special: Counter[str] = field(default_factory=Counter)  # side -> NaN or infinite codes
    bad_scales: Counter[str] = field(default_factory=Counter)
    odd_scales: Counter[str] = field(default_factory=Counter)  # float32 scales that are not powers of two
    # (side, tensor, file) -> wrong bytes of what fills a rank's slice up
    bad_filling: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    blocks: Counter[tuple[int, int]] = field(default_factory=Counter)  # FP8 block -> elements that differ
    first: list[dict[str, Any]] = field(default_factory=list)
    spans: Counter[int] = field(default_factory=Counter)
    other_scale: int = 0
    rebuilt: Counter[str] = field(default_factory=Counter)  # --inverse: codes, sign, wrong
    codes: dict[tuple[str, str], Array] = field(default_factory=dict)  # (side, format) -> uses of each code
    scale_codes: dict[str, Array] = field(default_factory=dict)  # side -> uses of each scale exponent + 127

    def add(self, other: "Tally") -> None:
        """Merge the tally of other rows."""
        for name in ("elements", "different", "error_sum", "lost_sign", "gained_sign", "other_scale"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_error = max(self.largest_error, other.largest_error)
        self.bytes_differ |= other.bytes_differ
        self.scale_bytes_differ |= other.scale_bytes_differ
        self.copies_differ |= other.copies_differ
        for name in ("special", "bad_scales", "odd_scales", "bad_filling", "blocks", "spans", "rebuilt"):
            getattr(self, name).update(getattr(other, name))
        self.first = sorted(self.first + other.first, key=lambda d: d["at"])[:FIRST_DIFFERENCES]


def _reduce_blocks(operation: np.ufunc, values: Array, rows: int, columns: int) -> Array:
    """`operation` over tiles of `rows` x `columns`, ragged at the edges."""
    if values.shape[0] % rows:
        down = operation.reduceat(values, np.arange(0, values.shape[0], rows), axis=0)
    else:  # the same, in vector registers
        down = operation.reduce(values.reshape(-1, rows, values.shape[1]), axis=1)
    reduced: Array = operation.reduceat(down, np.arange(0, values.shape[1], columns), axis=1)
    return reduced


def count_blocks(different: Array, row0: int, block: tuple[int, int]) -> Counter[tuple[int, int]]:
    """Differing elements per block. `different` is bool `[rows, columns]` of a band that starts at row `row0`."""
    if block[1] >= different.shape[1]:
        block = block[0], different.shape[1]
    counts = _reduce_blocks(np.add, different.astype(np.int64), *block)
    rows, columns = np.nonzero(counts)
    top = row0 // block[0]
    return Counter({(top + int(r), int(c)): int(counts[r, c]) for r, c in zip(rows, columns, strict=True)})


def count_spans(tally: Tally, fp4: RowBand, fp8: RowBand) -> None:
    """Per FP8 block: the span of its FP4 scales, and whether its scale is the reference converter's (largest - 6)."""
    if fp4.scales.raw is None or fp8.scales.raw is None or fp8.block[1] % fp4.block[1]:
        return
    if fp4.scales.bad is not None or fp8.scales.bad is not None:
        return
    tile = fp8.block[0] // fp4.block[0], fp8.block[1] // fp4.block[1]
    largest = _reduce_blocks(np.maximum, fp4.scales.exponent, *tile)
    smallest = _reduce_blocks(np.minimum, fp4.scales.exponent, *tile)
    tally.spans.update((largest - smallest).reshape(-1).tolist())
    other = fp8.scales.exponent != np.maximum(largest - 6, -127)
    if fp8.scales.mantissa is not None:
        other |= fp8.scales.mantissa != 1
    tally.other_scale += int(np.count_nonzero(other))


def byte_uses(data: Array) -> Array:
    """How often each byte occurs in uint8 data: int64 [256].

    Much data is counted in pairs of bytes: half the steps, and fewer of them wait for the one before at the same count.
    """
    flat = np.ascontiguousarray(data).reshape(-1)
    if (counted := compiled.count(flat)) is not None:
        return counted
    if len(flat) < COUNTED_IN_PAIRS or len(flat) % 2:
        return np.bincount(flat, minlength=256)
    pairs = np.bincount(flat.view(np.uint16), minlength=2**16).reshape(256, 256)
    uses: Array = pairs.sum(axis=0) + pairs.sum(axis=1)
    return uses


def count_codes(tally: Tally, side: str, band: RowBand) -> None:
    """Use of each FP4 or FP8 code."""
    kind = band.number_format
    if kind is E2M1:
        bytes_used = byte_uses(band.data).reshape(16, 16)
        uses = bytes_used.sum(axis=0) + bytes_used.sum(axis=1)
    elif kind is E4M3:
        uses = byte_uses(band.data)
    else:
        return
    tally.codes[side, kind.name] = tally.codes.get((side, kind.name), 0) + uses


def count_scales(tally: Tally, side: str, scales: Scales) -> None:
    """Use of each scale exponent; scales that are not positive and finite, or not powers of two."""
    if scales.raw is None:
        return
    if scales.is_e8m0:
        uses = byte_uses(scales.raw)[:255]  # all but 255, which is bad
    else:
        good = scales.exponent if scales.bad is None else scales.exponent[~scales.bad]
        uses = np.bincount(np.clip(good.reshape(-1) + 127, 0, 254), minlength=255)
    tally.scale_codes[side] = tally.scale_codes.get(side, 0) + uses
    if scales.bad is not None:
        tally.bad_scales[side] += int(np.count_nonzero(scales.bad))
    if scales.mantissa is not None:
        tally.odd_scales[side] += int(np.count_nonzero(scales.mantissa != 1))


def special_codes(band: RowBand) -> int:
    """Number of codes that are NaN or infinite."""
    kind = band.number_format
    if not has_special(band):
        return 0
    return int(np.count_nonzero((unpack(kind, band.data) & (kind.sign - 1)) >= kind.first_special))


def module_of(name: str) -> str:
    """`layers.3.attn.wq_a.weight` -> `layers.3`; a tensor outside of the layers -> `top`."""
    match = _MODULE.fullmatch(name)
    return match[1] if match else "top"


def module_order(module: str) -> tuple[int, int]:
    """Top first, then layers, then mtp stages, by number."""
    kind, _, number = module.partition(".")
    return {"top": 0, "layers": 1}.get(kind, 2), int(number or 0)


def _add_arrays(sums: dict[tuple[str, str], Array], more: dict[tuple[str, str], Array]) -> None:
    for key, values in more.items():
        sums[key] = sums[key] + values if key in sums else values


@dataclass
class Statistics:
    """Sums over all tensors, for the report: spans, codes, scales per module, bytes per dtype."""

    spans: Counter[int] = field(default_factory=Counter)
    other_scale: int = 0
    codes: dict[tuple[str, str], Array] = field(default_factory=dict)  # (side, format) -> uses of each code
    scales: dict[tuple[str, str], Array] = field(default_factory=dict)  # (side, module) -> uses of exponent + 127
    sizes: dict[str, Counter[str]] = field(default_factory=lambda: {"source": Counter(), "output": Counter()})
    rebuilt: Counter[str] = field(default_factory=Counter)

    def take_histograms(self, name: str, tally: Tally) -> None:
        """Move a tally's histograms into those of its module: one histogram per tensor would fill the memory."""
        _add_arrays(self.codes, tally.codes)
        _add_arrays(self.scales, {(side, module_of(name)): uses for side, uses in tally.scale_codes.items()})
        tally.codes, tally.scale_codes = {}, {}

    def add_histograms(self, other: "Statistics") -> None:
        """Add the histograms of another process."""
        _add_arrays(self.codes, other.codes)
        _add_arrays(self.scales, other.scales)

    def add(self, compared: ComparedTensor, tally: Tally) -> None:
        """Add the counts of a whole tensor, without its histograms."""
        self.spans.update(tally.spans)
        self.other_scale += tally.other_scale
        self.rebuilt.update(tally.rebuilt)
        for side, tensor in compared.tensors():
            self.sizes[side][tensor.dtype] += tensor.size * (1 + len(tensor.copies))

    def _scale_exponents(self) -> dict[str, dict[str, dict[str, int]]]:
        """Side -> module -> exponent -> number of scales. Exponents that do not occur are left out."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for side, module in sorted(self.scales, key=lambda key: (key[0] != "source", module_order(key[1]))):
            uses = enumerate(self.scales[side, module])
            found.setdefault(side, {})[module] = {str(code - 127): int(count) for code, count in uses if count}
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {
            "bytes_by_dtype": {side: dict(sorted(sizes.items())) for side, sizes in self.sizes.items()},
            "scale_exponents": self._scale_exponents(),
            "code_use": {f"{side} {kind}": [int(n) for n in uses] for (side, kind), uses in sorted(self.codes.items())},
        }
        if self.spans:
            found["fp8_blocks"] = {
                "count": sum(self.spans.values()),
                "span_limit": E4M3_SPAN,
                "spans": {str(span): count for span, count in sorted(self.spans.items())},
                "smallest_headroom": E4M3_SPAN - max(self.spans),
                "beyond_span_limit": sum(count for span, count in self.spans.items() if span > E4M3_SPAN),
                "other_scale_than_reference": self.other_scale,
            }
        return found


# Elements that differ, as messages and JSON show them: position, both codes, both scales, both values.


def _value_text(number_format: Format, code: int, scale_mantissa: int, scale_exponent: int) -> str:
    values = decode(number_format, np.array([code]))
    if values.special[0]:
        return "not a number"
    mantissa, exponent = int(values.mantissa[0]) * scale_mantissa, int(values.exponent[0]) + scale_exponent
    number = math.ldexp(mantissa, exponent) * (-1 if values.negative[0] else 1)
    return repr(number)


def _scale_of(band: RowBand, row: int, column: int) -> tuple[str, int, int] | None:
    """(text, mantissa, exponent) of one element's scale, mantissa 0 if it is not a scale; None for a band without."""
    scales = band.scales
    if scales.raw is None:
        return None
    at = min(row // band.block[0], scales.exponent.shape[0] - 1), column // band.block[1]
    code = f"0x{int(scales.raw[at]):0{2 * scales.raw.itemsize}x}"
    if scales.bad is not None and scales.bad[at]:
        return f"{code} (not a scale)", 0, 0
    mantissa, exponent = 1 if scales.mantissa is None else int(scales.mantissa[at]), int(scales.exponent[at])
    return f"{code} (2^{exponent})" if mantissa == 1 else f"{code} ({mantissa}*2^{exponent})", mantissa, exponent


def _element(band: RowBand, row: int, column: int) -> dict[str, Any]:
    """Code, scale and value of one element, for a message."""
    code = int(unpack(band.number_format, band.data[row : row + 1])[0, column])
    text, mantissa, exponent = _scale_of(band, row, column) or (None, 1, 0)
    value = _value_text(band.number_format, code, mantissa, exponent) if mantissa else "not a number"
    return {"code": f"0x{code:0{band.number_format.bits // 4}x}", "scale": text, "value": value}


def first_differences(different: Array, row0: int, source: RowBand, output: RowBand) -> list[dict[str, Any]]:
    """The first few elements that differ. `row0` is the number of the band's first row in the tensor."""
    rows, columns = np.unravel_index(np.flatnonzero(different)[:FIRST_DIFFERENCES], different.shape)
    return [
        {
            "at": [row0 + int(r), int(c)],
            "source": _element(source, int(r), int(c)),
            "output": _element(output, int(r), int(c)),
        }
        for r, c in zip(rows, columns, strict=True)
    ]


def raw_difference(at: list[int], codes: list[str], dtype: str) -> dict[str, Any]:
    """One element of a tensor that is compared by bytes. `codes`: hexadecimal, of source and output."""
    shown = []
    for code in codes:
        number = int(code, 16)
        if dtype in ("F32", "BF16"):
            value = _value_text(F32, number << 16 if dtype == "BF16" else number, 1, 0)
        else:
            value = str(int.from_bytes(bytes.fromhex(code), "big", signed=dtype.startswith("I")))
        shown.append({"code": f"0x{code}", "scale": None, "value": value})
    return {"at": at, "source": shown[0], "output": shown[1]}
