"""Assertions, and hints for the memory checkers. ZRAMD_CHECK is set by the build profile:

0 release   nothing is compiled in.
2 asan      zr_assert and zr_assert_held, and the free parts of the arena are poisoned for AddressSanitizer, which
            cannot see into a mapping.
3 debug     these, and fresh and freed memory is filled: a payload of D0 was never written, one of DF is gone.
            Named points, where a test may end the process or have another thread go on: see points.pxd.
"""

from zramd.core.system.locks cimport pthread_mutex_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #ifndef ZRAMD_CHECK
    #define ZRAMD_CHECK 0
    #endif
    #if ZRAMD_CHECK
    #define zr_fail(x) (fprintf(stderr, "zramd: %s:%d: assertion failed: %s\\n", __FILE__, __LINE__, x), abort())
    #define zr_assert(x) ((x) ? (void)0 : zr_fail(#x))
    #ifdef __GLIBC__
    #include <pthread.h>
    #include <unistd.h>
    /* (Asked of the system each time: a fork changes it.) */
    #define zr_assert_held(lock) zr_assert((lock)->__data.__owner == gettid())
    #else
    #define zr_assert_held(lock) ((void)(lock))
    #endif
    #else
    #define zr_assert(x) ((void)0)
    #define zr_assert_held(lock) ((void)0)
    #endif
    #define zr_static_assert(x) _Static_assert(x, #x)
    #ifdef __SANITIZE_ADDRESS__
    #include <sanitizer/asan_interface.h>
    #define zr_poison(p, n) __asan_poison_memory_region((p), (n))
    #define zr_unpoison(p, n) __asan_unpoison_memory_region((p), (n))
    #include <sys/mman.h>
    void __asan_get_shadow_mapping(size_t *scale, size_t *offset);
    /* Before whole pages are unmapped. What only unpoisons writes the shadow, an eighth of them, and keeps it: devices
       that come and go took 20 GB. */
    static inline void zr_forget(void *start, size_t size)
    {
        size_t scale, offset, first, end, page = 65536;
        if (size < page << 4) {
            zr_unpoison(start, size);
            return;
        }
        __asan_get_shadow_mapping(&scale, &offset);
        first = (((size_t)start >> scale) + offset + page - 1) & -page;
        end = ((((size_t)start + size) >> scale) + offset) & -page;
        zr_unpoison(start, ((first - offset) << scale) - (size_t)start);
        zr_unpoison((void *)((end - offset) << scale), (size_t)start + size - ((end - offset) << scale));
        madvise((void *)first, end - first, MADV_DONTNEED);
    }
    #else
    #define zr_forget(p, n) ((void)(p))
    #define zr_poison(p, n) ((void)(p))
    #define zr_unpoison(p, n) ((void)(p))
    #endif
    #if ZRAMD_CHECK >= 3
    #define zr_fill(p, c, n) memset((p), (c), (n))
    #else
    #define zr_fill(p, c, n) ((void)(p))
    #endif
    """
    enum:
        ZRAMD_CHECK
    void zr_assert(bint condition) noexcept nogil
    void zr_assert_held(pthread_mutex_t *lock) noexcept nogil           # by this thread
    void zr_static_assert(bint condition) noexcept nogil                # looked at by the compiler
    void zr_poison(void *start, size_t size) noexcept nogil
    void zr_unpoison(void *start, size_t size) noexcept nogil
    void zr_forget(void *start, size_t size) noexcept nogil
    void zr_fill(void *start, int byte, size_t size) noexcept nogil

cdef enum:
    FILL_FRESH = 0xD0
    FILL_FREED = 0xDF
