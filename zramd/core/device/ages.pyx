"""How long nobody has asked for a block, and what follows from it: functions over Blocks.

    age 0 to 127      sweeps since a request asked for it: the server makes one every 10 s
    128 to 252        the same, but only each 16th sweep counts
    253, AGE_WANTED   a cold block that was read in two sweeps within 30 s
    254, AGE_IDLE     marked by hand
    255, AGE_COOLING  it is being made cold, or hot again

A request makes it 0, whatever it was, but for AGE_WANTED: see Blocks._read_again. Ages are hints: nothing is wrong with one
that is.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.device.blocks cimport (
    AGE_COARSE,
    AGE_COOLING,
    AGE_IDLE,
    AGE_OLDEST,
    AGE_WANTED,
    STRIPES,
    Blocks,
    is_touched,
    scratch,
)
from zramd.core.device.slots cimport COLD, RAW, SLOT_COLD, SLOT_TRIED, has_object, is_candidate, slot_kind
from zramd.core.system cimport points
from zramd.core.system.locks cimport (
    counter_add,
    load_relaxed_8,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed_8,
    store_release,
)
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport SLOTS_PER_PAGE

cdef extern from *:
    """
    /* the age of a block, if no request has asked for it meanwhile */
    #define change_age(p, old, new) ({ uint8_t expected = (old); \
        __atomic_compare_exchange_n((p), &expected, (new), 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED); })
    """
    bint change_age(uint8_t *p, uint8_t old, uint8_t new) noexcept nogil


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
            if now == AGE_WANTED and age or now < age or now == AGE_COOLING:
                continue
            if now == AGE_IDLE or change_age(&table.ages[block], now, AGE_IDLE):
                marked += 1
    return marked


cdef int promote(Blocks table, uint64_t block, scratch *s) noexcept nogil:
    """_promote, one at a time with Blocks.cool: two could take each other's mark for their own."""
    cdef int rc
    pthread_mutex_lock(&table.cold.encoder_lock)
    rc = _promote(table, block, s)
    pthread_mutex_unlock(&table.cold.encoder_lock)
    return rc


cdef int _promote(Blocks table, uint64_t block, scratch *s) noexcept nogil:
    """Store a cold block as a write would, if it has AGE_WANTED: 1, 0, or -errno.

    0: it is not to be, or it would be raw. -EAGAIN: a request has asked for it meanwhile. -ENOSPC, -EDQUOT, -ENOMEM: there
    is no room for both, and none is made. The steps are those of Blocks.cool.
    """
    cdef uint64_t slot, now = 0
    cdef bint stored = False
    cdef int rc
    if load_relaxed_8(&table.ages[block]) != AGE_WANTED:
        return 0
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    slot = table.get(block)
    if slot_kind(slot) != COLD:
        pthread_mutex_unlock(&table.stripes[block % STRIPES])
        return 0
    rc = table._load(block, slot, s.page)
    # What cannot be read is not tried again before others read it.
    store_relaxed_8(&table.ages[block], 1 if rc else AGE_COOLING)
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    if rc:
        return rc
    zr_point(points.warming_read)
    rc = table._store(block, s.page, s, &now, False)
    if rc or slot_kind(now) == RAW:
        change_age(&table.ages[block], AGE_COOLING, 1)
        if rc == 0:
            table._free(block, now)
        return rc
    zr_point(points.warm_published)
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    if load_relaxed_8(&table.ages[block]) == AGE_COOLING:
        stored = True
        store_release(&table.slots[block], now)
        store_relaxed_8(&table.ages[block], 0)
        zr_point(points.warm_stored)
        table._count(now, 1)
        table._count(slot, <uint64_t>-1)
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    table._free(block, slot if stored else now)
    if not stored:
        return -EAGAIN
    counter_add(&table.counters.promoted, 1)
    return 1
