from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, scratch

cdef enum:
    TOGETHER = 16               # blocks that one read of the backing brings, at most

cdef struct near:
    # Blocks that are out, one after the other, with records that one read reaches.
    uint64_t block              # the first
    uint64_t slots[TOGETHER]    # theirs; the first one is pinned, and so the extent that all are in
    uint32_t count
    uint32_t size               # bytes of the read

cdef bint pin_away(Blocks table, uint64_t block, uint64_t *slot) noexcept nogil
cdef int load_away(Blocks table, uint64_t block, uint64_t slot, scratch *s) noexcept nogil
cdef bint find_near(Blocks table, uint64_t block, uint64_t most, near *found) noexcept nogil
cdef uint32_t load_near(Blocks table, const near *found, char *dst, scratch *s) noexcept nogil
