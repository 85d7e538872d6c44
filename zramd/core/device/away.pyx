"""Reads blocks that are out, one or several by one read of the backing. That waits for the disk, and no lock is held for it.

    pin_away  -> load_away      one: pin what its slot leads to, then read that
    find_near -> load_near      those that lie side by side

Neighbours go out together, so what a request of some blocks asks for mostly lies side by side. A read of 16 KiB takes hardly
longer than one of 4, and each by itself has the disk's whole latency.

The extent is pinned by the first block's slot. While it is, nothing of it is written again: what a neighbour's slot leads to
after that is what it had at that moment, and that is within the request.
"""

from libc.errno cimport EBADMSG, EREMOTEIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport STRIPES, Blocks, scratch
from zramd.core.device.codec cimport decode
from zramd.core.device.slots cimport SLOT_OUT_ZSTD, slot_bytes
from zramd.core.system cimport points
from zramd.core.system.locks cimport (
    counter_add,
    load_relaxed_8,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
)
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport BLOCK_SHIFT


cdef bint pin_away(Blocks table, uint64_t block, uint64_t *slot) noexcept nogil:
    """Keep what a block that is out has on the backing, until it is unpinned; False: it is not out."""
    cdef bint found
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    slot[0] = table.get(block)
    found = table.is_away(slot[0])
    if found:
        table.backing.pin(slot[0])
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    return found


cdef int load_away(Blocks table, uint64_t block, uint64_t slot, scratch *s) noexcept nogil:
    """Read what a pinned slot leads to into s.page.

    0; -EREMOTEIO: the backing cannot be read; -EBADMSG: it has something else there.
    """
    cdef const char *payload
    cdef int rc
    zr_point(points.away_pinned)
    rc = table.backing.load(block, slot, s.room, &payload, &table.counters.bd_reads)
    zr_point(points.away_read)
    if rc == 0:
        if decode_away(table, slot, payload, s.page):
            rc = -EBADMSG
    elif rc != -EBADMSG:
        rc = -EREMOTEIO
    if rc:
        counter_add(&table.counters.bd_read_errors, 1)
        store_relaxed(&table.counters.corrupt_block, block + 1)
    return rc


cdef int decode_away(Blocks table, uint64_t slot, const char *payload, char *content) noexcept nogil:
    """The content of a block whose slot says that it is out; 0 or -EIO."""
    if slot & SLOT_OUT_ZSTD:
        return table.cold.decode(payload, slot_bytes(slot), content)
    return decode(payload, slot_bytes(slot), content)


cdef bint find_near(Blocks table, uint64_t block, uint64_t most, near *found) noexcept nogil:
    """Find out how many blocks, of so many from this one on, one read brings; False: one at most.

    True: they are noted as read, and the first one's slot is pinned.
    """
    cdef uint32_t size
    found.block = block
    found.count = 1
    if not pin_away(table, block, &found.slots[0]):
        return False
    found.size = table.backing.reach(found.slots[0], found.slots[0])
    while found.count < min(most, <uint64_t>TOGETHER):
        size = see_near(table, block + found.count, found.slots[0], &found.slots[found.count])
        if size == 0:
            break
        found.size = max(found.size, size)
        found.count += 1
    if found.count == 1:
        table.backing.unpin(found.slots[0])
        return False
    return True


cdef uint32_t see_near(Blocks table, uint64_t block, uint64_t first, uint64_t *slot) noexcept nogil:
    """Note that a block is read if a read from what slot `first` leads to reaches it, too: its bytes, 0: it does not."""
    cdef uint32_t size = 0
    cdef uint8_t age
    pthread_mutex_lock(&table.stripes[block % STRIPES])
    slot[0] = table.get(block)
    if table.is_away(slot[0]):
        size = table.backing.reach(first, slot[0])
        if size:
            age = load_relaxed_8(&table.ages[block])
            if age:
                table._read_again(block, age)
    pthread_mutex_unlock(&table.stripes[block % STRIPES])
    return size


cdef uint32_t load_near(Blocks table, const near *found, char *dst, scratch *s) noexcept nogil:
    """Read them into dst, a block each.

    How many there are before the first that is not what its slot says; 0 also if the disk cannot be read.
    """
    cdef const char *payload
    cdef uint32_t i
    cdef int rc
    zr_point(points.away_pinned)
    rc = table.backing.fetch(found.slots[0], found.size, s.room, &table.counters.bd_reads)
    zr_point(points.away_read)
    if rc:
        return 0
    for i in range(found.count):
        payload = table.backing.payload_of(found.block + i, found.slots[i], found.slots[0], s.room)
        if payload == NULL or decode_away(table, found.slots[i], payload, dst + (<uint64_t>i << BLOCK_SHIFT)):
            return i
    return found.count
