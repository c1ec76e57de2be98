/* The threads of the kernels, and how they share out work.
 *
 * The thread that has a job deals its items from a counter and takes part. Helpers that are awake in time take part
 * too; nobody waits for one that the system has not yet given a processor, because the counter has nothing left for it.
 * OpenMP instead waits for every thread at the end of every loop: beside busy processes a step of decoding then takes up
 * to forty times as long. A helper watches for the next job for some microseconds, then it sleeps.
 * A second thread that has a job meanwhile does it alone. */
#include "threads.h"

#if defined(_WIN32)
void dsv4_share(work *function, const void *job, int64_t items, int64_t chunk, int32_t threads) {
    (void)chunk, (void)threads;
    function(job, 0, items, 0);
}
#else
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define MOST_HELPERS 255
#define ROUNDS_AWAKE 1000 /* of watching, tens of microseconds */

static struct {
    pthread_mutex_t owner; /* held by the thread that has the job */
    pthread_mutex_t lock;  /* of everything below that is not atomic */
    pthread_cond_t wake, done;
    int64_t helpers, asleep, joined, threads; /* started; waiting for `wake`; with this job, and how many may be */
    int open;                                 /* whether the job still takes helpers */
    work *function;
    const void *job;
    int64_t items, chunk;
    _Atomic int64_t number, next, active; /* of the job; its next item; helpers at work */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_items(int64_t worker) {
    for (;;) {
        int64_t first = atomic_fetch_add(&pool.next, pool.chunk);
        if (first >= pool.items) return;
        int64_t last = first + pool.chunk;
        pool.function(pool.job, first, last < pool.items ? last : pool.items, worker);
    }
}

static void watch(int64_t seen) {
    for (int i = 0; i < ROUNDS_AWAKE && atomic_load_explicit(&pool.number, memory_order_relaxed) == seen; i++)
        pause_briefly();
}

static void *help(void *unused) {
    int64_t seen = 0;
    for (;;) {
        watch(seen);
        pthread_mutex_lock(&pool.lock);
        while (pool.number == seen) {
            pool.asleep++;
            pthread_cond_wait(&pool.wake, &pool.lock);
            pool.asleep--;
        }
        seen = pool.number;
        if (pool.open && pool.joined < pool.threads) {
            int64_t worker = pool.joined++;
            pool.active++;
            pthread_mutex_unlock(&pool.lock);
            take_items(worker);
            pthread_mutex_lock(&pool.lock);
            if (--pool.active == 0) pthread_cond_signal(&pool.done);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    return unused;
}

/* A child of fork has none of the helpers, and may have been born while locks were held. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.owner, 0), pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.wake, 0), pthread_cond_init(&pool.done, 0);
    pool.helpers = 0;
    pool.asleep = 0;
    pool.active = 0;
    pool.open = 0;
}

/* Start helpers until there are `wanted`, or the system gives no more. Signals stay with the program's own threads. */
static void start_helpers(int64_t wanted) {
    static int watches_forks;
    sigset_t all, before;
    if (!watches_forks) watches_forks = !pthread_atfork(0, 0, forget_helpers);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < wanted && pool.helpers < MOST_HELPERS) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, 0)) break;
        pthread_detach(thread);
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void dsv4_share(work *function, const void *job, int64_t items, int64_t chunk, int32_t threads) {
    if (threads < 2 || items <= chunk || pthread_mutex_trylock(&pool.owner)) {
        if (items > 0) function(job, 0, items, 0);
        return;
    }
    if (pool.helpers < threads - 1) start_helpers(threads - 1);
    pthread_mutex_lock(&pool.lock);
    pool.function = function, pool.job = job, pool.items = items, pool.chunk = chunk;
    pool.threads = threads, pool.joined = 1, pool.open = 1, pool.next = 0;
    pool.number++;
    if (pool.asleep) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_items(0);
    for (int i = 0; i < ROUNDS_AWAKE && atomic_load(&pool.active); i++) pause_briefly();
    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    while (pool.active) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}
#endif
