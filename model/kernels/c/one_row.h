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
#define MOST_FEW 6 /* rows of x that few_rows.h takes: with four of the weight, as many sums as registers hold */

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

/* Whether the scales of a weight are such as the tables for FP4 are for: E8M0, for 32 columns of one row. */
INLINE int has_known_scales(const struct matrix *w) {
    return w->format != FLOAT4_E2M1FN || (w->block_rows == 1 && w->block_columns == 32 && !w->scale_is_float32);
}

#if defined(HAVE_DOT)
/* Tables that are filled once for a list of products: the values of E2M1 for each exponent that a block scale may have
 * (there is a scale for every 32 numbers), then the bytes of E4M3. */
#define E2M1_BYTES (256 * 64)
#define TABLE_BYTES (E2M1_BYTES + (int64_t)sizeof(struct e4m3_bytes))

INLINE int needs_tables(const struct product *p) {
    return uses_dot(p) && p->m_count <= MOST_FEW && p->w->format != BFLOAT16;
}

static inline void fill_tables(void *tables) {
    struct e4m3_bytes bytes = e4m3_as_bf16();
    for (int exponent = 0; exponent < 256; exponent++) {
        __m512i shift = _mm512_set1_epi16((short)((exponent - 127) * 128));
        _mm512_storeu_si512((uint16_t *)tables + 32 * exponent, shifted(e2m1_as_bf16(), shift));
    }
    memcpy((uint8_t *)tables + E2M1_BYTES, &bytes, sizeof bytes);
}

INLINE struct e4m3_bytes filled_e4m3(const void *tables) {
    struct e4m3_bytes bytes;
    memcpy(&bytes, (const uint8_t *)tables + E2M1_BYTES, sizeof bytes);
    return bytes;
}

INLINE void dot(__m512 *sum, __m512i x, __m512i weight) {
    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)x, (__m512bh)weight);
}

/* The values of E2M1 times an E8M0 scale. */
INLINE __m512i table_of(const void *tables, uint8_t scale) {
    return _mm512_loadu_si512((const uint16_t *)tables + 32 * scale);
}

/* FP4 in blocks of one row and 32 columns, with E8M0 scales: two blocks at a time. */
static inline void dot_fp4(const struct matrix *w, const uint16_t *x, const void *tables, int64_t row, __m512 *sum) {
    const uint8_t *p = row_of(w, FLOAT4_E2M1FN, row), *ahead = place_ahead(w, FLOAT4_E2M1FN, row);
    const uint8_t *scale = (const uint8_t *)w->scale + scale_row(w, row);
    int64_t bytes = w->columns / 2, scales = w->scale_columns, k = 0;
    for (; k + 64 <= w->columns; k += 64, p += 32, scale += 2) {
        __m512i first = _mm512_loadu_si512(x + k), last = _mm512_loadu_si512(x + k + 32);
        ahead = fetch_ahead(fetch_ahead(ahead, FLOAT4_E2M1FN), FLOAT4_E2M1FN);
        for (int o = 0; o < 4; o++) {
            __m512i indices = e2m1_indices(_mm256_loadu_si256((const __m256i *)(p + o * bytes)));
            dot(sum + o, first, first_e2m1(indices, table_of(tables, scale[o * scales])));
            dot(sum + o, last, last_e2m1(indices, table_of(tables, scale[o * scales + 1])));
        }
    }
    if (k == w->columns) return;
    for (int o = 0; o < 4; o++)
        dot(sum + o, _mm512_loadu_si512(x + k), bf16_of_e2m1(p + o * bytes, table_of(tables, scale[o * scales])));
}

/* The block scales of FP8 are those of many rows, so x is multiplied by them instead of the weight. This is exact where
 * no number of x is so small or large that a moderate scale leads out of the normal numbers of bfloat16. */
static inline int can_be_scaled(const uint16_t *x, int64_t columns) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), least_one = _mm512_set1_epi16(64 << 7);
    const __m512i range = _mm512_set1_epi16((190 - 64) << 7);
    __mmask32 outside = 0;
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i v = _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude);
        outside |= _mm512_mask_cmpgt_epu16_mask(_mm512_test_epi16_mask(v, v), _mm512_sub_epi16(v, least_one), range);
    }
    return !outside;
}

/* x times the scales of a row of blocks. Of every 32 numbers those that `unpacklo` leaves of two rows come first. */
static inline void scale_x(const struct matrix *w, const uint16_t *x, int64_t place, uint16_t *out) {
    const __m512i order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    int64_t step = step_columns(w);
    for (int64_t start = 0; start < w->columns; start += step) {
        __m512i shift = shift_of_scale(scale_at(w, place++));
        for (int64_t k = start; k < least(start + step, w->columns); k += 32)
            _mm512_storeu_si512(out + k, _mm512_permutexvar_epi64(order, shifted(_mm512_loadu_si512(x + k), shift)));
    }
}

