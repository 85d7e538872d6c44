from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.device cimport Device
from zramd.core.system.locks cimport pthread_cond_t, pthread_mutex_t
from zramd.core.ublk.threads cimport pthread_t

cdef enum:
    READERS = 4                 # reads that the disk has at once

cdef struct answers:
    # Reads that are done, for the thread that waits for `wake`.
    pthread_mutex_t lock
    job *first
    int wake                    # an eventfd

cdef struct job:
    # A read that has to wait for the disk. It is its owner's, who leaves it alone until it comes back.
    job *next
    answers *back
    char *buffer
    uint64_t offset
    uint64_t length
    uint64_t began              # of Device.try_read
    uint32_t tag                # the owner's
    int result                  # 0 or -errno

cdef class Readers:
    cdef Device device
    cdef int priority
    cdef int process            # whose threads they are: a child that was forked off has none
    cdef pthread_mutex_t lock
    cdef pthread_cond_t news
    cdef job *first             # of what no thread has taken yet
    cdef job *last
    cdef bint ending
    cdef pthread_t threads[READERS]
    cdef uint32_t started       # of them
    cdef uint32_t begun
    cdef int unurgent           # errno of a thread that could not have its priority

    cdef int open(self) noexcept nogil
    cdef void give(self, job *j) noexcept nogil
    cdef void _work(self) noexcept nogil
    cdef void close(self) noexcept nogil

cdef job *take_answers(answers *back) noexcept nogil
