from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    HEAD_SIZE = 1 << 16         # of a file: the header page, then the words that are kept
    KEPT_STATE = 1 << 12        # where they begin: the device's state_words,
    KEPT_POOL = KEPT_STATE + 512    # the pool's counters,
    KEPT_ARENA = KEPT_STATE + 1024  # the arena's,
    KEPT_DEVICE = 1 << 13       # the device's counters
    KEPT_PAGES = 2              # that hold them

cdef uint64_t whole_pages(uint64_t size) noexcept nogil
cdef uint32_t page_unit() noexcept nogil
cdef void *secret_alloc(uint64_t size) noexcept nogil
cdef void secret_free(void *start, uint64_t size) noexcept nogil

cdef class Region:
    cdef char *base
    cdef readonly uint64_t size     # bytes, whole pages
    cdef int fd                     # -1: anonymous
    cdef uint64_t offset            # in the file

    cdef void _advise(self) noexcept nogil
    cdef int take_room(self, void *start, uint64_t size) noexcept nogil
    cdef int touch(self, char *start, uint64_t size) noexcept nogil
    cdef int refusal(self) noexcept nogil
    cdef int populate(self, uint64_t size) noexcept nogil
    cdef int release(self, void *start, uint64_t size) noexcept nogil
    cdef void clear(self) noexcept nogil
    cdef bint next_extent(self, uint64_t *start, uint64_t *end) noexcept nogil

cdef class Memory:
    cdef readonly int fd            # -1: anonymous
    cdef readonly uint64_t end      # bytes of all regions so far
    cdef Region head

    cdef Region region(self, uint64_t size, bint writable)
    cdef uint64_t *kept(self, uint64_t offset) noexcept nogil

cdef int region_map(void *start, uint64_t size) noexcept nogil
cdef int region_populate(void *start, uint64_t size) noexcept nogil
