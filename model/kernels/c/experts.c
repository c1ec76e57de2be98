/* The choice of experts and the sum of their outputs: see reference_small.py. */
#include "threads.h"
#include "vectors.h"

/* scores float32 [rows, experts], bias float32 [experts] -> the `count` largest sums of both, int64 [rows, count]. Of
 * equal ones the lower number is first. NaN counts as the largest. `biased` is scratch of `experts` floats. */
void OF_FORM(dsv4_choose_experts)(const float *scores, const float *bias, int64_t *chosen, float *biased, int64_t rows,
                                  int64_t experts, int64_t count) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t e = 0; e < experts; e++) {
            float sum = scores[row * experts + e] + bias[e];
            biased[e] = sum != sum ? INFINITY : sum;
        }
        for (int64_t slot = 0; slot < count; slot++) {
            int64_t best = 0;
            while (best + 1 < experts && biased[best] != biased[best]) best++; /* taken before */
            for (int64_t e = best + 1; e < experts; e++)
                if (biased[e] > biased[best]) best = e;
            chosen[row * count + slot] = best;
            biased[best] = NAN; /* is larger than nothing */
        }
    }
}

/* Chosen scores over their sum plus eps, times a factor: scores [rows, experts], chosen, weights [rows, count]. `terms` is
 * scratch of `count` floats. */
void OF_FORM(dsv4_expert_weights)(const float *scores, const int64_t *chosen, float *weights, float *terms, int64_t rows,
                                  int64_t experts, int64_t count, float eps, float factor) {
    for (int64_t row = 0; row < rows; row++) {
        float *mine = weights + row * count;
        for (int64_t i = 0; i < count; i++) terms[i] = mine[i] = scores[row * experts + chosen[row * count + i]];
        float divisor = tree_sum(terms, count) + eps;
        for (int64_t i = 0; i < count; i++) mine[i] = mine[i] / divisor * factor;
    }
}

struct experts {
    const void *outputs, *shared;
    const int64_t *experts;
    void *out;
    float *scratch;
    int64_t count, columns;
    int32_t is_bf16;
};

/* The number of experts of a token that come before expert `i` of it. */
static int64_t place_of(const int64_t *experts, int64_t count, int64_t i) {
    int64_t before = 0;
    for (int64_t j = 0; j < count; j++) before += experts[j] < experts[i] || (experts[j] == experts[i] && j < i);
    return before;
}

INLINE void add_row(const struct experts *e, int64_t row, int is_bf16, float *sums) {
    const int64_t *experts = e->experts + row * e->count;
    int64_t columns = e->columns, at = row * columns;
    for (int64_t k = 0; k < columns; k++) sums[k] = 0.f;
    for (int64_t place = 0; place < e->count; place++)
        for (int64_t i = 0; i < e->count; i++) {
            if (place_of(experts, e->count, i) != place) continue;
            int64_t from = (row * e->count + i) * columns;
            for (int64_t k = 0; k < columns; k++) sums[k] = sums[k] + load_as_float(e->outputs, is_bf16, from + k);
        }
    for (int64_t k = 0; k < columns; k++)
        store_as(e->out, is_bf16, at + k, sums[k] + load_as_float(e->shared, is_bf16, at + k));
}

static void add_rows(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct experts *e = job;
    float *sums = e->scratch + worker * e->columns;
    for (int64_t row = first; row < last; row++)
        if (e->is_bf16) add_row(e, row, 1, sums);
        else add_row(e, row, 0, sums);
}

/* outputs [rows, count, columns], shared and out [rows, columns], experts [rows, count]; scratch of a row of floats for
 * each thread. */
void OF_FORM(dsv4_add_experts)(const void *outputs, const void *shared, const int64_t *experts, void *out,
                               float *scratch, int64_t rows, int64_t count, int64_t columns, int32_t is_bf16,
                               int32_t threads) {
    struct experts e = {outputs, shared, experts, out, scratch, count, columns, is_bf16};
    dsv4_share(add_rows, &e, rows, dsv4_quarters(rows, threads), threads);
}
