/* Which keys a query attends to: see reference_small.py. */
#include "threads.h"
#include "vectors.h"

#define DIGITS 256
#define MINUS_INFINITY 0x007fffffu /* as `ordered` makes it; NaN with a sign are below it */

/* The score of a block, as `ordered` made it. */
struct scored {
    uint32_t key;
    int32_t block;
};

/* Numbers in the order of the scores, of which -0 is 0. */
static void ordered(const float *scores, int64_t n, uint32_t *keys) {
    for (int64_t i = 0; i < n; i++) {
        float score = scores[i] + 0.f;
        int32_t bits;
        memcpy(&bits, &score, 4);
        keys[i] = (uint32_t)(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
    }
}

static int64_t at_least(const uint32_t *keys, int64_t n, uint32_t bound) {
    int32_t found = 0;
    for (int64_t i = 0; i < n; i++) found += keys[i] >= bound;
    return found;
}

/* The largest bound that `count` of the keys reach, or, if just as many reach it, a lower one. */
static uint32_t lowest_chosen(const uint32_t *keys, int64_t n, int64_t count) {
    uint32_t bound = 0;
    for (uint32_t bit = 1u << 31; bit && count < n; bit >>= 1) {
        int64_t found = at_least(keys, n, bound | bit);
        if (found >= count) bound |= bit;
        if (found == count) break;
    }
    return bound;
}

/* Keys above the bound, and as many that equal it, the first ones, as make `count`; the older ones before. */
static void collect(const uint32_t *keys, int64_t n, uint32_t bound, int64_t count, struct scored *chosen) {
    int64_t equal = count - (bound == UINT32_MAX ? 0 : at_least(keys, n, bound + 1)), found = 0;
    for (int64_t i = 0; i < n && found < count; i++) {
        if (keys[i] < bound || (keys[i] == bound && equal-- <= 0)) continue;
        chosen[found++] = (struct scored){keys[i], (int32_t)i};
    }
}

/* One round of sorting: the digit at `shift`, descending, and what is equal in the order it had. */
static void sort_digit(const struct scored *from, int64_t n, int shift, struct scored *to) {
    int32_t place[DIGITS + 1] = {0};
    for (int64_t i = 0; i < n; i++) place[DIGITS - (from[i].key >> shift & (DIGITS - 1))]++;
    for (int digit = 0; digit < DIGITS; digit++) place[digit + 1] += place[digit];
    for (int64_t i = 0; i < n; i++) to[place[DIGITS - 1 - (from[i].key >> shift & (DIGITS - 1))]++] = from[i];
}

struct choice {
    const float *scores;
    const int64_t *reach;
    int32_t *out;
    uint8_t *scratch;
    int64_t blocks, count;
};

/* Bytes of scratch of a worker: the keys of a row, and the chosen ones twice, to sort them. */
static int64_t worker_bytes(int64_t blocks, int64_t count) {
    return blocks * (int64_t)sizeof(uint32_t) + 2 * count * (int64_t)sizeof(struct scored);
}

/* The best of the first `n` scores of a row. */
static void choose_row(const struct choice *c, const float *scores, int64_t n, uint8_t *scratch, int32_t *out) {
    uint32_t *keys = (uint32_t *)scratch;
    struct scored *chosen = (struct scored *)(keys + c->blocks), *other = chosen + c->count;
    int64_t count = least(c->count, n);
    ordered(scores, n, keys);
    collect(keys, n, lowest_chosen(keys, n, count), count, chosen);
    for (int shift = 0; shift < 32; shift += 16) {
        sort_digit(chosen, count, shift, other);
        sort_digit(other, count, shift + 8, chosen);
    }
    for (int64_t i = 0; i < c->count; i++) out[i] = i < count && chosen[i].key > MINUS_INFINITY ? chosen[i].block : -1;
}

static void choose_rows(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct choice *c = job;
    uint8_t *scratch = c->scratch + worker * worker_bytes(c->blocks, c->count);
    for (int64_t row = first; row < last; row++)
        choose_row(c, c->scores + row * c->blocks, least(c->blocks, c->reach[row]), scratch, c->out + row * c->count);
}

/* Bytes of scratch of `dsv4_best_in_reach`. */
int64_t OF_FORM(dsv4_best_in_reach_scratch)(int64_t blocks, int64_t count, int32_t threads) {
    return worker_bytes(blocks, count) * threads;
}

/* scores float32 [rows, blocks], reach int64 [rows] -> int32 [rows, count], count at least 1 and at most `blocks`: of
 * the first `reach` blocks those with the largest scores, best first, of equal ones the older first, then -1. The
 * smallest of them is found bit by bit; then they are collected and sorted. */
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
