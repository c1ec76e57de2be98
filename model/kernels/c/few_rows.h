/* A few rows of x with rows of a stored weight, four at a time: what checking a draft is, and a small batch.
 *
 * The weight is decoded in registers, once for all rows of x, as for a single one (one_row.h): it is read from memory
 * once and never stored decoded. Each sum adds up in the order of a single row. */
#pragma once
#include "one_row.h"

#ifdef HAVE_DOT
/* Rows of x as bfloat16, `apart` elements apart. */
struct few_x {
    const uint16_t *first;
    int64_t apart;
};

/* 32 columns of one row of the weight, from k on, with those of `mt` rows of x, whose sums are `width` apart. */
INLINE void dot_few(int mt, int width, __m512 *sum, struct few_x x, int64_t k, __m512i weight) {
    for (int m = 0; m < mt; m++) dot(sum + m * width, _mm512_loadu_si512(x.first + m * x.apart + k), weight);
}

INLINE void few_fp4(int mt, const struct matrix *w, struct few_x x, const void *tables, int64_t row, __m512 *sum) {
    const uint8_t *p = row_of(w, FLOAT4_E2M1FN, row), *ahead = place_ahead(w, FLOAT4_E2M1FN, row);
    const uint8_t *scale = (const uint8_t *)w->scale + scale_row(w, row);
    int64_t bytes = w->columns / 2, scales = w->scale_columns, k = 0;
    for (; k + 64 <= w->columns; k += 64, p += 32, scale += 2) {
        ahead = fetch_ahead(fetch_ahead(ahead, FLOAT4_E2M1FN), FLOAT4_E2M1FN);
        for (int o = 0; o < 4; o++) {
            __m512i indices = e2m1_indices(_mm256_loadu_si256((const __m256i *)(p + o * bytes)));
            dot_few(mt, 4, sum + o, x, k, first_e2m1(indices, table_of(tables, scale[o * scales])));
            dot_few(mt, 4, sum + o, x, k + 32, last_e2m1(indices, table_of(tables, scale[o * scales + 1])));
        }
    }
    if (k == w->columns) return;
    for (int o = 0; o < 4; o++)
        dot_few(mt, 4, sum + o, x, k, bf16_of_e2m1(p + o * bytes, table_of(tables, scale[o * scales])));
}

/* Two rows of FP8: the sums of four and the tables that decode them do not fit into registers. */
INLINE void few_fp8(int mt, const struct matrix *w, struct few_x x, const void *filled, int64_t row, __m512 *result) {
    const __m512i by_lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); /* so that unpacking leaves the natural order */
    const struct e4m3_bytes tables = filled_e4m3(filled);
    const uint8_t *p = row_of(w, FLOAT8_E4M3FN, row), *ahead = place_ahead(w, FLOAT8_E4M3FN, row);
    int64_t step = step_columns(w), scales[2] = {scale_row(w, row), scale_row(w, row + 1)};
    __m512 sum[2 * MOST_FEW];
    for (int i = 0; i < 2 * mt; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = least(start + step, w->columns), k = start;
        __m512i shift[2] = {shift_of_scale(scale_at(w, scales[0]++)), shift_of_scale(scale_at(w, scales[1]++))};
        for (; k + 64 <= stop; k += 64) {
            ahead = fetch_ahead(ahead, FLOAT8_E4M3FN); /* four times 32 bytes, as many as are read */
            for (int o = 0; o < 2; o++) {
                __m512i codes = _mm512_loadu_si512(p + o * w->columns + k), first, last;
                bf16_of_64_e4m3(_mm512_permutexvar_epi64(by_lanes, codes), &tables, &first, &last);
                dot_few(mt, 2, sum + o, x, k, shifted(first, shift[o]));
                dot_few(mt, 2, sum + o, x, k + 32, shifted(last, shift[o]));
            }
        }
        for (; k < stop; k += 32)
            for (int o = 0; o < 2; o++) {
                __m256i codes = _mm256_loadu_si256((const __m256i *)(p + o * w->columns + k));
                dot_few(mt, 2, sum + o, x, k, bf16_of_e4m3(codes, shift[o]));
            }
    }
    for (int m = 0; m < mt; m++)
        for (int o = 0; o < 2; o++) result[4 * m + o] = sum[2 * m + o];
}

INLINE void few_bf16(int mt, const struct matrix *w, struct few_x x, int64_t row, __m512 *sum) {
    const uint8_t *first = row_of(w, BFLOAT16, row), *ahead = place_ahead(w, BFLOAT16, row);
    for (int64_t k = 0; k < w->columns; k += 32) {
        ahead = fetch_ahead(ahead, BFLOAT16);
        for (int o = 0; o < 4; o++)
            dot_few(mt, 4, sum + o, x, k, _mm512_loadu_si512((const uint16_t *)first + o * w->columns + k));
    }
}

/* `mt` rows of x, a constant, with four rows of the weight: y [mt, 4]. */
INLINE void few_rows_of(int mt, const struct matrix *w, struct few_x x, const void *tables, int64_t row, float *y) {
    __m512 sum[4 * MOST_FEW];
    for (int i = 0; i < 4 * mt; i++) sum[i] = _mm512_setzero_ps();
    if (w->format == FLOAT4_E2M1FN) {
        few_fp4(mt, w, x, tables, row, sum);
    } else if (w->format == BFLOAT16) {
        few_bf16(mt, w, x, row, sum);
    } else {
        few_fp8(mt, w, x, tables, row, sum);
        few_fp8(mt, w, x, tables, row + 2, sum + 2);
    }
    for (int m = 0; m < mt; m++) {
        lanes sums[4];
        for (int o = 0; o < 4; o++) sums[o] = (lanes)sum[4 * m + o];
        horizontal_sums(sums, 4, y + 4 * m);
    }
}

/* 2 to MOST_FEW rows of x with four rows of the weight: y [m_count, 4]. */
static void few_rows_by_four(int64_t m_count, const struct matrix *w, struct few_x x, const void *tables, int64_t row,
                             float *y) {
    switch (m_count) {
    case 2: few_rows_of(2, w, x, tables, row, y); break;
    case 3: few_rows_of(3, w, x, tables, row, y); break;
    case 4: few_rows_of(4, w, x, tables, row, y); break;
    case 5: few_rows_of(5, w, x, tables, row, y); break;
    default: few_rows_of(6, w, x, tables, row, y);
    }
}
#endif
