/* Sparse attention with a sink. */
#include "products.h"
#include "threads.h"

#define KEYS_PER_BLOCK 64 /* of the released attention kernel; reference.py reads the number here */
#define HEADS_PER_TILE 4

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
            OF_FORM(dsv4_products)(rounded, keys + (first + j) * c, c, least(n - j, 4), c, q, heads, c, &scores[0][j],
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

struct attention {
    const void *q, *window, *compressed;
    const int32_t *index;
    const float *sink;
    void *out;
    float *scratch;
    int64_t heads, c, listed, window_rows, query; /* `query`: the one whose heads are shared out */
    float scale;
    int32_t is_bf16;
};

/* Floats of scratch of a worker beside the listed keys: queries and outputs of a tile of heads. */
static int64_t tile_floats(int64_t c) { return 2 * HEADS_PER_TILE * c; }

int64_t OF_FORM(dsv4_sparse_attention_scratch)(int64_t c, int64_t listed, int64_t threads) {
    return threads * (listed * c + tile_floats(c)) * (int64_t)sizeof(float);
}

static void load_key(const struct attention *a, int64_t query, int64_t j, float *keys) {
    int32_t row = a->index[query * a->listed + j];
    int in_window = row < a->window_rows;
    if (row < 0) memset(keys + j * a->c, 0, a->c * sizeof(float));
    else
        load_paired(in_window ? a->window : a->compressed, a->is_bf16, in_window ? row : row - a->window_rows, a->c,
                    keys + j * a->c);
}

/* Up to HEADS_PER_TILE heads from `head` on. `tile` is tile_floats(c) of scratch. */
static void attend_tile(const struct attention *a, int64_t query, int64_t head, const float *keys, float *tile) {
    int64_t n = least(a->heads - head, HEADS_PER_TILE), at = query * a->heads + head, c = a->c;
    float *out = tile + HEADS_PER_TILE * c;
    for (int64_t i = 0; i < n; i++) load_paired(a->q, a->is_bf16, at + i, c, tile + i * c);
    attend(tile, keys, a->index + query * a->listed, a->listed, c, n, a->sink + head, a->scale, a->is_bf16, out);
    for (int64_t k = 0; k < n * c; k += 32) store_unpaired(out + k, a->out, a->is_bf16, at * c + k);
}

static void attend_queries(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct attention *a = job;
    float *keys = a->scratch + worker * (a->listed * a->c + tile_floats(a->c));
    for (int64_t query = first; query < last; query++) {
        for (int64_t j = 0; j < a->listed; j++) load_key(a, query, j, keys);
        for (int64_t h = 0; h < a->heads; h += HEADS_PER_TILE)
            attend_tile(a, query, h, keys, keys + a->listed * a->c);
    }
}

static void load_keys(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct attention *a = job;
    (void)worker;
    for (int64_t j = first; j < last; j++) load_key(a, a->query, j, a->scratch);
}

static void attend_tiles(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct attention *a = job;
    float *tile = a->scratch + a->listed * a->c + worker * tile_floats(a->c);
    for (int64_t i = first; i < last; i++) attend_tile(a, a->query, i * HEADS_PER_TILE, a->scratch, tile);
}

/* q, out [queries, heads, c]; window [window_rows, c], compressed [.., c]; index [queries, listed]: reference.py. */
void OF_FORM(dsv4_sparse_attention)(const void *q, const void *window, const void *compressed, const int32_t *index,
                                    const float *sink, float scale, int64_t queries, int64_t heads, int64_t c,
                                    int64_t listed, int64_t window_rows, int32_t is_bf16, void *out, void *scratch,
                                    int32_t threads) {
    struct attention a = {q, window, compressed, index, sink, out, scratch, heads, c, listed, window_rows, 0, scale,
                          is_bf16};
    if (queries >= threads) {
        dsv4_share(attend_queries, &a, queries, 1, threads);
        return;
    }
    int64_t tiles = (heads + HEADS_PER_TILE - 1) / HEADS_PER_TILE;
    for (a.query = 0; a.query < queries; a.query++) {
        dsv4_share(load_keys, &a, listed, dsv4_quarters(listed, threads), threads);
        dsv4_share(attend_tiles, &a, tiles, 1, threads);
    }
}
