"""Several blocks that are out by one read of the backing.

Neighbours go out together, so what a request of some blocks asks for mostly lies side by side. A read of 16 KiB takes hardly
longer than one of 4, and each by itself has the disk's whole latency.

The extent is pinned by the first block's slot. While it is, nothing of it is written again: what a neighbour's slot leads to
after that is what it had at that moment, and that is within the request.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport STRIPES, Blocks, scratch
from zramd.core.system cimport points
from zramd.core.system.locks cimport load_relaxed_8, pthread_mutex_lock, pthread_mutex_unlock
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport BLOCK_SHIFT


cdef bint find_near(Blocks table, uint64_t block, uint64_t most, near *found) noexcept nogil:
    """Find out how many blocks, of so many from this one on, one read brings; False: one at most.

    True: they are noted as read, and the first one's slot is pinned.
    """
    cdef uint32_t size
    found.block = block
    found.count = 1
    if not table.pin_away(block, &found.slots[0]):
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
    """Read them into dst, a block each; it waits for the disk, and holds nothing else.

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
        if payload == NULL or table.decode_away(found.slots[i], payload, dst + (<uint64_t>i << BLOCK_SHIFT)):
            return i
    return found.count
