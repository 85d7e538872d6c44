from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.backing cimport Backing
from zramd.core.device.blocks cimport Blocks
from zramd.core.device.device cimport Device
from zramd.core.system.locks cimport pthread_mutex_t

cdef enum:
    MOST_RECORDS = 1024         # in an extent
    MOST_SOURCES = 128          # extents whose records move to one extent

cdef struct entry:
    # What a record in the buffer was made of.
    uint64_t slot               # the block's then
    uint32_t block
    uint32_t at                 # in the buffer
    uint8_t age                 # the block's before it got AGE_LEAVING
    bint moves                  # from another extent

cdef struct wanted:
    # Which blocks are to go out.
    uint8_t age
    bint raw
    bint idle
    bint unread
    bint tried

cdef class Writeback:
    cdef Device device
    cdef Backing backing
    cdef pthread_mutex_t lock               # guards all below: one step at a time
    cdef char *buffer                       # an extent that is to be written
    cdef char *other                        # one that is read
    cdef entry *entries
    cdef uint32_t count
    cdef uint32_t used                      # bytes of the buffer
    cdef uint32_t moving                    # of them: records from other extents
    cdef uint64_t sources[MOST_SOURCES]     # pinned
    cdef uint32_t source_count
    cdef uint64_t sequence

    cdef bint _has_room(self, uint32_t size) noexcept nogil
    cdef bint _gather(self, Blocks table, uint64_t *block, uint64_t end, const wanted *which, uint64_t *taken) noexcept nogil
    cdef bint _copy(self, Blocks table, uint64_t block, const wanted *which) noexcept nogil
    cdef void _put(self, uint64_t block, uint32_t what, uint32_t sum) noexcept nogil
    cdef int _reclaim(self, Blocks table, uint64_t most, uint32_t *records) noexcept nogil
    cdef int _move(self, Blocks table, uint64_t extent, uint32_t *records) noexcept nogil
    cdef int _flush(self, Blocks table, uint64_t *blocks, uint64_t *written, uint64_t *moved, uint64_t *took) noexcept nogil
    cdef bint _commit(self, Blocks table, entry *e, uint64_t extent) noexcept nogil
    cdef void _forget(self, Blocks table) noexcept nogil
    cdef int _bring_back(self, Blocks table, uint64_t block, char *room, bint only_wanted) noexcept nogil
