from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks

cdef extern from *:
    """
    /* the age of a block, if no request has asked for it meanwhile */
    #define change_age(p, old, new) ({ uint8_t expected = (old); \
        __atomic_compare_exchange_n((p), &expected, (new), 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED); })
    """
    bint change_age(uint8_t *p, uint8_t old, uint8_t new) noexcept nogil

cdef enum:
    AGES = 256

cdef struct census:
    # Blocks by their age, and how many were tried in vain, whatever it is.
    uint64_t stored[AGES]
    uint64_t raw[AGES]          # candidates
    uint64_t others[AGES]       # candidates
    uint64_t tried
    # Bytes that would leave memory if blocks went out: of those that nobody has read since they were written, of others,
    # and of raw ones among both.
    uint64_t unread[AGES]
    uint64_t read[AGES]
    uint64_t huge[AGES]
    uint64_t back               # blocks that are out, and wanted

cdef void sweep(Blocks table, bint coarse, bint keep, uint32_t threshold, census *found) noexcept nogil
cdef uint64_t mark_idle(Blocks table, uint8_t age) noexcept nogil
