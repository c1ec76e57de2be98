/* The hot operations in C, in the order of summation that numerics.py defines, so that they give the same bits.
 *
 * A dot product has sixteen lanes. Of every 32 elements, lane l adds the product of element 2l + 1 and then that of 2l,
 * each sum rounded to float32. That is the order of vdpbf16ps, which some CPUs have for bfloat16 (a test at start
 * asks this one whether it keeps to it); elsewhere the odd and the even elements are two vectors of sixteen float32.
 * Products and sums are rounded one by one (-ffp-contract=off); where the product of the inputs is exact in float32
 * (8 significant bits times 8, no underflow), a fused multiply-add rounds the same, and is used.
 * Work is split over outputs only, never inside a sum. Lengths of dot products are multiples of 32.
 *
 * "Paired" float32 data: of every 32 elements first the sixteen odd ones, then the sixteen even ones.
 */
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

/* Products of a single row of paired x with OT rows of a stored weight, decoded in registers. */
#define SINGLE(OT)                                                                                                     \
    INLINE void single_##OT(const struct matrix *w, int format, int exact, const float *x, int64_t row, float *y) {    \
        lanes sum[OT];                                                                                                 \
        const uint8_t *p[OT];                                                                                          \
        int64_t step = step_columns(w), scales[OT];                                                                    \
        for (int o = 0; o < OT; o++) {                                                                                 \
            sum[o] = splat(0.f);                                                                                       \
            p[o] = row_of(w, format, row + o);                                                                         \
            scales[o] = scale_row(w, row + o);                                                                         \
        }                                                                                                              \
        for (int64_t start = 0; start < w->columns; start += step) {                                                   \
            int64_t stop = start + step < w->columns ? start + step : w->columns;                                      \
            float scale[OT];                                                                                           \
            for (int o = 0; o < OT; o++) scale[o] = scale_at(w, scales[o]++);                                          \
            for (const float *value = x + start; value < x + stop; value += 32) {                                      \
                lanes odd = load(value), even = load(value + 16);                                                      \
                for (int o = 0; o < OT; o++) {                                                                         \
                    struct pair weight = decode(p[o], format, scale[o]);                                               \
                    sum[o] = multiply_add(odd, weight.odd, sum[o], exact);                                             \
                    sum[o] = multiply_add(even, weight.even, sum[o], exact);                                           \
                    p[o] += bytes_of_32(format);                                                                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int o = 0; o < OT; o++) y[o] = fold(sum[o]);                                                              \
    }

SINGLE(1)
SINGLE(4)

/* Products of MT rows of paired x with OT rows of paired weights, both float32. */
#define TILE(MT, OT)                                                                                                   \
    INLINE void tile_##MT##_##OT(const float *w, int64_t w_stride, int64_t columns, int exact, const float *x,         \
                                 int64_t x_stride, float *y, int64_t y_stride) {                                       \
        lanes sum[MT][OT];                                                                                             \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) sum[m][o] = splat(0.f);                                                       \
        for (int64_t k = 0; k < columns; k += 16) {                                                                    \
            lanes weight[OT];                                                                                          \
            for (int o = 0; o < OT; o++) weight[o] = load(w + o * w_stride + k);                                       \
            for (int m = 0; m < MT; m++) {                                                                             \
                lanes value = load(x + m * x_stride + k);                                                              \
                for (int o = 0; o < OT; o++) sum[m][o] = multiply_add(value, weight[o], sum[m][o], exact);             \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) y[m * y_stride + o] = fold(sum[m][o]);                                        \
    }

TILE(1, 1)
TILE(1, 4)
TILE(2, 4)
TILE(6, 1)
TILE(6, 4)

/* y [m_count, o_count] = x @ w.T for paired float32 x and w; o_count at most 4. */
#define PRODUCTS(NAME, PREFIX, TYPE, ...)                                                                              \
    static void NAME(const TYPE *w, int64_t w_stride, int64_t o_count, int64_t columns, const TYPE *x, int64_t m_count,\
                     int64_t x_stride, float *y, int64_t y_stride) {                                                   \
        int64_t m = 0;                                                                                                 \
        for (; m + 6 <= m_count; m += 6)                                                                               \
            if (o_count == 4)                                                                                          \
                PREFIX##6_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride); \
            else                                                                                                       \
                for (int64_t o = 0; o < o_count; o++)                                                                  \
                    PREFIX##6_1(w + o * w_stride, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride,           \
                                y + m * y_stride + o, y_stride);                                                       \
        for (; m + 2 <= m_count && o_count == 4; m += 2)                                                               \
            PREFIX##2_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride);     \
        for (; m < m_count; m++)                                                                                       \
            if (o_count == 4)                                                                                          \
                PREFIX##1_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride); \
            else                                                                                                       \
                for (int64_t o = 0; o < o_count; o++)                                                                  \
                    PREFIX##1_1(w + o * w_stride, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride,           \
                                y + m * y_stride + o, y_stride);                                                       \
    }

