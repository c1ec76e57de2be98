/* One row of x with rows of a stored weight, four at a time, which are decoded in registers: what decoding a token is.
 *
 * Its time is that of reading the weight from memory. Four rows side by side are many short streams, which the
 * processor's own prefetcher follows badly; so what is stored behind them is fetched in the order in which it is stored.
 * It is fetched into the second level cache only: more requests can be outstanding there, and the first level has no room
 * for it. */
#pragma once
#include "decode/bf16.h"
#include "products.h"

#define SHORTEST_AHEAD (1 << 14) /* bytes: time enough for memory to answer */
#define LONGEST_AHEAD (1 << 17)  /* bytes of four rows; the prefetcher follows longer rows well */

INLINE int uses_dot(const struct product *p) {
#ifdef HAVE_DOT
    return p->exact;
#else
    (void)p;
    return 0;
#endif
}

/* The place in four rows that begin at `row` from where on lines are fetched; null for rows that are too long. */
INLINE const uint8_t *place_ahead(const struct matrix *w, int format, int64_t row) {
    int64_t group = 4 * (w->columns / 32 * bytes_of_32(format));
    if (group > LONGEST_AHEAD) return 0;
    return row_of(w, format, row) + (group > SHORTEST_AHEAD ? group : SHORTEST_AHEAD);
}

/* Fetch as many bytes as 32 columns of four rows have. */
INLINE const uint8_t *fetch_ahead(const uint8_t *place, int format) {
    if (!place) return 0;
    for (int i = 0; i < 4 * bytes_of_32(format); i += 64) __builtin_prefetch(place + i, 0, 2);
    return place + 4 * bytes_of_32(format);
}

/* One row of paired x with `ot` rows of a stored weight; `ot` (1 or 4), format and exact are constants. */
INLINE void gemv(int ot, const struct matrix *w, int format, int exact, const float *x, int64_t row, float *y) {
    sixteen sum[4];
    const uint8_t *p[4], *ahead = ot == 4 ? place_ahead(w, format, row) : 0;
    int64_t step = step_columns(w), scales[4];
    for (int o = 0; o < ot; o++) {
        sum[o] = zeros();
        p[o] = row_of(w, format, row + o);
        scales[o] = scale_row(w, row + o);
    }
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = least(start + step, w->columns);
        float scale[4];
        for (int o = 0; o < ot; o++) scale[o] = scale_at(w, scales[o]++);
        for (const float *value = x + start; value < x + stop; value += 32) {
            sixteen odd = load_sixteen(value), even = load_sixteen(value + 16);
            ahead = fetch_ahead(ahead, format);
            for (int o = 0; o < ot; o++) {
                struct pair weight = decode(p[o], format, scale[o]);
                sum[o] = add_product(odd, weight.odd, sum[o], exact);
                sum[o] = add_product(even, weight.even, sum[o], exact);
                p[o] += bytes_of_32(format);
            }
        }
    }
    horizontal_sums(sum, ot, y);
}

INLINE void gemv_rows(const struct matrix *w, int format, int exact, const float *x, int64_t row, int64_t count,
                      float *y) {
    if (count == 4) gemv(4, w, format, exact, x, row, y);
    else
        for (int64_t o = 0; o < count; o++) gemv(1, w, format, exact, x, row + o, y + o);
}

#ifdef HAVE_DOT
/* The values of E2M1 for each exponent that a block scale may have: there is a scale for every 32 numbers. */
#define TABLE_BYTES (256 * 64)

INLINE int needs_tables(const struct product *p) {
    return uses_dot(p) && p->m_count == 1 && p->w->format == FLOAT4_E2M1FN;
}

static inline void fill_tables(void *tables) {
    for (int exponent = 0; exponent < 256; exponent++) {
        __m512i shift = _mm512_set1_epi16((short)((exponent - 127) * 128));
        _mm512_storeu_si512((uint16_t *)tables + 32 * exponent, shifted(e2m1_as_bf16(), shift));
    }
}

INLINE const uint16_t *table_of_scale(const struct matrix *w, int64_t place, const void *tables) {
    uint32_t exponent;
    if (w->scale_is_float32) exponent = ((const uint32_t *)w->scale)[place] >> 23 & 255;
    else exponent = ((const uint8_t *)w->scale)[place];
    return (const uint16_t *)tables + 32 * exponent;
}

INLINE void dot(__m512 *sum, const uint16_t *x, __m512i weight) {
    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)weight);
}

