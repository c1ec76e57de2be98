/* The hot operations in C, in the order of summation that numerics.py defines, so that they give the same bits.
 *
 * A dot product has sixteen lanes; lane l adds the products of elements l, l + 16, l + 32, ... in that order. Sixteen
 * float32 are one vector type of gcc and clang, which every CPU can run. Products and sums are rounded one by one
 * (-ffp-contract=off); where the product of the inputs is exact in float32 (8 significant bits times 8), a fused
 * multiply-add rounds the same, and is used. Work is split over outputs only, never inside a sum.
 * Every length that enters a dot product is a multiple of 16; the caller fills up with zeros.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));

enum format { FLOAT32, BFLOAT16, FLOAT8_E4M3FN, FLOAT4_E2M1FN };

/* A weight [rows, columns] as stored. Scales are E8M0 bytes or float32, one per block_rows x block_columns. */
struct matrix {
    const void *values;
    const void *scale;
    int64_t rows, columns, stride; /* stride: elements from one row to the next */
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
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

INLINE lanes splat(float x) { return (lanes){0} + x; }

INLINE float fold(lanes v) {
    float a[16];
    memcpy(a, &v, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
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

/* Sixteen weights of one row, from column k on, decoded to their exact float32 values. */
INLINE lanes decode_bf16(const uint16_t *p) {
#ifdef HAVE_AVX512
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    lanes v;
    for (int i = 0; i < 16; i++) v[i] = bf16(p[i]);
    return v;
#endif
}

INLINE lanes decode_e4m3(const uint8_t *p, float scale) {
#ifdef HAVE_AVX512
    /* Through float16, bias 15 instead of 7, which hardware widens subnormals and all: 2**8 too small. The byte goes
     * to the upper half of a signed 16-bit number; shifted right by one the sign is doubled, and bit 14 cleared. */
    __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 8);
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbfff));
    return (lanes)_mm512_cvtph_ps(half) * 256.0f * scale;
#else
    /* Exponent and mantissa at their places in a float32, whose bias is 127 and not 7: 2**120 too small. */
    ilanes bits;
    for (int i = 0; i < 16; i++) bits[i] = ((int32_t)(p[i] & 0x80) << 24) | ((int32_t)(p[i] & 0x7f) << 20);
    return (lanes)bits * 0x1p120f * scale;
#endif
}

INLINE lanes decode_e2m1(const uint8_t *p, float scale) {
    /* Eight bytes, the even element in the low nibble. */
#ifdef HAVE_AVX512
    const __m512 table = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f,
                                        -4.f, -6.f);
    const __m512i shift = _mm512_setr_epi64(0x0000000400000000, 0x0000000c00000008, 0x0000001400000010,
                                            0x0000001c00000018, 0x0000000400000000, 0x0000000c00000008,
                                            0x0000001400000010, 0x0000001c00000018);
    int32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    __m512i packed = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    /* The lookup uses the lowest four bits of each lane. */
    return (lanes)_mm512_permutexvar_ps(_mm512_srlv_epi32(packed, shift), (__m512)((lanes)table * scale));
#else
    static const float table[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                    -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    lanes v;
    for (int i = 0; i < 8; i++) {
        v[2 * i] = table[p[i] & 15];
        v[2 * i + 1] = table[p[i] >> 4];
    }
    return v * scale;
#endif
}

/* Where the scales of a row begin, and the scale of its block number `block`. */
INLINE int64_t scale_row(const struct matrix *w, int64_t row) { return row / w->block_rows * w->scale_columns; }

INLINE float scale_at(const struct matrix *w, int64_t place) {
    if (!w->scale) return 1.f;
    return w->scale_is_float32 ? ((const float *)w->scale)[place] : e8m0(((const uint8_t *)w->scale)[place]);
}

/* Columns that share one scale; all of them if there is none. */
INLINE int64_t step_columns(const struct matrix *w) { return w->scale ? w->block_columns : w->columns; }

