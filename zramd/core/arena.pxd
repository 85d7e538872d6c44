from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from zramd.core.locks cimport pthread_mutex_t

cdef void *region_map(uint64_t size, bint writable) noexcept nogil
cdef void region_unmap(void *base, uint64_t size) noexcept nogil
cdef int region_release(void *start, uint64_t size) noexcept nogil

cdef class Arena:
    cdef readonly uint32_t span_count   # spans in the reservation
    cdef char *base
    cdef uint16_t *committed            # per span: bitmap of its resident pages; its owner's to change
    cdef uint32_t *links                # per free span: the next free one
    cdef pthread_mutex_t lock           # guards the four below, and links
    cdef uint32_t top                   # spans below this one were handed out at least once
    cdef uint32_t writable              # spans below this one may be written to
    cdef uint32_t warm                  # free spans with resident pages (the stock), last in first out
    cdef uint32_t cold                  # free spans without
    cdef uint64_t stock                 # atomic: resident pages of the warm spans
    cdef uint64_t pages                 # atomic: resident pages, the stock among them
    cdef uint64_t pages_max             # atomic: the most there ever were
    cdef uint64_t limit                 # atomic: most pages there may be, 0: no limit

    cdef int64_t take(self, uint32_t npages) noexcept nogil
    cdef void give(self, uint32_t span, bint keep) noexcept nogil
    cdef int commit(self, uint32_t span, uint32_t mask) noexcept nogil
    cdef int decommit(self, uint32_t span, uint32_t mask) noexcept nogil
    cdef uint64_t trim_stock(self) noexcept nogil
    cdef void reset(self) noexcept nogil
    cdef void reset_peak(self) noexcept nogil
    cdef uint64_t metadata_bytes(self) noexcept nogil
    cdef const char *check(self, uint64_t *where) noexcept nogil
    cdef const char *_walk(self, uint64_t *where) noexcept nogil
