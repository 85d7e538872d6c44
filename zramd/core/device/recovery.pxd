from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.memory.arena cimport Arena
from zramd.core.device.backing cimport Backing
from zramd.core.device.blocks cimport Blocks
from zramd.core.memory.region cimport Region
from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport size_class

cdef enum:
    MENDS = 4096
    LOST = 1024

cdef enum step:
    FIND_PAGES
    SCAN_SLOTS
    REBUILD_SPANS

cdef struct recovery_numbers:
    # By the names of the statistics.
    uint64_t recovery_ms
    uint64_t recovered_blocks
    uint64_t leaked_objects
    uint64_t lost_blocks

cdef class Recovery:
    cdef Blocks table
    cdef Pool pool
    cdef Arena arena
    cdef Region slot_table
    cdef uint64_t *slots
    cdef Region touches
    cdef uint64_t blocks
    cdef bint verify
    cdef Backing backing            # None: there is none, or it is not the state's
    cdef bint had_backing           # blocks may be out
    cdef bint keeps                 # pages that nothing is on, too
    cdef bint lacks_backing         # a block is out, and there is none
    cdef Region used                # bitmap: the handles that slots hold
    # The chunks that slots lead to. Of zspages with a bitmap it is theirs; of each other span SPAN_CHUNKS bits are here,
    # from where the `next` of its record says.
    cdef Region live
    cdef uint32_t top               # spans below this one had a class, or pages that are kept
    cdef uint32_t lists             # of them those of classes without a bitmap
    cdef uint64_t cells_end         # cells from this one on are not in the file
    cdef step now                   # which of the parallel steps
    cdef uint64_t cursor            # atomic: the next piece of work
    cdef uint64_t pieces
    cdef int failed                 # -errno: a page that must be there cannot be had
    cdef const char *wrong          # of the first contradiction; NULL: none was found
    cdef uint64_t wrong_block
    cdef uint64_t mends[MENDS]      # handles whose cell is pinned or whose header is wrong
    cdef uint64_t mend_count        # this and those below: atomic
    cdef uint64_t lost_blocks[LOST]     # with verify: blocks whose slot leads nowhere, or to another's
    cdef uint64_t disputed[LOST]        # with verify: blocks whose handle or chunk another block took before
    cdef uint64_t dispute_count         # atomic
    # Results; atomic.
    cdef uint64_t lost              # those blocks, and those that were lost before
    cdef uint64_t lost_now
    cdef uint64_t stored
    cdef uint64_t same
    cdef uint64_t huge
    cdef uint64_t cold
    cdef uint64_t cold_bytes
    cdef uint64_t compr
    cdef uint64_t out
    cdef uint64_t out_bytes
    cdef uint64_t handles
    cdef uint64_t slot_pages        # that hold something
    cdef uint64_t leaked
    cdef uint64_t milliseconds

    cdef recovery_numbers numbers(self)
    cdef void _find_top(self) noexcept nogil
    cdef uint64_t _fill_holes(self, Region table, uint64_t end) noexcept nogil
    cdef void _find_pages(self, uint32_t first, uint32_t last) noexcept nogil
    cdef bint _has_pages(self, uint32_t span, uint32_t pages) noexcept nogil
    cdef uint64_t *_live_bits(self, uint32_t span, size_class *c) noexcept nogil
    cdef void _work(self) noexcept nogil
    cdef void _scan_slots(self, uint64_t first, uint64_t last) noexcept nogil
    cdef bint _scan_page(self, uint64_t block, uint64_t end) noexcept nogil
    cdef const char *_scan_slot(self, uint64_t block, uint64_t slot) noexcept nogil
    cdef bint _is_rightful(self, uint64_t block, uint64_t slot) noexcept nogil
    cdef void _settle_disputes(self) noexcept nogil
    cdef void _lose(self, uint64_t block) noexcept nogil
    cdef bint _is_lost(self, uint64_t block) noexcept nogil
    cdef bint _same_handle(self, uint64_t block, uint64_t other) noexcept nogil
    cdef bint _same_chunk(self, uint64_t block, uint64_t other) noexcept nogil
