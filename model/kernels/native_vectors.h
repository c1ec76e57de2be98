/* Vectors of sixteen lanes, and the decoders of every stored format. Part of native.c. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
#include <immintrin.h>
#if defined(__AVX512BF16__)
#define HAVE_DOT 1
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));

enum format { FLOAT32, BFLOAT16, FLOAT8_E4M3FN, FLOAT4_E2M1FN };

/* A weight [rows, columns] as stored. Scales are E8M0 bytes or float32, one per block_rows x block_columns. */
struct matrix {
    const void *values;
    const void *scale;
    int64_t rows, columns;
    int64_t block_rows, block_columns, scale_columns;
    int32_t format, scale_is_float32;
};

INLINE float bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nan = (bits >> 16) | 0x40, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}

INLINE float e8m0(uint8_t code) {
    uint32_t bits = code ? (uint32_t)code << 23 : 1u << 22;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, 64);
    return v;
}

INLINE void store(float *p, lanes v) { memcpy(p, &v, 64); }

INLINE lanes splat(float x) { return (lanes){0} + x; }

/* Element i of bfloat16 or float32 data. */
INLINE float read(const void *x, int is_bf16, int64_t i) {
    return is_bf16 ? bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void write(void *x, int is_bf16, int64_t i, float value) {
    if (is_bf16) ((uint16_t *)x)[i] = to_bf16(value);
    else ((float *)x)[i] = value;
}

/* The lanes by halves. */
INLINE float fold(lanes v) {
#ifdef HAVE_AVX512
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float a[16];
    memcpy(a, &v, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#endif
}

/* The lanes of `count` sums; four at once, by the same additions, cost little more than one. */
INLINE void fold_each(const lanes *sums, int count, float *out) {
#ifdef HAVE_AVX512
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
#endif
    for (int i = 0; i < count; i++) out[i] = fold(sums[i]);
}

INLINE lanes multiply_add(lanes a, lanes b, lanes c, int exact) {
#ifdef HAVE_AVX512
    if (exact) return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    (void)exact;
#endif
    lanes product = a * b;
    return product + c;
}

/* Thirty-two numbers of a row as their exact float32 values: the odd and the even elements. */
struct pair {
    lanes odd, even;
};

#ifdef HAVE_AVX512
INLINE struct pair pair_of_words(__m512i words) { /* 32 bfloat16 */
    return (struct pair){(lanes)_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)),
                         (lanes)_mm512_slli_epi32(words, 16)};
}

INLINE struct pair decode_f32(const float *p) {
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    return (struct pair){(lanes)_mm512_permutex2var_ps(low, odd, high), (lanes)_mm512_permutex2var_ps(low, even, high)};
}

INLINE struct pair decode_bf16(const uint16_t *p) { return pair_of_words(_mm512_loadu_si512(p)); }

/* E4M3 in the upper byte of 16 bits becomes a float16 with the exponent bias 15 instead of 7, 2**8 too small, when
 * shifted right by one: the sign is doubled, and bit 14 must be cleared. Hardware widens float16, subnormals and all. */
INLINE lanes from_upper_bytes(__m256i words, float scale) {
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16((short)0xbfff));
    return (lanes)_mm512_cvtph_ps(half) * 256.0f * scale;
}

INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    __m256i words = _mm256_loadu_si256((const __m256i *)p);
    return (struct pair){from_upper_bytes(_mm256_and_si256(words, _mm256_set1_epi16((short)0xff00)), scale),
                         from_upper_bytes(_mm256_slli_epi16(words, 8), scale)};
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
#else
INLINE struct pair decode_f32(const float *p) {
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = p[2 * i + 1], v.even[i] = p[2 * i];
    return v;
}

INLINE struct pair decode_bf16(const uint16_t *p) {
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = bf16(p[2 * i + 1]), v.even[i] = bf16(p[2 * i]);
    return v;
}

/* Exponent and mantissa at their places in a float32, whose bias is 127 and not 7: 2**120 too small. */
INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    ilanes odd, even;
    for (int i = 0; i < 16; i++) {
        odd[i] = ((int32_t)(p[2 * i + 1] & 0x80) << 24) | ((int32_t)(p[2 * i + 1] & 0x7f) << 20);
        even[i] = ((int32_t)(p[2 * i] & 0x80) << 24) | ((int32_t)(p[2 * i] & 0x7f) << 20);
    }
    return (struct pair){(lanes)odd * 0x1p120f * scale, (lanes)even * 0x1p120f * scale};
}

INLINE struct pair decode_e2m1(const uint8_t *p, float scale) {
    static const float table[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                    -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = table[p[i] >> 4], v.even[i] = table[p[i] & 15];
    return (struct pair){v.odd * scale, v.even * scale};
}
#endif

INLINE struct pair decode(const uint8_t *p, int format, float scale) {
    if (format == FLOAT4_E2M1FN) return decode_e2m1(p, scale);
    if (format == FLOAT8_E4M3FN) return decode_e4m3(p, scale);
    if (format == BFLOAT16) return decode_bf16((const uint16_t *)p);
    return decode_f32((const float *)p);
}

/* Bytes of 32 stored numbers. */
INLINE int64_t bytes_of_32(int format) {
    return format == FLOAT32 ? 128 : format == BFLOAT16 ? 64 : format == FLOAT8_E4M3FN ? 32 : 16;
}

/* Where a row begins, where its scales begin, and the scale at a place. */
INLINE const uint8_t *row_of(const struct matrix *w, int format, int64_t row) {
    return (const uint8_t *)w->values + row * (w->columns / 32 * bytes_of_32(format));
}

INLINE int64_t scale_row(const struct matrix *w, int64_t row) { return row / w->block_rows * w->scale_columns; }

INLINE float scale_at(const struct matrix *w, int64_t place) {
    if (!w->scale) return 1.f;
    return w->scale_is_float32 ? ((const float *)w->scale)[place] : e8m0(((const uint8_t *)w->scale)[place]);
}

/* Columns that share one scale; all of them if there is none. */
INLINE int64_t step_columns(const struct matrix *w) { return w->scale ? w->block_columns : w->columns; }
