/* Index scores by vdpbf16ps, for bfloat16 whose products are exact: sixteen keys at once, a lane for each.
 *
 * The sum of a dot product has sixteen lanes (vectors.h). Here each of those is a vector, to which the instruction adds
 * the products of two columns of the query with those of sixteen keys; then the sixteen vectors are added by halves.
 * Nothing is added across lanes, which takes as long as the products where keys have few columns. Keys are turned for it,
 * once for all queries of an item. */
#pragma once
#include "index.h"

#define HEADS_AT_ONCE 4 /* that share the loaded keys, and whose sums fit into registers */

#ifdef HAVE_DOT
/* Sixteen rows of sixteen 32-bit numbers to columns, in place. */
INLINE void transpose(__m512i *x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) { /* pairs of rows, and then fours, in each quarter of the registers */
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            x[i + 2 * half] = _mm512_unpacklo_epi64(y[i + half], y[i + half + 2]);
            x[i + 2 * half + 1] = _mm512_unpackhi_epi64(y[i + half], y[i + half + 2]);
        }
    for (int i = 0; i < 4; i++) { /* the quarters of four registers */
        __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* Keys of a tile, zeros beyond `count`, in pairs of columns: [columns / 2, KEYS_PER_TILE]. */
static void turn_keys(const uint16_t *keys, int64_t count, int64_t columns, uint32_t *turned) {
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i row[16];
        for (int i = 0; i < 16; i++)
            row[i] = i < count ? _mm512_loadu_si512(keys + i * columns + k) : _mm512_setzero_si512();
        transpose(row);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(turned + (k / 2 + i) * KEYS_PER_TILE, row[i]);
    }
}

/* Some heads of a query. Between their products those of the heads before, if there are any, are weighted. */
struct some_heads {
    const uint32_t *keys, *q[HEADS_AT_ONCE];
    int64_t pairs;
    float *before, weights[HEADS_AT_ONCE];
};

struct sums {
    lanes of[HEADS_AT_ONCE];
};

/* A lane of the sums. The instruction itself repeats two numbers of the query for all keys, which no intrinsic says: with
 * an instruction more for each, too few of the products that could begin fit into the processor's queues. */
INLINE struct sums lane_of_sums(const struct some_heads *heads, int lane) {
    struct sums sum;
    for (int h = 0; h < HEADS_AT_ONCE; h++) sum.of[h] = splat(0.f);
    for (int64_t pair = lane; pair < heads->pairs; pair += 16) {
        __m512i keys = _mm512_loadu_si512(heads->keys + pair * KEYS_PER_TILE);
        for (int h = 0; h < HEADS_AT_ONCE; h++)
            __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.of[h]) : "v"(keys), "m"(heads->q[h][pair]));
    }
    return sum;
}

INLINE struct sums added(struct sums a, struct sums b) {
    for (int h = 0; h < HEADS_AT_ONCE; h++) a.of[h] = a.of[h] + b.of[h];
    return a;
}

INLINE void weigh_before(const struct some_heads *heads, int i) {
    float *products = heads->before + i * KEYS_PER_TILE;
    store(products, weighted(load(products), heads->weights[i], 1));
}

/* Sums of lanes that are a distance apart, in the order that keeps the fewest of them. */
INLINE struct sums eight_apart(const struct some_heads *heads, int lane) {
    return added(lane_of_sums(heads, lane), lane_of_sums(heads, lane + 8));
}

INLINE struct sums four_apart(const struct some_heads *heads, int lane) {
    if (heads->before) weigh_before(heads, lane);
    return added(eight_apart(heads, lane), eight_apart(heads, lane + 4));
}

INLINE struct sums two_apart(const struct some_heads *heads, int lane) {
    return added(four_apart(heads, lane), four_apart(heads, lane + 2));
}

/* The scores of a query with the turned keys [key, key + count). `products`: scratch for whole groups of heads. */
static void score_turned(const struct scores *s, const uint32_t *keys, int64_t key, int64_t count, int64_t query,
                         float *products) {
    int64_t columns = s->keys->columns;
    const uint16_t *q = (const uint16_t *)s->q + query * s->heads * columns;
    const float *weights = s->weights + query * s->heads;
    struct some_heads heads = {.keys = keys, .pairs = columns / 2};
    for (int64_t first = 0; first < s->heads; first += HEADS_AT_ONCE) {
        int64_t head[HEADS_AT_ONCE]; /* beyond the last one, this one again */
        for (int i = 0; i < HEADS_AT_ONCE; i++) {
            head[i] = least(first + i, s->heads - 1);
            heads.q[i] = (const uint32_t *)(q + head[i] * columns);
        }
        struct sums sum = added(two_apart(&heads, 0), two_apart(&heads, 1));
        heads.before = products + first * KEYS_PER_TILE;
        for (int i = 0; i < HEADS_AT_ONCE; i++) {
            store(heads.before + i * KEYS_PER_TILE, sum.of[i]);
            heads.weights[i] = weights[head[i]];
        }
    }
    for (int i = 0; i < HEADS_AT_ONCE; i++) weigh_before(&heads, i);
    store_scores(s, products, query, key, count);
}

/* The scores of queries [query, stop) with keys [key, last). */
static void score_by_dot(const struct scores *s, int64_t key, int64_t last, int64_t query, int64_t stop, float *scratch) {
    float *products = scratch, *turned = products + (s->heads + HEADS_AT_ONCE) * KEYS_PER_TILE;
    int64_t columns = s->keys->columns;
    for (; key < last; key += KEYS_PER_TILE) {
        int64_t count = least(last - key, KEYS_PER_TILE);
        turn_keys((const uint16_t *)s->keys->values + key * columns, count, columns, (uint32_t *)turned);
        for (int64_t i = query; i < stop; i++)
            score_turned(s, (const uint32_t *)turned, key, count, i, products);
    }
}
#endif
