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

/* E4M3 in the upper byte of 16 bits, by way of float16: see the form for AVX-512. */
INLINE __m256 from_upper_bytes(__m128i bytes, __m256 scale) {
    __m128i half = _mm_and_si128(_mm_srai_epi16(bytes, 1), _mm_set1_epi16((short)0xbfff));
    return _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f)), scale);
}

INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    const __m128i upper = _mm_set1_epi16((short)0xff00);
    __m128i low = _mm_loadu_si128((const __m128i *)p), high = _mm_loadu_si128((const __m128i *)(p + 16));
    __m256 factor = _mm256_set1_ps(scale);
    return (struct pair){{from_upper_bytes(_mm_and_si128(low, upper), factor),
                          from_upper_bytes(_mm_and_si128(high, upper), factor)},
                         {from_upper_bytes(_mm_slli_epi16(low, 8), factor),
                          from_upper_bytes(_mm_slli_epi16(high, 8), factor)}};
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
