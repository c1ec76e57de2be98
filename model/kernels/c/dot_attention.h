/* Attention by vdpbf16ps, for bfloat16 whose scores are exact; keys are read where they are.
 *
 * The instruction adds two products to a lane, one after the other, rounding after each: for scores those of two
 * neighbouring columns, for values those of two keys, whose columns are mixed for it. Mixing leaves the columns of
 * `sums` in another order; storing restores it. */
#pragma once
#include "attention.h"

#ifdef HAVE_DOT
#define DOT_HEADS 6  /* at once: with four keys, or 64 columns of two keys, as many sums as registers hold */
#define DOT_COLUMNS 64

/* Where the listed keys of a query are. A masked one is all zeros; `nothing` adds nothing, because times a probability
 * of 0 it is -0. */
struct dot_keys {
    const uint16_t *const *keys;
    const uint16_t *nothing;
    float *sums; /* of DOT_HEADS heads */
};

/* Three keys more than are listed, so that they can be taken four at a time, then the two rows of zeros. */
static void list_keys(const struct attention *a, int64_t query, float *scratch) {
    const uint16_t **keys = (const uint16_t **)scratch;
    uint16_t *zeros = (uint16_t *)(keys + a->listed + 3);
    for (int64_t k = 0; k < a->c; k++) zeros[k] = 0, zeros[a->c + k] = 0x8000;
    for (int64_t j = 0; j < a->listed + 3; j++) {
        const uint16_t *key = j < a->listed ? key_at(a, a->index[query * a->listed + j]) : 0;
        keys[j] = key ? key : zeros;
    }
}

/* What `list_keys` left in scratch, and sums of a worker. */
static struct dot_keys listed_keys(const struct attention *a, float *scratch, float *sums) {
    const uint16_t *const *keys = (const uint16_t *const *)scratch;
    return (struct dot_keys){keys, (const uint16_t *)(keys + a->listed + 3) + a->c, sums};
}

/* Dot products of `heads`, a constant, with four keys. */
INLINE void dot_scores(int heads, const uint16_t *const *keys, const uint16_t *q, int64_t c, float *scores) {
    lanes sum[DOT_HEADS][4];
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < 4; j++) sum[h][j] = splat(0.f);
    for (int64_t k = 0; k < c; k += 32) {
        __m512bh key[4];
        for (int j = 0; j < 4; j++) key[j] = (__m512bh)_mm512_loadu_si512(keys[j] + k);
        for (int h = 0; h < heads; h++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(q + h * c + k);
            for (int j = 0; j < 4; j++) sum[h][j] = (lanes)_mm512_dpbf16_ps((__m512)sum[h][j], value, key[j]);
        }
    }
    for (int h = 0; h < heads; h++) horizontal_sums(sum[h], 4, scores + h * KEYS_PER_BLOCK);
}

/* Probabilities of two keys, the first in the upper half. */
INLINE int32_t two_of(const float *probabilities) {
    uint32_t bits[2];
    memcpy(bits, probabilities, 8);
    return (int32_t)(bits[0] | bits[1] >> 16);
}

/* sums = sums * shrink + probabilities @ keys, for 32 columns times `halves` / 2 from `column` on; heads and halves are
 * constants. `pairs` are of two keys each. */
INLINE void dot_values(int heads, int halves, const struct dot_keys *listed, int64_t first, int64_t n, int64_t c,
                       int64_t column, int32_t (*pairs)[KEYS_PER_BLOCK / 2], const float *shrink) {
    lanes sum[DOT_HEADS][DOT_COLUMNS / 16];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < halves; i++) sum[h][i] = load(listed->sums + h * c + column + 16 * i) * shrink[h];
    for (int64_t j = 0; j < n; j += 2) {
        const uint16_t *one = listed->keys[first + j], *two = j + 1 < n ? listed->keys[first + j + 1] : listed->nothing;
        __m512bh mixed[DOT_COLUMNS / 16];
        for (int i = 0; i < halves; i += 2) {
            __m512i upper = _mm512_loadu_si512(one + column + 16 * i);
            __m512i lower = _mm512_loadu_si512(two + column + 16 * i);
            mixed[i] = (__m512bh)_mm512_unpacklo_epi16(lower, upper);
            mixed[i + 1] = (__m512bh)_mm512_unpackhi_epi16(lower, upper);
        }
        for (int h = 0; h < heads; h++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(pairs[h][j / 2]);
            for (int i = 0; i < halves; i++) sum[h][i] = (lanes)_mm512_dpbf16_ps((__m512)sum[h][i], pair, mixed[i]);
        }
    }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < halves; i++) store(listed->sums + h * c + column + 16 * i, sum[h][i]);
}

