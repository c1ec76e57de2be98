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
#include "native_vectors.h"

#include "native_products.h"

typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef double doubles8 __attribute__((vector_size(64)));
typedef int64_t longs8 __attribute__((vector_size(64)));

INLINE doubles8 choose(longs8 mask, doubles8 a, doubles8 b) {
    return (doubles8)((mask & (longs8)a) | (~mask & (longs8)b));
}

/* exp of float32 through float64, the polynomial of numerics.py, eight at a time. */
INLINE floats8 exponential8(floats8 x) {
    doubles8 v = __builtin_convertvector(x, doubles8), bound = (doubles8){0} + 700.0;
    v = choose(v < -bound, -bound, choose(v > bound, bound, v));
    doubles8 t = v * 0x1.71547652b82fep+0 + 0.5;
    doubles8 truncated = __builtin_convertvector(__builtin_convertvector(t, ints8), doubles8);
    doubles8 n = choose(truncated > t, truncated - 1.0, truncated); /* floor */
    doubles8 r = (v - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    static const double factorials[14] = {1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0, 5040.0, 40320.0, 362880.0, 3628800.0,
                                          39916800.0, 479001600.0, 6227020800.0};
    doubles8 value = (doubles8){0} + 1.0 / factorials[13];
    for (int k = 12; k >= 0; k--) value = value * r + 1.0 / factorials[k];
    longs8 whole = __builtin_convertvector(__builtin_convertvector(n, ints8), longs8);
    return __builtin_convertvector(value * (doubles8)((whole + 1023) << 52), floats8);
}

INLINE float exponential(float x) { return exponential8((floats8){x})[0]; }

INLINE void exponentials(float *x) {
    for (int i = 0; i < 16; i += 8) {
        floats8 v;
        memcpy(&v, x + i, 32);
        v = exponential8(v);
        memcpy(x + i, &v, 32);
    }
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

/* Thirty-two paired numbers to their natural order, as elements `at` ... of bfloat16 or float32 data. */
INLINE void unpair(const float *pairs, void *out, int is_bf16, int64_t at) {
    for (int i = 0; i < 16; i++) {
        write(out, is_bf16, at + 2 * i, pairs[16 + i]);
        write(out, is_bf16, at + 2 * i + 1, pairs[i]);
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
        int64_t n = listed - first < KEYS_PER_BLOCK ? listed - first : KEYS_PER_BLOCK;
        while (n && index[first + n - 1] < 0) n--; /* masked at the end: would add zeros */
        if (!n) continue;                          /* would also multiply by one */
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
        /* Queries are dealt out, as later ones have more keys; or the heads of each if there are too few of them. */
        int by_head = queries < threads;
        int64_t from = by_head ? 0 : share, step = by_head ? 1 : threads;
        int64_t first = by_head ? heads * share / threads : 0, last = by_head ? heads * (share + 1) / threads : heads;
        for (int64_t query = from; query < queries; query += step) {
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
                for (int64_t k = 0; k < n * c; k += 32) unpair(tile_out + k, out, is_bf16, at * c + k);
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

#include "native_parts.h"
