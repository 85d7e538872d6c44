"""Locks and atomic words. Every word that two threads may touch without a common lock goes through these.

pthread locks: uncontended 7 ns, against 44 ns for Cython's pymutex, and ThreadSanitizer knows them.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_rwlock_t:
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
    int pthread_rwlock_destroy(pthread_rwlock_t *lock)
    int pthread_rwlock_rdlock(pthread_rwlock_t *lock)
    int pthread_rwlock_wrlock(pthread_rwlock_t *lock)
    int pthread_rwlock_unlock(pthread_rwlock_t *lock)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

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
    #include <pthread.h>
    /* glibc's default lets readers starve a writer: check and reset would never get in under load */
    static inline int rwlock_init_fair(pthread_rwlock_t *lock)
    {
        pthread_rwlockattr_t attr;
        int rc = pthread_rwlockattr_init(&attr);
        if (rc) return rc;
    #ifdef __GLIBC__
        pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    #endif
        rc = pthread_rwlock_init(lock, &attr);
        pthread_rwlockattr_destroy(&attr);
        return rc;
    }
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
    int rwlock_init_fair(pthread_rwlock_t *lock) noexcept nogil
