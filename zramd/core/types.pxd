"""Words, constants and records of zramd's core.

page    4096 bytes of the arena.              block   4096 bytes of the device.
span    SPAN_PAGES pages of address space at a fixed place in the arena; a zspage lives at the start of one.
zspage  the smallest run of pages that holds a whole number of chunks of one size class.
chunk   one place in a zspage; allocated, it holds a header and an object, free, the link to the next free chunk.
object  a stored payload: compressed bytes, or a raw block (huge).
obj     an object's location: its chunk's offset in the arena, in bytes. Chunks are CHUNK_ALIGN aligned.
cell    one 64-bit word of the handle table: sum << CELL_SUM_SHIFT | obj | CELL_LENT | CELL_LIVE | CELL_PIN, or a
        same-filled block's word.
handle  a cell's index, from 1; never a location, so moving an object rewrites one cell, and its owner does not notice.
slot    one 64-bit word a block: the handle of its object, and the bytes of the payload; see device/slots.pxd.
sum     with verify: half of the object's checksum; 0 without.

A span and the number of its zspage are the same number, so an obj leads to its zspage with one shift:

    obj ──>> SPAN_SHIFT──> zspages[span] ──class_index──> classes[i].size ──> chunk number

Slots, cells, payloads and the class of each span are the truth (see "crash rule" in pool.pyx); everything else can
be rebuilt from them, which recovery.pyx does.
They hold offsets and numbers, no pointers, so they mean the same wherever they are mapped.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    PAGE_SHIFT = 12
    PAGE_SIZE = 1 << PAGE_SHIFT
    BLOCK_SHIFT = 12
    BLOCK_SIZE = 1 << BLOCK_SHIFT
    SLOTS_PER_PAGE = PAGE_SIZE >> 3     # of 8 bytes

    # Longest zspage: as long as the page bitmaps allow. See docs/density.md.
    SPAN_PAGES = 16
    SPAN_SHIFT = PAGE_SHIFT + 4     # log2(SPAN_PAGES * PAGE_SIZE)
    SPAN_SIZE = 1 << SPAN_SHIFT
    SPAN_LENGTHS = SPAN_PAGES + 1   # a zspage has 1 to SPAN_PAGES pages

    HEADER_SIZE = 4             # see header_of; a handle has 31 bits, so a pool holds 2**31 - 1 objects
    CHUNK_ALIGN = 8             # the low 3 bits of an obj are free for the cell's tags
    MIN_CHUNK = 32
    CLASS_DELTA = 8             # spacing of size classes up to FINE_CHUNK before merging, twice as much above
    FINE_CHUNK = 768
    CLASS_SIZES = 513           # PAGE_SIZE / CLASS_DELTA + 1
    MAX_CLASSES = 255           # span_class holds their number + 1 in a byte
    MAX_CHUNKS = 2048           # SPAN_SIZE / MIN_CHUNK: most chunks in a zspage
    MAPPED_CHUNKS = 64          # zspages of no more chunks have a bitmap of those in use, others a list of the free ones
    NO_CHUNK = 0xFFFF
    CELLS_SLACK = 1 << 17       # handles beyond max_objects: objects that are written but not yet published by their owner

    # Fullness groups: 0 %, then up to 10, 20, … 90, 99 %, and 100 %, as zsmalloc has them since Linux 6.4.
    GROUP_EMPTY = 0
    GROUP_FULL = 11
    GROUPS = 12
    ISOLATED = 254              # taken off its list by the compactor
    NO_ZSPAGE = 255             # this span holds no zspage

    CELL_PIN = 1                # someone reads, writes, moves or frees the object
    CELL_LIVE = 2               # the cell holds an obj; clear: the cell is on the free list
    CELL_LENT = 4               # the object is in a chunk of a larger class than its own
    CELL_TAGS = 7
    CELL_TAG_BITS = 3           # of a free cell, the next free one is above
    CELL_SUM_SHIFT = 48       # the cell's half of the checksum is above: obj has 47 bits at most

cdef enum:
    NIL = 0x7FFFFFFF            # no span: end of a list

cdef struct zspage:
    # Guarded by the lock of its class; 32 bytes for 64 KiB of span.
    uint64_t used_map           # with a bitmap: the chunks in use; a free one need not be resident
    uint32_t prev               # neighbours in the list of its fullness group, as span numbers
    uint32_t next
    uint16_t inuse              # chunks that hold an object
    # With a list: chunks in use + chunks on the list == fresh. With a bitmap: all chunks.
    uint16_t fresh              # chunks below this one were used at least once; those above need not be resident
    uint16_t first_free         # head of the free list, NO_CHUNK at its end
    uint16_t class_index
    uint8_t group
    uint8_t dry                 # listed, and no free chunk is on resident pages: behind those of which that is not known

cdef inline uint64_t pages_of(uint64_t size) noexcept nogil:
    """How many pages so many bytes take."""
    return (size >> PAGE_SHIFT) + (size & (PAGE_SIZE - 1) != 0)

cdef inline uint64_t cell_obj(uint64_t cell) noexcept nogil:
    return cell << (64 - CELL_SUM_SHIFT) >> (64 - CELL_SUM_SHIFT) & ~<uint64_t>CELL_TAGS

cdef inline uint64_t free_cell(uint64_t next) noexcept nogil:
    """A free cell, with the next one on the list; 0: it is the last."""
    return next << CELL_TAG_BITS

cdef inline uint64_t next_cell(uint64_t cell) noexcept nogil:
    return cell >> CELL_TAG_BITS

cdef inline uint32_t header_of(uint64_t handle) noexcept nogil:
    """What the chunk of an object begins with."""
    return <uint32_t>handle << 1 | 1

cdef inline uint32_t free_header(uint32_t next) noexcept nogil:
    """What a free chunk begins with, where they are on a list: the next one, NO_CHUNK at the end."""
    return next << 1

cdef inline bint header_is_live(uint32_t header) noexcept nogil:
    return header & 1

cdef inline uint32_t header_handle(uint32_t header) noexcept nogil:
    return header >> 1

cdef inline uint32_t header_next(uint32_t header) noexcept nogil:
    return header >> 1
