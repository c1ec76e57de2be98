/* The decoders, and the sums of a dot product, for AVX2. */
#pragma once
#include "../vectors.h"

/* Two registers of eight: the compiler would keep a vector of sixteen in memory. */
typedef struct {
    __m256 low, high;
} sixteen;

struct pair {
    sixteen odd, even;
};

INLINE sixteen zeros(void) { return (sixteen){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

INLINE sixteen load_sixteen(const float *p) { return (sixteen){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

INLINE void store_sixteen(float *p, sixteen v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}

INLINE sixteen add_product(sixteen a, sixteen b, sixteen sum, int exact) {
    if (exact) return (sixteen){_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
    __m256 low = _mm256_mul_ps(a.low, b.low), high = _mm256_mul_ps(a.high, b.high);
    return (sixteen){_mm256_add_ps(low, sum.low), _mm256_add_ps(high, sum.high)};
}

/* 8 + 8 lanes, then 4 + 4. */
INLINE __m128 quarters(sixteen v) {
    __m256 eight = _mm256_add_ps(v.low, v.high);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

/* The last two halves of two sums: [a0 + a2, a1 + a3, b0 + b2, b1 + b3]. */
INLINE __m128 halves(__m128 a, __m128 b) {
    return _mm_add_ps(_mm_shuffle_ps(a, b, 0x44), _mm_shuffle_ps(a, b, 0xee));
}

/* The horizontal sums of `count` vectors; four at once, by the same additions, cost little more than one. */
INLINE void horizontal_sums(const sixteen *sums, int count, float *out) {
    if (count == 4) {
        __m128 ab = halves(quarters(sums[0]), quarters(sums[1])), cd = halves(quarters(sums[2]), quarters(sums[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
        return;
    }
    for (int i = 0; i < count; i++) {
        __m128 four = quarters(sums[i]), two = halves(four, four);
        out[i] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
}

/* Every second of sixteen floats, `from` the first or the second. */
INLINE __m256 every_second(const float *p, int from) {
    __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    __m256 mixed = from ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}

INLINE struct pair decode_f32(const float *p) {
    return (struct pair){{every_second(p, 1), every_second(p + 16, 1)}, {every_second(p, 0), every_second(p + 16, 0)}};
}

INLINE __m256 upper_halves(const uint16_t *p) { /* of eight pairs of bfloat16: the odd ones */
    __m256i words = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}

INLINE __m256 lower_halves(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16));
}

INLINE struct pair decode_bf16(const uint16_t *p) {
    return (struct pair){{upper_halves(p), upper_halves(p + 16)}, {lower_halves(p), lower_halves(p + 16)}};
}

INLINE sixteen times(sixteen v, float factor) {
    return (sixteen){_mm256_mul_ps(v.low, _mm256_set1_ps(factor)), _mm256_mul_ps(v.high, _mm256_set1_ps(factor))};
}

/* E4M3 in the upper bytes of 16 bits, by way of float16, 2**8 too small: see the form for AVX-512. */
INLINE sixteen from_upper_bytes(__m256i words) {
    __m256i halves = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16((short)0xbf80));
    return (sixteen){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

/* Of 32 E4M3 the 256th part. */
INLINE struct pair small_e4m3(const uint8_t *p) {
    __m256i bytes = _mm256_loadu_si256((const __m256i *)p);
    return (struct pair){from_upper_bytes(bytes), from_upper_bytes(_mm256_slli_epi16(bytes, 8))};
}

INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    struct pair small = small_e4m3(p);
    return (struct pair){times(times(small.odd, 256.0f), scale), times(times(small.even, 256.0f), scale)};
}

/* Eight E2M1 codes in the low nibbles: three bits choose a magnitude from the table, the fourth is the sign. */
INLINE __m256 lookup(__m256i codes, __m256 table) {
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, codes), _mm256_castsi256_ps(sign));
}

INLINE struct pair decode_e2m1(const uint8_t *p, float scale) {
    const __m256 magnitudes = _mm256_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
    __m256 table = _mm256_mul_ps(magnitudes, _mm256_set1_ps(scale));
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    __m256i low = _mm256_cvtepu8_epi32(bytes), high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
    return (struct pair){{lookup(_mm256_srli_epi32(low, 4), table), lookup(_mm256_srli_epi32(high, 4), table)},
                         {lookup(low, table), lookup(high, table)}};
}

/* Tables of the values of E2M1 for each exponent that a block scale may have: the lower bytes of sixteen bfloat16, then
 * the upper ones. */
#define E2M1_BYTES 32
#define TABLE_BYTES (256 * E2M1_BYTES)

static inline void fill_tables(void *tables) {
    const __m256i values = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, (short)0x8000,
                                             (short)0xbf00, (short)0xbf80, (short)0xbfc0, (short)0xc000, (short)0xc040,
                                             (short)0xc080, (short)0xc0c0);
    __m256i zeros = _mm256_cmpeq_epi16(_mm256_and_si256(values, _mm256_set1_epi16(0x7fff)), _mm256_setzero_si256());
    for (int exponent = 0; exponent < 256; exponent++) {
        __m256i shift = _mm256_andnot_si256(zeros, _mm256_set1_epi16((short)((exponent - 127) * 128)));
        __m256i table = _mm256_add_epi16(values, shift);
        __m256i lower = _mm256_and_si256(table, _mm256_set1_epi16(0xff));
        __m256i bytes = _mm256_packus_epi16(lower, _mm256_srli_epi16(table, 8));
        _mm256_storeu_si256((__m256i *)tables + exponent, _mm256_permute4x64_epi64(bytes, 0xd8));
    }
}

/* Eight pairs of bfloat16: the first of each are the lower eight lanes. */
INLINE sixteen widen_pairs(__m256i pairs) {
    __m256i upper = _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000));
    return (sixteen){_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(upper)};
}

/* Sixteen bytes of E2M1 by the table of their scale. */
INLINE struct pair e2m1_by_table(const uint8_t *p, const uint8_t *table) {
    /* Eight bytes twice in each half: of each pair that becomes 32 bits the lower one is of the lower eight lanes. */
    const __m256i order = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
                                           4, 12, 5, 13, 6, 14, 7, 15);
    const __m256i nibble = _mm256_setr_epi64x(0, 4, 0, 4); /* even elements, odd elements */
    __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    __m256i lower_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    __m256i upper_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table + 1));
    __m256i codes = _mm256_srlv_epi64(_mm256_shuffle_epi8(bytes, order), nibble);
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(0x0f));
    __m256i lower = _mm256_shuffle_epi8(lower_table, codes), upper = _mm256_shuffle_epi8(upper_table, codes);
    __m256i even = _mm256_unpacklo_epi8(lower, upper), odd = _mm256_unpackhi_epi8(lower, upper);
    return (struct pair){widen_pairs(odd), widen_pairs(even)};
}