PRODUCTS(products, tile_, float, , 0)
PRODUCTS(exact_products, tile_, float, , 1)

#ifdef HAVE_DOT
/* The same for bfloat16 x and weights in their natural order. */
#define DOT(MT, OT)                                                                                                    \
    INLINE void dot_##MT##_##OT(const uint16_t *w, int64_t w_stride, int64_t columns, const uint16_t *x,               \
                                int64_t x_stride, float *y, int64_t y_stride) {                                        \
        __m512 sum[MT][OT];                                                                                            \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) sum[m][o] = _mm512_setzero_ps();                                              \
        for (int64_t k = 0; k < columns; k += 32) {                                                                    \
            __m512bh weight[OT];                                                                                       \
            for (int o = 0; o < OT; o++) weight[o] = (__m512bh)_mm512_loadu_si512(w + o * w_stride + k);               \
            for (int m = 0; m < MT; m++) {                                                                             \
                __m512bh value = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);                                   \
                for (int o = 0; o < OT; o++) sum[m][o] = _mm512_dpbf16_ps(sum[m][o], value, weight[o]);                \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) y[m * y_stride + o] = fold((lanes)sum[m][o]);                                 \
    }

DOT(1, 1)
DOT(1, 4)
DOT(2, 4)
DOT(6, 1)
DOT(6, 4)
PRODUCTS(dot_products, dot_, uint16_t)

/* Whether this CPU's vdpbf16ps adds the odd product first and rounds after each, on numbers that tell. */
static int dot_is_in_order(void) {
    uint32_t state = 12345;
    for (int round = 0; round < 2000; round++) {
        uint16_t a[32], b[32];
        float before[16], after[16];
        for (int i = 0; i < 80; i++) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            uint32_t exponent = 118 + state / 65536 % 18;
            if (i < 32) a[i] = (uint16_t)((state & 0x807f) | exponent << 7);
            else if (i < 64) b[i - 32] = (uint16_t)((state & 0x807f) | exponent << 7);
            else before[i - 64] = bf16((uint16_t)((state & 0x807f) | exponent << 7)) * 1.0001f;
        }
        __m512 sum = _mm512_dpbf16_ps(_mm512_loadu_ps(before), (__m512bh)_mm512_loadu_si512(a),
                                      (__m512bh)_mm512_loadu_si512(b));
        _mm512_storeu_ps(after, sum);
        for (int i = 0; i < 16; i++) {
            float expected = before[i] + bf16(a[2 * i + 1]) * bf16(b[2 * i + 1]);
            expected = expected + bf16(a[2 * i]) * bf16(b[2 * i]);
            if (expected != after[i]) return 0;
        }
    }
    return 1;
}

/* FP4 by a table of bfloat16: a byte b becomes the two indices b and b >> 4, of which the lookup uses five bits. The
 * table repeats after sixteen entries. Its values are exact, and so are they times the scale. */
INLINE __m512i words_of_e2m1(const uint8_t *p, __m512i table) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
}

INLINE __m512i table_of_e2m1(float scale) {
    static const float values[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                     -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)(load(values) * scale), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

/* FP8 by shifting: exponent and mantissa to their places in a bfloat16, the bias from 7 to 127; the seven subnormals
 * from a table. `shift` is the exponent of the scale at its place. */
INLINE __m512i words_of_e4m3(const uint8_t *p, __m512i shift) {
    const __m512i subnormals = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40,
                                                                     0x3c60));
    __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    __m512i words = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    words = _mm512_mask_permutexvar_epi16(words, subnormal, magnitude, subnormals);
    words = _mm512_mask_add_epi16(words, _mm512_test_epi16_mask(magnitude, magnitude), words, shift);
    return _mm512_or_si512(words, _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16((short)0x8000)));
}

INLINE __m512i shift_of_scale(float scale) {
    int32_t bits;
    memcpy(&bits, &scale, 4);
    return _mm512_set1_epi16((short)(((bits >> 23) - 127) * 128));
}

