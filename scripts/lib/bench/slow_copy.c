/* Loaded first (LD_PRELOAD) it stretches one copy of ZRAMD_COPY bytes, once `slow_copy` is set to 1: the copy
   takes ZRAMD_COPY_MS milliseconds of its thread's own processor time, as if that had been much slower; or, with 0
   of them, it stands still until `slow_copy` is set to 3.
   For scripts/bench --only waiting, and tests/unit/core/test_waiting.py. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

int slow_copy;      /* 1: the next copy of that size is slow; 2: it is under way; 3: it is done */

static void work_for(long ms)
{
    struct timespec start, now, moment = {0, 1000000};
    while (ms == 0 && __atomic_load_n(&slow_copy, __ATOMIC_SEQ_CST) == 2)
        nanosleep(&moment, NULL);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    do
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < ms);
}

void *memcpy(void *to, const void *from, size_t size)
{
    volatile char *out = to;
    const char *in = from;
    int wanted = 1;
    size_t i;
    if (__atomic_load_n(&slow_copy, __ATOMIC_RELAXED) == 1 && size == strtoul(getenv("ZRAMD_COPY"), NULL, 10)
            && __atomic_compare_exchange_n(&slow_copy, &wanted, 2, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        work_for(atol(getenv("ZRAMD_COPY_MS")));
        __atomic_store_n(&slow_copy, 3, __ATOMIC_SEQ_CST);
    }
    for (i = 0; i < size; i++)
        out[i] = in[i];
    return to;
}
