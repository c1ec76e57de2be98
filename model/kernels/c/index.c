/* The scores of the lightning indexer: every query with every key, and then a sum over the heads for sixteen keys at once. */
#include "dot_index.h"
#include "threads.h"

#define KEYS_PER_GROUP 64 /* which stay in the first level cache while queries pass by */
#define QUERIES_PER_ITEM 32 /* which stay in the second level cache while keys pass by */

/* Floats of scratch of a worker: the products of a tile of keys with some heads more than there are, and then a group of
 * keys and a query as paired float32, which is more than dot_index.h needs. */
static int64_t worker_floats(int64_t heads, int64_t columns) {
    return (heads + HEADS_AT_ONCE) * KEYS_PER_TILE + (KEYS_PER_GROUP + heads) * padded(columns);
}

int64_t OF_FORM(dsv4_index_scores_scratch)(int64_t heads, int64_t columns, int64_t threads) {
    return threads * worker_floats(heads, columns) * (int64_t)sizeof(float);
}

/* Keys [first, last) or queries. */
struct range {
    int64_t first, last;
};

/* The scores of a query with decoded keys. */
static void score_query(const struct scores *s, int exact, struct range keys, const float *decoded, int64_t query,
                        const float *q, float *products) {
    int64_t heads = s->heads, columns = s->keys->columns, apart = padded(columns);
    const float *weights = s->weights + query * heads;
    memset(products, 0, heads * KEYS_PER_TILE * sizeof(float)); /* a group may end inside a tile */
    for (int64_t key = keys.first; key < keys.last; key += KEYS_PER_TILE) {
        int64_t n = least(keys.last - key, KEYS_PER_TILE);
        for (int64_t i = 0; i < n; i += 4, decoded += 4 * apart)
            OF_FORM(dsv4_products)(exact, decoded, apart, least(n - i, 4), columns, q, heads, apart, products + i,
                                   KEYS_PER_TILE);
        for (int64_t h = 0; h < heads; h++) {
            float *dots = products + h * KEYS_PER_TILE;
            store(dots, s->is_bf16 ? weighted(load(dots), weights[h], 1) : weighted(load(dots), weights[h], 0));
        }
        store_scores(s, products, query, key, n);
    }
}

/* Through the tiles of the matrix products, as paired float32. */
static void score_by_tiles(const struct scores *s, int exact, struct range keys, struct range queries, float *scratch) {
    int64_t heads = s->heads, apart = padded(s->keys->columns);
    float *decoded = scratch + (heads + HEADS_AT_ONCE) * KEYS_PER_TILE, *q = decoded + KEYS_PER_GROUP * apart;
    struct matrix all = *s->keys;
    all.values = s->q, all.rows = s->queries * heads;
    OF_FORM(dsv4_decode_rows)(s->keys, keys.first, keys.last - keys.first, 0, decoded);
    for (int64_t query = queries.first; query < queries.last; query++) {
        OF_FORM(dsv4_decode_rows)(&all, query * heads, heads, 0, q);
        score_query(s, exact, keys, decoded, query, q, scratch);
    }
}

/* The least magnitude of rows of keys or of queries, as `least_bf16`. */
static int32_t least_of(const void *values, struct range rows, int64_t width) {
    return least_bf16((const uint16_t *)values + rows.first * width, (rows.last - rows.first) * width);
}

/* Items are a group of keys with some queries; the next item has the same queries and other keys. */
static void score_items(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct scores *s = job;
    int64_t groups = (s->keys->rows + KEYS_PER_GROUP - 1) / KEYS_PER_GROUP, columns = s->keys->columns, examined = -1;
    float *scratch = s->scratch + worker * worker_floats(s->heads, columns);
    int32_t least_query = 0;
    for (int64_t item = first; item < last; item++) {
        int64_t key = item % groups * KEYS_PER_GROUP, query = item / groups * QUERIES_PER_ITEM;
        struct range keys = {key, least(key + KEYS_PER_GROUP, s->keys->rows)};
        struct range queries = {query, least(query + QUERIES_PER_ITEM, s->queries)};
        if (s->is_bf16 && examined != query) least_query = least_of(s->q, queries, s->heads * columns), examined = query;
        int exact = s->is_bf16 && are_exact(least_of(s->keys->values, keys, columns), least_query);
#ifdef HAVE_DOT
        if (exact) {
            score_by_dot(s, keys.first, keys.last, queries.first, queries.last, scratch);
            continue;
        }
#endif
        score_by_tiles(s, exact, keys, queries, scratch);
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
