from libc.stdint cimport uint32_t, uint64_t

from zramd.core.ublk.ring cimport ring

cdef class Control:
    cdef ring ring
    cdef int fd                         # /dev/ublk-control, -1: closed
    cdef bint stuck                     # a command has not been answered: the ring, and what is in room, are the kernel's
    cdef readonly double timeout        # seconds
    cdef void *room                     # what a command reads or writes

    cdef void _close(self) noexcept
    cdef int _command(self, uint32_t command, uint32_t number, uint32_t size, uint64_t data, timeout) except? -1
    cdef int _do(self, str what, uint32_t command, uint32_t number, uint32_t size=*, uint64_t data=*, timeout=*,
                 dict reasons=*) except -1
