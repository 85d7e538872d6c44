from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.device cimport Device
from zramd.core.device.loading cimport Stream

cdef class Writer(Stream):
    cdef Device device
    cdef int fd
    cdef bint live
    cdef bint headed
    cdef bint ended
    cdef uint64_t epoch
    cdef uint64_t changes_before
    cdef uint64_t changes
    cdef const char *gave_up
    cdef char unread[128]   # why, if it is a block that cannot be read
    cdef char *room         # to read from the backing

    cdef bint _has_cold(self) noexcept nogil
    cdef int _step(self) noexcept nogil
    cdef void _gather(self) noexcept nogil
    cdef uint32_t _record(self, uint64_t block, char *out) noexcept nogil
    cdef uint32_t _record_away(self, uint64_t block, uint64_t slot, char *out) noexcept nogil
    cdef void _look(self) noexcept nogil
    cdef void _finish(self) noexcept nogil
    cdef void _give_up(self, const char *why) noexcept nogil
    cdef uint64_t _changes(self) noexcept nogil
