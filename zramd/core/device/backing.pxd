from libc.stdint cimport uint32_t, uint64_t

from zramd.core.memory.region cimport Region
from zramd.core.types cimport BLOCK_SIZE

cdef enum:
    EXTENT_SHIFT = 16
    EXTENT_BYTES = 1 << EXTENT_SHIFT
    EXTENT_HEAD = 64            # bytes at the begin of an extent, or a granule where that is larger
    RECORD_HEAD = 12
    ROOM = 4 * BLOCK_SIZE       # records that one read brings, with all of the sectors that they are on
    GRANULE = 16                # bytes; twice as many for each doubling beyond 64 GiB

cdef extern from *:
    """
    /* Of an extent's word: the bytes of it that live, one thread that reads it, and what is the matter with it: it is being
       written; writing it failed, or reading all of it. */
    #define EXTENT_LIVE ((uint64_t)0xFFFFFFFF)
    #define EXTENT_READER ((uint64_t)1 << 32)
    #define EXTENT_WRITTEN ((uint64_t)1 << 62)
    #define EXTENT_BAD ((uint64_t)1 << 63)
    """
    uint64_t EXTENT_LIVE, EXTENT_READER, EXTENT_WRITTEN, EXTENT_BAD

cdef enum:
    AWAY = 1                    # beside 0 and -errno: the block is out

cdef struct extent_head:
    char magic[8]
    uint64_t sequence           # of all extents that were written since the start
    uint32_t records
    uint32_t bytes              # of the head and all of them
    uint32_t sum                # of what is before, seeded with the extent's number
    uint32_t unused

cdef struct record:
    # What a payload on the backing begins with.
    uint32_t block
    uint32_t what               # payload bytes, and SLOT_OUT_ZSTD
    uint32_t sum                # of the payload, seeded with the two

cdef class Backing:
    cdef int fd
    cdef readonly uint64_t size             # bytes
    cdef readonly uint32_t granule          # bytes
    cdef uint32_t granule_shift
    cdef readonly uint32_t sector           # bytes: what is read and written begins and ends with one
    cdef uint32_t head                      # bytes that the head of an extent takes
    cdef readonly uint64_t extents          # the first is the superblock's
    cdef Region table
    cdef uint64_t *words                    # of each extent; atomic
    cdef uint64_t used                      # atomic: extents that are neither free nor bad
    cdef uint64_t bad                       # atomic
    cdef uint64_t live                      # atomic: bytes of records that slots lead to
    cdef uint64_t cursor                    # where the search for a free extent goes on

    cdef bint has_place(self, uint64_t slot) noexcept nogil
    cdef uint32_t record_bytes(self, uint32_t size) noexcept nogil
    cdef uint64_t *_word(self, uint64_t slot) noexcept nogil
    cdef void pin(self, uint64_t slot) noexcept nogil
    cdef void unpin(self, uint64_t slot) noexcept nogil
    cdef void add(self, uint64_t slot) noexcept nogil
    cdef void drop(self, uint64_t slot) noexcept nogil
    cdef void forget_all(self) noexcept nogil
    cdef void count_used(self) noexcept nogil
    cdef uint64_t take(self) noexcept nogil
    cdef void give(self, uint64_t extent, bint is_bad) noexcept nogil
    cdef void give_up(self, uint64_t extent) noexcept nogil
    cdef void try_again(self) noexcept nogil
    cdef uint64_t emptiest(self, uint64_t most) noexcept nogil
    cdef uint32_t reach(self, uint64_t first, uint64_t slot) noexcept nogil
    cdef int fetch(self, uint64_t first, uint32_t size, char *room, uint64_t *moved) noexcept nogil
    cdef const char *payload_of(self, uint64_t block, uint64_t slot, uint64_t first, const char *room) noexcept nogil
    cdef int load(self, uint64_t block, uint64_t slot, char *room, const char **payload, uint64_t *moved) noexcept nogil
    cdef int read(self, char *buffer, uint64_t size, uint64_t offset) noexcept nogil
    cdef int write(self, const char *buffer, uint64_t size, uint64_t offset) noexcept nogil
    cdef int populate(self) noexcept nogil

cdef uint32_t record_sum(uint64_t block, uint32_t what, const char *payload) noexcept nogil