/* Columns [start, stop) of a stored row, which begin at p, as bfloat16. The scale is a moderate power of two. */
static void decode_words(const uint8_t *p, int format, float scale, int64_t count, uint16_t *out) {
    if (format == BFLOAT16) {
        memcpy(out, p, count * sizeof(uint16_t));
    } else if (format == FLOAT8_E4M3FN) {
        __m512i shift = shift_of_scale(scale);
        for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, words_of_e4m3(p + k, shift));
    } else {
        __m512i table = table_of_e2m1(scale);
        for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, words_of_e2m1(p + k / 2, table));
    }
}

/* One row of bfloat16 x with four rows of a weight. */
INLINE void dot_single(const struct matrix *w, int format, const uint16_t *x, int64_t row, float *y) {
    __m512 sum[4];
    const uint8_t *p[4];
    int64_t step = step_columns(w), scales[4];
    for (int o = 0; o < 4; o++) {
        sum[o] = _mm512_setzero_ps();
        p[o] = row_of(w, format, row + o);
        scales[o] = scale_row(w, row + o);
    }
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = start + step < w->columns ? start + step : w->columns;
        __m512i table[4];
        for (int o = 0; o < 4 && format != BFLOAT16; o++) {
            float scale = scale_at(w, scales[o]++);
            table[o] = format == FLOAT4_E2M1FN ? table_of_e2m1(scale) : shift_of_scale(scale);
        }
        for (const uint16_t *value = x + start; value < x + stop; value += 32) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(value);
            for (int o = 0; o < 4; o++) {
                __m512i weight = format == FLOAT4_E2M1FN   ? words_of_e2m1(p[o], table[o])
                                 : format == FLOAT8_E4M3FN ? words_of_e4m3(p[o], table[o])
                                                           : _mm512_loadu_si512(p[o]);
                sum[o] = _mm512_dpbf16_ps(sum[o], one, (__m512bh)weight);
                p[o] += bytes_of_32(format);
            }
        }
    }
    for (int o = 0; o < 4; o++) y[o] = fold((lanes)sum[o]);
}
#else
static int dot_is_in_order(void) { return 0; }
static void decode_words(const uint8_t *p, int format, float scale, int64_t count, uint16_t *out) {
    (void)p, (void)format, (void)scale, (void)count, (void)out;
}
#endif

/* 1 if bfloat16 products may go through vdpbf16ps on this machine. */
int32_t dsv4_has_dot(void) { return dot_is_in_order(); }

/* Distance of decoded rows: rows a power of two apart would share the same few lines of the cache. */
INLINE int64_t padded(int64_t columns) { return columns + 32; }

/* Rows [row, row + count) of w, decoded: paired float32, or bfloat16 in natural order if `words`. */
static void decode_rows(const struct matrix *w, int64_t row, int64_t count, int words, void *out) {
    int64_t step = step_columns(w);
    for (int64_t o = 0; o < count; o++) {
        const uint8_t *p = row_of(w, w->format, row + o);
        int64_t place = scale_row(w, row + o);
        for (int64_t start = 0; start < w->columns; start += step) {
            int64_t stop = start + step < w->columns ? start + step : w->columns;
            float scale = scale_at(w, place++);
            if (words) {
                decode_words(p, w->format, scale, stop - start, (uint16_t *)out + o * padded(w->columns) + start);
                p += (stop - start) / 32 * bytes_of_32(w->format);
                continue;
            }
            float *to = (float *)out + o * padded(w->columns) + start;
            for (int64_t k = start; k < stop; k += 32, to += 32, p += bytes_of_32(w->format)) {
                struct pair v = decode(p, w->format, scale);
                store(to, v.odd);
                store(to + 16, v.even);
            }
        }
    }
}

