from libc.stdint cimport uint64_t

from zramd.core.device.recovery cimport recovery_numbers
from zramd.core.device.serving cimport Served
from zramd.core.memory.region cimport Memory
from zramd.core.pool.pool cimport Pool

cdef struct state_words:
    # Kept, and not reset.
    uint64_t limit_asked        # mem_limit of the last start + 1; 0: there was none
    uint64_t limit              # mem_limit now
    uint64_t data_id[2]         # random: names what the device holds, from when it was last empty; 0: none yet
    uint64_t loading            # a saved device is being loaded: not all of it has arrived
    uint64_t backing_id[2]      # data_id when the backing was claimed: its superblock has it too
    uint64_t budget_left        # bytes that may be written to it,
    uint64_t budget_at          # at that time

cdef class Device(Served):
    cdef Pool pool                          # the table's
    cdef Memory memory
    cdef object mark_out                    # the same before its first block goes out
    cdef object mark_cold                   # to be called before a state's first cold block; None: no more
    cdef state_words *kept
    cdef recovery_numbers recovered         # zeros: nothing was taken over
    cdef uint64_t epoch                     # atomic: how often the data was replaced as a whole, by reset or load
    cdef readonly bint dropped              # the state held a device that was loaded in part: it was reset

    cdef str culprit(self, int rc, uint64_t offset, uint64_t length)
