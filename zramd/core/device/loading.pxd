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

    FORMAT = 2              # without cold blocks a save has format 1, which older versions read
    STEPS = 16              # chunks between two looks for signals and calls of progress

cdef extern from *:
    """
    #define ZR_SAVE_MAGIC "\\x89ZRAMD\\r\\n"
    #define ZR_SAVE_CHANGED "a client changed the device while it was saved"
    """
    const char *magic "ZR_SAVE_MAGIC"
    const char *CHANGED "ZR_SAVE_CHANGED"       # in streams, too: see error_of

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

cdef class Stream:
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

cdef class Reader(Stream):
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

cdef object error_of(const char *why)
