from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, op, scratch
from zramd.core.system.gate cimport gate

cdef struct piece:
    # What a request does next of its range of bytes.
    uint64_t offset
    uint64_t end                # of the range
    uint64_t block
    uint32_t at                 # where in the block
    uint32_t size
    uint32_t steps              # pieces so far

cdef class Served:
    cdef readonly uint64_t disksize         # bytes
    cdef uint64_t blocks
    cdef Blocks table
    cdef gate gate
    cdef uint64_t unfinished                # atomic: requests that left the gate in the middle of changing the device
    cdef bint urgent                        # real-time threads make requests

    # requests: 0 or -errno, -EINVAL beyond the end
    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil
    # the same in two steps: AWAY, so read_away is to be called where one may wait for a disk
    cdef int try_read(self, char *dst, uint64_t offset, uint64_t length, uint64_t *began) noexcept nogil
    cdef int read_away(self, char *dst, uint64_t offset, uint64_t length, uint64_t began) noexcept nogil
    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil

    # hints, of what will be asked for soon
    cdef void expect_next(self, uint64_t offset) noexcept nogil
    cdef void expect_later(self, uint64_t offset) noexcept nogil

    cdef bint _fits(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _load_away(self, uint64_t block, scratch *s, uint64_t *slot, bint changes) noexcept nogil
    cdef uint32_t _read_near(self, const piece *p, char *dst, scratch *s) noexcept nogil
    cdef int _read_away(self, piece *p, char *dst, scratch **s) noexcept nogil
    cdef int _merge_away(self, const piece *p, const char *src, scratch *s) noexcept nogil
    cdef void _make_way(self, uint32_t *steps, bint changes) noexcept nogil
    cdef uint64_t _begin(self) noexcept nogil
    cdef void _end(self, op kind, uint64_t began) noexcept nogil
    cdef bint _next(self, piece *p, bint changes) noexcept nogil
    cdef void _look_ahead(self, const piece *p, uint64_t soon, uint32_t most) noexcept nogil
    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _read(self, char *dst, uint64_t offset, uint64_t length, bint waits) noexcept nogil
    cdef int _zero(self, uint64_t offset, uint64_t length, bint hole, bint exact) noexcept nogil
    cdef uint64_t _extent(self, uint64_t offset, uint64_t end, int *kind) noexcept nogil
