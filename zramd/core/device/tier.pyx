"""What makes blocks of a device cold, and hot again, a few at a time: the hands of zramd.server.tiers.

Each step holds a lock of its own, and enters the device's gate for one block at a time. Requests never wait for the lock.
A real-time thread is an ordinary one meanwhile.
"""

cimport cython
from libc.errno cimport EAGAIN, EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from zramd.core.device.ages cimport AGES, census, mark_idle, sweep
from zramd.core.device.blocks cimport AGE_IDLE, AGE_WANTED, Blocks, is_touched, scratch
from zramd.core.device.cold cimport Cold
from zramd.core.device.cooling cimport cool, promote
from zramd.core.device.device cimport Device
from zramd.core.device.slots cimport RAW, is_candidate, slot_bytes, slot_kind
from zramd.core.system.gate cimport gate_enter, gate_leave
from zramd.core.system.locks cimport (
    load_relaxed_8,
    mutex_inherit,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from zramd.core.system.process cimport be_calm, be_urgent
from zramd.core.types cimport SLOTS_PER_PAGE


@cython.final
cdef class Tier:
    """Makes blocks of a device cold and hot again, in steps. Any thread may call it; one does, most of the time."""

    def __cinit__(self, Device device not None):
        pthread_mutex_init(&self.lock, NULL)
        mutex_inherit(&self.lock)
        self.device = device

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    @property
    def level(self):
        """zstd's level for what becomes cold, 0: nothing does. A change waits for a step at most.

        It raises ValueError for a level that there is not, MemoryError: then all is as before.
        """
        return self.device.table.cold.level

    @level.setter
    def level(self, int level):
        cdef Cold fresh = Cold(level)
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.device.table.cold.exchange_encoder(fresh)
            pthread_mutex_unlock(&self.lock)
        # What it leaves to recompression.
        self.device.pool.set_mem_limit(self.device.pool.mem_limit(), self.device.table.cold.level > 0)

    def sweep(self, bint coarse, bint keep, uint32_t threshold):
        """Let every block grow older (see Device.ages); (stored, raw, others, tried, unread, read, huge, back).

        The first three are lists of 256, by age: all that are stored; candidates that are raw; candidates with a payload of
        threshold bytes or more. tried: those that recompression did not shrink. unread, read, huge: lists, too, of payload
        bytes in memory: of blocks that nobody has read since they were written, of others, and of raw ones among them. back:
        blocks that are out, and were read so often that they are to be in memory. keep: leave alone what is to be hot
        again, else its reads are forgotten.
        """
        cdef census found
        cdef int i, priority
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            sweep(self.device.table, coarse, keep, threshold, &found)
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
        return (
            [found.stored[i] for i in range(AGES)],
            [found.raw[i] for i in range(AGES)],
            [found.others[i] for i in range(AGES)],
            found.tried,
            [found.unread[i] for i in range(AGES)],
            [found.read[i] for i in range(AGES)],
            [found.huge[i] for i in range(AGES)],
            found.back,
        )

    def mark_idle(self, uint8_t age):
        """Mark blocks of this age and older as idle, 0: all; how many are marked now. Those of one word cannot be."""
        cdef uint64_t marked
        with nogil:
            marked = mark_idle(self.device.table, age)
        return marked

    def cool(self, uint64_t first, uint64_t tries, uint32_t threshold, uint8_t age, bint raw=False, bint idle=False):
        """Try to make a few blocks cold: (next, tried, tried_bytes, done, saved, stopped).

        From block `first` on, tries at most; those that have a payload of threshold bytes or more (raw: that are raw) and
        are `age` old or older (idle: that are marked). next: where to go on, the device's end (or beyond): all were looked
        at. tried: how many, with payloads of tried_bytes; of them `done` are cold now, with saved bytes less. stopped: 0, or
        the errno for which there was no room for the last one's old and new payload at once. Raises MemoryError, and what
        marks a state as one with cold blocks.
        """
        cdef step s
        cdef int priority
        cdef scratch *room
        cdef bint expected = self.device.table.cold.level != 0
        if expected:
            self.device._expect_cold()
        room = self.device.table.scratch_take()
        if room == NULL:
            raise MemoryError("no memory to recompress in")
        memset(&s, 0, sizeof(s))
        s.next = first
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            if expected and self.device.table.cold.level:  # which another thread may have set meanwhile
                self._cool(self.device.table, &s, tries, threshold, age, raw, idle, room)
            else:
                s.next = self.device.blocks
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
            self.device.table.scratch_give(room)
        return s.next, s.tried, s.tried_bytes, s.done, s.saved, s.stopped

    cdef void _cool(self, Blocks table, step *s, uint64_t tries, uint32_t threshold, uint8_t age, bint raw, bint idle,
                    scratch *room) noexcept nogil:
        cdef uint64_t block, slot, left = LOOK
        cdef uint8_t now
        cdef int rc
        while s.next < table.count and s.tried < tries and left and s.stopped == 0:
            left -= 1
            block = s.next
            if not is_touched(&table.touched[block // SLOTS_PER_PAGE]):
                s.next += SLOTS_PER_PAGE - block % SLOTS_PER_PAGE
                continue
            s.next += 1
            now = load_relaxed_8(&table.ages[block])
            if now < age or (idle and now != AGE_IDLE):
                continue
            slot = table.get(block)
            if not is_candidate(slot, threshold) or (raw and slot_kind(slot) != RAW):
                continue
            s.tried += 1
            s.tried_bytes += slot_bytes(slot)
            gate_enter(&self.device.gate)
            rc = cool(table, block, threshold, age, room.page, room.out)
            gate_leave(&self.device.gate)
            if rc > 0:
                s.done += 1
                s.saved += rc
            elif rc and rc != -EAGAIN and rc != -EIO:
                s.stopped = -rc

    def promote(self, uint64_t first, uint64_t tries):
        """Make a few cold blocks hot again that were read in two sweeps within 30 s: (next, tried, done, stopped), as cool.

        Raises MemoryError.
        """
        cdef step s
        cdef int priority
        cdef scratch *room = self.device.table.scratch_take()
        if room == NULL:
            raise MemoryError("no memory to make blocks hot again in")
        memset(&s, 0, sizeof(s))
        s.next = first
        with nogil:
            priority = be_calm()
            pthread_mutex_lock(&self.lock)
            self._promote(self.device.table, &s, tries, room)
            pthread_mutex_unlock(&self.lock)
            be_urgent(priority)
            self.device.table.scratch_give(room)
        return s.next, s.tried, s.done, s.stopped

    cdef void _promote(self, Blocks table, step *s, uint64_t tries, scratch *room) noexcept nogil:
        cdef uint64_t block, left = LOOK
        cdef int rc
        while s.next < table.count and s.tried < tries and left and s.stopped == 0:
            left -= 1
            block = s.next
            if not is_touched(&table.touched[block // SLOTS_PER_PAGE]):
                s.next += SLOTS_PER_PAGE - block % SLOTS_PER_PAGE
                continue
            s.next += 1
            if load_relaxed_8(&table.ages[block]) != AGE_WANTED:
                continue
            s.tried += 1
            gate_enter(&self.device.gate)
            rc = promote(table, block, room)
            gate_leave(&self.device.gate)
            if rc > 0:
                s.done += 1
            elif rc and rc != -EAGAIN and rc != -EIO:
                s.stopped = -rc