/* One row of x, up to four rows of w. */
static void one_row(const struct matrix *w, const float *x, const uint16_t *words, int64_t row, int64_t count, int exact,
                    float *y) {
#define CASE(FORMAT)                                                                                                   \
    if (w->format == FORMAT && count == 4) {                                                                           \
        if (exact) single_4(w, FORMAT, 1, x, row, y);                                                                  \
        else single_4(w, FORMAT, 0, x, row, y);                                                                        \
        return;                                                                                                        \
    }                                                                                                                  \
    if (w->format == FORMAT) {                                                                                         \
        for (int64_t o = 0; o < count; o++) single_1(w, FORMAT, exact, x, row + o, y + o);                             \
        return;                                                                                                        \
    }
#ifdef HAVE_DOT
    if (words && count == 4) {
        if (w->format == FLOAT4_E2M1FN) dot_single(w, FLOAT4_E2M1FN, words, row, y);
        else if (w->format == FLOAT8_E4M3FN) dot_single(w, FLOAT8_E4M3FN, words, row, y);
        else dot_single(w, BFLOAT16, words, row, y);
        return;
    }
#else
    (void)words;
#endif
    CASE(FLOAT32)
    CASE(BFLOAT16)
    CASE(FLOAT8_E4M3FN)
    CASE(FLOAT4_E2M1FN)
}

/* Rows of the weight that are decoded once for many rows of x, so that both stay in the second level cache. */
static int64_t strip_rows(const struct matrix *w) {
    int64_t rows = 65536 / w->columns / 4 * 4;
    return rows < 4 ? 4 : rows > 16 ? 16 : rows;
}

/* Rows of x, `stride` elements apart, as paired float32 and, if `words`, as bfloat16, both padded. */
static void prepare(const void *x, int is_bf16, int64_t m_count, int64_t stride, int64_t columns, float *pairs,
                    uint16_t *words) {
    for (int64_t m = 0; m < m_count; m++) {
        const uint8_t *p = (const uint8_t *)x + m * stride * (is_bf16 ? 2 : 4);
        if (words) memcpy(words + m * padded(columns), p, columns * sizeof(uint16_t));
        if (words && m_count > 1) continue; /* nothing else will be looked at */
        for (int64_t k = 0; k < columns; k += 32, p += is_bf16 ? 64 : 128) {
            struct pair v = is_bf16 ? decode_bf16((const uint16_t *)p) : decode_f32((const float *)p);
            store(pairs + m * padded(columns) + k, v.odd);
            store(pairs + m * padded(columns) + k + 16, v.even);
        }
    }
}

/* y [m_count, stop - start] = x [m_count, columns] @ rows [start, stop) of w. x is bfloat16 or float32 with rows
 * `x_stride` apart. exact: products are exact in float32; dot: vdpbf16ps may compute them.
 * scratch holds (2 * m_count + threads * 16) * (columns + 32) floats. */
void dsv4_linear(const struct matrix *w, const void *values, int64_t m_count, int64_t x_stride, int64_t start,
                 int64_t stop, float *y, float *scratch, int32_t is_bf16, int32_t exact, int32_t dot, int32_t threads) {
    int64_t stride = padded(w->columns);
    float *x = scratch;
    uint16_t *words = exact && dot ? (uint16_t *)(scratch + m_count * stride) : 0;
    prepare(values, is_bf16, m_count, x_stride, w->columns, x, words);
    scratch += 2 * m_count * stride;
    int64_t y_stride = stop - start, strip = m_count > 1 ? strip_rows(w) : 4, strips = (y_stride + strip - 1) / strip;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++)
        for (int64_t at = strips * share / threads; at < strips * (share + 1) / threads; at++) {
            int64_t row = start + at * strip, count = stop - row < strip ? stop - row : strip;
            if (m_count == 1) {
                one_row(w, x, words, row, count, exact, y + at * strip);
                continue;
            }
            float *buffer = scratch + share * 16 * padded(w->columns);
            decode_rows(w, row, count, words != 0, buffer);
            for (int64_t m = 0; m < m_count; m += 6)
                for (int64_t o = 0; o < count; o += 4) {
                    int64_t rows = m_count - m < 6 ? m_count - m : 6, columns = count - o < 4 ? count - o : 4;
                    float *to = y + m * y_stride + at * strip + o;
                    int64_t from = o * padded(w->columns), apart = padded(w->columns);
#ifdef HAVE_DOT
                    if (words) {
                        dot_products((const uint16_t *)buffer + from, apart, columns, w->columns, words + m * stride,
                                     rows, stride, to, y_stride);
                        continue;
                    }
#endif
                    (exact ? exact_products : products)(buffer + from, apart, columns, w->columns, x + m * stride, rows,
                                                        stride, to, y_stride);
                }
        }
}

