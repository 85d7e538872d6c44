from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.cold cimport Cold
from zramd.core.device.device cimport Device
from zramd.core.types cimport BLOCK_SIZE

cdef enum:
    # docs/save-format.md has the format.
    HEAD_BYTES = 36
    FRAME_BYTES = 16
    BODY_MAX = 128 << 10
    END_BYTES = 28

cdef enum kind:
    KIND_BLOCKS = 1
    KIND_END = 2
    KIND_GIVEN_UP = 3

cdef struct frame_head:
    uint32_t kind
    uint32_t records
    uint32_t bytes
    uint32_t crc            # of the three words before and the body

cdef struct tally:
    uint64_t blocks
    uint64_t same
    uint64_t raw
    uint64_t lost
    uint64_t cold
    uint64_t payload_bytes

cdef class _Stream:
    # One frame at a time; what is common to both directions.
    cdef char *buffer
    cdef uint32_t moved     # bytes of the frame that were read or written
    cdef uint32_t size      # bytes of the frame
    cdef uint64_t at        # where in the stream the frame begins
    cdef uint32_t total     # CRC-32C of the CRCs of all frames before
    cdef int patience       # milliseconds that nothing may move, -1: for ever
    cdef int waited         # of those, since something moved
    cdef tally counted
    cdef uint64_t next      # the next block that may come
    cdef uint64_t version   # of the format
    cdef Cold cold          # decompresses what is cold
    cdef char page[BLOCK_SIZE]

    cdef int _wait(self, int fd, int events) noexcept nogil
    cdef int _write(self, int fd) noexcept nogil
    cdef int _decode(self, uint32_t what, const char *data) noexcept nogil
    cdef void _seal(self, uint32_t kind, uint32_t records, uint32_t bytes) noexcept nogil

cdef class _Writer(_Stream):
    cdef Device device
    cdef int fd
    cdef bint live
    cdef bint headed
    cdef bint ended
    cdef uint64_t epoch
    cdef uint64_t changes_before
    cdef uint64_t changes
    cdef const char *gave_up
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

cdef class _Reader(_Stream):
    cdef int fd
    cdef int copy           # -1: none
    cdef bint copy_failed
    cdef Device device      # None: only look
    cdef uint64_t limit     # bytes of the stream
    cdef bint headed
    cdef bint ready         # the frame is whole and was used
    cdef bint ended
    cdef uint64_t disksize
    cdef uint64_t saved_at
    cdef uint64_t changes
    cdef const char *wrong
    cdef uint64_t wrong_at
    cdef bint given_up
    cdef bint cut_off
    cdef bytes begun        # the stream's first bytes, which the caller has read already
    cdef const char *early
    cdef uint32_t early_left
    cdef uint64_t wrong_block   # + 1

    cdef int _fill(self, uint32_t need) noexcept nogil
    cdef int _fail(self, const char *wrong) noexcept nogil
    cdef int _cut(self) noexcept nogil
    cdef int _step(self, int steps) noexcept nogil
    cdef int _head(self) noexcept nogil
    cdef int _frame(self) noexcept nogil
    cdef int _records(self, uint32_t count, uint32_t bytes) noexcept nogil
    cdef bint _is_record(self, uint32_t what) noexcept nogil
    cdef int _record(self, uint64_t block, uint32_t what, const char *data) noexcept nogil
    cdef int _end(self) noexcept nogil
