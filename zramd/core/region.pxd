from libc.stdint cimport int64_t, uint64_t

cdef enum:
    HEAD_SIZE = 1 << 16         # of a file: the header page, then the words that are kept
    KEPT_STATE = 1 << 12        # where they begin: the device's state_words,
    KEPT_POOL = KEPT_STATE + 512    # the pool's counters,
    KEPT_ARENA = KEPT_STATE + 1024  # the arena's,
    KEPT_DEVICE = 1 << 13       # the device's counters
    KEPT_PAGES = 2              # that hold them

cdef inline uint64_t whole_pages(uint64_t size) noexcept nogil:
    return (size + 4095) & ~<uint64_t>4095

cdef class Region:
    cdef char *base
    cdef readonly uint64_t size     # bytes, whole pages
    cdef int fd                     # -1: anonymous
    cdef uint64_t offset            # in the file
    cdef uint64_t looks             # atomic: calls of is_scarce
    cdef uint64_t scarce            # atomic: what it found the last time

    cdef bint is_scarce(self) noexcept nogil
    cdef int ready(self, void *start, uint64_t size) noexcept nogil
    cdef int release(self, void *start, uint64_t size) noexcept nogil
    cdef int release_all(self) noexcept nogil
    cdef bint next_extent(self, uint64_t *start, uint64_t *end) noexcept nogil

cdef class Memory:
    cdef readonly int fd            # -1: anonymous
    cdef readonly uint64_t end      # bytes of all regions so far
    cdef Region head

    cdef Region region(self, uint64_t size, bint writable)
    cdef uint64_t *kept(self, uint64_t offset) noexcept nogil

cdef int region_populate(void *start, uint64_t size) noexcept nogil
cdef void regions_are_locked() noexcept nogil
