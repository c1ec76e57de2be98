/* Stored numbers as bfloat16, for vdpbf16ps. The block scale is a moderate power of two, so every value is exact. */
#pragma once
#include "../decode.h"

#ifdef HAVE_DOT
/* The exponent of a block scale at its place in a bfloat16. */
INLINE __m512i shift_of_scale(float scale) {
    int32_t bits;
    memcpy(&bits, &scale, 4);
    return _mm512_set1_epi16((short)(((bits >> 23) - 127) * 128));
}

/* bfloat16 times the power of two of `shift`; zeros stay zeros. */
INLINE __m512i shifted(__m512i bf16, __m512i shift) {
    return _mm512_mask_add_epi16(bf16, _mm512_test_epi16_mask(bf16, _mm512_set1_epi16(0x7fff)), bf16, shift);
}

/* The sixteen values of E2M1, twice. */
INLINE __m512i e2m1_as_bf16(void) {
    return _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                                    (short)0x8000, (short)0xbf00, (short)0xbf80, (short)0xbfc0,
                                                    (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
}

/* The codes of 64 E2M1, half of a register, as indices of a table, of which a lookup uses five bits: lane l has
 * the two of byte l in the lower bytes of its words, and those of byte 16 + l in the upper ones. */
INLINE __m512i e2m1_indices(__m256i bytes) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    /* Bytes l and 16 + l, and of the second operand, whose numbers begin at 64, the same. */
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(0x50401000),
                                            _mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101)));
    return _mm512_permutex2var_epi8(_mm512_castsi256_si512(bytes), places,
                                    _mm512_castsi256_si512(_mm256_srli_epi16(bytes, 4)));
}

/* The first and the last 32 of these numbers, by tables of the values of E2M1 times a scale. */
INLINE __m512i first_e2m1(__m512i indices, __m512i table) { return _mm512_permutexvar_epi16(indices, table); }

INLINE __m512i last_e2m1(__m512i indices, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(indices, 8), table);
}

/* Thirty-two of them, sixteen bytes. */
INLINE __m512i bf16_of_e2m1(const uint8_t *p, __m512i table) {
    return first_e2m1(e2m1_indices(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p))), table);
}

/* FP8 by shifting: exponent and mantissa to their places in a bfloat16, the bias from 7 to 127; the seven subnormals
 * from a table. */
INLINE __m512i bf16_of_e4m3(__m256i bytes, __m512i shift) {
    const __m512i subnormals = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40,
                                                                     0x3c60));
    __m512i codes = _mm512_cvtepu8_epi16(bytes);
    __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    __m512i bf16 = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    bf16 = _mm512_mask_permutexvar_epi16(bf16, subnormal, magnitude, subnormals);
    bf16 = _mm512_mask_add_epi16(bf16, _mm512_test_epi16_mask(magnitude, magnitude), bf16, shift);
    return _mm512_or_si512(bf16, _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16((short)0x8000)));
}

/* The 128 magnitudes of E4M3 as bfloat16: their lower bytes, and their upper bytes. */
struct e4m3_bytes {
    __m512i low[2], high[2];
};

INLINE struct e4m3_bytes e4m3_as_bf16(void) {
    struct e4m3_bytes tables;
    uint8_t codes[128], which[64];
    for (int i = 0; i < 128; i++) codes[i] = (uint8_t)i;
    for (int i = 0; i < 64; i++) which[i] = (uint8_t)(2 * i);
    __m512i even = _mm512_loadu_si512(which), odd = _mm512_or_si512(even, _mm512_set1_epi8(1));
    for (int i = 0; i < 2; i++) {
        const __m256i *first = (const __m256i *)(codes + 64 * i);
        __m512i a = bf16_of_e4m3(_mm256_loadu_si256(first), _mm512_setzero_si512());
        __m512i b = bf16_of_e4m3(_mm256_loadu_si256(first + 1), _mm512_setzero_si512());
        tables.low[i] = _mm512_permutex2var_epi8(a, even, b);
        tables.high[i] = _mm512_permutex2var_epi8(a, odd, b);
    }
    return tables;
}

/* Sixty-four FP8 by these tables, without their scale: of every sixteen the first eight, and the last eight. */
INLINE void bf16_of_64_e4m3(__m512i codes, const struct e4m3_bytes *tables, __m512i *first, __m512i *last) {
    __m512i low = _mm512_permutex2var_epi8(tables->low[0], codes, tables->low[1]);
    __m512i high = _mm512_permutex2var_epi8(tables->high[0], codes, tables->high[1]);
    high = _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8((char)0x80), 0xf8); /* high | (codes & sign) */
    *first = _mm512_unpacklo_epi8(low, high);
    *last = _mm512_unpackhi_epi8(low, high);
}

/* Columns [start, stop) of a stored row, which begin at p, as bfloat16. */
static inline void decode_as_bf16(const uint8_t *p, int format, float scale, int64_t count, uint16_t *out) {
    if (format == BFLOAT16) {
        memcpy(out, p, count * sizeof(uint16_t));
        return;
    }
    __m512i shift = shift_of_scale(scale);
    if (format == FLOAT8_E4M3FN) {
        for (int64_t k = 0; k < count; k += 32)
            _mm512_storeu_si512(out + k, bf16_of_e4m3(_mm256_loadu_si256((const __m256i *)(p + k)), shift));
        return;
    }
    __m512i table = shifted(e2m1_as_bf16(), shift);
    for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, bf16_of_e2m1(p + k / 2, table));
}
#endif
