/* The decoders, and the sums of a dot product, for AVX-512. */
#pragma once
#include "../sixteen.h"

/* The horizontal sums of `count` vectors; four at once, by the same additions, cost little more than one. */
INLINE void horizontal_sums(const sixteen *sums, int count, float *out) {
    if (count == 4) {
        __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
        __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
        __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one)));
        return;
    }
    for (int i = 0; i < count; i++) out[i] = horizontal_sum(sums[i]);
}

INLINE struct pair widen_pair(__m512i bf16) { /* 32 bfloat16 */
    return (struct pair){(lanes)_mm512_and_si512(bf16, _mm512_set1_epi32((int)0xffff0000)),
                         (lanes)_mm512_slli_epi32(bf16, 16)};
}

INLINE struct pair decode_f32(const float *p) {
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    return (struct pair){(lanes)_mm512_permutex2var_ps(low, odd, high), (lanes)_mm512_permutex2var_ps(low, even, high)};
}

INLINE struct pair decode_bf16(const uint16_t *p) { return widen_pair(_mm512_loadu_si512(p)); }

/* E4M3 in the upper byte of 16 bits becomes a float16 with the exponent bias 15 instead of 7, 2**8 too small, when
 * shifted right by one: the sign is doubled, and bit 14 must be cleared. Hardware widens float16, subnormals and all. */
INLINE lanes from_upper_bytes(__m256i bytes, float scale) {
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(bytes, 1), _mm256_set1_epi16((short)0xbfff));
    return (lanes)_mm512_cvtph_ps(half) * 256.0f * scale;
}

INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    __m256i codes = _mm256_loadu_si256((const __m256i *)p);
    return (struct pair){from_upper_bytes(_mm256_and_si256(codes, _mm256_set1_epi16((short)0xff00)), scale),
                         from_upper_bytes(_mm256_slli_epi16(codes, 8), scale)};
}

/* Sixteen bytes, the even element in the low nibble. The lookup uses the lowest four bits of each lane. */
INLINE struct pair decode_e2m1(const uint8_t *p, float scale) {
    const __m512 table = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f,
                                        -4.f, -6.f);
    __m512 scaled = (__m512)((lanes)table * scale);
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return (struct pair){(lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), scaled),
                         (lanes)_mm512_permutexvar_ps(codes, scaled)};
}
