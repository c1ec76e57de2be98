/* What the two ways of computing attention share: attention.c with paired float32, dot_attention.h with vdpbf16ps. */
#pragma once
#include "products.h"

#define KEYS_PER_BLOCK 64 /* of the released attention kernel; reference.py reads the number here */

struct attention {
    const void *q, *window, *compressed;
    const int32_t *index;
    const float *sink;
    void *out;
    float *scratch;
    int64_t heads, c, listed, window_rows;
    float scale;
    int32_t is_bf16;
};

/* A query, and whether its products are exact in float32. */
struct query {
    int64_t number;
    int32_t least_key; /* of its listed keys, by `least_bf16` */
    int exact_scores;
};

/* The key that `index` names, of the window or compressed; null for -1. */
static const void *key_at(const struct attention *a, int32_t index) {
    int in_window = index < a->window_rows;
    int64_t row = in_window ? index : index - a->window_rows;
    const uint8_t *pool = in_window ? a->window : a->compressed;
    return index < 0 ? 0 : pool + row * a->c * (a->is_bf16 ? 2 : 4);
}

static struct query examined(const struct attention *a, int64_t number) {
    struct query found = {number, 0, 0};
    if (!a->is_bf16) return found;
    found.least_key = LEAST_OF_NONE;
    for (int64_t j = 0; j < a->listed; j++) {
        const uint16_t *key = key_at(a, a->index[number * a->listed + j]);
        if (key) found.least_key = (int32_t)least(found.least_key, least_bf16(key, a->c));
    }
    int64_t numbers = a->heads * a->c;
    found.exact_scores = are_exact(found.least_key, least_bf16((const uint16_t *)a->q + number * numbers, numbers));
    return found;
}

/* The keys of a block that are not masked at the end. Those would add zeros, and multiply by one. */
static int64_t keys_of_block(const struct attention *a, const int32_t *index, int64_t first) {
    int64_t n = least(a->listed - first, KEYS_PER_BLOCK);
    while (n && index[first + n - 1] < 0) n--;
    return n;
}

/* The softmax of a head so far. */
struct softmax {
    float largest, total;
};

/* Scores of a block to probabilities relative to the largest score so far, zeros behind them; rounded to bfloat16 for
 * bfloat16 keys. Returns the factor for the sums so far. */
static float softmax_block(const struct attention *a, const int32_t *index, int64_t n, float *scores,
                           struct softmax *head) {
    float before = head->largest, found[16];
    lanes most = splat(before), sums = splat(0.f);
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = j < n && index[j] >= 0 ? scores[j] * a->scale : -INFINITY;
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j += 16) {
        lanes v = load(scores + j);
        ilanes larger = v > most;
        most = (lanes)((larger & (ilanes)v) | (~larger & (ilanes)most));
    }
    store(found, most);
    for (int i = 0; i < 16; i++)
        if (found[i] > head->largest) head->largest = found[i];
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = scores[j] - head->largest;
    for (int64_t j = 0; j < n; j += 16) exponentials(scores + j);
    for (int64_t j = n; j < KEYS_PER_BLOCK; j++) scores[j] = 0.f;
    for (int64_t j = 0; j < KEYS_PER_BLOCK; j += 16) sums = sums + load(scores + j);
    float shrink = exponential(before - head->largest);
    head->total = head->total * shrink + horizontal_sum(sums);
    if (a->is_bf16)
        for (int64_t j = 0; j < KEYS_PER_BLOCK; j++) scores[j] = rounded_to_bf16(scores[j]);
    return shrink;
}

/* What the sums of a head are divided by at the end. */
static float divisor_of(const struct softmax *head, float sink) {
    return head->total + exponential(sink - head->largest);
}

/* Whether products of a head's probabilities with the keys are exact. */
static int are_exact_values(const float *probabilities, int32_t least_key) {
    return are_exact(least_key, least_bf16_of_float(probabilities, KEYS_PER_BLOCK));
}
