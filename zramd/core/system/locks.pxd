"""Locks and atomic words. Every word that two threads may touch without a common lock goes through these.

pthread locks: uncontended 7 ns, against 44 ns for Cython's pymutex, and ThreadSanitizer knows them.
Where some threads are real-time and others are not, each lock must pass priority on (mutex_inherit): its holder runs as soon
as its most urgent waiter would. That costs 1 to 2 ns a lock, so only a device that needs it pays.
No thread waits by giving the processor away (sched_yield): a real-time thread gives it to real-time threads only.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *lock, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *lock)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_trylock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)
    int pthread_cond_init(pthread_cond_t *cond, void *attr)
    int pthread_cond_destroy(pthread_cond_t *cond)
    int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock)
    int pthread_cond_signal(pthread_cond_t *cond)

cdef extern from *:
    """
    #define load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    /* The fence, which is no instruction, keeps the compiler from moving what follows before the store: what a kill
       leaves must be a moment of the program as it is written. */
    #define store_release(p, v) \
        (__atomic_store_n((p), (v), __ATOMIC_RELEASE), __atomic_signal_fence(__ATOMIC_SEQ_CST))
    #define counter_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_RELAXED))
    #define counter_sub(p, n) ((void)__atomic_fetch_sub((p), (n), __ATOMIC_RELAXED))
    /* for a word with one writer at a time (it holds a lock) and readers without one: no locked instruction */
    #define owned_add(p, n) __atomic_store_n((p), *(p) + (n), __ATOMIC_RELAXED)
    #define owned_sub(p, n) __atomic_store_n((p), *(p) - (n), __ATOMIC_RELAXED)
    static inline int compare_swap(uint64_t *p, uint64_t expected, uint64_t desired)
    {
        return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    #if defined(__x86_64__)
    #define cpu_relax() __builtin_ia32_pause()
    #else
    #define cpu_relax() __asm__ __volatile__("" ::: "memory")
    #endif
    /* for the two words of which each side writes one and then reads the other */
    #define ordered_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_SEQ_CST))
    #define ordered_sub(p, n) ((void)__atomic_fetch_sub((p), (n), __ATOMIC_SEQ_CST))
    #define ordered_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define ordered_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #include <pthread.h>
    #include <time.h>
    #define this_thread() ((uint64_t)pthread_self())
    /* Make a lock that is not in use yet pass its waiter's priority on to its holder; 0 or an errno. */
    static inline int mutex_inherit(pthread_mutex_t *lock)
    {
        pthread_mutexattr_t attr;
        int rc = pthread_mutexattr_init(&attr);
        if (rc) return rc;
        rc = pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
        if (!rc) {
            pthread_mutex_destroy(lock);
            rc = pthread_mutex_init(lock, &attr);
        }
        pthread_mutexattr_destroy(&attr);
        return rc;
    }
    /* Sleep so long that anybody else can run; as a real-time thread 55 us, as an ordinary one 110 us. */
    static inline void nap(void)
    {
        struct timespec time = {0, 50000};
        nanosleep(&time, NULL);
    }
    #if defined(ZRAMD_CHECK) && ZRAMD_CHECK >= 3
    /* A scheduler that runs one thread at a time decides here, too: a real wait would be for a thread that it holds. See
       points.pxd. */
    int zr_schedule_lock(pthread_mutex_t *lock) __attribute__((weak));
    int zr_schedule_trylock(pthread_mutex_t *lock) __attribute__((weak));
    int zr_schedule_unlock(pthread_mutex_t *lock) __attribute__((weak));
    void zr_schedule_nap(void) __attribute__((weak));
    #define pthread_mutex_lock(lock) (zr_schedule_lock ? zr_schedule_lock : (pthread_mutex_lock))(lock)
    #define pthread_mutex_trylock(lock) (zr_schedule_trylock ? zr_schedule_trylock : (pthread_mutex_trylock))(lock)
    #define pthread_mutex_unlock(lock) (zr_schedule_unlock ? zr_schedule_unlock : (pthread_mutex_unlock))(lock)
    #define nap() (zr_schedule_nap ? zr_schedule_nap : (nap))()
    #endif
    """
    uint64_t load_relaxed(uint64_t *p) noexcept nogil
    uint64_t load_acquire(uint64_t *p) noexcept nogil
    uint32_t load_relaxed_32 "load_relaxed"(uint32_t *p) noexcept nogil
    void store_relaxed(uint64_t *p, uint64_t value) noexcept nogil
    void store_release(uint64_t *p, uint64_t value) noexcept nogil
    void counter_add(uint64_t *p, uint64_t n) noexcept nogil
    void counter_sub(uint64_t *p, uint64_t n) noexcept nogil
    void counter_add_32 "counter_add"(uint32_t *p, uint32_t n) noexcept nogil
    void counter_sub_32 "counter_sub"(uint32_t *p, uint32_t n) noexcept nogil
    void owned_add(uint64_t *p, uint64_t n) noexcept nogil
    void owned_add_32 "owned_add"(uint32_t *p, uint32_t n) noexcept nogil
    void owned_sub_32 "owned_sub"(uint32_t *p, uint32_t n) noexcept nogil
    void owned_sub(uint64_t *p, uint64_t n) noexcept nogil
    bint compare_swap(uint64_t *p, uint64_t expected, uint64_t desired) noexcept nogil
    void cpu_relax() noexcept nogil
    uint16_t load_relaxed_16 "load_relaxed"(uint16_t *p) noexcept nogil
    uint8_t load_relaxed_8 "load_relaxed"(uint8_t *p) noexcept nogil
    void store_relaxed_8 "store_relaxed"(uint8_t *p, uint8_t value) noexcept nogil
    void store_relaxed_16 "store_relaxed"(uint16_t *p, uint16_t value) noexcept nogil
    void ordered_add(uint64_t *p, uint64_t n) noexcept nogil
    void ordered_sub(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t ordered_load(uint64_t *p) noexcept nogil
    void ordered_store(uint64_t *p, uint64_t value) noexcept nogil
    int mutex_inherit(pthread_mutex_t *lock) noexcept nogil
    void nap() noexcept nogil
    uint64_t this_thread() noexcept nogil     # never 0

cdef inline void clear_words(uint64_t *words, size_t size) noexcept nogil:
    """Make all words of so many bytes 0, each of them atomically."""
    cdef size_t i
    for i in range(size // sizeof(uint64_t)):
        store_relaxed(words + i, 0)

cdef enum:
    LET_IN_SPINS = 200      # about what a thread on another processor takes to wake up

cdef inline void lock_counted(pthread_mutex_t *lock, uint32_t *waiters) noexcept nogil:
    """Lock, and show the holder meanwhile that a thread waits."""
    if pthread_mutex_trylock(lock):
        counter_add_32(waiters, 1)
        pthread_mutex_lock(lock)
        counter_sub_32(waiters, 1)

cdef inline void let_in(uint32_t *waiters) noexcept nogil:
    """Let the waiters have the lock that was just released: one that only wakes up now would find it taken again."""
    cdef uint32_t spins = 0
    while spins < LET_IN_SPINS and load_relaxed_32(waiters):
        spins += 1
        cpu_relax()
    if load_relaxed_32(waiters):
        nap()

cdef inline void give_way(pthread_mutex_t *lock, uint32_t *waiters) noexcept nogil:
    """Let the waiters for a lock have it, then take it again."""
    pthread_mutex_unlock(lock)
    let_in(waiters)
    lock_counted(lock, waiters)