/* exp of float32 through float64, the polynomial of numerics.py. */
INLINE float exponential(float x) {
    double v = x < -700.f ? -700.0 : x > 700.f ? 700.0 : (double)x;
    double n = floor(v * 0x1.71547652b82fep+0 + 0.5);
    double r = (v - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    static const double factorials[14] = {1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0, 5040.0, 40320.0, 362880.0, 3628800.0,
                                          39916800.0, 479001600.0, 6227020800.0};
    double value = 1.0 / factorials[13];
    for (int k = 12; k >= 0; k--) value = value * r + 1.0 / factorials[k];
    int64_t bits = ((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return (float)(value * power);
}

/* The same for sixteen numbers, in a loop that compilers turn into vectors. */
INLINE void exponentials(float *x) {
    for (int i = 0; i < 16; i++) x[i] = exponential(x[i]);
}

#define KEYS_PER_BLOCK 64
#define HEADS_PER_TILE 4

/* Row `row` of a pool of keys or queries, paired. */
static void gather(const void *pool, int is_bf16, int64_t row, int64_t c, float *out) {
    const uint8_t *p = (const uint8_t *)pool + row * c * (is_bf16 ? 2 : 4);
    for (int64_t k = 0; k < c; k += 32, p += is_bf16 ? 64 : 128) {
        struct pair v = is_bf16 ? decode_bf16((const uint16_t *)p) : decode_f32((const float *)p);
        store(out + k, v.odd);
        store(out + k + 16, v.even);
    }
}

/* out[h] = out[h] * shrink[h] + sum over the block's keys, oldest first, of weights[h][j] * keys[j]. */
static void add_values(const float *keys, int64_t n, int64_t c, float weights[][KEYS_PER_BLOCK], const float *shrink,
                       int64_t heads, int exact, float *out) {
    for (int64_t k = 0; k < c; k += 16) {
        lanes sum[HEADS_PER_TILE];
        for (int64_t h = 0; h < heads; h++) sum[h] = load(out + h * c + k) * shrink[h];
        for (int64_t j = 0; j < n; j++) {
            lanes key = load(keys + j * c + k);
            for (int64_t h = 0; h < heads; h++) sum[h] = multiply_add(splat(weights[h][j]), key, sum[h], exact);
        }
        for (int64_t h = 0; h < heads; h++) memcpy(out + h * c + k, &sum[h], 64);
    }
}

/* Scores of a block to probabilities relative to the largest score so far. Returns the factor for what came before. */
static float soften(float *scores, int64_t n, float *largest, float *total, int rounded) {
    float before = *largest;
    for (int64_t j = 0; j < n; j++)
        if (scores[j] > *largest) *largest = scores[j];
    lanes sums = splat(0.f);
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = j < n ? scores[j] - *largest : -INFINITY;
    for (int64_t j = 0; j < n; j += 16) exponentials(scores + j);
    for (int64_t j = n; j < KEYS_PER_BLOCK; j++) scores[j] = 0.f;
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j += 16) sums = sums + load(scores + j);
    float shrink = exponential(before - *largest);
    *total = *total * shrink + fold(sums);
    if (rounded)
        for (int64_t j = 0; j < n; j++) scores[j] = bf16(to_bf16(scores[j]));
    return shrink;
}

/* Up to HEADS_PER_TILE heads of one query: q and out [heads, c], keys [listed, c] with zeros where index is -1. */
static void attend(const float *q, const float *keys, const int32_t *index, int64_t listed, int64_t c, int64_t heads,
                   const float *sink, float scale, int rounded, float *out) {
    float largest[HEADS_PER_TILE], total[HEADS_PER_TILE] = {0}, shrink[HEADS_PER_TILE];
    float scores[HEADS_PER_TILE][KEYS_PER_BLOCK];
    for (int64_t h = 0; h < heads; h++) largest[h] = -INFINITY;
    memset(out, 0, heads * c * sizeof(float));
    for (int64_t first = 0; first < listed; first += KEYS_PER_BLOCK) {
        int64_t n = listed - first < KEYS_PER_BLOCK ? listed - first : KEYS_PER_BLOCK, seen = 0;
        for (int64_t j = 0; j < n; j++) seen += index[first + j] >= 0;
        if (!seen) continue; /* would multiply by one and add zeros */
        for (int64_t j = 0; j < n; j += 4)
            (rounded ? exact_products : products)(keys + (first + j) * c, c, n - j < 4 ? n - j : 4, c, q, heads, c,
                                                  &scores[0][j], KEYS_PER_BLOCK);
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t j = 0; j < n; j++) scores[h][j] = index[first + j] < 0 ? -INFINITY : scores[h][j] * scale;
            shrink[h] = soften(scores[h], n, &largest[h], &total[h], rounded);
        }
        add_values(keys + first * c, n, c, scores, shrink, heads, rounded, out);
    }
    for (int64_t h = 0; h < heads; h++) {
        float divisor = total[h] + exponential(sink[h] - largest[h]);
        for (int64_t k = 0; k < c; k++) out[h * c + k] = out[h * c + k] / divisor;
    }
}

