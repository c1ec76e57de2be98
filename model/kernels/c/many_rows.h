/* Products of many rows of x with rows of a weight that are decoded already: tiles of six rows of x with four of the
 * weight, as many sums as registers hold, and strips of sixteen rows of the weight. */
#pragma once
#include "products.h"

#define TILE_ROWS 6    /* of x */
#define TILE_COLUMNS 4 /* rows of the weight */
#define STRIP_ROWS 16  /* of the weight: as many results of a row of x as a vector has lanes */

/* How products are added up; a constant wherever it is an argument. */
enum arithmetic {
    TWO_ROUNDINGS, /* float32 pairs: the product is rounded, then the sum */
    FUSED,         /* float32 pairs whose products are exact */
    BF16_DOT,      /* bfloat16 in natural order, by vdpbf16ps */
};

/* Decoded rows, `apart` elements apart. */
struct decoded {
    const void *first;
    int64_t apart;
};

/* Products of `mt` rows of paired x with `ot` rows of paired weights; mt, ot and exact are constants. */
INLINE void float_tile(int exact, int mt, int ot, const float *w, int64_t w_apart, int64_t columns, const float *x,
                       int64_t x_apart, sixteen sum[TILE_ROWS][TILE_COLUMNS]) {
    for (int m = 0; m < mt; m++)
        for (int o = 0; o < ot; o++) sum[m][o] = zeros();
    for (int64_t k = 0; k < columns; k += 16) {
        sixteen weight[TILE_COLUMNS];
        for (int o = 0; o < ot; o++) weight[o] = load_sixteen(w + o * w_apart + k);
        for (int m = 0; m < mt; m++) {
            sixteen value = load_sixteen(x + m * x_apart + k);
            for (int o = 0; o < ot; o++) sum[m][o] = add_product(value, weight[o], sum[m][o], exact);
        }
    }
}

#ifdef HAVE_DOT
/* The same for bfloat16 x and weights in their natural order. */
INLINE void dot_tile(int mt, int ot, const uint16_t *w, int64_t w_apart, int64_t columns, const uint16_t *x,
                     int64_t x_apart, sixteen sum[TILE_ROWS][TILE_COLUMNS]) {
    for (int m = 0; m < mt; m++)
        for (int o = 0; o < ot; o++) sum[m][o] = zeros();
    for (int64_t k = 0; k < columns; k += 32) {
        __m512bh weight[TILE_COLUMNS];
        for (int o = 0; o < ot; o++) weight[o] = (__m512bh)_mm512_loadu_si512(w + o * w_apart + k);
        for (int m = 0; m < mt; m++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(x + m * x_apart + k);
            for (int o = 0; o < ot; o++) sum[m][o] = (lanes)_mm512_dpbf16_ps((__m512)sum[m][o], value, weight[o]);
        }
    }
}
#endif

/* Row `row` of decoded rows of the type that `kind` multiplies. */
INLINE const void *decoded_row(int kind, struct decoded rows, int64_t row) {
    return (const uint8_t *)rows.first + row * rows.apart * (int64_t)(kind == BF16_DOT ? sizeof(uint16_t) : sizeof(float));
}

/* Rows m ... of x with rows o ... of the weight: the sums of `mt` times `ot`, constants as `kind` is. */
INLINE void tile(int kind, int mt, int ot, struct decoded w, int64_t o, int64_t columns, struct decoded x, int64_t m,
                 sixteen sum[TILE_ROWS][TILE_COLUMNS]) {
    const void *weights = decoded_row(kind, w, o), *values = decoded_row(kind, x, m);
#ifdef HAVE_DOT
    if (kind == BF16_DOT) {
        dot_tile(mt, ot, weights, w.apart, columns, values, x.apart, sum);
        return;
    }
#endif
    float_tile(kind == FUSED, mt, ot, weights, w.apart, columns, values, x.apart, sum);
}

/* y [m_count, o_count] = x @ w.T, o_count at most TILE_COLUMNS, in tiles of six rows of x and fewer. */
INLINE void products(int kind, struct decoded w, int64_t o_count, int64_t columns, struct decoded x, int64_t m_count,
                     float *y, int64_t y_stride) {
    sixteen sum[TILE_ROWS][TILE_COLUMNS];
    int64_t m = 0;
#define TILE(MT, OT, O)                                                                                                \
    do {                                                                                                               \
        tile(kind, MT, OT, w, O, columns, x, m, sum);                                                                  \
        for (int i = 0; i < MT; i++) horizontal_sums(sum[i], OT, y + (m + i) * y_stride + (O));                        \
    } while (0)
    if (o_count == TILE_COLUMNS) {
        for (; m + 6 <= m_count; m += 6) TILE(6, 4, 0);
        for (; m + 4 <= m_count; m += 4) TILE(4, 4, 0);
        for (; m + 2 <= m_count; m += 2) TILE(2, 4, 0);
        for (; m < m_count; m++) TILE(1, 4, 0);
        return;
    }
    for (; m + 6 <= m_count; m += 6)
        for (int64_t o = 0; o < o_count; o++) TILE(6, 1, o);
    for (; m < m_count; m++)
        for (int64_t o = 0; o < o_count; o++) TILE(1, 1, o);
#undef TILE
}

/* Results of a row of x to y, `count` of them from element `at` on. */
INLINE void store_strip(const float *results, int64_t count, void *y, int is_bf16, int64_t at) {
    if (count == STRIP_ROWS && is_bf16) store_lanes(y, 1, at, load(results));
    else if (count == STRIP_ROWS) store_lanes(y, 0, at, load(results));
    else
        for (int64_t i = 0; i < count; i++) store_as(y, is_bf16, at + i, results[i]);
}

/* Decoded rows of a weight and of x; the results are y [m_count, count] from its row `row` and its column `column` on. */
struct strip {
    struct decoded w;
    int64_t count;
    struct decoded x;
    int64_t m_count, row, column;
};

/* y = x @ w.T. The results of six rows of x are stored sixteen at a time. */
INLINE void multiply_strip(int kind, const struct product *p, const struct strip *s) {
    for (int64_t m = 0; m < s->m_count; m += TILE_ROWS) {
        float results[TILE_ROWS][STRIP_ROWS];
        int64_t rows = least(s->m_count - m, TILE_ROWS);
        struct decoded x = {decoded_row(kind, s->x, m), s->x.apart};
        for (int64_t o = 0; o < s->count; o += TILE_COLUMNS) {
            struct decoded w = {decoded_row(kind, s->w, o), s->w.apart};
            products(kind, w, least(s->count - o, TILE_COLUMNS), p->w->columns, x, rows, &results[0][o], STRIP_ROWS);
        }
        for (int64_t i = 0; i < rows; i++)
            store_strip(results[i], s->count, p->y, p->y_is_bf16, (s->row + m + i) * p->y_stride + s->column);
    }
}
