from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, scratch

cdef enum:
    AGES = 256

cdef struct census:
    # Blocks by their age, and how many were tried in vain, whatever it is.
    uint64_t stored[AGES]
    uint64_t raw[AGES]          # candidates
    uint64_t others[AGES]       # candidates
    uint64_t tried

cdef void sweep(Blocks table, bint coarse, bint keep, uint32_t threshold, census *found) noexcept nogil
cdef uint64_t mark_idle(Blocks table, uint8_t age) noexcept nogil
cdef int promote(Blocks table, uint64_t block, scratch *s) noexcept nogil
