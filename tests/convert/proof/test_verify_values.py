"""The exact comparison against rational arithmetic, and the tables against ml_dtypes."""

from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.convert.proof.tally import COUNTED_IN_PAIRS, byte_uses
from dsv4.convert.proof.values import compiled
from dsv4.convert.proof.values.compare import (
    RowBand,
    Scales,
    compare,
    e8m0_scales,
    float_scales,
    has_special,
    no_scales,
)
from dsv4.convert.proof.values.formats import (
    BF16,
    E2M1,
    E4M3,
    F32,
    Array,
    Format,
    conversion_table,
    decode,
    encode,
    has_table,
)
from dsv4.convert.proof.values.inverse import rebuild

FORMATS = {E2M1: ml_dtypes.float4_e2m1fn, E4M3: ml_dtypes.float8_e4m3fn, BF16: ml_dtypes.bfloat16, F32: np.float32}
BLOCKS = [(1, 32), (32, 32), (128, 128)]


@cache
def oracle(number_format: Format, code: int) -> Fraction | None:
    """The value as a rational number; None for NaN and infinity. -0 is 0: signs are looked at apart."""
    storage = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}[number_format.bits]
    value = float(np.array(code, dtype=storage).view(FORMATS[number_format]))
    return Fraction(value) if np.isfinite(value) else None


@pytest.mark.parametrize("number_format", [E2M1, E4M3, BF16])
def test_decode_every_code(number_format: Format) -> None:
    codes = np.arange(1 << number_format.bits)
    values = decode(number_format, codes)
    for code in codes:
        wanted = oracle(number_format, int(code))
        assert bool(values.special[code]) == (wanted is None)
        assert bool(values.negative[code]) == bool(code & number_format.sign)
        if wanted is not None:
            sign = -1 if values.negative[code] else 1
            assert sign * int(values.mantissa[code]) * Fraction(2) ** int(values.exponent[code]) == wanted
            assert int(values.mantissa[code]) % 2 or (wanted == 0 and values.exponent[code] == 0)


@pytest.mark.parametrize("number_format", [E2M1, E4M3, BF16])
def test_encode_inverts_decode(number_format: Format) -> None:
    codes = np.arange(1, number_format.first_special)
    values = decode(number_format, codes)
    for code, mantissa, exponent in zip(codes, values.mantissa, values.exponent, strict=True):
        assert encode(number_format, int(mantissa), int(exponent)) == code


@pytest.mark.parametrize(("mantissa", "exponent"), [(17, 0), (1, -10), (1, 9), (15, 5), (3, -10)])
def test_encode_knows_what_e4m3_lacks(mantissa: int, exponent: int) -> None:
    assert encode(E4M3, mantissa, exponent) is None


@pytest.mark.parametrize("wide", [E4M3, BF16])
@pytest.mark.parametrize("narrow", [E2M1, E4M3])
@pytest.mark.fast_cases(1)
def test_conversion_table_every_entry(narrow: Format, wide: Format) -> None:
    """Entry by entry against a search through all wide codes by rational value."""
    table = conversion_table(narrow, wide)
    codes = {oracle(wide, code): code for code in range(wide.first_special)}
    per_byte = 8 // narrow.bits
    exact: dict[tuple[int, int], int | None] = {}
    for row, code in product(range(len(table.signed)), range(1 << narrow.bits)):
        value = oracle(narrow, code)
        found = None if value is None else codes.get(abs(value) * Fraction(2) ** (row + table.first))
        exact[row, code] = None if found is None else found | (wide.sign if code & narrow.sign else 0)
    mask = (1 << wide.bits) - 1
    for row, byte in product(range(0, len(table.signed), 1 if wide is E4M3 else 9), range(256)):
        for place in range(per_byte):
            code = (byte >> (4 * place)) & 15 if narrow is E2M1 else byte
            wanted = exact[row, code]
            signed = (int(table.signed[row, byte]) >> (wide.bits * place)) & mask
            folded = (int(table.folded[row, byte]) >> (wide.bits * place)) & mask
            assert signed == (wide.nan if wanted is None else wanted)
            assert folded == (0 if signed == wide.sign else signed)
            if table.complete[row]:
                assert wanted is not None


def test_beyond_the_table_only_zero_has_a_code() -> None:
    for narrow, wide in product((E2M1, E4M3), (E4M3, BF16, F32)):
        assert has_table(narrow, wide)
        table = conversion_table(narrow, wide)
        values = decode(narrow, np.arange(1, narrow.first_special))
        for difference in (table.first, table.first + len(table.signed) - 1):
            pairs = zip(values.mantissa, values.exponent, strict=True)
            assert all(encode(wide, int(m), int(e) + difference) is None for m, e in pairs)


