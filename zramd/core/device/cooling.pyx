"""A block becomes cold, and hot again: functions over Blocks.

    read and decode, under the stripe    age = AGE_COOLING
    encode, without it                   by zstd, or as a write would
    obj_publish                          the new object is complete
    slot, under the stripe               if the age is AGE_COOLING still: nobody has asked for the block meanwhile
    free                                 the old object, or else the new one

One block at a time, under the cold codec's encoder_lock.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.device.ages cimport change_age
from zramd.core.device.blocks cimport AGE_COOLING, AGE_LEAVING, AGE_WANTED, STRIPES, Blocks, scratch
from zramd.core.device.checksum cimport checksum
from zramd.core.device.slots cimport (
    COLD,
    RAW,
    cold_slot,
    is_candidate,
    is_cold,
    slot_bytes,
    slot_kind,
    sum_high,
    tried_slot,
)
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

cdef int cool(Blocks table, uint64_t block, uint32_t threshold, uint8_t age, char *page, char *out) noexcept nogil:
    """Compress a block again, by the cold codec, and keep that if its chunk gets smaller: how many bytes, 0, or -errno.

    Only raw blocks, and those with a payload of threshold bytes or more, that nobody asked for in so many sweeps and
    that were not tried in vain. What zstd compressed when it was written, and does not shrink any more, is cold as it
    is. page and out have room for a block each. -EAGAIN: a request has asked for it meanwhile. -ENOSPC, -EDQUOT,
    -ENOMEM: there is no room for both, and none is made; -ENOBUFS: half of the reserve is left, which is for requests.
    Whoever reads or writes it waits for a decompression at most.
    """
    cdef int rc
    if load_relaxed_8(&table.ages[block]) < age or table.get(block) == 0:
        return 0
    # One at a time: two could take each other's mark for their own.
    pthread_mutex_lock(&table.cold.encoder_lock)
    rc = _cool(table, block, threshold, age, page, out)
    pthread_mutex_unlock(&table.cold.encoder_lock)
    return rc


cdef int _cool(Blocks table, uint64_t block, uint32_t threshold, uint8_t age, char *page, char *out) noexcept nogil:
    cdef uint64_t slot, now = 0
    cdef uint32_t size
    cdef uint8_t before
    cdef bint stored
    cdef int rc
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    slot = table.get(block)
    size = slot_bytes(slot)
    before = load_relaxed_8(&table.ages[block])
    if before < age or before == AGE_LEAVING or not is_candidate(slot, threshold):
        pthread_mutex_unlock(&table.stripes[block % STRIPES])
        return 0
    rc = table._load(block, slot, page)
    if rc:
        # It was changed in memory, and that is counted: once is enough.
        now = tried_slot(slot)
        store_release(&table.slots[block], now)
        _count_cold(table, slot, now)
    else:
        # A request puts another age here, and so takes the mark off: the slot alone does not say so, as the same handle
        # may have come back with other content of the same size.
        store_relaxed_8(&table.ages[block], AGE_COOLING)
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    if rc:
        return rc
    zr_point(points.cooling_read)
    size = table.cold.encode(page, out, table.pool.payload_below(size))
    if size:
        rc = _store_cold(table, block, out, size, &now)
    else:
        now = tried_slot(slot)
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    stored = load_relaxed_8(&table.ages[block]) == AGE_COOLING
    if stored:
        store_relaxed_8(&table.ages[block], before)
        if rc == 0:
            store_release(&table.slots[block], now)
            if is_cold(now):
                zr_point(points.cold_stored)
            _count_cold(table, slot, now)
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    if size == 0 and stored:
        counter_add(&table.counters.recompress_useless, 1)
    if rc or size == 0:
        return rc
    table._free(block, slot if stored else now)
    if not stored:
        return -EAGAIN
    counter_add(&table.counters.recompressed, 1)
    counter_add(&table.counters.recompress_saved, slot_bytes(slot) - size)
    return slot_bytes(slot) - size


cdef inline void _count_cold(Blocks table, uint64_t slot, uint64_t now) noexcept nogil:
    """Count a block whose slot the cold codec has changed; one that it did not shrink is what it was, but for zstd's."""
    if is_cold(now):
        table._count(now, 1)
        table._count(slot, <uint64_t>-1)


cdef int _store_cold(Blocks table, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil:
    """Store a cold payload; the slot that stands for it. Errors as cool."""
    cdef uint64_t handle = 0
    cdef uint32_t sum = 0
    cdef char *place
    cdef int rc = table.pool.obj_alloc(size, &handle, &place, True)
    if rc:
        return rc
    if table.verify:
        sum = checksum(payload, size, block)
    memcpy(place, payload, size)
    table.pool.obj_publish(handle, sum_high(sum))
    zr_point(points.cold_published)
    slot[0] = cold_slot(handle, size, sum)
    return 0


cdef int promote(Blocks table, uint64_t block, scratch *s) noexcept nogil:
    """_promote, one at a time with cool: two could take each other's mark for their own."""
    cdef int rc
    pthread_mutex_lock(&table.cold.encoder_lock)
    rc = _promote(table, block, s)
    pthread_mutex_unlock(&table.cold.encoder_lock)
    return rc


cdef int _promote(Blocks table, uint64_t block, scratch *s) noexcept nogil:
    """Store a cold block as a write would, if it has AGE_WANTED: 1, 0, or -errno.

    0: it is not to be, or it would be raw. -EAGAIN: a request has asked for it meanwhile. -ENOSPC, -EDQUOT, -ENOMEM: there
    is no room for both, and none is made. The steps are those of cool.
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
