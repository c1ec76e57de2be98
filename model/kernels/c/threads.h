/* Threads that share out the items of a job: threads.c, compiled once for all forms. */
#pragma once
#include <stdint.h>

/* Items [first, last) of a job, by worker number `worker`, which counts from 0. */
typedef void work(const void *job, int64_t first, int64_t last, int64_t worker);

/* Have at most `threads` workers, this thread among them, do all items, `chunk` at a time; returns when they are done.
 * Which worker does which items is open, so results must not depend on it. */
void dsv4_share(work *function, const void *job, int64_t items, int64_t chunk, int32_t threads);

/* A chunk that gives each of the threads about four turns. */
static inline int64_t dsv4_quarters(int64_t items, int32_t threads) {
    int64_t chunk = items / (4 * (int64_t)threads);
    return chunk < 1 ? 1 : chunk;
}