# Random bands against fractions.

LARGE = (1 << 30, 1 << 30)  # no scale: one block for everything


def element_codes(band: RowBand) -> Array:
    data = band.data
    if band.number_format is E2M1:
        return np.stack((data & 15, data >> 4), axis=-1).reshape(data.shape[0], -1)
    return data.view({8: np.uint8, 16: np.uint16, 32: np.uint32}[band.number_format.bits])


def scale_fraction(raw: Array | None, row: int, column: int) -> Fraction | None:
    if raw is None:
        return Fraction(1)
    code = raw[min(row, raw.shape[0] - 1), min(column, raw.shape[1] - 1)]
    if raw.dtype == np.uint8:
        return None if code == 255 else Fraction(2) ** (int(code) - 127)
    value = float(code.view(np.float32))
    return Fraction(value) if np.isfinite(value) and value > 0 else None


def rational(band: RowBand) -> list[list[Fraction | None]]:
    codes = element_codes(band)
    found = []
    for row in range(band.rows):
        values: list[Fraction | None] = []
        for column in range(band.columns):
            value = oracle(band.number_format, int(codes[row, column]))
            scale = scale_fraction(band.scales.raw, row // band.block[0], column // band.block[1])
            values.append(None if value is None or scale is None else value * scale)
        found.append(values)
    return found


def make_scales(random: np.random.Generator, kind: str, rows: int, columns: int, centre: int) -> Scales:
    if kind == "none":
        return no_scales()
    exponents = np.clip(random.integers(centre - 3, centre + 4, (rows, columns)), 0, 254)
    if kind.startswith("e8m0"):
        codes = exponents.astype(np.uint8)
        if kind == "e8m0 with nan":
            codes.reshape(-1)[0] = 255
        return e8m0_scales(codes)
    values = np.ldexp(1.0, exponents - 127).astype(np.float32)
    if kind == "any float":
        with np.errstate(over="ignore"):  # infinity is one of the scales that are no scales
            values *= random.choice(np.array([1, 1.25, 0.1, 3], np.float32), (rows, columns))
    return float_scales(values.view(np.uint32))


SCALES = ["none", "e8m0", "e8m0", "e8m0 with nan", "float", "any float"]


def make_band(random: np.random.Generator, kind: Format, shape: tuple[int, int], scales: str, centre: int) -> RowBand:
    rows, columns = shape
    block = BLOCKS[0] if kind is E2M1 else BLOCKS[int(random.integers(len(BLOCKS)))]
    data = random.integers(0, 256, (rows, columns * kind.bits // 8), dtype=np.uint8)
    made = make_scales(random, scales, -(-rows // block[0]), -(-columns // block[1]), centre)
    return RowBand(kind, data, columns, made, LARGE if scales == "none" else block)


def nearest(random: np.random.Generator, first: RowBand, second: RowBand) -> None:
    """Fill `second` with the codes nearest to the first's values, a few of them then changed."""
    values = rational(first)
    codes = element_codes(second).copy()
    for row, column in np.ndindex(codes.shape):
        value = values[row][column]
        scale = scale_fraction(second.scales.raw, row // second.block[0], column // second.block[1])
        if value is not None and scale is not None and random.random() < 0.97:
            negative = int(element_codes(first)[row, column]) & first.number_format.sign
            codes[row, column] = nearest_code(second.number_format, abs(value) / scale, bool(negative))
    if second.number_format is E2M1:
        codes = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    second.data = np.ascontiguousarray(codes).view(np.uint8)


def nearest_code(kind: Format, value: Fraction, negative: bool) -> int:
    top = {E2M1: 6.0, E4M3: 448.0}.get(kind, 2.0**127)
    number = np.array(min(float(value), top)).astype(np.float32).astype(FORMATS[kind])
    code = int(number.view({4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}[kind.bits]))
    return code | (kind.sign if negative else 0)


def plain() -> Any:
    """A context in which nothing compiled is used."""
    return mock.patch.object(compiled, "_library", lambda: None)


def check_plain(first: RowBand, second: RowBand) -> None:
    """That `compare` gives the same without compiled code."""
    result = compare(first, second)
    with plain():
        wanted = compare(first, second)
    assert (result.lost_sign, result.gained_sign) == (wanted.lost_sign, wanted.gained_sign)
    assert (result.different is None) == (wanted.different is None)
    assert result.different is None or np.array_equal(result.different, wanted.different)


def check(first: RowBand, second: RowBand) -> None:
    """`compare` against fractions, element by element, signs of zero apart."""
    check_plain(first, second)
    result = compare(first, second)
    a, b = rational(first), rational(second)
    signs = [(element_codes(band) & band.number_format.sign) != 0 for band in (first, second)]
    lost = gained = 0
    for row, column in np.ndindex(first.rows, first.columns):
        x, y = a[row][column], b[row][column]
        wanted = x is None or y is None or x != y
        found = result.different is not None and bool(result.different[row, column])
        assert wanted == found, (row, column, x, y)
        if not wanted and x == 0:
            lost += bool(signs[0][row, column] and not signs[1][row, column])
            gained += bool(signs[1][row, column] and not signs[0][row, column])
    assert (result.lost_sign, result.gained_sign) == (lost, gained)
    if first.number_format is E2M1 and second.number_format is not E2M1:
        # A code comes back exactly where the value is the same, but for the sign of zero.
        different = 0 if result.different is None else int(np.count_nonzero(result.different))
        codes = first.rows * first.columns
        assert rebuild(first, second) == {"codes": codes, "sign": lost + gained, "wrong": different}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    formats=st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(list(FORMATS))),
    scales=st.tuples(st.sampled_from(SCALES), st.sampled_from(SCALES)),
    shape=st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from([2, 32, 64, 96, 40, 160])),
    centres=st.tuples(st.sampled_from([3, 120, 127, 251]), st.integers(-8, 8)),
    related=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_pair_of_formats(
    formats: tuple[Format, Format],
    scales: tuple[str, str],
    shape: tuple[int, int],
    centres: tuple[int, int],
    related: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    first = make_band(random, formats[0], shape, scales[0], centres[0])
    second = make_band(random, formats[1], shape, scales[1], centres[0] + centres[1])
    if related:
        nearest(random, first, second)
    check(first, second)


@pytest.mark.parametrize("exponent", [0, 1, 5, 6, 127, 253, 254])
@pytest.mark.parametrize("wide", [E4M3, BF16, F32])
@pytest.mark.fast_cases(1)
def test_all_codes_at_the_ends_of_e8m0(exponent: int, wide: Format) -> None:
    """Every FP4 code under every legal difference of scales, also where float32 over- or underflows."""
    data = np.arange(256, dtype=np.uint8).reshape(16, 16)
    first = RowBand(E2M1, data, 32, e8m0_scales(np.full((16, 1), exponent, np.uint8)), (1, 32))
    for other in range(max(0, exponent - 12), min(254, exponent + 12) + 1):
        random = np.random.default_rng(other)
        blank = np.zeros((16, 32 * wide.bits // 8), np.uint8)
        scales = e8m0_scales(np.full((1, 1), other, np.uint8)) if wide is E4M3 else no_scales()
        second = RowBand(wide, blank, 32, scales, (128, 128) if wide is E4M3 else LARGE)
        nearest(random, first, second)
        check(first, second)
        if wide is not E4M3:
            break


def in_fp8(codes: Array, data: Array, difference: int) -> tuple[int, int] | None:
    """The compiled comparison of one group: 32 FP4 codes and 32 FP8 bytes."""
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)[None]
    scales = [(np.array([[exponent]], np.int32), (1, 32)) for exponent in (difference, 0)]
    return compiled.fp4_in_fp8(packed, data[None], *scales)


@pytest.mark.skipif(compiled._library() is None, reason="no compiled library")
@pytest.mark.parametrize("difference", [-14, -10, -9, -6, -1, 0, 1, 6, 8, 9, 13])
def test_every_code_beside_every_byte_compiled(difference: int) -> None:
    """Against fractions: one byte of a group is exchanged, and the group is equal exactly where the values are."""
    wide = {code: oracle(E4M3, code) for code in range(256)}
    codes, scale = np.arange(16, dtype=np.uint8), Fraction(2) ** difference
    for code, place in zip(codes, np.random.default_rng(3).integers(0, 32, 16), strict=True):
        value = oracle(E2M1, int(code))
        assert value is not None
        group, data = np.zeros(32, np.uint8), np.zeros(32, np.uint8)
        group[place] = code
        for byte, other in wide.items():
            data[place] = byte
            negative = bool(code & 8), bool(byte & 128)
            signs = (int(negative == (True, False)), int(negative == (False, True))) if value == 0 else (0, 0)
            assert in_fp8(group, data, difference) == (signs if other == value * scale else None)


@pytest.mark.parametrize("columns", [32, 4064, 4096, 8256])
def test_long_rows(columns: int) -> None:
    """Signs are counted in eight bits for a while, and a row is looked at in parts: no sum and no place is lost."""
    random = np.random.default_rng(columns)
    data = np.full((3, columns // 2), 0x88, np.uint8)  # -0
    first = RowBand(E2M1, data, columns, e8m0_scales(np.full((3, columns // 32), 120, np.uint8)), (1, 32))
    second = RowBand(E4M3, np.zeros((3, columns), np.uint8), columns, no_scales(), LARGE)
    assert compare(first, second).lost_sign == 3 * columns
    second.data[:, ::3] = 0x80
    result = compare(first, second)
    assert (result.different, result.lost_sign, result.gained_sign) == (None, int((second.data == 0).sum()), 0)
    data[:] = 0
    result = compare(first, second)
    assert (result.different, result.lost_sign, result.gained_sign) == (None, 0, int((second.data != 0).sum()))
    for row, column in [(0, 0), (2, columns - 1), *random.integers((0, 0), (3, columns), (8, 2)).tolist()]:
        for wrong in (0x01, 0x81, 0x7F, 0xFF):
            damaged = RowBand(E4M3, second.data.copy(), columns, second.scales, second.block)
            damaged.data[row, column] = wrong
            different = compare(first, damaged).different
            assert different is not None and np.argwhere(different).tolist() == [[row, column]]
            check_plain(first, damaged)


def test_each_block_has_its_own_scale() -> None:
    """Several blocks both ways, the last ones cut: one scale that is changed shows in its block, and nowhere else."""
    random, (rows, columns) = np.random.default_rng(5), (70, 160)
    narrow = random.integers(116, 119, (rows, columns // 32), dtype=np.uint8)
    wide = random.integers(113, 116, (3, 2), dtype=np.uint8)
    data = random.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    first = RowBand(E2M1, data, columns, e8m0_scales(narrow), (1, 32))
    table = conversion_table(E2M1, E4M3)
    of_rows = wide[np.arange(rows) // 32][:, np.arange(columns // 2) // 64].astype(int)
    codes = table.signed[np.repeat(narrow, 16, axis=1) - of_rows - table.first, data]
    second = RowBand(E4M3, codes.view(np.uint8), columns, e8m0_scales(wide), (32, 128))
    assert compare(first, second).different is None
    scales = [(band.scales.exponent, band.block) for band in (first, second)]
    if compiled._library() is not None:  # it has not left it to the form in numpy
        assert compiled.fp4_in_fp8(first.data, second.data, *scales) == (0, 0)
    for row, column in np.ndindex(wide.shape):
        damaged = wide.copy()
        damaged[row, column] += 1
        different = compare(first, RowBand(E4M3, second.data, columns, e8m0_scales(damaged), (32, 128))).different
        inside = np.zeros((rows, columns), bool)
        inside[row * 32 : row * 32 + 32, column * 128 : column * 128 + 128] = True
        assert different is not None and np.array_equal(different, inside & ((second.data & 127) != 0))
    check_plain(first, second)


@pytest.mark.parametrize("size", [*range(1, 70), 4097])
def test_one_nan_anywhere_is_found(size: int) -> None:
    data = np.full((1, size), 0x7E, np.uint8)
    band = RowBand(E4M3, data, size, no_scales(), LARGE)
    assert not has_special(band)
    for place in {0, size // 2, size - 1}:
        data[:] = 0x7E
        data[0, place] = 0xFF
        assert has_special(band)
        with plain():
            assert has_special(band)


@pytest.mark.parametrize("beyond", range(4))
@pytest.mark.parametrize("narrow", [E2M1, E4M3])
def test_differences_beyond_the_table(narrow: Format, beyond: int) -> None:
    """What the first or last useful row says must not be taken for what lies beyond it."""
    table = conversion_table(narrow, E4M3)
    data = np.arange(256, dtype=np.uint8).reshape(8, 32)
    data[(data & 127) == 127] = 0
    for row, difference in ((1, table.first - beyond), (-2, table.first + len(table.signed) - 1 + beyond)):
        columns = 32 * 8 // narrow.bits
        scales = e8m0_scales(np.full((8, columns // 32), 127 + difference, np.uint8))
        first = RowBand(narrow, data, columns, scales, (1, 32))
        codes = np.ascontiguousarray(table.signed[row][data]).view(np.uint8)
        check(first, RowBand(E4M3, codes, columns, no_scales(), LARGE))


@pytest.mark.parametrize("wide", [E4M3, BF16, F32])
def test_the_mark_of_a_gap_is_no_value(wide: Format) -> None:
    """Where no wide code exists the table holds the wide NaN: a NaN that is really there must not match it."""
    first = RowBand(E2M1, np.full((4, 16), 0x77, np.uint8), 32, e8m0_scales(np.full((4, 1), 254, np.uint8)), (1, 32))
    nan = np.full((4, 32), wide.nan, {8: np.uint8, 16: np.uint16, 32: np.uint32}[wide.bits])
    second = RowBand(wide, nan.view(np.uint8), 32, no_scales(), LARGE)
    assert (conversion_table(E2M1, wide).signed[-1, 0x77] & np.uint64(wide.nan)) == wide.nan
    check(first, second)


@pytest.mark.slow
def test_rows_of_many_blocks_with_ragged_edges() -> None:
    """Bands of several blocks in both directions; the last ones are cut."""
    random = np.random.default_rng(0)
    for columns in (160, 156):
        first = RowBand(
            E2M1, random.integers(0, 256, (34, columns // 2), dtype=np.uint8), columns, no_scales(), (1, 32)
        )
        first.scales = e8m0_scales(random.integers(118, 124, (34, -(-columns // 32)), dtype=np.uint8))
        second = make_band(random, E4M3, (34, columns), "none", 0)
        second.block, second.scales = (32, 128), e8m0_scales(random.integers(113, 116, (2, 2), dtype=np.uint8))
        nearest(random, first, second)
        check(first, second)


def test_rebuild_counts_signs_and_errors_apart() -> None:
    data = np.arange(256, dtype=np.uint8).reshape(16, 16)
    first = RowBand(E2M1, data, 32, e8m0_scales(np.full((16, 1), 120, np.uint8)), (1, 32))
    second = RowBand(E4M3, np.zeros((16, 32), np.uint8), 32, e8m0_scales(np.full((1, 1), 114, np.uint8)), (128, 128))
    nearest(np.random.default_rng(1), first, second)
    kept = {(row, column): int(code) for (row, column), code in np.ndenumerate(element_codes(second))}
    wanted = element_codes(first)
    wrong = sign = 0
    for (row, column), code in kept.items():
        value, source = oracle(E4M3, code), oracle(E2M1, int(wanted[row, column]))
        equal = value is not None and source is not None and value == source * Fraction(2) ** 6
        wrong += not equal
        sign += equal and value == 0 and bool(code & 128) != bool(wanted[row, column] & 8)
    assert rebuild(first, second) == {"codes": 512, "sign": sign, "wrong": wrong}
    second.data = np.where(second.data == 0x80, 0, second.data).astype(np.uint8)
    assert rebuild(first, second)["sign"] > 20


def test_rebuild_takes_no_mark_for_a_code() -> None:
    """What has no FP4 code is marked with 255, which packs like two codes 15: it must not count as those."""
    first = RowBand(E2M1, np.full((4, 16), 0xFF, np.uint8), 32, e8m0_scales(np.full((4, 1), 120, np.uint8)), (1, 32))
    second = RowBand(
        E4M3, np.full((4, 32), 0x7E, np.uint8), 32, e8m0_scales(np.full((1, 1), 120, np.uint8)), (128, 128)
    )
    assert rebuild(first, second) == {"codes": 128, "sign": 0, "wrong": 128}


@pytest.mark.parametrize("scale", [3.0, 1.25, 0.1])
@pytest.mark.fast_cases(1)
def test_rebuild_needs_an_exact_quotient(scale: float) -> None:
    """Every FP4 code beside every FP8 code, under a scale by which most FP8 values cannot be divided."""
    codes = np.arange(16, dtype=np.uint8)
    packed = np.tile((codes[0::2] | codes[1::2] << 4).astype(np.uint8), (256, 2))
    scales = float_scales(np.full((256, 1), scale, np.float32).view(np.uint32))
    first = RowBand(E2M1, packed, 32, scales, (1, 32))
    second = RowBand(E4M3, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 32, axis=1), 32, no_scales(), LARGE)
    check(first, second)


@pytest.mark.parametrize("size", [0, 1, 255, COUNTED_IN_PAIRS - 2, COUNTED_IN_PAIRS, COUNTED_IN_PAIRS + 1])
def test_every_byte_is_counted_once(size: int) -> None:
    """In pairs or one by one, from rows of a larger array; byte b occurs b times as often as byte 1."""
    counts = np.arange(256, dtype=np.int64) * size // (255 * 128)
    counts[0] = size - counts[1:].sum()
    data = np.random.default_rng(2).permutation(np.repeat(np.arange(256, dtype=np.uint8), counts))
    wide = np.stack((data, ~data), axis=1)
    assert byte_uses(data).tolist() == byte_uses(wide[:, 0]).tolist() == counts.tolist()
    with plain():
        assert byte_uses(data).tolist() == byte_uses(wide[:, 0]).tolist() == counts.tolist()