/* Bytes of sixteen weights. */
INLINE int64_t sixteen(int format) {
    return format == FLOAT32 ? 64 : format == BFLOAT16 ? 32 : format == FLOAT8_E4M3FN ? 16 : 8;
}

INLINE const uint8_t *row_of(const struct matrix *w, int format, int64_t row) {
    return (const uint8_t *)w->values + row * w->stride / 16 * sixteen(format);
}

INLINE lanes decode(const uint8_t *p, int format, float scale) {
    if (format == FLOAT4_E2M1FN) return decode_e2m1(p, scale);
    if (format == FLOAT8_E4M3FN) return decode_e4m3(p, scale);
    if (format == BFLOAT16) return decode_bf16((const uint16_t *)p);
    return load((const float *)p);
}

/* One tile: MT rows of x times OT rows of the weight, the accumulators in registers. */
#define TILE(MT, OT)                                                                                                   \
    INLINE void tile_##MT##_##OT(const struct matrix *w, int format, int exact, const float *x, int64_t stride,        \
                                 int64_t row, float *y, int64_t y_stride) {                                            \
        lanes sum[MT][OT];                                                                                             \
        const uint8_t *p[OT];                                                                                          \
        int64_t step = step_columns(w), scales[OT];                                                                    \
        for (int o = 0; o < OT; o++) {                                                                                 \
            for (int m = 0; m < MT; m++) sum[m][o] = splat(0.f);                                                       \
            p[o] = row_of(w, format, row + o);                                                                         \
            scales[o] = scale_row(w, row + o);                                                                         \
        }                                                                                                              \
        for (int64_t start = 0; start < w->columns; start += step) {                                                   \
            int64_t stop = start + step < w->columns ? start + step : w->columns;                                      \
            float scale[OT];                                                                                           \
            for (int o = 0; o < OT; o++) scale[o] = scale_at(w, scales[o]++);                                          \
            for (const float *value = x + start; value < x + stop; value += 16) {                                      \
                lanes weight[OT];                                                                                      \
                for (int o = 0; o < OT; o++) {                                                                         \
                    weight[o] = decode(p[o], format, scale[o]);                                                        \
                    p[o] += sixteen(format);                                                                           \
                }                                                                                                      \
                for (int m = 0; m < MT; m++) {                                                                         \
                    lanes one = load(value + m * stride);                                                              \
                    for (int o = 0; o < OT; o++) sum[m][o] = multiply_add(one, weight[o], sum[m][o], exact);           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) y[m * y_stride + o] = fold(sum[m][o]);                                        \
    }

TILE(1, 1)
TILE(1, 4)
TILE(2, 1)
TILE(2, 4)
TILE(6, 1)
TILE(6, 4)

/* `count` (at most 4) weight rows from `row` on, for all rows of x. */
#define ROWS(NAME, FORMAT, EXACT)                                                                                      \
    static void NAME(const struct matrix *w, const float *x, int64_t m_count, int64_t stride, int64_t row,             \
                     int64_t count, float *y, int64_t y_stride) {                                                      \
        int64_t m = 0;                                                                                                 \
        for (; m + 6 <= m_count; m += 6)                                                                               \
            if (count == 4)                                                                                            \
                tile_6_4(w, FORMAT, EXACT, x + m * stride, stride, row, y + m * y_stride, y_stride);                   \
            else                                                                                                       \
                for (int64_t o = 0; o < count; o++)                                                                    \
                    tile_6_1(w, FORMAT, EXACT, x + m * stride, stride, row + o, y + m * y_stride + o, y_stride);       \
        for (; m + 2 <= m_count; m += 2)                                                                               \
            if (count == 4)                                                                                            \
                tile_2_4(w, FORMAT, EXACT, x + m * stride, stride, row, y + m * y_stride, y_stride);                   \
            else                                                                                                       \
                for (int64_t o = 0; o < count; o++)                                                                    \
                    tile_2_1(w, FORMAT, EXACT, x + m * stride, stride, row + o, y + m * y_stride + o, y_stride);       \
        for (; m < m_count; m++)                                                                                       \
            if (count == 4)                                                                                            \
                tile_1_4(w, FORMAT, EXACT, x + m * stride, stride, row, y + m * y_stride, y_stride);                   \
            else                                                                                                       \
                for (int64_t o = 0; o < count; o++)                                                                    \
                    tile_1_1(w, FORMAT, EXACT, x + m * stride, stride, row + o, y + m * y_stride + o, y_stride);       \
    }

ROWS(rows_f32, FLOAT32, 0)
ROWS(rows_f32_exact, FLOAT32, 1)
ROWS(rows_bf16, BFLOAT16, 0)
ROWS(rows_bf16_exact, BFLOAT16, 1)
ROWS(rows_fp8, FLOAT8_E4M3FN, 0)
ROWS(rows_fp8_exact, FLOAT8_E4M3FN, 1)
ROWS(rows_fp4, FLOAT4_E2M1FN, 0)
ROWS(rows_fp4_exact, FLOAT4_E2M1FN, 1)

typedef void (*rows_function)(const struct matrix *, const float *, int64_t, int64_t, int64_t, int64_t, float *, int64_t);

/* Rows [row, row + count) of w as float32 [count, columns], each row 16 further on: rows whose distance is a power of
 * two would fall into the same few lines of the cache. */
static void decode_rows(const struct matrix *w, int64_t row, int64_t count, float *out) {
    int64_t step = step_columns(w);
    for (int64_t o = 0; o < count; o++) {
        const uint8_t *p = row_of(w, w->format, row + o);
        int64_t place = scale_row(w, row + o);
        for (int64_t start = 0; start < w->columns; start += step) {
            int64_t stop = start + step < w->columns ? start + step : w->columns;
            float scale = scale_at(w, place++);
            for (int64_t k = start; k < stop; k += 16, p += sixteen(w->format)) {
                lanes v = decode(p, w->format, scale);
                memcpy(out + o * (w->columns + 16) + k, &v, 64);
            }
        }
    }
}

/* Rows of the weight that are decoded once for many rows of x, so that both stay in the second level cache. */
static int64_t strip_rows(const struct matrix *w) {
    int64_t rows = 65536 / w->columns / 4 * 4;
    return rows < 4 ? 4 : rows > 16 ? 16 : rows;
}

/* y [m_count, stop - start] = x [m_count, columns] @ rows [start, stop) of w. `exact`: products are exact in float32.
 * `scratch` holds threads * 16 * (columns + 16) floats if m_count > 1. */
void dsv4_linear(const struct matrix *w, const float *x, int64_t m_count, int64_t stride, int64_t start, int64_t stop,
                 float *y, float *scratch, int32_t exact, int32_t threads) {
    static const rows_function table[4][2] = {
        {rows_f32, rows_f32_exact}, {rows_bf16, rows_bf16_exact}, {rows_fp8, rows_fp8_exact}, {rows_fp4, rows_fp4_exact}};
    rows_function direct = table[w->format][exact ? 1 : 0], decoded = table[FLOAT32][exact ? 1 : 0];
    int64_t y_stride = stop - start, strip = m_count > 1 ? strip_rows(w) : 4, strips = (y_stride + strip - 1) / strip;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++)
        for (int64_t at = strips * share / threads; at < strips * (share + 1) / threads; at++) {
            int64_t row = start + at * strip, count = stop - row < strip ? stop - row : strip;
            if (m_count == 1) {
                direct(w, x, 1, stride, row, count, y + at * strip, y_stride);
                continue;
            }
            float *buffer = scratch + share * 16 * (w->columns + 16);
            decode_rows(w, row, count, buffer);
            struct matrix strip_of_w = {buffer, 0, count, w->columns, w->columns + 16, 1, w->columns, 1, FLOAT32, 0};
            for (int64_t m = 0; m < m_count; m += 6)
                for (int64_t o = 0; o < count; o += 4)
                    decoded(&strip_of_w, x + m * stride, m_count - m < 6 ? m_count - m : 6, stride, o,
                            count - o < 4 ? count - o : 4, y + m * y_stride + at * strip + o, y_stride);
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

#define KEYS_PER_BLOCK 64
#define HEADS_PER_TILE 4

static void gather(const void *pool, int is_bf16, int64_t row, int64_t c, float *out) {
    if (!is_bf16) {
        memcpy(out, (const float *)pool + row * c, c * sizeof(float));
        return;
    }
    const uint16_t *p = (const uint16_t *)pool + row * c;
    for (int64_t k = 0; k < c; k += 16) {
        lanes v = decode_bf16(p + k);
        memcpy(out + k, &v, 64);
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
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = j < n ? exponential(scores[j] - *largest) : 0.f;
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
        struct matrix block = {keys + first * c, 0, n, c, c, 1, c, 1, FLOAT32, 0};
        for (int64_t j = 0; j < n; j += 4)
            (rounded ? rows_f32_exact : rows_f32)(&block, q, heads, c, j, n - j < 4 ? n - j : 4, &scores[0][j],
                                                  KEYS_PER_BLOCK);
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
                if (is_bf16)
                    for (int64_t k = 0; k < n * c; k++) ((uint16_t *)out)[at * c + k] = to_bf16(tile_out[k]);
                else
                    memcpy((float *)out + at * c, tile_out, n * c * sizeof(float));
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

/* scores [queries, keys->rows]; q float32 [queries, heads, columns], weights float32 [queries, heads]; see ops.py.
 * `scratch` holds threads * heads * 5 floats. */
void dsv4_index_scores(const struct matrix *keys, const float *q, const float *weights, int64_t queries, int64_t heads,
                       int32_t rounded, float *scores, float *scratch, int32_t threads) {
    int64_t tiles = (keys->rows + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++) {
        float *dots = scratch + share * heads * 5, *products = dots + heads * 4;
        for (int64_t job = queries * tiles * share / threads; job < queries * tiles * (share + 1) / threads; job++) {
            int64_t query = job / tiles, row = job % tiles * 4, n = keys->rows - row < 4 ? keys->rows - row : 4;
            rows_function rows = keys->format == FLOAT32 ? rows_f32 : rows_bf16_exact;
            rows(keys, q + query * heads * keys->columns, heads, keys->columns, row, n, dots, 4);
            for (int64_t j = 0; j < n; j++) {
                for (int64_t h = 0; h < heads; h++) {
                    float dot = rounded ? bf16(to_bf16(dots[h * 4 + j])) : dots[h * 4 + j];
                    float product = (dot > 0.f ? dot : 0.f) * weights[query * heads + h];
                    products[h] = rounded ? bf16(to_bf16(product)) : product;
                }
                float sum = tree_sum(products, heads);
                scores[query * keys->rows + row + j] = rounded ? bf16(to_bf16(sum)) : sum;
            }
        }
    }
}

/* The small operations of parts.py. `x` and results are bfloat16 or float32; everything in between is float32. */

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
void dsv4_simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16) {
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
void dsv4_collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                   int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k++) {
            float total = weights[row * n] * read(h, is_bf16, row * n * columns + k);
            for (int64_t j = 1; j < n; j++)
                total = total + weights[row * n + j] * read(h, is_bf16, (row * n + j) * columns + k);
            write(out, is_bf16, row * columns + k, total);
        }
}

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
void dsv4_expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows,
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

/* gate, up, out [rows, columns]; share [rows] or null. */
void dsv4_swiglu(const void *gate, const void *up, const float *share, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = row * columns; at < (row + 1) * columns; at++) {
            float g = read(gate, is_bf16, at), u = read(up, is_bf16, at);
            g = g > limit ? limit : g;
            u = u < -limit ? -limit : u > limit ? limit : u;
            float value = g / (1.f + exponential(-g)) * u;
            write(out, is_bf16, at, share ? share[row] * value : value);
        }
}
