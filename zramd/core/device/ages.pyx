"""How long nobody has asked for a block, and what follows from it: functions over Blocks.

    age 0 to 127      sweeps since a request asked for it: the server makes one every 10 s
    128 to 251        the same, but only each 16th sweep counts
    252, AGE_LEAVING  it is being written to the backing
    253, AGE_WANTED   a cold block that was read in two sweeps within 30 s, or one that is out, within 10 min
    254, AGE_IDLE     marked by hand
    255, AGE_COOLING  it is being made cold, or hot again

A request makes it 0, whatever it was, but for AGE_WANTED: see Blocks._read_again. Ages are hints: nothing is wrong with one
that is.
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
    Blocks,
    is_read,
    is_touched,
)
from zramd.core.device.slots cimport RAW, SLOT_COLD, SLOT_TRIED, has_object, is_candidate, slot_bytes, slot_kind
from zramd.core.system.locks cimport load_relaxed_8, store_relaxed_8
from zramd.core.types cimport BLOCK_SIZE, SLOTS_PER_PAGE


cdef void sweep(Blocks table, bint coarse, bint keep, uint32_t threshold, census *found) noexcept nogil:
    """Let every block grow older by a sweep, the old ones only in a coarse one, and count them.

    keep: those that are to be hot again are still to be. A request may come between the look and the store: then the block
    is taken for older than it is, once.
    """
    cdef uint64_t page, block, slot
    cdef uint8_t age
    memset(found, 0, sizeof(found[0]))
    for page in range(table.count // SLOTS_PER_PAGE + 1):
        if not is_touched(&table.touched[page]):
            continue
        for block in range(page * SLOTS_PER_PAGE, min((page + 1) * SLOTS_PER_PAGE, table.count)):
            age = load_relaxed_8(&table.ages[block])
            if age < AGE_COARSE or (coarse and age < AGE_OLDEST):
                age += 1
                store_relaxed_8(&table.ages[block], age)
            elif age == AGE_WANTED and not keep:
                age = 1
                store_relaxed_8(&table.ages[block], age)
            slot = table.get(block)
            if slot == 0:
                continue
            found.stored[age] += 1
            if has_object(slot):
                if is_read(table.reads, block):
                    found.read[age] += slot_bytes(slot)
                else:
                    found.unread[age] += slot_bytes(slot)
                if slot_kind(slot) == RAW:
                    found.huge[age] += BLOCK_SIZE
            elif age == AGE_WANTED:
                found.back += 1
            if is_candidate(slot, threshold):
                if slot_kind(slot) == RAW:
                    found.raw[age] += 1
                else:
                    found.others[age] += 1
            elif has_object(slot) and slot & SLOT_TRIED and not slot & SLOT_COLD:
                found.tried += 1


cdef uint64_t mark_idle(Blocks table, uint8_t age) noexcept nogil:
    """Give each block with an object that has this age, or a greater one, AGE_IDLE; how many have it now."""
    cdef uint64_t page, block, marked = 0
    cdef uint8_t now
    for page in range(table.count // SLOTS_PER_PAGE + 1):
        if not is_touched(&table.touched[page]):
            continue
        for block in range(page * SLOTS_PER_PAGE, min((page + 1) * SLOTS_PER_PAGE, table.count)):
            if not has_object(table.get(block)):
                continue
            now = load_relaxed_8(&table.ages[block])
            if now == AGE_WANTED and age or now < age or now == AGE_COOLING or now == AGE_LEAVING:
                continue
            if now == AGE_IDLE or change_age(&table.ages[block], now, AGE_IDLE):
                marked += 1
    return marked