/* 32 FP8 of each of two rows, without scale, with 32 of x in the order of `scale_x`. */
INLINE void dot_two_rows(const uint8_t *p, int64_t columns, __m512i low_x, __m512i high_x,
                         const struct e4m3_bytes *tables, __m512 *sum) {
    __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p)),
                                       _mm256_loadu_si256((const __m256i *)(p + columns)), 1);
    __m512i first, last;
    bf16_of_64_e4m3(codes, tables, &first, &last);
    dot(sum, low_x, first);
    dot(sum + 1, high_x, last);
}

/* FP8 whose four rows have the scales that x was multiplied by. */
static inline void dot_fp8(const struct matrix *w, const uint16_t *x, const void *filled, int64_t row, __m512 *sum) {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(8));
    const struct e4m3_bytes tables = filled_e4m3(filled);
    const uint8_t *p = row_of(w, FLOAT8_E4M3FN, row), *ahead = place_ahead(w, FLOAT8_E4M3FN, row);
    __m512 part[4] = {sum[0], sum[1], sum[2], sum[3]};
    for (const uint16_t *end = x + w->columns; x < end; x += 32, p += 32) {
        __m512i low = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)x));
        __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(x + 16)));
        ahead = fetch_ahead(ahead, FLOAT8_E4M3FN);
        dot_two_rows(p, w->columns, low, high, &tables, part);
        dot_two_rows(p + 2 * w->columns, w->columns, low, high, &tables, part + 2);
    }
    for (int i = 0; i < 4; i += 2) {
        sum[i] = _mm512_permutex2var_ps(part[i], even, part[i + 1]);
        sum[i + 1] = _mm512_permutex2var_ps(part[i], odd, part[i + 1]);
    }
}

/* FP8 whose four rows have scales of their own. */
static inline void dot_fp8_scaled(const struct matrix *w, const uint16_t *x, const void *filled, int64_t row,
                                  __m512 *sum) {
    const __m512i by_lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); /* so that unpacking leaves the natural order */
    const struct e4m3_bytes tables = filled_e4m3(filled);
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
                bf16_of_64_e4m3(_mm512_permutexvar_epi64(by_lanes, _mm512_loadu_si512(p[o] + k)), &tables, &first,
                                &last);
                dot(sum + o, _mm512_loadu_si512(x + k), shifted(first, shift[o]));
                dot(sum + o, _mm512_loadu_si512(x + k + 32), shifted(last, shift[o]));
            }
        }
        for (; k < stop; k += 32) {
            ahead = fetch_ahead(ahead, FLOAT8_E4M3FN);
            for (int o = 0; o < 4; o++)
                dot(sum + o, _mm512_loadu_si512(x + k),
                    bf16_of_e4m3(_mm256_loadu_si256((const __m256i *)(p[o] + k)), shift[o]));
        }
    }
}

static inline void dot_bf16(const struct matrix *w, const uint16_t *x, int64_t row, __m512 *sum) {
    const uint8_t *first = row_of(w, BFLOAT16, row), *ahead = place_ahead(w, BFLOAT16, row);
    for (int64_t k = 0; k < w->columns; k += 32) {
        ahead = fetch_ahead(ahead, BFLOAT16);
        for (int o = 0; o < 4; o++)
            dot(sum + o, _mm512_loadu_si512(x + k), _mm512_loadu_si512((const uint16_t *)first + o * w->columns + k));
    }
}

/* One row of bfloat16 x with four rows of a quantized or bfloat16 weight. `scaled`: x times their scales, or null. */
static inline void dot_gemv(const struct matrix *w, const uint16_t *x, const uint16_t *scaled, const void *tables,
                            int64_t row, float *y) {
    __m512 sum[4];
    lanes sums[4];
    for (int o = 0; o < 4; o++) sum[o] = _mm512_setzero_ps();
    if (w->format == FLOAT4_E2M1FN) dot_fp4(w, x, tables, row, sum);
    else if (w->format == BFLOAT16) dot_bf16(w, x, row, sum);
    else if (scaled) dot_fp8(w, scaled, tables, row, sum);
    else dot_fp8_scaled(w, x, tables, row, sum);
    for (int o = 0; o < 4; o++) sums[o] = (lanes)sum[o];
    horizontal_sums(sums, 4, y);
}
#elif defined(HAVE_AVX2)
INLINE int needs_tables(const struct product *p) {
    return p->exact && p->m_count == 1 && p->w->format == FLOAT4_E2M1FN;
}

