/* Which keys a query attends to: see reference_small.py. */
#include "threads.h"
#include "vectors.h"

#define LAST_BLOCK 0xffffffffll
#define MINUS_INFINITY (-0x7f800001ll) /* as `rank` orders it; so are NaN with a sign, which are below it */

/* An integer in the order of the scores, and of equal scores larger for the older block. */
INLINE int64_t rank(float score, int64_t block) {
    int32_t bits;
    float positive_zero = score + 0.f;
    memcpy(&bits, &positive_zero, 4);
    return (int64_t)(bits ^ ((bits >> 31) & 0x7fffffff)) * (LAST_BLOCK + 1) + LAST_BLOCK - block;
}

/* Put `value` in place of the least of a heap, at its root. */
static void replace_least(int64_t *heap, int64_t size, int64_t value) {
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[at] = heap[child];
    }
    heap[at] = value;
}

struct choice {
    const float *scores;
    const int64_t *reach;
    int32_t *out;
    int64_t *heaps;
    int64_t blocks, count;
};

static void choose_rows(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct choice *c = job;
    int64_t *heap = c->heaps + worker * c->count, least_kept = MINUS_INFINITY * (LAST_BLOCK + 1) + LAST_BLOCK;
    for (int64_t row = first; row < last; row++) {
        int32_t *out = c->out + row * c->count;
        for (int64_t i = 0; i < c->count; i++) heap[i] = least_kept;
        for (int64_t block = 0; block < least(c->blocks, c->reach[row]); block++) {
            int64_t value = rank(c->scores[row * c->blocks + block], block);
            if (value > heap[0]) replace_least(heap, c->count, value);
        }
        for (int64_t left = c->count; left > 0; left--) { /* the least goes to the end */
            int64_t value = heap[0];
            replace_least(heap, left - 1, heap[left - 1]);
            out[left - 1] = value > least_kept ? (int32_t)(LAST_BLOCK - (value & LAST_BLOCK)) : -1;
        }
    }
}

/* Bytes of scratch of `dsv4_best_in_reach`. */
int64_t OF_FORM(dsv4_best_in_reach_scratch)(int64_t count, int32_t threads) {
    return count * threads * (int64_t)sizeof(int64_t);
}

/* scores float32 [rows, blocks], reach int64 [rows] -> int32 [rows, count], count at least 1 and at most `blocks`: of the
 * first `reach` blocks those with the largest scores, best first, of equal ones the older first, then -1. */
void OF_FORM(dsv4_best_in_reach)(const float *scores, const int64_t *reach, int32_t *out, int64_t rows, int64_t blocks,
                                 int64_t count, void *scratch, int32_t threads) {
    struct choice c = {scores, reach, out, scratch, blocks, count};
    dsv4_share(choose_rows, &c, rows, dsv4_quarters(rows, threads), threads);
}

/* window int32 [rows, recent], chosen int32 [rows, count] -> out [rows, recent + count]: the chosen rows behind the
 * `kept` rows of the window; -1 stays. */
void OF_FORM(dsv4_list_keys)(const int32_t *window, const int32_t *chosen, int32_t *out, int64_t rows, int64_t recent,
                             int64_t count, int64_t kept) {
    for (int64_t row = 0; row < rows; row++, window += recent, chosen += count, out += recent + count) {
        memcpy(out, window, recent * sizeof(int32_t));
        for (int64_t i = 0; i < count; i++) out[recent + i] = chosen[i] < 0 ? -1 : chosen[i] + (int32_t)kept;
    }
}
