/* Sparse attention with a sink: scores are dot products of heads with keys, in the order of deterministic.py; values
 * add up key by key, oldest first. Where vdpbf16ps does both, see dot_attention.h; here they are of paired float32. */
#include "attention.h"
#include "dot_attention.h"
#include "threads.h"

#define HEADS_PER_TILE 4

/* Row `row` of keys or queries, paired. */
static void load_paired(const void *row, int is_bf16, int64_t c, float *out) {
    const uint8_t *p = row;
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

/* Up to HEADS_PER_TILE heads of a query, from `head` on: q, out [heads, c], keys [listed, c], zeros where masked. */
static void attend(const struct attention *a, const struct query *query, int64_t head, int64_t heads, const float *q,
                   const float *keys, float *out) {
    const int32_t *index = a->index + query->number * a->listed;
    struct softmax softmax[HEADS_PER_TILE];
    float scores[HEADS_PER_TILE][KEYS_PER_BLOCK], shrink[HEADS_PER_TILE];
    int64_t c = a->c;
    for (int64_t h = 0; h < heads; h++) softmax[h] = (struct softmax){-INFINITY, 0.f};
    memset(out, 0, heads * c * sizeof(float));
    for (int64_t first = 0; first < a->listed; first += KEYS_PER_BLOCK) {
        int64_t n = keys_of_block(a, index, first);
        int exact = query->exact_scores;
        for (int64_t j = 0; j < n; j += 4)
            OF_FORM(dsv4_products)(exact, keys + (first + j) * c, c, least(n - j, 4), c, q, heads, c, &scores[0][j],
                                   KEYS_PER_BLOCK);
        for (int64_t h = 0; n && h < heads; h++) {
            shrink[h] = softmax_block(a, index + first, n, scores[h], softmax + h);
            exact = exact && are_exact_values(scores[h], query->least_key);
        }
        if (n) add_values(keys + first * c, n, c, scores, shrink, heads, exact, out);
    }
    for (int64_t h = 0; h < heads; h++) {
        float divisor = divisor_of(softmax + h, a->sink[head + h]);
        for (int64_t k = 0; k < c; k++) out[h * c + k] = out[h * c + k] / divisor;
    }
}

/* Whether dot_attention.h has the query. */
INLINE int goes_by_dot(const struct query *query) {
#ifdef HAVE_DOT
    return query->exact_scores;
#else
    (void)query;
    return 0;
#endif
}

/* Floats of scratch for the keys of a query, in either way, and for what a worker has of a tile of heads. */
static int64_t key_floats(int64_t c, int64_t listed) { return (listed + 1) * c + 16; }
static int64_t tile_floats(int64_t c) { return 2 * HEADS_PER_TILE * c; }

int64_t OF_FORM(dsv4_sparse_attention_scratch)(int64_t c, int64_t listed, int64_t threads) {
    return threads * (key_floats(c, listed) + tile_floats(c)) * (int64_t)sizeof(float);
}

/* A query and its keys, whose heads are shared out; scratch of tile_floats(c) a worker. */
struct heads {
    const struct attention *a;
    struct query query;
    float *keys, *tiles;
};

static void load_keys(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct heads *all = job;
    const struct attention *a = all->a;
    (void)worker;
    for (int64_t j = first; j < last; j++) {
        const void *key = key_at(a, a->index[all->query.number * a->listed + j]);
        if (key) load_paired(key, a->is_bf16, a->c, all->keys + j * a->c);
        else memset(all->keys + j * a->c, 0, a->c * sizeof(float));
    }
}

/* Heads [head, stop), at most HEADS_PER_TILE. */
static void attend_tile(const struct heads *all, int64_t head, int64_t stop, float *tile) {
    const struct attention *a = all->a;
    int64_t at = all->query.number * a->heads + head, n = stop - head, c = a->c;
    float *out = tile + HEADS_PER_TILE * c;
    for (int64_t i = 0; i < n; i++)
        load_paired((const uint8_t *)a->q + (at + i) * c * (a->is_bf16 ? 2 : 4), a->is_bf16, c, tile + i * c);
    attend(a, &all->query, head, n, tile, all->keys, out);
    for (int64_t k = 0; k < n * c; k += 32) store_unpaired(out + k, a->out, a->is_bf16, at * c + k);
}

static void attend_heads(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct heads *all = job;
    float *tile = all->tiles + worker * tile_floats(all->a->c);
#ifdef HAVE_DOT
    if (goes_by_dot(&all->query)) {
        struct dot_keys keys = listed_keys(all->a, all->keys, tile);
        attend_heads_by_dot(all->a, &all->query, first, last, &keys);
        return;
    }
#endif
    for (int64_t head = first; head < last; head += HEADS_PER_TILE)
        attend_tile(all, head, least(last, head + HEADS_PER_TILE), tile);
}

/* One query, by so many threads. */
static void attend_query(const struct attention *a, int64_t number, float *scratch, int32_t threads) {
    struct heads all = {a, examined(a, number), scratch, scratch + key_floats(a->c, a->listed)};
    int64_t together = HEADS_PER_TILE;
#ifdef HAVE_DOT
    if (goes_by_dot(&all.query)) list_keys(a, number, all.keys), together = DOT_HEADS;
#endif
    if (!goes_by_dot(&all.query)) dsv4_share(load_keys, &all, a->listed, dsv4_quarters(a->listed, threads), threads);
    dsv4_share(attend_heads, &all, a->heads, together, threads);
}

static void attend_queries(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct attention *a = job;
    float *scratch = a->scratch + worker * (key_floats(a->c, a->listed) + tile_floats(a->c));
    for (int64_t number = first; number < last; number++) attend_query(a, number, scratch, 1);
}

/* q, out [queries, heads, c]; window [window_rows, c], compressed [.., c]; index [queries, listed]: reference.py. */
void OF_FORM(dsv4_sparse_attention)(const void *q, const void *window, const void *compressed, const int32_t *index,
                                    const float *sink, float scale, int64_t queries, int64_t heads, int64_t c,
                                    int64_t listed, int64_t window_rows, int32_t is_bf16, void *out, void *scratch,
                                    int32_t threads) {
    struct attention a = {q, window, compressed, index, sink, out, scratch, heads, c, listed, window_rows, scale,
                          is_bf16};
    if (queries >= threads) dsv4_share(attend_queries, &a, queries, 1, threads);
    else
        for (int64_t number = 0; number < queries; number++) attend_query(&a, number, scratch, threads);
}
