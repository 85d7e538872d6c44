from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, scratch

cdef int cool(Blocks table, uint64_t block, uint32_t threshold, uint8_t age, char *page, char *out) noexcept nogil
cdef int promote(Blocks table, uint64_t block, scratch *s) noexcept nogil