/* q, out [queries, heads, c]; window [window_rows, c], compressed [.., c]; index [queries, listed]; see ops.py.
 * `scratch` holds threads * (listed + 2 * HEADS_PER_TILE) * c floats. */
void dsv4_sparse_attention(const void *q, const void *window, const void *compressed, const int32_t *index,
                           const float *sink, float scale, int64_t queries, int64_t heads, int64_t c, int64_t listed,
                           int64_t window_rows, int32_t is_bf16, void *out, float *scratch, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++) {
        float *keys = scratch + share * (listed + 2 * HEADS_PER_TILE) * c;
        float *tile_q = keys + listed * c, *tile_out = tile_q + HEADS_PER_TILE * c;
        /* Queries are shared out, or the heads of each query if there are too few of them. */
        int by_head = queries < threads;
        int64_t from = by_head ? 0 : queries * share / threads, to = by_head ? queries : queries * (share + 1) / threads;
        int64_t first = by_head ? heads * share / threads : 0, last = by_head ? heads * (share + 1) / threads : heads;
        for (int64_t query = from; query < to; query++) {
            const int32_t *list = index + query * listed;
            for (int64_t j = 0; j < listed; j++) {
                int in_window = list[j] < window_rows;
                if (list[j] < 0) memset(keys + j * c, 0, c * sizeof(float));
                else gather(in_window ? window : compressed, is_bf16, in_window ? list[j] : list[j] - window_rows, c,
                            keys + j * c);
            }
            for (int64_t h = first; h < last; h += HEADS_PER_TILE) {
                int64_t n = last - h < HEADS_PER_TILE ? last - h : HEADS_PER_TILE, at = query * heads + h;
                for (int64_t i = 0; i < n; i++) gather(q, is_bf16, at + i, c, tile_q + i * c);
                attend(tile_q, keys, list, listed, c, n, sink + h, scale, is_bf16, tile_out);
                for (int64_t k = 0; k < n * c; k++) {
                    float value = tile_out[k / 32 * 32 + (k % 2 ? 0 : 16) + k % 32 / 2];
                    if (is_bf16) ((uint16_t *)out)[at * c + k] = to_bf16(value);
                    else ((float *)out)[at * c + k] = value;
                }
            }
        }
    }
}

static float tree_sum(float *x, int64_t n) {
    while (n > 1) {
        int64_t half = n / 2;
        for (int64_t i = 0; i < half; i++) x[i] = x[i] + x[i + half];
        if (n % 2) x[half] = x[n - 1];
        n = half + n % 2;
    }
    return x[0];
}

/* scores [queries, keys->rows]; q paired float32 [queries, heads, columns], weights float32 [queries, heads]; see
 * ops.py. `scratch` holds threads * (heads * 5 + 4 * (columns + 32)) floats. */
void dsv4_index_scores(const struct matrix *keys, const float *q, const float *weights, int64_t queries, int64_t heads,
                       int32_t rounded, float *scores, float *scratch, int32_t threads) {
    int64_t tiles = (keys->rows + 3) / 4, columns = keys->columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++) {
        float *dots = scratch + share * (heads * 5 + 4 * padded(columns)), *buffer = dots + heads * 5;
        for (int64_t job = queries * tiles * share / threads; job < queries * tiles * (share + 1) / threads; job++) {
            int64_t query = job % queries, row = job / queries * 4, n = keys->rows - row < 4 ? keys->rows - row : 4;
            decode_rows(keys, row, n, 0, buffer);
            (rounded ? exact_products : products)(buffer, padded(columns), n, columns, q + query * heads * columns, heads,
                                                  columns, dots, 4);
            for (int64_t j = 0; j < n; j++) {
                float *products_of_heads = dots + heads * 4;
                for (int64_t h = 0; h < heads; h++) {
                    float dot = rounded ? bf16(to_bf16(dots[h * 4 + j])) : dots[h * 4 + j];
                    float product = (dot > 0.f ? dot : 0.f) * weights[query * heads + h];
                    products_of_heads[h] = rounded ? bf16(to_bf16(product)) : product;
                }
                float sum = tree_sum(products_of_heads, heads);
                scores[query * keys->rows + row + j] = rounded ? bf16(to_bf16(sum)) : sum;
            }
        }
    }
}