/* One row of paired x with four rows of FP4, which tables decode. */
static inline void table_gemv(const struct matrix *w, const float *x, const void *tables, int64_t row, float *y) {
    const uint8_t *p = row_of(w, FLOAT4_E2M1FN, row), *ahead = place_ahead(w, FLOAT4_E2M1FN, row);
    const uint8_t *scale = (const uint8_t *)w->scale + scale_row(w, row);
    int64_t bytes = w->columns / 2, scales = w->scale_columns;
    sixteen sum[4] = {zeros(), zeros(), zeros(), zeros()};
    for (const float *end = x + w->columns; x < end; x += 32, p += 16, scale++) {
        sixteen odd = load_sixteen(x), even = load_sixteen(x + 16);
        ahead = fetch_ahead(ahead, FLOAT4_E2M1FN);
        for (int o = 0; o < 4; o++) {
            const uint8_t *table = (const uint8_t *)tables + E2M1_BYTES * (int64_t)scale[o * scales];
            struct pair weight = e2m1_by_table(p + o * bytes, table);
            sum[o] = add_product(odd, weight.odd, sum[o], 1);
            sum[o] = add_product(even, weight.even, sum[o], 1);
        }
    }
    horizontal_sums(sum, 4, y);
}

/* x is multiplied by the block scale of four rows of FP8, and by 256, instead of the weight. This is exact where no
 * number of x is so small or large that a moderate scale leads out of the normal numbers of float32. */
static inline int can_be_scaled(const float *x, int64_t columns) {
    const uint32_t least_one = 64u << 23, range = (182u - 64u) << 23;
    uint32_t outside = 0;
    for (int64_t k = 0; k < columns; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        outside |= (bits != 0) & (bits - least_one > range);
    }
    return !outside;
}

/* One row of paired x with four rows of FP8 that have the same scales. */
static inline void fp8_gemv(const struct matrix *w, const float *x, int64_t row, float *y) {
    const uint8_t *p = row_of(w, FLOAT8_E4M3FN, row), *ahead = place_ahead(w, FLOAT8_E4M3FN, row);
    int64_t step = step_columns(w), place = scale_row(w, row);
    sixteen sum[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t start = 0; start < w->columns; start += step) {
        float factor = 256.0f * scale_at(w, place++);
        for (const float *end = x + least(step, w->columns - start); x < end; x += 32, p += 32) {
            sixteen odd = times(load_sixteen(x), factor), even = times(load_sixteen(x + 16), factor);
            ahead = fetch_ahead(ahead, FLOAT8_E4M3FN);
            for (int o = 0; o < 4; o++) {
                struct pair weight = small_e4m3(p + o * w->columns);
                sum[o] = add_product(odd, weight.odd, sum[o], 1);
                sum[o] = add_product(even, weight.even, sum[o], 1);
            }
        }
    }
    horizontal_sums(sum, 4, y);
}
#else
#define TABLE_BYTES 0

INLINE int needs_tables(const struct product *p) {
    (void)p;
    return 0;
}

static inline void fill_tables(void *tables) { (void)tables; }
#endif

/* One row of x in the forms in which the kernels take it. */
struct one_x {
    const float *pairs;
    const uint16_t *bf16; /* in its natural order; null where vdpbf16ps is not used */
    uint16_t *scaled;     /* memory for x times the scales of a row of blocks; null where x cannot be multiplied by them */
    int64_t scaled_for;   /* the row of blocks whose scales those are; -1 before the first */
    const void *tables;
};

#ifdef HAVE_DOT
/* x times the scales of four rows, null if it is not one row of scales or x cannot be multiplied by them. */
static inline const uint16_t *scaled_for_rows(const struct matrix *w, struct one_x *x, int64_t row) {
    int64_t block = row / w->block_rows;
    if (!x->scaled || (row + 3) / w->block_rows != block) return 0;
    if (x->scaled_for != block) scale_x(w, x->bf16, scale_row(w, row), x->scaled);
    x->scaled_for = block;
    return x->scaled;
}
#endif

/* One row of x with up to four rows of w. */
static inline void one_row_by_four(const struct matrix *w, struct one_x *one, int64_t row, int64_t count, int exact,
                                   float *y) {
    const float *x = one->pairs;
#if defined(HAVE_DOT)
    if (one->bf16 && count == 4 && has_known_scales(w)) {
        dot_gemv(w, one->bf16, scaled_for_rows(w, one, row), one->tables, row, y);
        return;
    }
#elif defined(HAVE_AVX2)
    if (exact && count == 4 && w->format == FLOAT4_E2M1FN && has_known_scales(w)) {
        table_gemv(w, x, one->tables, row, y);
        return;
    }
    if (one->scaled && count == 4 && row / w->block_rows == (row + 3) / w->block_rows) {
        fp8_gemv(w, x, row, y);
        return;
    }
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
