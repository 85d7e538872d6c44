from libc.stdint cimport uint64_t

cdef struct room:
    uint64_t granted        # atomic: pages that the device of this slot may have, its owner's to change
    uint64_t floor          # atomic: pages that are kept for it, whether it has them or not

cdef struct shared:
    uint64_t budget         # atomic: pages for all
    uint64_t top            # atomic: slots below this one were in use at least once
    uint64_t unused[6]
    room rooms[1 << 10]

cdef struct sums:
    uint64_t taken          # pages that all have or that are kept for them: the larger of both, of each
    uint64_t granted        # pages that all have

cdef dict budget_stats(Budget budget)

cdef class Budget:
    cdef shared *table
    cdef readonly uint64_t slot
    cdef room *own
    cdef uint64_t granted       # what own.granted is to be: what stands there anybody may have damaged

    cdef uint64_t limit(self) noexcept nogil
    cdef uint64_t floor(self) noexcept nogil
    cdef sums add_up(self, uint64_t own) noexcept nogil
    cdef bint raise_to(self, uint64_t pages, uint64_t more) noexcept nogil
    cdef void set_granted(self, uint64_t pages) noexcept nogil
    cdef bint _try(self, uint64_t pages) noexcept nogil
    cdef bint fits(self, uint64_t pages) noexcept nogil
