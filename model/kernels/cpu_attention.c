/* Sparse attention with a sink, and the scores of the lightning indexer. */
#include "cpu_products.h"

#define KEYS_PER_BLOCK 64 /* of the released attention kernel, as in reference.py */
#define HEADS_PER_TILE 4
#define KEYS_PER_TILE 4 /* of the indexer */

/* Row `row` of a pool of keys or queries, paired. */
static void load_paired(const void *pool, int is_bf16, int64_t row, int64_t c, float *out) {
    const uint8_t *p = (const uint8_t *)pool + row * c * (is_bf16 ? 2 : 4);
    for (int64_t k = 0; k < c; k += 32, p += is_bf16 ? 64 : 128) {
        struct pair v = is_bf16 ? decode_bf16((const uint16_t *)p) : decode_f32((const float *)p);
        store_sixteen(out + k, v.odd);
        store_sixteen(out + k + 16, v.even);
    }
}

/* Thirty-two paired numbers in their natural order, to elements `at` ... of bfloat16 or float32 data. */
INLINE void store_unpaired(const float *pairs, void *out, int is_bf16, int64_t at) {
    for (int i = 0; i < 16; i++) {
        store_as(out, is_bf16, at + 2 * i, pairs[16 + i]);
        store_as(out, is_bf16, at + 2 * i + 1, pairs[i]);
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
        for (int64_t h = 0; h < heads; h++) store(out + h * c + k, sum[h]);
    }
}

/* Scores of a block to probabilities relative to the largest score so far. Returns the factor for the sums so far. */
static float softmax_block(float *scores, int64_t n, float *largest, float *total, int rounded) {
    float before = *largest;
    for (int64_t j = 0; j < n; j++)
        if (scores[j] > *largest) *largest = scores[j];
    lanes sums = splat(0.f);
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = j < n ? scores[j] - *largest : -INFINITY;
    for (int64_t j = 0; j < n; j += 16) exponentials(scores + j);
    for (int64_t j = n; j < KEYS_PER_BLOCK; j++) scores[j] = 0.f;
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j += 16) sums = sums + load(scores + j);
    float shrink = exponential(before - *largest);
    *total = *total * shrink + horizontal_sum(sums);
    if (rounded)
        for (int64_t j = 0; j < n; j++) scores[j] = rounded_to_bf16(scores[j]);
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
        int64_t n = least(listed - first, KEYS_PER_BLOCK);
        while (n && index[first + n - 1] < 0) n--; /* masked at the end: would add zeros */
        if (!n) continue;                          /* would also multiply by one */
        for (int64_t j = 0; j < n; j += 4)
            dsv4_products(rounded, keys + (first + j) * c, c, least(n - j, 4), c, q, heads, c, &scores[0][j],
                          KEYS_PER_BLOCK);
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t j = 0; j < n; j++) scores[h][j] = index[first + j] < 0 ? -INFINITY : scores[h][j] * scale;
            shrink[h] = softmax_block(scores[h], n, &largest[h], &total[h], rounded);
        }
        add_values(keys + first * c, n, c, scores, shrink, heads, rounded, out);
    }
    for (int64_t h = 0; h < heads; h++) {
        float divisor = total[h] + exponential(sink[h] - largest[h]);
        for (int64_t k = 0; k < c; k++) out[h * c + k] = out[h * c + k] / divisor;
    }
}

/* Floats of scratch a thread needs: the listed keys, and queries and outputs of a tile of heads. */
static int64_t attention_scratch(int64_t c, int64_t listed) { return (listed + 2 * HEADS_PER_TILE) * c; }

int64_t dsv4_sparse_attention_scratch(int64_t c, int64_t listed, int64_t threads) {
    return threads * attention_scratch(c, listed);
}