/* The small operations of parts.py. `x` and results are bfloat16 or float32; everything in between is float32. The
 * loops are compiled once for each, so that the compiler can turn them into vectors. */

INLINE float read(const void *x, int is_bf16, int64_t i) {
    return is_bf16 ? bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void write(void *x, int is_bf16, int64_t i, float value) {
    if (is_bf16) ((uint16_t *)x)[i] = to_bf16(value);
    else ((float *)x)[i] = value;
}

/* Nearest E4M3 value, ties to even, of |v| at most 448. */
INLINE float round_e4m3(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    float subnormal = rintf(v * 512.f) * 0x1p-9f, normal;
    bits = (bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000;
    memcpy(&normal, &bits, 4);
    return fabsf(v) < 0x1p-6f ? subnormal : normal;
}

/* x, out [rows, columns]; groups of `group` along a row; the last may be shorter. */
INLINE void simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t start = 0; start < columns; start += group) {
            int64_t stop = start + group < columns ? start + group : columns, at = row * columns;
            float amax = 1e-4f, scale;
            for (int64_t k = start; k < stop; k++) {
                float v = fabsf(read(x, is_bf16, at + k));
                amax = v > amax ? v : amax;
            }
            float quotient = amax * (1.f / 448.f);
            uint32_t bits;
            memcpy(&bits, &quotient, 4);
            bits = ((bits >> 23) + ((bits & 0x7fffff) != 0)) << 23;
            memcpy(&scale, &bits, 4);
            for (int64_t k = start; k < stop; k++) {
                float v = read(x, is_bf16, at + k) / scale;
                v = v < -448.f ? -448.f : v > 448.f ? 448.f : v;
                write(out, is_bf16, at + k, round_e4m3(v) * scale);
            }
        }
}

void dsv4_simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16) {
    if (is_bf16) simulate_fp8(x, out, rows, columns, group, 1);
    else simulate_fp8(x, out, rows, columns, group, 0);
}

/* x [rows, columns] -> float32 [rows]; `scratch` holds `columns` floats. */
void dsv4_mean_square(const void *x, float *out, float *scratch, int64_t rows, int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t k = 0; k < columns; k++) {
            float v = read(x, is_bf16, row * columns + k);
            scratch[k] = v * v;
        }
        out[row] = tree_sum(scratch, columns) / (float)columns;
    }
}

/* x, out [rows, columns]; weight float32 [columns]; `scratch` holds `columns` floats. */
void dsv4_rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, int64_t rows,
                   int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * columns;
        float mean;
        dsv4_mean_square((const char *)x + at * (is_bf16 ? 2 : 4), &mean, scratch, 1, columns, is_bf16);
        float factor = 1.f / sqrtf(mean + eps);
        for (int64_t k = 0; k < columns; k++)
            write(out, is_bf16, at + k, read(x, is_bf16, at + k) * factor * weight[k]);
    }
}

/* x, out [rows, heads, columns]; cos, sin float32 [rows, pairs]; the last 2 * pairs dims turn. */
void dsv4_rotate(const void *x, const float *cos, const float *sin, void *out, int64_t rows, int64_t heads,
                 int64_t columns, int64_t pairs, int32_t is_bf16) {
    int64_t size = is_bf16 ? 2 : 4, plain = columns - 2 * pairs;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (row * heads + head) * columns;
            memcpy((char *)out + at * size, (const char *)x + at * size, plain * size);
            for (int64_t i = 0; i < pairs; i++) {
                float even = read(x, is_bf16, at + plain + 2 * i), odd = read(x, is_bf16, at + plain + 2 * i + 1);
                float c = cos[row * pairs + i], s = sin[row * pairs + i];
                write(out, is_bf16, at + plain + 2 * i, even * c - odd * s);
                write(out, is_bf16, at + plain + 2 * i + 1, even * s + odd * c);
            }
        }
}

INLINE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

