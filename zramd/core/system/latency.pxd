"""How long requests take: a histogram that threads add to without a lock, and a clock cheap enough for it.

The histogram is one of powers of two, like the log2 histograms of BPF tools.

Bucket i counts what took at most FIRST_BOUND << i nanoseconds and is in no bucket before it: 0.25, 0.5, 1, 2 … us,
2.1 s; the last counts the rest. Powers of two, so that a bucket is found by one instruction and a quantile is off by less
than a factor of two at the fastest read as at the slowest write. How many requests there were is the sum of the buckets:
no counter stands beside them that could differ.

The clock is the processor's time stamp counter where the kernel itself keeps time by it: two looks cost a 4K read of 1 us
about 10 ns, and 46 ns with clock_gettime, which waits for all instructions before it. Elsewhere it is clock_gettime.
"""

from libc.stdint cimport uint64_t

from zramd.core.system.locks cimport counter_add, load_relaxed

cdef enum:
    FIRST_BOUND = 250
    BUCKETS = 25

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static uint64_t ns_per_ticks;   /* ns in 2**32 ticks of the time stamp counter; 0: it is not used */

    static inline uint64_t system_now(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }

    #if defined(__x86_64__)
    #define ticks_now() __builtin_ia32_rdtsc()
    #define ticks_to_ns(ticks) ((uint64_t)(((unsigned __int128)(ticks) * ns_per_ticks) >> 32))
    #define clock_now() (ns_per_ticks ? ticks_to_ns(ticks_now()) : system_now())

    /* What both clocks show at one moment: of several looks the one that was interrupted least. */
    static uint64_t look_at_both(uint64_t *ticks)
    {
        uint64_t best = UINT64_MAX, ns = 0, before, between, after;
        int i;
        for (i = 0; i < 8; i++) {
            before = ticks_now();
            between = system_now();
            after = ticks_now();
            if (after - before < best) {
                best = after - before;
                *ticks = before + best / 2;
                ns = between;
            }
        }
        return ns;
    }

    /* Takes 2 ms: then the rate is right to 0.01 %. */
    static void use_ticks(void)
    {
        uint64_t ticks, later_ticks, ns = look_at_both(&ticks), later_ns;
        do
            later_ns = look_at_both(&later_ticks);
        while (later_ns - ns < 2000000);
        ns_per_ticks = ((later_ns - ns) << 32) / (later_ticks - ticks);
    }
    #else
    #define clock_now() system_now()
    #define use_ticks() ((void)0)
    #endif
    #define bit_length(n) ((n) ? 64 - __builtin_clzll(n) : 0)
    """
    uint64_t system_now() noexcept nogil            # ns, monotonic
    uint64_t clock_now() noexcept nogil             # the same, cheaper where it can be
    void use_ticks() noexcept
    int bit_length(uint64_t n) noexcept nogil

cdef struct latency:
    # All atomic.
    uint64_t sum                # ns
    uint64_t buckets[BUCKETS]

cdef inline void latency_add(latency *self, uint64_t began) noexcept nogil:
    """Count a request that began at a time of clock_now and ends now."""
    # The counter is read out of order and starts anew after a suspend: it may seem to have gone back.
    cdef uint64_t now = clock_now(), ns = now - began if now > began else 0
    cdef uint64_t firsts = (ns - 1) // FIRST_BOUND if ns else 0
    counter_add(&self.buckets[min(bit_length(firsts), BUCKETS - 1)], 1)
    counter_add(&self.sum, ns)

cdef inline uint64_t latency_count(latency *self) noexcept nogil:
    cdef uint64_t count = 0
    cdef int i
    for i in range(BUCKETS):
        count += load_relaxed(&self.buckets[i])
    return count
