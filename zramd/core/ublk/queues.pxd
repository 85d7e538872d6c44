from libc.stdint cimport uint32_t

from zramd.core.device.device cimport Device
from zramd.core.ublk.queue cimport Queue, refusal
from zramd.core.ublk.readers cimport Readers

cdef class Queues:
    cdef Device device
    cdef Readers readers        # None: nothing is ever out, or the threads are not there
    cdef list queues            # Queue objects
    cdef bint is_open           # the threads are there
    cdef int priority
    cdef uint32_t number
    cdef uint32_t depth
    cdef uint32_t max_io_bytes
    cdef int fd                 # /dev/ublkcN, -1: none

    cdef int _open(self) except -1
    cdef int _have_readers(self) except -1
    cdef _refusal(self, refusal what, int code)
    cdef void _close(self) noexcept
    cdef void _let_go(self) noexcept
    cdef _unserved(self, Queue queue, int code, str what)
