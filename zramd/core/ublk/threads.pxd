"""Threads that never know Python: made by the C library, with a stack of their own size, deaf to signals."""

from libc.stdint cimport uint64_t

from zramd.core.system.locks cimport pthread_cond_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdint.h>
    #include <time.h>
    #include <unistd.h>
    #include <sys/prctl.h>

    typedef void *(*thread_work)(void *);

    /* Start one; 0 or an errno. No signal is ever handled in it: Python's handlers belong to Python's threads. */
    static inline int thread_start(pthread_t *thread, thread_work work, void *argument, size_t stack)
    {
        pthread_attr_t attributes;
        sigset_t all, before;
        int rc = pthread_attr_init(&attributes);
        if (rc)
            return rc;
        rc = pthread_attr_setstacksize(&attributes, stack);
        if (!rc) {
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            rc = pthread_create(thread, &attributes, work, argument);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
        }
        pthread_attr_destroy(&attributes);
        return rc;
    }

    /* Name the calling thread, and make it a real-time one unless priority is 0; 0 or an errno. */
    static inline int thread_begin(const char *kind, unsigned number, int priority)
    {
        char name[16];
        struct sched_param param = {0};
        snprintf(name, sizeof(name), "%s%u", kind, number % 1000);
        prctl(PR_SET_NAME, name, 0UL, 0UL, 0UL);
        param.sched_priority = priority;
        return priority ? pthread_setschedparam(pthread_self(), SCHED_RR, &param) : 0;
    }

    /* Wait for news so long at most. */
    static inline void cond_wait_for(pthread_cond_t *news, pthread_mutex_t *lock, uint64_t milliseconds)
    {
        struct timespec end;
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_nsec += milliseconds % 1000 * 1000000;
        end.tv_sec += milliseconds / 1000 + end.tv_nsec / 1000000000;
        end.tv_nsec %= 1000000000;
        pthread_cond_timedwait(news, lock, &end);
    }

    /* Wake who polls an eventfd, whose count never gets so high that this would wait. */
    static inline void zr_wake(int fd)
    {
        uint64_t one = 1;
        (void)!write(fd, &one, sizeof(one));
    }
    """
    ctypedef struct pthread_t:
        pass
    ctypedef void *(*thread_work)(void *argument) noexcept nogil
    int pthread_join(pthread_t thread, void **result) nogil
    int pthread_cond_broadcast(pthread_cond_t *cond) nogil
    int thread_start(pthread_t *thread, thread_work work, void *argument, size_t stack) noexcept nogil
    int thread_begin(const char *kind, unsigned number, int priority) noexcept nogil
    void cond_wait_for(pthread_cond_t *news, void *lock, uint64_t milliseconds) noexcept nogil
    void zr_wake(int fd) noexcept nogil

cdef enum:
    # Bytes of address space: what process.pyx touches of it is all that is ever used, but for ThreadSanitizer's own.
    THREAD_STACK = 1 << 20