/* Divide each of n rows (stride 1) or columns (stride n) of an n x n matrix by its sum plus eps. */
static void normalize(float *comb, int64_t n, int by_columns, float eps) {
    float line[64];
    for (int64_t i = 0; i < n; i++) {
        float *first = comb + (by_columns ? i : i * n);
        int64_t stride = by_columns ? n : 1;
        for (int64_t j = 0; j < n; j++) line[j] = first[j * stride];
        float divisor = tree_sum(line, n) + eps;
        for (int64_t j = 0; j < n; j++) first[j * stride] = first[j * stride] / divisor;
    }
}

/* mixes [rows, (2 + n) n] -> pre, post [rows, n], comb [rows, n, n]; n at most 64. */
void dsv4_split_mixes(const float *mixes, const float *scale, const float *base, float *pre, float *post, float *comb,
                      int64_t rows, int64_t n, int64_t iterations, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const float *m = mixes + row * (2 + n) * n;
        float *c = comb + row * n * n;
        for (int64_t j = 0; j < n; j++) {
            pre[row * n + j] = sigmoid(m[j] * scale[0] + base[j]) + eps;
            post[row * n + j] = 2.f * sigmoid(m[n + j] * scale[1] + base[n + j]);
        }
        for (int64_t i = 0; i < n; i++) {
            float largest = -INFINITY, line[64];
            for (int64_t j = 0; j < n; j++) {
                int64_t at = 2 * n + i * n + j;
                c[i * n + j] = m[at] * scale[2] + base[at];
                if (c[i * n + j] > largest) largest = c[i * n + j];
            }
            for (int64_t j = 0; j < n; j++) line[j] = c[i * n + j] = exponential(c[i * n + j] - largest);
            float sum = tree_sum(line, n);
            for (int64_t j = 0; j < n; j++) c[i * n + j] = c[i * n + j] / sum + eps;
        }
        normalize(c, n, 1, eps);
        for (int64_t i = 1; i < iterations; i++) {
            normalize(c, n, 0, eps);
            normalize(c, n, 1, eps);
        }
    }
}

/* h [rows, n, columns], weights [rows, n] -> out [rows, columns]. */
INLINE void collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                   int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k++) {
            float total = weights[row * n] * read(h, is_bf16, row * n * columns + k);
            for (int64_t j = 1; j < n; j++)
                total = total + weights[row * n + j] * read(h, is_bf16, (row * n + j) * columns + k);
            write(out, is_bf16, row * columns + k, total);
        }
}

void dsv4_collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns, int32_t is_bf16) {
    if (is_bf16) collapse(weights, h, out, rows, n, columns, 1);
    else collapse(weights, h, out, rows, n, columns, 0);
}

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
INLINE void expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows,
                 int64_t n, int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t to = 0; to < n; to++) {
            const float *c = comb + row * n * n + to;
            for (int64_t k = 0; k < columns; k++) {
                float total = c[0] * read(h, is_bf16, row * n * columns + k);
                for (int64_t j = 1; j < n; j++)
                    total = total + c[j * n] * read(h, is_bf16, (row * n + j) * columns + k);
                float own = post[row * n + to] * read(output, is_bf16, row * columns + k);
                write(out, is_bf16, (row * n + to) * columns + k, own + total);
            }
        }
}

void dsv4_expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows, int64_t n,
                 int64_t columns, int32_t is_bf16) {
    if (is_bf16) expand(output, h, post, comb, out, rows, n, columns, 1);
    else expand(output, h, post, comb, out, rows, n, columns, 0);
}

/* gate, up, out [rows, columns]; share [rows] or null. */
INLINE void swiglu(const void *gate, const void *up, const float *share, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t start = 0; start < columns; start += 16) {
            int64_t n = columns - start < 16 ? columns - start : 16, at = row * columns + start;
            float gates[16] = {0}, decay[16];
            for (int64_t i = 0; i < n; i++) {
                float g = read(gate, is_bf16, at + i);
                gates[i] = g > limit ? limit : g;
            }
            for (int i = 0; i < 16; i++) decay[i] = -gates[i];
            exponentials(decay);
            for (int64_t i = 0; i < n; i++) {
                float u = read(up, is_bf16, at + i);
                u = u < -limit ? -limit : u > limit ? limit : u;
                float value = gates[i] / (1.f + decay[i]) * u;
                write(out, is_bf16, at + i, share ? share[row] * value : value);
            }
        }
}

void dsv4_swiglu(const void *gate, const void *up, const float *share, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16) {
    if (is_bf16) swiglu(gate, up, share, out, rows, columns, limit, 1);
    else swiglu(gate, up, share, out, rows, columns, limit, 0);
}