static inline void dot_fp4(const struct matrix *w, const uint16_t *x, const void *tables, int64_t row, __m512 *sum) {
    const uint8_t *p[4], *ahead = place_ahead(w, FLOAT4_E2M1FN, row);
    int64_t step = step_columns(w), scales[4];
    for (int o = 0; o < 4; o++) p[o] = row_of(w, FLOAT4_E2M1FN, row + o), scales[o] = scale_row(w, row + o);
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = least(start + step, w->columns);
        const uint16_t *table[4];
        for (int o = 0; o < 4; o++) table[o] = table_of_scale(w, scales[o]++, tables);
        for (int64_t k = start; k < stop; k += 32) {
            ahead = fetch_ahead(ahead, FLOAT4_E2M1FN);
            for (int o = 0; o < 4; o++)
                dot(sum + o, x + k, bf16_of_e2m1(p[o] + k / 2, _mm512_loadu_si512(table[o])));
        }
    }
}

static inline void dot_fp8(const struct matrix *w, const uint16_t *x, int64_t row, __m512 *sum) {
    const struct e4m3_bytes tables = e4m3_as_bf16();
    const uint8_t *p[4], *ahead = place_ahead(w, FLOAT8_E4M3FN, row);
    int64_t step = step_columns(w), scales[4];
    for (int o = 0; o < 4; o++) p[o] = row_of(w, FLOAT8_E4M3FN, row + o), scales[o] = scale_row(w, row + o);
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = least(start + step, w->columns), k = start;
        __m512i shift[4];
        for (int o = 0; o < 4; o++) shift[o] = shift_of_scale(scale_at(w, scales[o]++));
        for (; k + 64 <= stop; k += 64) {
            ahead = fetch_ahead(fetch_ahead(ahead, FLOAT8_E4M3FN), FLOAT8_E4M3FN);
            for (int o = 0; o < 4; o++) {
                __m512i first, last;
                bf16_of_64_e4m3(p[o] + k, &tables, &first, &last);
                dot(sum + o, x + k, shifted(first, shift[o]));
                dot(sum + o, x + k + 32, shifted(last, shift[o]));
            }
        }
        for (; k < stop; k += 32) {
            ahead = fetch_ahead(ahead, FLOAT8_E4M3FN);
            for (int o = 0; o < 4; o++)
                dot(sum + o, x + k, bf16_of_e4m3(_mm256_loadu_si256((const __m256i *)(p[o] + k)), shift[o]));
        }
    }
}

static inline void dot_bf16(const struct matrix *w, const uint16_t *x, int64_t row, __m512 *sum) {
    const uint8_t *first = row_of(w, BFLOAT16, row), *ahead = place_ahead(w, BFLOAT16, row);
    for (int64_t k = 0; k < w->columns; k += 32) {
        ahead = fetch_ahead(ahead, BFLOAT16);
        for (int o = 0; o < 4; o++)
            dot(sum + o, x + k, _mm512_loadu_si512((const uint16_t *)first + o * w->columns + k));
    }
}

/* One row of bfloat16 x with four rows of a quantized or bfloat16 weight. */
static inline void dot_gemv(const struct matrix *w, const uint16_t *x, const void *tables, int64_t row, float *y) {
    __m512 sum[4];
    lanes sums[4];
    for (int o = 0; o < 4; o++) sum[o] = _mm512_setzero_ps();
    if (w->format == FLOAT4_E2M1FN) dot_fp4(w, x, tables, row, sum);
    else if (w->format == FLOAT8_E4M3FN) dot_fp8(w, x, row, sum);
    else dot_bf16(w, x, row, sum);
    for (int o = 0; o < 4; o++) sums[o] = (lanes)sum[o];
    horizontal_sums(sums, 4, y);
}
#else
#define TABLE_BYTES 0

INLINE int needs_tables(const struct product *p) {
    (void)p;
    return 0;
}

static inline void fill_tables(void *tables) { (void)tables; }
#endif

/* One row of x, paired and, if not null, as bfloat16, with up to four rows of w. */
static inline void one_row_by_four(const struct matrix *w, const float *x, const uint16_t *x_bf16, const void *tables,
                                   int64_t row, int64_t count, int exact, float *y) {
#ifdef HAVE_DOT
    if (x_bf16 && count == 4) {
        dot_gemv(w, x_bf16, tables, row, y);
        return;
    }
#else
    (void)x_bf16, (void)tables;
#endif
    switch (w->format) {
    case FLOAT32: /* whose products are never exact */
        gemv_rows(w, FLOAT32, 0, x, row, count, y);
        break;
    case BFLOAT16:
        if (exact) gemv_rows(w, BFLOAT16, 1, x, row, count, y);
        else gemv_rows(w, BFLOAT16, 0, x, row, count, y);
        break;
    case FLOAT8_E4M3FN:
        if (exact) gemv_rows(w, FLOAT8_E4M3FN, 1, x, row, count, y);
        else gemv_rows(w, FLOAT8_E4M3FN, 0, x, row, count, y);
        break;
    default:
        if (exact) gemv_rows(w, FLOAT4_E2M1FN, 1, x, row, count, y);
        else gemv_rows(w, FLOAT4_E2M1FN, 0, x, row, count, y);
    }
}
