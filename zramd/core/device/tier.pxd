from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, scratch
from zramd.core.device.device cimport Device
from zramd.core.system.locks cimport pthread_mutex_t

cdef enum:
    LOOK = 1 << 16      # blocks that a step looks at, at most: 0.1 ms

cdef struct step:
    # What one has done, and where the next begins: see Tier.cool.
    uint64_t next
    uint64_t tried
    uint64_t tried_bytes
    uint64_t done
    uint64_t saved
    int stopped

cdef class Tier:
    cdef Device device
    cdef pthread_mutex_t lock       # one step at a time, which no change of the level comes between

    cdef void _cool(self, Blocks table, step *s, uint64_t tries, uint32_t threshold, uint8_t age, bint raw, bint idle,
                    scratch *room) noexcept nogil
    cdef void _promote(self, Blocks table, step *s, uint64_t tries, scratch *room) noexcept nogil
