"""Looks whether a table of blocks, its pool and its backing agree: for Device.check. Nothing is mended."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.device.blocks cimport Blocks, is_touched
from zramd.core.device.frames cimport is_cold_payload
from zramd.core.device.slots cimport (
    COLD,
    HOLE,
    LOST,
    OUT,
    RAW,
    SAME,
    SLOT_COLD,
    block_kind,
    has_object,
    is_known,
    is_out,
    slot_bytes,
    slot_handle,
    slot_kind,
)
from zramd.core.pool.compaction cimport compact_begin, compact_end
from zramd.core.pool.faults cimport find_pool_fault, find_zspage_fault
from zramd.core.system.gate cimport gate, gate_close, gate_open
from zramd.core.system.locks cimport load_relaxed, load_relaxed_32, nap
from zramd.core.types cimport SLOTS_PER_PAGE

cdef enum:
    PIECE_SLOTS = 2048      # of a walk: 0.1 ms, with verify 0.4
    PIECE_CHUNKS = 8192

cdef struct walk:
    # How far it is; zeros to begin with.
    uint64_t block
    uint32_t span
    bint done


cdef const char *find_table_fault(Blocks table, gate *closed, uint64_t *where) noexcept nogil:
    """Walk every structure, piece by piece with the gate closed; NULL, or what is wrong, with a block, handle or span
    in where[0]."""
    cdef const char *wrong = NULL
    cdef walk w
    memset(&w, 0, sizeof(w))
    while wrong == NULL and not w.done:
        gate_close(closed)
        compact_begin(table.pool)
        wrong = find_piece_fault(table, &w, where)
        compact_end(table.pool)
        gate_open(closed)
        if not w.done:
            nap()       # a waiter at the gate only wakes up now, and is not to find it closed again
    return wrong


cdef const char *find_piece_fault(Blocks table, walk *w, uint64_t *where) noexcept nogil:
    """A piece of that walk, until w.done. Nobody else may be here, but between two pieces they may.

    First each slot with its object, then each zspage with its chunks: what is right or wrong by itself. Last, and at
    one moment, all that is counted and listed.
    """
    if w.block < table.count:
        return find_slot_fault(table, w, where)
    if w.span < load_relaxed_32(&table.pool.arena.top):
        return find_zspage_fault(table.pool, &w.span, PIECE_CHUNKS, where)
    w.done = True
    return find_count_fault(table, where)


cdef const char *find_slot_fault(Blocks table, walk *w, uint64_t *where) noexcept nogil:
    """Look whether some slots lead to what they stand for."""
    cdef uint64_t block, slot, handle, left = PIECE_SLOTS
    cdef uint32_t size
    cdef const char *wrong
    cdef char *payload
    while left and w.block < table.count:
        left -= 1
        block = where[0] = w.block
        if not is_touched(&table.touched[block // SLOTS_PER_PAGE]):
            w.block += SLOTS_PER_PAGE - block % SLOTS_PER_PAGE
            continue
        w.block += 1
        slot = table.slots[block]
        handle = slot_handle(slot)
        size = slot_bytes(slot)
        if not is_known(slot):
            return "a slot is of no kind"
        if is_out(slot) and not table.is_away(slot):
            return "a slot leads beyond the backing"
        if slot_kind(slot) == SAME and not table.word_is_sound(block, slot, table.word_of(slot)):
            return "a slot's checksum differs from its word"
        if not has_object(slot):
            continue
        if table.pool.obj_begin(handle, &payload):
            return "a slot's handle is not live"
        wrong = NULL
        if size == 0 or size > table.pool.obj_capacity(handle):
            wrong = "a slot's size does not fit its object"
        elif not table.object_is_sound(block, slot, payload):
            wrong = "a slot's checksum differs from its object"
        elif slot & SLOT_COLD and not is_cold_payload(payload, size):
            wrong = "a cold payload does not begin as one"
        table.pool.obj_end(handle)
        if wrong != NULL:
            return wrong
    return NULL


cdef const char *find_count_fault(Blocks table, uint64_t *where) noexcept nogil:
    """Look whether the counters are those of the slots, and the pool's those of the cells.

    Slots are unique when their handles are as many as the cells.
    """
    cdef uint64_t block, slot, touched = 0
    cdef uint64_t stored = 0, lost = 0, same = 0, words = 0, huge = 0, compr = 0, cold = 0, cold_size = 0
    cdef uint64_t out = 0, out_size = 0, records = 0
    cdef block_kind what
    where[0] = 0
    for block in range(table.count // SLOTS_PER_PAGE + 1):
        touched += table.touched[block]
    if touched != table.touched_pages:
        return "the count of touched slot pages is wrong"
    block = 0
    while block < table.count:
        if not is_touched(&table.touched[block // SLOTS_PER_PAGE]):
            block += SLOTS_PER_PAGE - block % SLOTS_PER_PAGE
            continue
        slot = table.slots[block]
        block += 1
        what = slot_kind(slot)
        stored += what != HOLE
        lost += what == LOST
        same += what == SAME
        words += what == SAME and slot_handle(slot) != 0
        huge += what == RAW
        if has_object(slot):
            compr += slot_bytes(slot)
        if what == OUT:
            out += 1
            out_size += slot_bytes(slot)
            records += 0 if table.backing is None else table.backing.record_bytes(slot_bytes(slot))
        if what == COLD:
            cold += 1
            cold_size += slot_bytes(slot)
    if (cold != table.counters.cold_pages or cold_size != table.counters.cold_data_size):
        return "the counters of the cold blocks differ from the slots"
    if out != table.counters.out_pages or out_size != table.counters.out_data_size:
        return "the counters of the blocks that are out differ from the slots"
    if table.backing is not None and records != load_relaxed(&table.backing.live):
        return "the extents' live bytes differ from the slots"
    if (stored != table.counters.pages_stored or same != table.counters.same_pages
            or compr != table.counters.compr_data_size or huge != table.counters.huge_pages):
        return "the counters differ from the slots"
    if stored - lost - same - out + words != table.pool.cells_used:
        return "the slots' handles are not as many as the cells in use"
    return find_pool_fault(table.pool, where, words)
