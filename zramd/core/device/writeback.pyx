"""What writes blocks to the backing, and brings them back: the hands of zramd.server.writeback.

    gather    payloads, as they are in the pool, into the buffer: an extent     age = AGE_LEAVING
    reclaim   the same of what still lives in the emptiest extent
    flush     the buffer -> a free extent -> each slot, if nobody has asked for its block meanwhile -> free the object

No lock is held during I/O but this object's own, which no request takes. A block's slot is changed once its record is on the
backing, and what it was in memory is freed last: a process killed at any moment loses nothing. Each step enters the
device's gate for one block at a time. A real-time thread is an ordinary one meanwhile.
"""

cimport cython
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from zramd.core.device.away cimport pin_away
from zramd.core.device.backing cimport (
    EXTENT_BYTES,
    EXTENT_READER,
    EXTENT_SHIFT,
    RECORD_HEAD,
    ROOM,
    extent_head,
    record,
    record_sum,
)
from zramd.core.device.blocks cimport (
    AGE_IDLE,
    AGE_LEAVING,
    AGE_OLDEST,
    AGE_WANTED,
    OUT_READ_AGAIN,
    STRIPES,
    Blocks,
    clear_read,
    is_read,
    is_touched,
)
from zramd.core.device.checksum cimport crc_of
from zramd.core.device.device cimport Device
from zramd.core.device.slots cimport (
    RAW,
    SLOT_COLD,
    SLOT_OUT_ZSTD,
    SLOT_SIZE_MASK,
    SLOT_TRIED,
    has_object,
    is_cold,
    is_out,
    out_slot,
    out_what,
    slot_bytes,
    slot_handle,
    slot_kind,
    slot_sum,
    sum_low,
)
from zramd.core.memory.region cimport secret_alloc, secret_free
from zramd.core.system cimport points
from zramd.core.system.gate cimport gate_enter, gate_leave
from zramd.core.system.latency cimport system_now
from zramd.core.system.locks cimport (
    counter_add,
    counter_sub,
    load_relaxed,
    load_relaxed_8,
    mutex_inherit,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed_8,
    store_release,
)
from zramd.core.system.points cimport zr_point
from zramd.core.system.process cimport be_calm, be_urgent
from zramd.core.types cimport BLOCK_SIZE, SLOTS_PER_PAGE

import os

cdef extern from "<errno.h>":
    int EXFULL

cdef enum:
    LOOK = 1 << 16              # blocks that a step looks at, at most: 0.1 ms
    FILL_TRIES = 16             # blocks without room before an extent is full: a smaller one may fit, 1.5 % fewer bytes
    BACK = 64                   # blocks that a step brings back, at most
    PAGE = 4096                 # the unit of what is written

cdef const char *magic = b"zramdext"


