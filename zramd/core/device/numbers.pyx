"""What can be asked of a table of blocks: its counters, how long requests took, what stands for a block.

Nothing here is counted: that is done where it happens.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.device.blocks cimport (
    AGE_COARSE,
    AGE_COOLING,
    AGE_IDLE,
    AGE_LEAVING,
    AGE_OLDEST,
    AGE_WANTED,
    OP_READ,
    OP_TRIM,
    OP_WRITE,
    OP_ZERO,
    STRIPES,
    Blocks,
    counters,
    is_touched,
)
from zramd.core.device.slots cimport (
    COLD,
    HOLE,
    LOST,
    LZ4,
    OUT,
    RAW,
    SAME,
    SLOT_OUT_ZSTD,
    SLOT_TRIED,
    block_kind,
    has_object,
    is_cold,
    slot_bytes,
    slot_handle,
    slot_kind,
)
from zramd.core.pool.zsmalloc cimport object_place, place
from zramd.core.system.gate cimport gate, gate_enter, gate_leave
from zramd.core.system.latency cimport BUCKETS
from zramd.core.system.locks cimport load_relaxed, load_relaxed_8, pthread_mutex_lock, pthread_mutex_unlock
from zramd.core.system.words cimport number_words, read_words
from zramd.core.types cimport BLOCK_SHIFT, BLOCK_SIZE, SLOTS_PER_PAGE

from zramd.errors import CorruptionError

cdef enum:
    COARSE_SWEEPS = 16      # in a coarse sweep
    LINE = 40               # bytes of a line of block_state
    LOOKS = 64 << 10        # slots to look at before others may have the device to themselves: 0.1 ms


cdef dict counter_indexes():
    cdef counters fields
    cdef dict found
    number_words(<uint64_t *>&fields, sizeof(fields))
    found = fields
    del found["unused"], found["corrupt_block"]
    return found


cdef dict COUNTERS = counter_indexes()      # each is a statistic


cdef dict table_stats(Blocks table):
    """The numbers of a table by the names of the statistics, as a dict of ints."""
    return read_words(<uint64_t *>table.counters, COUNTERS) | {
        "orig_data_size": load_relaxed(&table.counters.pages_stored) << BLOCK_SHIFT,
        "reads": requests(table, OP_READ),
        "writes": requests(table, OP_WRITE),
        "trims": requests(table, OP_TRIM),
        "zeroes": requests(table, OP_ZERO),
        "metadata_bytes": table.metadata_bytes(),
    }


cdef dict table_latencies(Blocks table):
    """See Device.latencies."""
    cdef int kind, i
    found = {}
    for kind, name in enumerate(("read", "write", "trim", "zero")):
        counts = tuple([load_relaxed(&table.counters.latencies[kind].buckets[i]) for i in range(BUCKETS)])
        found[name] = (load_relaxed(&table.counters.latencies[kind].sum), counts)
    return found


cdef dict describe_block(Blocks table, uint64_t number):
    """See Device.block. Nobody resets the table meanwhile."""
    cdef uint64_t slot, word = 0
    cdef block_kind what
    cdef place at
    cdef int rc = 0
    with nogil:
        pthread_mutex_lock(&table.stripes[number % STRIPES])
        slot = table.get(number)
        what = slot_kind(slot)
        if what == SAME:
            word = table.word_of(slot)
        elif has_object(slot):
            rc = object_place(table.pool, slot_handle(slot), &at)
        pthread_mutex_unlock(&table.stripes[number % STRIPES])
    if rc:
        raise CorruptionError(f"a slot's handle is not live (at {number})")
    if what == HOLE:
        return {"block": number, "kind": "hole"}
    if what == LOST:
        return {"block": number, "kind": "lost"}
    if what == SAME:
        return {"block": number, "kind": "same", "word": word, "handle": slot_handle(slot)}
    if what == OUT:
        return {
            "block": number,
            "kind": "out",
            "codec": "raw" if slot_bytes(slot) == BLOCK_SIZE else "zstd" if slot & SLOT_OUT_ZSTD else "lz4",
            "payload_bytes": slot_bytes(slot),
            "place": slot_handle(slot) * table.backing.granule,
        }
    return {
        "block": number,
        "kind": "raw" if what == RAW else "zstd" if is_cold(slot) else "lz4",
        "handle": slot_handle(slot),
        "payload_bytes": slot_bytes(slot),
        "obj": at.obj,
        "zspage": at.span,
        "chunk": at.chunk,
        "class_index": at.class_index,
        "class_size": at.class_size,
        "zspage_inuse": at.inuse,
        "zspage_objs": at.objs,
        "zspage_pages": at.pages,
    }


# ------------------------------------------------------------------------------------------------------------
# zram's block_state

cdef inline void put_digits(char *end, uint64_t n, uint32_t width, char pad) noexcept nogil:
    """Write a number that ends before end, in so many characters: what is missing at its left is pad."""
    cdef uint32_t i
    for i in range(1, width + 1):
        (end - i)[0] = <char>(c'0' + n % 10) if n or i == 1 else pad
        n //= 10

cdef inline uint64_t accessed(uint8_t age, uint64_t now, uint64_t sweep) noexcept nogil:
    """When a block was asked for, on now's clock: 0 for one that is marked idle, as nobody knows any more."""
    cdef uint64_t sweeps = age
    if age == AGE_WANTED:
        return now
    if age == AGE_IDLE:
        return 0
    if age == AGE_COOLING or age == AGE_LEAVING:
        sweeps = AGE_OLDEST
    if sweeps > AGE_COARSE:
        sweeps = AGE_COARSE + (sweeps - AGE_COARSE) * COARSE_SWEEPS
    return now - min(sweeps * sweep, now)

