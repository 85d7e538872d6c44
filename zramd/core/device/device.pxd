from libc.stdint cimport int64_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, op, scratch
from zramd.core.device.recovery cimport recovery_numbers
from zramd.core.system.gate cimport gate
from zramd.core.memory.region cimport Memory
from zramd.core.pool.pool cimport Pool

cdef struct state_words:
    # Kept, and not reset.
    uint64_t limit_asked        # mem_limit of the last start + 1; 0: there was none
    uint64_t limit              # mem_limit now
    uint64_t data_id[2]         # random: names what the device holds, from when it was last empty; 0: none yet
    uint64_t loading            # a saved device is being loaded: not all of it has arrived
    uint64_t backing_id[2]      # data_id when the backing was claimed: its superblock has it too
    uint64_t budget_left        # bytes that may be written to it,
    uint64_t budget_at          # at that time

cdef struct piece:
    # What a request does next of its range of bytes.
    uint64_t offset
    uint64_t end                # of the range
    uint64_t block
    uint32_t at                 # where in the block
    uint32_t size
    uint32_t steps              # pieces so far

cdef class Device:
    cdef readonly uint64_t disksize         # bytes
    cdef uint64_t blocks
    cdef Blocks table
    cdef Pool pool                          # the table's
    cdef Memory memory
    cdef gate gate
    cdef uint64_t unfinished                # atomic: requests that left the gate in the middle of changing the device
    cdef object mark_out                    # the same before its first block goes out
    cdef object mark_cold                   # to be called before a state's first cold block; None: no more
    cdef bint urgent                        # real-time threads make requests
    cdef state_words *kept
    cdef recovery_numbers recovered         # zeros: nothing was taken over
    cdef uint64_t epoch                     # atomic: how often the data was replaced as a whole, by reset or load
    cdef readonly bint dropped              # the state held a device that was loaded in part: it was reset

    # requests: 0 or -errno, -EINVAL beyond the end
    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil

    cdef bint _fits(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _load_away(self, uint64_t block, scratch *s, uint64_t *slot, bint changes) noexcept nogil
    cdef uint32_t _read_near(self, const piece *p, char *dst, scratch *s) noexcept nogil
    cdef int _read_away(self, piece *p, char *dst, scratch **s) noexcept nogil
    cdef int _merge_away(self, const piece *p, const char *src, scratch *s) noexcept nogil
    cdef void _make_way(self, uint32_t *steps, bint changes) noexcept nogil
    cdef uint64_t _begin(self) noexcept nogil
    cdef void _end(self, op kind, uint64_t began) noexcept nogil
    cdef bint _next(self, piece *p, bint changes) noexcept nogil
    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _zero(self, uint64_t offset, uint64_t length, bint hole, bint exact) noexcept nogil
    cdef uint64_t _extent(self, uint64_t offset, uint64_t end, int *kind) noexcept nogil
    cdef str culprit(self, int rc, uint64_t offset, uint64_t length)