@cython.final
cdef class Writeback:
    """Writes blocks of a device to its backing, and brings them back, in steps. Any thread may call it; one does.

    A device has one: two would take each other's marks for their own.

    Raises ValueError for a device without a backing, MemoryError.
    """

    def __cinit__(self, Device device not None):
        pthread_mutex_init(&self.lock, NULL)
        mutex_inherit(&self.lock)
        self.device = device
        self.backing = device.table.backing
        if self.backing is None:
            raise ValueError("the device has no backing")
        self.buffer = <char *>secret_alloc(EXTENT_BYTES)
        self.other = <char *>secret_alloc(EXTENT_BYTES)
        self.entries = <entry *>secret_alloc(MOST_RECORDS * sizeof(entry))
        if self.buffer == NULL or self.other == NULL or self.entries == NULL:
            raise MemoryError(f"no memory to write back in: {2 * EXTENT_BYTES} bytes")
        self.used = self.backing.head

    def __dealloc__(self):
        if self.count or self.source_count:
            self._forget(self.device.table)
        secret_free(self.buffer, EXTENT_BYTES)
        secret_free(self.other, EXTENT_BYTES)
        secret_free(self.entries, MOST_RECORDS * sizeof(entry))
        pthread_mutex_destroy(&self.lock)

    @property
    def pending(self):
        """Bytes in the buffer, 0: it is empty."""
        return self.used if self.count else 0

    def drop(self):
        """Empty the buffer: what is in it stays where it was."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self._forget(self.device.table)
            pthread_mutex_unlock(&self.lock)

    cdef void _forget(self, Blocks table) noexcept nogil:
        cdef uint32_t i
        cdef entry *e
        for i in range(self.count):
            e = &self.entries[i]
            if e.moves:
                continue
            pthread_mutex_lock(&table.stripes[e.block % STRIPES])
            if load_relaxed_8(&table.ages[e.block]) == AGE_LEAVING:
                store_relaxed_8(&table.ages[e.block], e.age)
            pthread_mutex_unlock(&table.stripes[e.block % STRIPES])
        for i in range(self.source_count):
            counter_sub(&self.backing.words[self.sources[i]], EXTENT_READER)
        self.count = self.moving = self.source_count = 0
        self.used = self.backing.head

    # --------------------------------------------------------------------------------------------------------
    # gather

    def gather(self, uint64_t first, uint64_t end, uint8_t age, bint raw=False, bint idle=False, bint unread=False,
               bint tried=False):
        """Copy payloads of blocks into the buffer: (next, taken, full).

        From block `first` on, not beyond `end`, and of 65,536 at most: those with an object that are `age` old or older
        (raw: that are raw; idle: that are marked; unread: that nobody has read since they were written; tried: that
        recompression did not shrink). Of those that are marked nobody knows the age: they are of none but 0. next: where to
        go on. taken: how many are in the buffer now that were not. full: the next one has no room there, nor have some
        after it. Raises what marks a state as one with blocks that are out.
        """
        cdef uint64_t taken = 0
        cdef bint full
        cdef int priority
        cdef wanted which
        which.age, which.raw, which.idle, which.unread, which.tried = age, raw, idle, unread, tried
        self.device._expect_out()
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            full = self._gather(self.device.table, &first, min(end, self.device.blocks), &which, &taken)
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
        return first, taken, full

    cdef bint _has_room(self, uint32_t size) noexcept nogil:
        return self.count < MOST_RECORDS and self.used + self.backing.record_bytes(size) <= EXTENT_BYTES

    cdef bint _gather(self, Blocks table, uint64_t *block, uint64_t end, const wanted *which,
                      uint64_t *taken) noexcept nogil:
        """gather; whether the buffer is full."""
        cdef uint64_t left = LOOK, slot, at = block[0]
        cdef uint32_t tries = FILL_TRIES
        while at < end and left and tries:
            left -= 1
            if not is_touched(&table.touched[at // SLOTS_PER_PAGE]):
                at += SLOTS_PER_PAGE - at % SLOTS_PER_PAGE
                continue
            slot = table.get(at)
            if is_leaving(table, at, slot, which):
                if self._has_room(slot_bytes(slot)):
                    gate_enter(&self.device.gate)
                    taken[0] += self._copy(table, at, which)
                    gate_leave(&self.device.gate)
                else:
                    if tries == FILL_TRIES:
                        block[0] = at
                    tries -= 1
            at += 1
        if tries < FILL_TRIES:
            return True
        block[0] = at
        return False

    cdef bint _copy(self, Blocks table, uint64_t block, const wanted *which) noexcept nogil:
        """Copy a block's payload into the buffer, if it is still to go out; whether it is there."""
        cdef uint64_t slot
        cdef uint32_t size
        cdef char *payload
        cdef char *room = self.buffer + self.used + RECORD_HEAD
        cdef bint is_sound = False
        cdef entry *e = &self.entries[self.count]
        pthread_mutex_lock(&table.stripes[block % STRIPES])
        slot = table.get(block)
        size = slot_bytes(slot)
        if is_leaving(table, block, slot, which) and self._has_room(size) and table.pool.obj_begin(
                slot_handle(slot), &payload) == 0:
            # One that was changed in memory stays there, where whoever reads it is told.
            is_sound = size > 0 and table.object_is_sound(block, slot, payload)
            if is_sound:
                memcpy(room, payload, size)
                e.slot = slot
                e.age = load_relaxed_8(&table.ages[block])
                e.moves = False
                # Requests put another age here, and so take the mark off: then the slot is not to be changed.
                store_relaxed_8(&table.ages[block], AGE_LEAVING)
            table.pool.obj_end(slot_handle(slot))
        pthread_mutex_unlock(&table.stripes[block % STRIPES])
        if is_sound:
            zr_point(points.leaving_copied)
            if is_cold(slot):
                size |= SLOT_OUT_ZSTD
            self._put(block, size, record_sum(block, size, room))
        return is_sound

    cdef void _put(self, uint64_t block, uint32_t what, uint32_t sum) noexcept nogil:
        """Make the payload at the end of the buffer a record."""
        cdef record head
        cdef uint32_t whole = self.backing.record_bytes(what & SLOT_SIZE_MASK)
        cdef uint32_t bytes = RECORD_HEAD + (what & SLOT_SIZE_MASK)
        head.block = <uint32_t>block
        head.what = what
        head.sum = sum
        memcpy(self.buffer + self.used, &head, RECORD_HEAD)
        # What others stored is not to be in what is written.
        memset(self.buffer + self.used + bytes, 0, whole - bytes)
        self.entries[self.count].block = <uint32_t>block
        self.entries[self.count].at = self.used
        self.count += 1
        self.used += whole

    # --------------------------------------------------------------------------------------------------------
    # reclaim

    def reclaim(self, double share):
        """Copy the live records of the emptiest extent into the buffer, if at most that share of it lives: how many.

        0: there is no such extent, or not enough room for its records. Raises OSError when it cannot be read: it is given
        up then, and what is in it stays.
        """
        cdef uint32_t records = 0
        cdef uint64_t most = <uint64_t>(share * EXTENT_BYTES)
        cdef int rc, priority
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            rc = self._reclaim(self.device.table, min(most, <uint64_t>(EXTENT_BYTES - self.used)), &records)
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
        if rc:
            raise OSError(-rc, os.strerror(-rc))
        return records

    cdef int _reclaim(self, Blocks table, uint64_t most, uint32_t *records) noexcept nogil:
        cdef uint64_t extent
        cdef int rc = 0
        while rc == 0 and records[0] == 0 and self.source_count < MOST_SOURCES:
            extent = self.backing.emptiest(most)
            if extent == 0:
                break
            # (Nobody else takes extents: it is what it was.)
            counter_add(&self.backing.words[extent], EXTENT_READER)
            self.sources[self.source_count] = extent
            self.source_count += 1
            rc = self._move(table, extent, records)
            if rc:
                self.backing.give_up(extent)
                counter_add(&table.counters.bd_read_errors, 1)
        return rc

    cdef int _move(self, Blocks table, uint64_t extent, uint32_t *records) noexcept nogil:
        """Copy what lives of an extent into the buffer; 0 or -errno: some of it cannot be read."""
        cdef extent_head head
        cdef record r
        cdef uint64_t slot, first = extent << EXTENT_SHIFT
        cdef uint32_t at = self.backing.head, size
        cdef const char *payload
        cdef int rc = self.backing.read(self.other, EXTENT_BYTES, first)
        if rc:
            return rc
        counter_add(&table.counters.bd_reads, EXTENT_BYTES)
        memcpy(&head, self.other, sizeof(head))
        if (memcmp(head.magic, magic, sizeof(head.magic)) or head.bytes > EXTENT_BYTES
                or head.sum != head_sum(&head, extent)):
            return -EIO
        for _ in range(head.records):
            if at + RECORD_HEAD > head.bytes:
                return -EIO
            memcpy(&r, self.other + at, RECORD_HEAD)
            size = r.what & SLOT_SIZE_MASK
            if size == 0 or size > BLOCK_SIZE or at + RECORD_HEAD + size > head.bytes:
                return -EIO
            payload = self.other + at + RECORD_HEAD
            slot = table.get(r.block) if r.block < table.count else 0
            # (Also of those that are dead: which block it was of is only known if it is right.)
            if r.sum != record_sum(r.block, r.what, payload):
                rc = -EIO           # the others can be read
            elif is_out(slot) and slot_handle(slot) << self.backing.granule_shift == first + at:
                if r.what != out_what(slot) or sum_low(r.sum) != slot_sum(slot):
                    rc = -EIO
                elif self._has_room(size):
                    memcpy(self.buffer + self.used + RECORD_HEAD, payload, size)
                    self.entries[self.count].slot = slot
                    self.entries[self.count].moves = True
                    self._put(r.block, r.what, r.sum)
                    self.moving += self.backing.record_bytes(size)
                    records[0] += 1
            at += self.backing.record_bytes(size)
        return rc

    # --------------------------------------------------------------------------------------------------------
    # flush

    def flush(self):
        """Write the buffer to a free extent: (blocks, written, moved, nanoseconds, stopped).

        blocks: how many are out now that were in memory. written: bytes on the device, whole pages; of them `moved` for
        reclaim. nanoseconds: what the device took. stopped: 0, EXFULL: no extent is free, or the errno of the device,
        which is never that: ENOSPC is one that lies on a full file system. Then all stays where it was. The buffer is empty
        afterwards.
        """
        cdef uint64_t blocks = 0, written = 0, moved = 0, took = 0
        cdef int rc, priority
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            rc = self._flush(self.device.table, &blocks, &written, &moved, &took)
            self._forget(self.device.table)
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
        return blocks, written, moved, took, -rc

    cdef int _flush(self, Blocks table, uint64_t *blocks, uint64_t *written, uint64_t *moved, uint64_t *took) noexcept nogil:
        cdef uint64_t extent, size = (self.used + PAGE - 1) & ~<uint64_t>(PAGE - 1), began
        cdef extent_head head
        cdef uint32_t i
        cdef int rc
        if self.count == 0:
            return 0
        # The last one is for reclaim, which makes others free.
        if not self.moving and self.backing.extents - 1 - load_relaxed(&self.backing.used) - load_relaxed(
                &self.backing.bad) <= 1:
            return -EXFULL
        extent = self.backing.take()
        if extent == 0:
            return -EXFULL
        zr_point(points.extent_taken)
        self.sequence += 1
        memset(&head, 0, sizeof(head))
        memcpy(head.magic, magic, sizeof(head.magic))
        head.sequence = self.sequence
        head.records = self.count
        head.bytes = self.used
        head.sum = head_sum(&head, extent)
        memset(self.buffer, 0, self.backing.head)
        memcpy(self.buffer, &head, sizeof(head))
        memset(self.buffer + self.used, 0, size - self.used)
        began = system_now()
        rc = self.backing.write(self.buffer, size, extent << EXTENT_SHIFT)
        took[0] = system_now() - began
        zr_point(points.extent_written)
        if rc:
            counter_add(&table.counters.bd_write_errors, 1)
        else:
            written[0] = size
            moved[0] = size * self.moving // self.used
            counter_add(&table.counters.bd_writes, written[0])
            counter_add(&table.counters.reclaimed_bytes, moved[0])
            # The last first: a block may have been written since it was gathered, and gathered again. The mark is that of
            # the last one, which takes it off.
            for i in range(self.count):
                gate_enter(&self.device.gate)
                blocks[0] += self._commit(table, &self.entries[self.count - 1 - i], extent)
                gate_leave(&self.device.gate)
        self.backing.give(extent, rc != 0)
        return rc

    cdef bint _commit(self, Blocks table, entry *e, uint64_t extent) noexcept nogil:
        """Let a block's slot lead to its record, unless another request came; whether it is out now, and was in memory."""
        cdef record r
        cdef uint64_t now
        cdef bint stored
        memcpy(&r, self.buffer + e.at, RECORD_HEAD)
        now = out_slot(((extent << EXTENT_SHIFT) + e.at) >> self.backing.granule_shift, r.what, r.sum)
        pthread_mutex_lock(&table.stripes[e.block % STRIPES])
        stored = table.get(e.block) == e.slot
        if not e.moves:
            stored = stored and load_relaxed_8(&table.ages[e.block]) == AGE_LEAVING
            if stored:
                store_relaxed_8(&table.ages[e.block], e.age)
                clear_read(table.reads, e.block)        # the next read is the first one
        if stored:
            self.backing.add(now)
            store_release(&table.slots[e.block], now)
            table._count(now, 1)
            table._count(e.slot, <uint64_t>-1)
            if e.moves:
                zr_point(points.out_moved)
            else:
                zr_point(points.out_stored)
        pthread_mutex_unlock(&table.stripes[e.block % STRIPES])
        if not stored:
            return False
        table._free(e.block, e.slot)
        if e.moves:
            return False
        zr_point(points.out_object_freed)
        counter_add(&table.counters.written_out, 1)
        return True

    # --------------------------------------------------------------------------------------------------------
    # bring back

    def bring_back(self, uint64_t first, uint64_t end, bint wanted=True):
        """Store a few blocks that are out in memory again: (next, tried, done, stopped).

        From block `first` on, not beyond `end`: those that were read twice within 10 minutes (wanted=False: all), 64 at
        most. stopped: 0, or the errno of the last one, for which there is no room. Those that cannot be read are left.
        Raises MemoryError.
        """
        cdef uint64_t tried = 0, done = 0, left = LOOK
        cdef int rc, stopped = 0, priority
        cdef Blocks table = self.device.table
        cdef char *room = <char *>secret_alloc(ROOM)
        if room == NULL:
            raise MemoryError("no memory to read blocks in")
        end = min(end, self.device.blocks)
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            while first < end and tried < BACK and left and stopped == 0:
                left -= 1
                if not is_touched(&table.touched[first // SLOTS_PER_PAGE]):
                    first += SLOTS_PER_PAGE - first % SLOTS_PER_PAGE
                    continue
                if is_out(table.get(first)) and (not wanted or load_relaxed_8(&table.ages[first]) == AGE_WANTED):
                    tried += 1
                    rc = self._bring_back(table, first, room, wanted)
                    done += rc > 0
                    if rc < 0 and rc != -EIO:
                        stopped = -rc
                first += 1
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
        secret_free(room, ROOM)
        return first, tried, done, stopped

    cdef int _bring_back(self, Blocks table, uint64_t block, char *room, bint only_wanted) noexcept nogil:
        """Store a block in memory as it is on the backing: 1, 0, or -errno. -EIO: it cannot be read."""
        cdef uint64_t slot, now = 0
        cdef const char *payload
        cdef bint stored
        cdef int rc
        cdef bint is_there
        gate_enter(&self.device.gate)
        is_there = not pin_away(table, block, &slot)
        gate_leave(&self.device.gate)
        if is_there:
            return 0
        rc = self.backing.load(block, slot, room, &payload, &table.counters.bd_reads)
        zr_point(points.away_read)
        if rc:
            counter_add(&table.counters.bd_read_errors, 1)
            self.backing.unpin(slot)
            if only_wanted:
                store_relaxed_8(&table.ages[block], OUT_READ_AGAIN + 1)     # not again before others read it
            return -EIO
        gate_enter(&self.device.gate)
        rc = table._store_payload(block, payload, slot_bytes(slot), &now)
        if rc == 0:
            if slot & SLOT_OUT_ZSTD:
                now |= SLOT_COLD
            zr_point(points.back_published)
            pthread_mutex_lock(&table.stripes[block % STRIPES])
            stored = table.get(block) == slot
            if stored:
                store_release(&table.slots[block], now)
                store_relaxed_8(&table.ages[block], 0)
                table._count(now, 1)
                table._count(slot, <uint64_t>-1)
                zr_point(points.back_stored)
            pthread_mutex_unlock(&table.stripes[block % STRIPES])
            table._free(block, slot if stored else now)
            if stored:
                counter_add(&table.counters.brought_back, 1)
                rc = 1
        gate_leave(&self.device.gate)
        self.backing.unpin(slot)
        return rc


cdef bint is_leaving(Blocks table, uint64_t block, uint64_t slot, const wanted *which) noexcept nogil:
    """Whether a block with that slot is one that is to go out."""
    cdef uint8_t age = load_relaxed_8(&table.ages[block])
    if age < which.age or AGE_OLDEST < age != AGE_IDLE or (which.idle and age != AGE_IDLE) or not has_object(slot):
        return False
    if age == AGE_IDLE and which.age and not which.idle:
        return False    # a mark alone is no age: scripts mark all, to see later what is marked still
    if which.unread and is_read(table.reads, block):
        return False
    if which.tried and (not slot & SLOT_TRIED or slot & SLOT_COLD):
        return False
    return not which.raw or slot_kind(slot) == RAW


cdef uint32_t head_sum(const extent_head *head, uint64_t extent) noexcept nogil:
    """The checksum of the head of an extent."""
    return crc_of(<const char *>head, 24, <uint32_t>extent)