cdef inline void put_line(char *out, uint64_t block, uint64_t slot, uint8_t age, uint64_t when) noexcept nogil:
    """Write what zram prints with "%12zd %12u.%06d %c%c%c%c%c%c"; the fraction is always 0, there too.

    The flags: same-filled, written back, huge, idle, recompressed, incompressible.
    """
    cdef block_kind what = slot_kind(slot)
    memset(out, c' ', LINE)
    put_digits(out + 12, block, 12, c' ')
    put_digits(out + 25, when, 12, c' ')
    out[25] = c'.'
    put_digits(out + 32, 0, 6, c'0')
    memset(out + 33, c'.', 6)
    if what == SAME:
        out[33] = c's'
    if what == OUT:
        out[34] = c'w'
    if what == RAW or (what == OUT and slot_bytes(slot) == BLOCK_SIZE):
        out[35] = c'h'
    if age == AGE_IDLE and what != SAME:
        out[36] = c'i'
    if what == COLD or (what == OUT and slot & SLOT_OUT_ZSTD):
        out[37] = c'r'
    if (what == RAW or what == LZ4) and slot & SLOT_TRIED:
        out[38] = c'n'
    out[39] = c'\n'

cdef uint32_t describe_blocks(
    Blocks table, gate *entrance, char *out, uint32_t room, uint64_t *block, uint64_t now, uint64_t sweep
) noexcept nogil:
    """Write lines for the blocks that are stored, from block[0] on, into room bytes; how many were written.

    Stops when the room is used up, or enough was looked at. block[0]: with which to go on. now: seconds on the clock that is
    shown; sweep: seconds of a sweep.
    """
    cdef uint64_t slot
    cdef uint32_t written = 0, looks = 0
    cdef uint8_t age
    gate_enter(entrance)
    while block[0] < table.count and written + LINE <= room and looks < LOOKS:
        looks += 1
        if not is_touched(&table.touched[block[0] // SLOTS_PER_PAGE]):
            block[0] += SLOTS_PER_PAGE - block[0] % SLOTS_PER_PAGE
            continue
        slot = table.get(block[0])
        if slot:
            age = load_relaxed_8(&table.ages[block[0]])
            put_line(out + written, block[0], slot, age, accessed(age, now, sweep))
            written += LINE
        block[0] += 1
    gate_leave(entrance)
    return written
