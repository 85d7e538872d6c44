"""What stands for a block: its slot, one 64-bit word. Nobody else takes one apart.

    63            48 47                          16 15  14   13   12                0
    |  half a sum   |           handle             |COLD|LOST|SAME|  payload bytes    |

The payload of an object is what a block was compressed to, or all of it (raw); with COLD it begins with a byte that
names another codec than lz4 (see frames.pyx). With SAME the block is one word repeated, and there is no object: the word is
in the handle's cell, handle 0 is the word 0, and where others have the size is more of the sum. All of it 0 is a hole: a
block that was never written, or freed. LOST alone: what the slot led to was changed in memory, and reading the block is an
error. LOST with an object, and without COLD: the cold codec was tried, and did not shrink it. Both: zstd compressed the
block when it was written, and the cold codec is still to come.

SAME with COLD: the block is out, see backing.pyx. Its payload is on the backing, at a place in granules that is where others
have the handle; half of its record's checksum is above that, and bit 14 says that the payload is zstd's.
"""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.types cimport BLOCK_SIZE

cdef enum:
    SLOT_SIZE_MASK = 0x1FFF     # payload bytes, 1 to 4096
    SLOT_SAME = 0x2000
    SLOT_LOST = 0x4000          # the whole slot
    SLOT_TRIED = 0x4000         # with an object
    SLOT_COLD = 0x8000
    SLOT_ZSTD = 0xC000
    SLOT_OUT = 0xA000           # both bits
    SLOT_OUT_ZSTD = 0x4000      # of one that is out
    SLOT_HANDLE_SHIFT = 16
    SLOT_SUM_SHIFT = 48       # the slot's half of the checksum is above

cdef enum block_kind:
    HOLE
    SAME
    LOST
    LZ4
    RAW
    ZSTD                        # as it was written
    COLD                        # zstd too, but the cold codec has had it
    OUT                         # on the backing

cdef inline uint64_t sum_low(uint32_t sum) noexcept nogil:
    """The half of a checksum that is in the slot."""
    return sum & 0xFFFF

cdef inline uint64_t sum_high(uint32_t sum) noexcept nogil:
    """The half that is in the cell."""
    return sum >> 16

cdef inline uint64_t slot_handle(uint64_t slot) noexcept nogil:
    return slot << (64 - SLOT_SUM_SHIFT) >> (64 - SLOT_SUM_SHIFT + SLOT_HANDLE_SHIFT)

cdef inline uint32_t slot_bytes(uint64_t slot) noexcept nogil:
    """Payload bytes of a slot with an object; a bit that changed in memory may have made them too many."""
    return slot & SLOT_SIZE_MASK

cdef inline uint64_t slot_sum(uint64_t slot) noexcept nogil:
    """The slot's half of the checksum of its object."""
    return slot >> SLOT_SUM_SHIFT

cdef inline block_kind slot_kind(uint64_t slot) noexcept nogil:
    if slot == 0:
        return HOLE
    if slot & SLOT_SAME:
        return SAME if not slot & SLOT_COLD else OUT
    if slot == SLOT_LOST:
        return LOST
    if slot & SLOT_COLD:
        return COLD if not slot & SLOT_TRIED else ZSTD
    return RAW if slot_bytes(slot) == BLOCK_SIZE else LZ4

cdef inline bint is_cold(uint64_t slot) noexcept nogil:
    """Whether the payload begins with the name of its codec: it is not lz4's."""
    return slot & SLOT_COLD and not slot & SLOT_SAME

cdef inline bint is_known(uint64_t slot) noexcept nogil:
    """Whether a slot's flags and size go together: others come from bits that changed in memory."""
    if slot & SLOT_SAME:
        return not slot & SLOT_LOST or slot & SLOT_COLD
    return not slot & SLOT_COLD or slot_bytes(slot) < BLOCK_SIZE

cdef inline bint has_object(uint64_t slot) noexcept nogil:
    """Whether a slot's handle is that of an object."""
    return slot != 0 and not slot & SLOT_SAME and slot != SLOT_LOST

cdef inline bint is_out(uint64_t slot) noexcept nogil:
    """Whether a block's payload is on the backing; its handle is then a place there."""
    return slot & SLOT_OUT == SLOT_OUT

cdef inline bint is_candidate(uint64_t slot, uint32_t threshold) noexcept nogil:
    """Whether a block may become cold: it is raw, or its payload has threshold bytes or more, and was not tried yet."""
    if not has_object(slot) or (slot & SLOT_COLD != 0) != (slot & SLOT_TRIED != 0):
        return False
    return slot_kind(slot) == RAW or slot_bytes(slot) >= threshold

cdef inline bint is_zeros(uint64_t slot) noexcept nogil:
    """Whether a block is the word 0 repeated, and not a hole."""
    return slot_kind(slot) == SAME and slot_handle(slot) == 0

cdef inline uint64_t object_slot(uint64_t handle, uint32_t size, uint32_t sum) noexcept nogil:
    """A slot with an object of size bytes; sum: its checksum, or 0, of which the cell keeps the other half."""
    return sum_low(sum) << SLOT_SUM_SHIFT | handle << SLOT_HANDLE_SHIFT | size

cdef inline uint64_t cold_slot(uint64_t handle, uint32_t size, uint32_t sum) noexcept nogil:
    """The same for a cold object."""
    return object_slot(handle, size, sum) | SLOT_COLD

cdef inline uint64_t tried_slot(uint64_t slot) noexcept nogil:
    """The slot of an object that the cold codec did not shrink."""
    return slot & ~<uint64_t>SLOT_TRIED if slot & SLOT_COLD else slot | SLOT_TRIED

cdef inline uint64_t same_slot(uint64_t handle, uint32_t sum) noexcept nogil:
    """A slot that stands for a word; sum: its checksum, or 0, of which the lower 29 bits are kept."""
    return SLOT_SAME | sum_low(sum) << SLOT_SUM_SHIFT | handle << SLOT_HANDLE_SHIFT | sum_high(sum) & SLOT_SIZE_MASK

cdef inline uint64_t out_slot(uint64_t place, uint32_t what, uint32_t sum) noexcept nogil:
    """The slot of a block that is out; what: payload bytes, with SLOT_OUT_ZSTD if they are zstd's, as its record has it."""
    return sum_low(sum) << SLOT_SUM_SHIFT | place << SLOT_HANDLE_SHIFT | SLOT_OUT | what

cdef inline uint32_t out_what(uint64_t slot) noexcept nogil:
    """What the record of a block that is out has as its size and kind."""
    return <uint32_t>slot & (SLOT_OUT_ZSTD | SLOT_SIZE_MASK)
