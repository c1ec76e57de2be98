/* The scores of the lightning indexer: every query with every key, through the tiles of the matrix products, and then a
 * sum over the heads for sixteen keys at once. */
#include "products.h"
#include "threads.h"

#define KEYS_PER_TILE 16
#define KEYS_PER_GROUP 64 /* which stay in the first level cache while queries pass by */
#define QUERIES_PER_ITEM 8

struct scores {
    const struct matrix *keys;
    const void *q;
    const float *weights;
    float *out, *scratch;
    int64_t queries, heads;
    int32_t is_bf16;
};

/* Floats of scratch of a worker: the dot products of a tile of keys [heads, KEYS_PER_TILE], and, where products are of
 * paired float32, a group of keys and a query. */
static int64_t worker_floats(int64_t heads, int64_t columns) {
    return heads * KEYS_PER_TILE + (KEYS_PER_GROUP + heads) * padded(columns);
}

int64_t OF_FORM(dsv4_index_scores_scratch)(int64_t heads, int64_t columns, int64_t threads) {
    return threads * worker_floats(heads, columns) * (int64_t)sizeof(float);
}

/* The scores of a tile's keys from the dot products, which are overwritten: those above zero times the weights of their
 * heads, added up by halves. `rounded` is a constant. */
INLINE lanes add_heads(float *dots, const float *weights, int64_t heads, int rounded) {
    for (int64_t h = 0; h < heads; h++) {
        lanes dot = rounded_lanes(load(dots + h * KEYS_PER_TILE), rounded);
        dot = (lanes)((ilanes)dot & (dot > 0.f));
        store(dots + h * KEYS_PER_TILE, rounded_lanes(dot * weights[h], rounded));
    }
    for (int64_t n = heads; n > 1; n = n / 2 + n % 2) {
        float *upper = dots + n / 2 * KEYS_PER_TILE;
        for (float *sum = dots; sum < dots + n / 2 * KEYS_PER_TILE; sum += KEYS_PER_TILE, upper += KEYS_PER_TILE)
            store(sum, load(sum) + load(upper));
        if (n % 2) store(dots + n / 2 * KEYS_PER_TILE, load(upper));
    }
    return rounded_lanes(load(dots), rounded);
}

/* Where the rows of keys or of a query are, and how far apart. */
struct rows {
    const void *first;
    int64_t stride;
};

/* Keys [row, row + count). `dot`: vdpbf16ps multiplies them as they are stored; else they are paired float32. */
struct group {
    struct rows keys;
    int64_t row, count;
    int dot, exact;
};

static const uint16_t *bf16_row(const struct matrix *w, int64_t row) {
    return (const uint16_t *)w->values + row * w->columns;
}

static struct rows rows_of(const struct matrix *w, int64_t row, int64_t count, int dot, float *buffer) {
    if (dot) return (struct rows){bf16_row(w, row), w->columns};
    OF_FORM(dsv4_decode_rows)(w, row, count, 0, buffer);
    return (struct rows){buffer, padded(w->columns)};
}

/* Dot products of a query's heads with four keys of a group, or fewer, from `key` on. */
static void multiply_keys(const struct group *g, int64_t key, int64_t count, int64_t columns, struct rows query,
                          int64_t heads, float *dots) {
#ifdef HAVE_DOT
    if (g->dot) {
        OF_FORM(dsv4_dot_products)((const uint16_t *)g->keys.first + key * g->keys.stride, g->keys.stride, count, columns,
                                   query.first, heads, query.stride, dots, KEYS_PER_TILE);
        return;
    }
#endif
    OF_FORM(dsv4_products)(g->exact, (const float *)g->keys.first + key * g->keys.stride, g->keys.stride, count, columns,
                           query.first, heads, query.stride, dots, KEYS_PER_TILE);
}

static void score_query(const struct scores *s, const struct matrix *q, int64_t query, const struct group *g,
                        float *scratch) {
    int64_t heads = s->heads, columns = q->columns;
    float *dots = scratch, *pairs = dots + heads * KEYS_PER_TILE + KEYS_PER_GROUP * padded(columns);
    const float *weights = s->weights + query * heads;
    struct rows mine = rows_of(q, query * heads, heads, g->dot, pairs);
    memset(dots, 0, heads * KEYS_PER_TILE * sizeof(float)); /* a group may end inside a tile */
    for (int64_t key = 0; key < g->count; key += KEYS_PER_TILE) {
        int64_t n = least(g->count - key, KEYS_PER_TILE);
        for (int64_t i = 0; i < n; i += 4) multiply_keys(g, key + i, least(n - i, 4), columns, mine, heads, dots + i);
        lanes found = s->is_bf16 ? add_heads(dots, weights, heads, 1) : add_heads(dots, weights, heads, 0);
        memcpy(s->out + query * s->keys->rows + g->row + key, &found, n * sizeof(float));
    }
}

/* Items are a group of keys with some queries; the next item has the same keys and other queries. */
static void score_items(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct scores *s = job;
    struct matrix q = *s->keys;
    q.values = s->q, q.rows = s->queries * s->heads;
    int64_t turns = (s->queries + QUERIES_PER_ITEM - 1) / QUERIES_PER_ITEM, columns = q.columns;
    float *scratch = s->scratch + worker * worker_floats(s->heads, columns);
    for (int64_t item = first; item < last; item++) {
        int64_t query = item % turns * QUERIES_PER_ITEM, stop = least(query + QUERIES_PER_ITEM, s->queries);
        struct group g = {.row = item / turns * KEYS_PER_GROUP};
        g.count = least(s->keys->rows - g.row, KEYS_PER_GROUP);
        g.exact = s->is_bf16 && are_exact(least_bf16(bf16_row(s->keys, g.row), g.count * columns),
                                          least_bf16(bf16_row(&q, query * s->heads), (stop - query) * s->heads * columns));
#ifdef HAVE_DOT
        g.dot = g.exact;
#endif
        g.keys = rows_of(s->keys, g.row, g.count, g.dot, scratch + s->heads * KEYS_PER_TILE);
        for (; query < stop; query++) score_query(s, &q, query, &g, scratch);
    }
}

/* scores [queries, keys->rows]; q [queries, heads, columns] of the keys' type, float32 or bfloat16, in which sums are
 * rounded; weights float32 [queries, heads]; see reference.py. */
void OF_FORM(dsv4_index_scores)(const struct matrix *keys, const void *q, const float *weights, int64_t queries,
                                int64_t heads, int32_t is_bf16, float *scores, void *scratch, int32_t threads) {
    struct scores s = {keys, q, weights, scores, scratch, queries, heads, is_bf16};
    int64_t groups = (keys->rows + KEYS_PER_GROUP - 1) / KEYS_PER_GROUP;
    int64_t items = groups * ((queries + QUERIES_PER_ITEM - 1) / QUERIES_PER_ITEM);
    dsv4_share(score_items, &s, items, dsv4_quarters(items, threads), threads);
}