/* q, out [queries, heads, c]; window [window_rows, c], compressed [.., c]; index [queries, listed]; see reference.py. */
void dsv4_sparse_attention(const void *q, const void *window, const void *compressed, const int32_t *index,
                           const float *sink, float scale, int64_t queries, int64_t heads, int64_t c, int64_t listed,
                           int64_t window_rows, int32_t is_bf16, void *out, float *scratch, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        float *keys = scratch + share * attention_scratch(c, listed);
        float *tile_q = keys + listed * c, *tile_out = tile_q + HEADS_PER_TILE * c;
        /* Queries are dealt out, as later ones have more keys; or the heads of each if there are too few of them. */
        int by_head = queries < threads;
        int64_t from = by_head ? 0 : share, step = by_head ? 1 : threads;
        struct span mine = by_head ? span_of(heads, share, threads) : (struct span){0, heads};
        for (int64_t query = from; query < queries; query += step) {
            const int32_t *list = index + query * listed;
            for (int64_t j = 0; j < listed; j++) {
                int in_window = list[j] < window_rows;
                if (list[j] < 0) memset(keys + j * c, 0, c * sizeof(float));
                else load_paired(in_window ? window : compressed, is_bf16, in_window ? list[j] : list[j] - window_rows,
                                 c, keys + j * c);
            }
            for (int64_t h = mine.first; h < mine.last; h += HEADS_PER_TILE) {
                int64_t n = least(mine.last - h, HEADS_PER_TILE), at = query * heads + h;
                for (int64_t i = 0; i < n; i++) load_paired(q, is_bf16, at + i, c, tile_q + i * c);
                attend(tile_q, keys, list, listed, c, n, sink + h, scale, is_bf16, tile_out);
                for (int64_t k = 0; k < n * c; k += 32) store_unpaired(tile_out + k, out, is_bf16, at * c + k);
            }
        }
    }
}

/* Floats of scratch a thread needs: dot products of a tile, products of a key, and the decoded keys. */
static int64_t scores_scratch(int64_t heads, int64_t columns) {
    return heads * (KEYS_PER_TILE + 1) + KEYS_PER_TILE * padded(columns);
}

int64_t dsv4_index_scores_scratch(int64_t heads, int64_t columns, int64_t threads) {
    return threads * scores_scratch(heads, columns);
}

/* scores [queries, keys->rows]; q paired float32 [queries, heads, columns], weights float32 [queries, heads]; see
 * reference.py. */
void dsv4_index_scores(const struct matrix *keys, const float *q, const float *weights, int64_t queries, int64_t heads,
                       int32_t rounded, float *scores, float *scratch, int32_t threads) {
    int64_t tiles = (keys->rows + KEYS_PER_TILE - 1) / KEYS_PER_TILE, columns = keys->columns;
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        float *dots = scratch + share * scores_scratch(heads, columns);
        float *products_of_heads = dots + heads * KEYS_PER_TILE, *buffer = products_of_heads + heads;
        struct span mine = span_of(queries * tiles, share, threads);
        for (int64_t job = mine.first; job < mine.last; job++) {
            int64_t query = job % queries, row = job / queries * KEYS_PER_TILE;
            int64_t n = least(keys->rows - row, KEYS_PER_TILE);
            dsv4_decode_rows(keys, row, n, 0, buffer);
            dsv4_products(rounded, buffer, padded(columns), n, columns, q + query * heads * columns, heads, columns,
                          dots, KEYS_PER_TILE);
            for (int64_t j = 0; j < n; j++) {
                for (int64_t h = 0; h < heads; h++) {
                    float dot = dots[h * KEYS_PER_TILE + j];
                    if (rounded) dot = rounded_to_bf16(dot);
                    float product = (dot > 0.f ? dot : 0.f) * weights[query * heads + h];
                    products_of_heads[h] = rounded ? rounded_to_bf16(product) : product;
                }
                float sum = tree_sum(products_of_heads, heads);
                scores[query * keys->rows + row + j] = rounded ? rounded_to_bf16(sum) : sum;
            }
        }
    }
}