/* The same with each product and sum rounded by itself, for a head. */
static void add_values_by_one(const struct dot_keys *listed, int64_t first, int64_t n, int64_t c,
                              const float *probabilities, float shrink, float *sums) {
    for (int64_t k = 0; k < c; k += 32) {
        lanes low = load(sums + k) * shrink, high = load(sums + k + 16) * shrink;
        for (int64_t j = 0; j < n; j++) {
            __m512i key = _mm512_loadu_si512(listed->keys[first + j] + k), none = _mm512_setzero_si512();
            low = low + (lanes)_mm512_unpacklo_epi16(none, key) * probabilities[j];
            high = high + (lanes)_mm512_unpackhi_epi16(none, key) * probabilities[j];
        }
        store(sums + k, low);
        store(sums + k + 16, high);
    }
}

/* Whether sums times a factor are zero or so large that they stay multiples of 2**-126. */
static int are_large(const float *sums, int64_t count, float factor) {
    const uint32_t bound = (uint32_t)(127 - 126 + 24) << 23;
    uint32_t lowest = 0xffffffff;
    for (int64_t k = 0; k < count; k++) {
        float value = sums[k] * factor;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits = (bits & 0x7fffffff) - 1;
        lowest = bits < lowest ? bits : lowest;
    }
    return lowest >= bound - 1;
}

INLINE void add_dot_values(int heads, const struct dot_keys *listed, int64_t first, int64_t n, int64_t c,
                           float (*probabilities)[KEYS_PER_BLOCK], const float *shrink) {
    int32_t pairs[DOT_HEADS][KEYS_PER_BLOCK / 2];
    int64_t column = 0;
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < KEYS_PER_BLOCK; j += 2) pairs[h][j / 2] = two_of(probabilities[h] + j);
    for (; column + DOT_COLUMNS <= c; column += DOT_COLUMNS)
        dot_values(heads, DOT_COLUMNS / 16, listed, first, n, c, column, pairs, shrink);
    if (column < c) dot_values(heads, 2, listed, first, n, c, column, pairs, shrink);
}

/* Sums over a divisor to the output of a head, in the natural order of its columns. */
static void store_head(const float *sums, int64_t c, float divisor, uint16_t *out) {
    for (int64_t k = 0; k < c; k += 32) {
        lanes low = rounded_lanes(load(sums + k) / divisor, 1), high = rounded_lanes(load(sums + k + 16) / divisor, 1);
        __m512i a = _mm512_srli_epi32((__m512i)low, 16), b = _mm512_srli_epi32((__m512i)high, 16);
        _mm512_storeu_si512(out + k, _mm512_packus_epi32(a, b));
    }
}

/* `heads` of a query, a constant, from `head` on. */
INLINE void attend_by_dot(int heads, const struct attention *a, const struct query *query, int64_t head,
                          const struct dot_keys *listed) {
    const int32_t *index = a->index + query->number * a->listed;
    int64_t c = a->c, at = (query->number * a->heads + head) * c;
    struct softmax softmax[DOT_HEADS];
    float scores[DOT_HEADS][KEYS_PER_BLOCK], shrink[DOT_HEADS];
    int in_pairs = 1; /* whether every sum is a multiple of 2**-126, so far */
    for (int h = 0; h < heads; h++) softmax[h] = (struct softmax){-INFINITY, 0.f};
    memset(listed->sums, 0, heads * c * sizeof(float));
    for (int64_t first = 0; first < a->listed; first += KEYS_PER_BLOCK) {
        int64_t n = keys_of_block(a, index, first);
        for (int64_t j = 0; j < n; j += 4)
            dot_scores(heads, listed->keys + first + j, (const uint16_t *)a->q + at, c, &scores[0][j]);
        for (int h = 0; n && h < heads; h++) {
            shrink[h] = softmax_block(a, index + first, n, scores[h], softmax + h);
            in_pairs = in_pairs && are_exact_values(scores[h], query->least_key) &&
                       (shrink[h] == 1.f || are_large(listed->sums + h * c, c, shrink[h]));
        }
        if (n && in_pairs) add_dot_values(heads, listed, first, n, c, scores, shrink);
        for (int h = 0; n && !in_pairs && h < heads; h++)
            add_values_by_one(listed, first, n, c, scores[h], shrink[h], listed->sums + h * c);
    }
    for (int h = 0; h < heads; h++) {
        float divisor = divisor_of(softmax + h, a->sink[head + h]);
        store_head(listed->sums + h * c, c, divisor, (uint16_t *)a->out + at + h * c);
    }
}

/* Heads [head, stop) of a query. */
static void attend_heads_by_dot(const struct attention *a, const struct query *query, int64_t head, int64_t stop,
                                const struct dot_keys *listed) {
    for (; head + 6 <= stop; head += 6) attend_by_dot(6, a, query, head, listed);
    for (; head + 4 <= stop; head += 4) attend_by_dot(4, a, query, head, listed);
    for (; head + 2 <= stop; head += 2) attend_by_dot(2, a, query, head, listed);
    for (; head < stop; head++) attend_by_dot(1, a, query, head, listed);
}
#endif
