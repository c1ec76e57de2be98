/* What the two ways of computing index scores share: index.c with paired float32, dot_index.h with vdpbf16ps. */
#pragma once
#include "products.h"

#define KEYS_PER_TILE 16

struct scores {
    const struct matrix *keys;
    const void *q;
    const float *weights;
    float *out, *scratch;
    int64_t queries, heads;
    int32_t is_bf16;
};

/* Dot products, zero for those below, times the weight of their head. `rounded`, a constant: all are bfloat16, so that
 * the lower half of a NaN is zero. */
INLINE lanes weighted(lanes dot, float weight, int rounded) {
#ifdef HAVE_AVX512
    lanes relu = (lanes)_mm512_max_ps(_mm512_setzero_ps(), (__m512)dot); /* the second one if that is NaN */
#else
    lanes relu = (lanes)((ilanes)dot & ~(dot < 0.f));
#endif
    return rounded ? nearest_lanes(nearest_lanes(relu) * weight) : relu * weight;
}

/* The scores of a tile's keys from the products of each head, which are added up by halves and overwritten. Every
 * NaN is the same one: which of two a sum keeps is up to the compiler. */
INLINE void store_scores(const struct scores *s, float *products, int64_t query, int64_t key, int64_t count) {
    int64_t n = s->heads, t = KEYS_PER_TILE;
    for (; n > 1 && n % 4 == 0; n /= 4) /* two rounds */
        for (float *sum = products; sum < products + n / 4 * t; sum += t)
            store(sum, (load(sum) + load(sum + n / 2 * t)) + (load(sum + n / 4 * t) + load(sum + n / 4 * 3 * t)));
    for (; n > 1; n = n / 2 + n % 2) {
        for (float *sum = products; sum < products + n / 2 * t; sum += t) store(sum, load(sum) + load(sum + n / 2 * t));
        if (n % 2) store(products + n / 2 * t, load(products + (n - 1) * t));
    }
    lanes found = s->is_bf16 ? nearest_lanes(load(products)) : load(products);
    ilanes is_nan = found != found;
    found = (lanes)((is_nan & 0x7fc00000) | (~is_nan & (ilanes)found));
    memcpy(s->out + query * s->keys->rows + key, &found, count * sizeof(float));
}
