"""The device: a table of slots, one a block, over a codec and a pool. Whole requests run without the GIL.

    write:  encode -> pool.obj_alloc -> copy -> obj_publish -> slot -> free the old object
    read:   slot -> pool.obj_begin -> decode into the client's buffer -> obj_end
    trim:   slot = 0 -> free

A block is read or written whole, under the lock of its stripe; blocks of one request one after the other. A new object
is complete before its slot changes, so a write that fails leaves the old content (and a crash leaves either).
Nothing here knows where an object is, and compaction knows nothing of slots.

With verify, half of an object's checksum is in the slot and half in the cell; it is seeded with the block's number, so
that a slot that leads to another block's object is found out too. For a same-filled block all of it is in the slot.

Lock order: gate, one stripe, then the pool's. No lock but the stripe of a part-written block is held while compressing.
"""

cimport cython
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from zramd.core.checks cimport zr_crash_point
from zramd.core.checksum cimport checksum
from zramd.core.codec cimport decode, encode, fill, same_filled, state_size
from zramd.core.latency cimport BUCKETS, FIRST_BOUND, clock_now, latency_add, latency_count, use_ticks
from zramd.core.locks cimport (
    counter_add,
    counter_sub,
    load_acquire,
    load_relaxed,
    owned_add,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    pthread_rwlock_destroy,
    pthread_rwlock_rdlock,
    pthread_rwlock_unlock,
    pthread_rwlock_wrlock,
    rwlock_init_fair,
    store_relaxed,
    store_release,
)
from zramd.core.recovery cimport Recovery
from zramd.core.region cimport KEPT_DEVICE, KEPT_STATE, Memory, Region, region_populate
from zramd.core.types cimport (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOT_CHECK_SHIFT,
    SLOT_HANDLE_SHIFT,
    SLOT_LOST,
    SLOT_SAME,
    SLOT_SIZE_MASK,
    SLOTS_PER_PAGE,
    SPAN_SHIFT,
    SPAN_SIZE,
    cell_obj,
    slot_handle,
)
from zramd.core.zsmalloc cimport Zsmalloc, size_class

import os

import os

from zramd.core.zsmalloc import pool_layout
from zramd.errors import CorruptionError, error_from

cdef extern from *:
    """
    #define is_touched(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define touch(p) (__atomic_exchange_n((p), 1, __ATOMIC_RELAXED) == 0)
    """
    bint is_touched(uint8_t *p) noexcept nogil
    bint touch(uint8_t *p) noexcept nogil   # whether it was not before

MAX_DISKSIZE = 4 << 40      # bytes: 2**30 blocks; handles have 31 bits

cdef enum:
    EXTENTS_MAX = 4096      # in one answer: the client asks again for the rest
    # NBD's block status flags
    STATE_HOLE = 1
    STATE_ZERO = 2


cdef int time_by_ticks() except -1:
    """Time requests by the processor's time stamp counter if the kernel trusts it: it keeps watching it."""
    try:
        with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as source:
            if source.read() == "tsc\n":
                use_ticks()
    except OSError:
        pass  # no sysfs: the system's clock is right too
    return 0

time_by_ticks()


def state_layout(uint64_t disksize):
    """What a state file for a device of disksize bytes, a multiple of 4096, must agree on: names -> numbers.

    "bytes" is the size of the file.
    """
    cdef uint64_t blocks = disksize >> BLOCK_SHIFT
    return {"disksize": disksize, "slots": blocks} | pool_layout(blocks)


@cython.final
cdef class Device:
    """A block device of disksize bytes (rounded up to 4096) that reads as zeros until it is written.

    mem_limit: most bytes of pages the pool may use, 0: no limit. acceleration: lz4's, 1 compresses best.
    state: descriptor, the caller's to close, of the file that holds all data (see zramd.state); what is in it is
    taken over, and progress(done, total) called about every second meanwhile. -1: memory of this process.
    verify: store a checksum with each block, and check it on each read; a state is all with or all without.
    Raises ValueError for a size out of range, also of the state; MemoryError when the address space cannot be had;
    CorruptionError when the state contradicts itself (then nothing in it was changed).
    Every method may be called from any number of threads.
    """

    def __cinit__(self, uint64_t disksize, *, uint64_t mem_limit=0, int acceleration=1, int state=-1,
                  bint verify=False, progress=None):
        cdef Memory memory
        cdef uint32_t i
        for i in range(STRIPES):
            pthread_mutex_init(&self.stripes[i], NULL)
        pthread_mutex_init(&self.scratch_lock, NULL)
        rwlock_init_fair(&self.gate)
        if not 0 < disksize <= <uint64_t>MAX_DISKSIZE:
            raise ValueError(f"disksize {disksize} is out of range: 1 to {MAX_DISKSIZE} bytes")
        self.blocks = (disksize + BLOCK_SIZE - 1) >> BLOCK_SHIFT
        self.disksize = self.blocks << BLOCK_SHIFT
        self.acceleration = acceleration
        self.scratch_size = sizeof(scratch) + state_size()
        self.verify = verify
        self.memory = memory = Memory(state)
        self.kept = <state_words *>memory.kept(KEPT_STATE)
        self.n = <counters *>memory.kept(KEPT_DEVICE)
        self.slot_table = memory.region(self.blocks * sizeof(uint64_t), True)
        self.slots = <uint64_t *>self.slot_table.base
        self.touches = Region(self.blocks // SLOTS_PER_PAGE + 1)
        self.touched = <uint8_t *>self.touches.base
        self.pool = Zsmalloc(self.blocks, memory=memory)
        if state >= 0:
            if os.fstat(state).st_size != memory.end:
                raise ValueError(f"a state of {os.fstat(state).st_size} bytes is not one of {memory.end} bytes")
            self._take_over(progress)
            if self.kept.loading:
                self.reset()
                self.kept.loading = 0
                self.dropped = True
        # A limit that was changed at work stays, until another one is asked for than the last time.
        if self.kept.limit_asked == mem_limit + 1:
            self.pool.mem_limit = self.kept.limit
        else:
            self.mem_limit = mem_limit
            self.kept.limit_asked = mem_limit + 1
        if not self.kept.data_id[0]:
            self._name_data()

    def _name_data(self):
        cdef bytes name = os.urandom(sizeof(self.kept.data_id))
        memcpy(self.kept.data_id, <const char *>name, sizeof(self.kept.data_id))
        self.kept.data_id[0] |= 1

    @property
    def data_id(self):
        """Names the data that the device holds, as hexadecimal digits: the same name, the same data, also in a state that
        was taken over. A device begins with a new one when it is empty, reset, or loaded."""
        return f"{self.kept.data_id[1]:016x}{self.kept.data_id[0]:016x}"

    def _take_over(self, progress):
        """Rebuild from the state all that is not in it."""
        cdef Recovery recovery = Recovery(self.pool, self.slot_table, self.touches, self.blocks, self.verify)
        recovery.run(progress)
        self.n.inflight = 0
        self.n.pages_stored = recovery.stored
        self.n.compr_data_size = recovery.compr
        self.n.same_pages = recovery.same
        self.n.huge_pages = recovery.huge
        self.touched_pages = recovery.slot_pages
        self.recovery_ms = recovery.milliseconds
        self.recovered_blocks = recovery.stored
        self.leaked_objects = recovery.leaked
        self.lost_blocks = recovery.lost

    def __dealloc__(self):
        cdef scratch *s
        cdef uint32_t i
        while self.scratches != NULL:
            s = self.scratches
            self.scratches = s.next
            free(s)
        pthread_rwlock_destroy(&self.gate)
        pthread_mutex_destroy(&self.scratch_lock)
        for i in range(STRIPES):
            pthread_mutex_destroy(&self.stripes[i])

    # --------------------------------------------------------------------------------------------------------
    # scratch: as many as there ever were requests at work at once; the last one used is still in the cache

    cdef scratch *_scratch_take(self) noexcept nogil:
        cdef scratch *s
        pthread_mutex_lock(&self.scratch_lock)
        s = self.scratches
        if s != NULL:
            self.scratches = s.next
        else:
            s = <scratch *>malloc(self.scratch_size)
            if s != NULL:
                owned_add(&self.scratch_count, 1)
        pthread_mutex_unlock(&self.scratch_lock)
        return s

    cdef void _scratch_give(self, scratch *s) noexcept nogil:
        pthread_mutex_lock(&self.scratch_lock)
        s.next = self.scratches
        self.scratches = s
        pthread_mutex_unlock(&self.scratch_lock)

    # --------------------------------------------------------------------------------------------------------
    # one block

    cdef int _store(self, uint64_t block, const char *content, scratch *s, uint64_t *slot) noexcept nogil:
        """Store a block's content; the slot that stands for it. -ENOSPC: mem_limit, even after compaction."""
        cdef uint64_t word
        cdef uint32_t size
        if same_filled(content, &word):
            return self._store_word(block, word, slot)
        size = encode(content, s.out, self.pool.max_payload, s.state, self.acceleration)
        if size == 0:
            return self._store_payload(block, content, BLOCK_SIZE, slot)
        return self._store_payload(block, s.out, size, slot)

    cdef int _store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil:
        """Store a block that is one word repeated; the slot that stands for it."""
        cdef uint64_t handle
        slot[0] = self._same_slot(block, word)
        if word:
            handle = self.pool.word_alloc(word)
            if handle == 0:
                return -ENOMEM
            slot[0] |= handle << SLOT_HANDLE_SHIFT
        return 0

    cdef int _store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil:
        """Store what a block is compressed to, or all of it; the slot that stands for it. Errors as _store."""
        cdef uint64_t handle = 0
        cdef uint32_t check = 0
        cdef char *place
        cdef int rc = self.pool.obj_alloc(size, &handle, &place)
        if rc == -ENOSPC:
            counter_add(&self.n.limit_compactions, 1)
            while rc == -ENOSPC and self.pool.make_room():
                rc = self.pool.obj_alloc(size, &handle, &place)
        if rc:
            return rc
        if self.verify:
            check = checksum(payload, size, block)
        memcpy(place, payload, size)
        zr_crash_point("payload-written")
        self.pool.obj_publish(handle, check >> 16)
        zr_crash_point("object-published")
        slot[0] = <uint64_t>(check & 0xFFFF) << SLOT_CHECK_SHIFT | handle << SLOT_HANDLE_SHIFT | size
        return 0

    cdef uint64_t _same_slot(self, uint64_t block, uint64_t word) noexcept nogil:
        """The slot of a block that is one word repeated, but for its handle."""
        cdef uint64_t check
        if not self.verify:
            return SLOT_SAME
        check = checksum(<const char *>&word, sizeof(word), block)
        # Half of it is where others have their size.
        return SLOT_SAME | (check & 0xFFFF) << SLOT_CHECK_SHIFT | check >> 16 & SLOT_SIZE_MASK

    cdef int _load(self, uint64_t block, uint64_t slot, char *content) noexcept nogil:
        """The content that a block's slot stands for; 0 or -EIO."""
        cdef uint64_t handle = slot_handle(slot), word
        cdef uint32_t size = slot & SLOT_SIZE_MASK
        cdef char *payload
        cdef int rc = -EIO
        if slot == 0:
            memset(content, 0, BLOCK_SIZE)
            return 0
        if slot & SLOT_SAME:
            word = self.pool.word_read(handle) if handle else 0
            if self._word_is_sound(block, slot, word):
                fill(content, word)
                rc = 0
        elif self.pool.obj_begin(handle, &payload) == 0:
            if self._object_is_sound(block, slot, payload):
                rc = decode(payload, size, content)
            self.pool.obj_end(handle)
        if rc:
            counter_add(&self.n.checksum_errors, 1)
            store_relaxed(&self.n.corrupt_block, block + 1)
        return rc

    cdef inline bint _word_is_sound(self, uint64_t block, uint64_t slot, uint64_t word) noexcept nogil:
        return not self.verify or slot == (
            self._same_slot(block, word) | slot_handle(slot) << SLOT_HANDLE_SHIFT)

    cdef inline bint _object_is_sound(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil:
        cdef uint32_t size = slot & SLOT_SIZE_MASK, check
        if size > BLOCK_SIZE or not self.pool.obj_fits(payload, size):
            return False
        if not self.verify:
            return True
        check = checksum(payload, size, block)
        return check == (self.pool.obj_check(slot_handle(slot)) << 16 | slot >> SLOT_CHECK_SHIFT)

    cdef void _drop(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Free what a block's slot stood for, once no block holds the slot."""
        cdef uint64_t handle = slot_handle(slot), size = slot & SLOT_SIZE_MASK
        if slot == 0:
            return
        counter_sub(&self.n.pages_stored, 1)
        if slot & SLOT_SAME:
            counter_sub(&self.n.same_pages, 1)
            # A wrong slot must not free another block's word.
            if handle and self._word_is_sound(block, slot, self.pool.word_read(handle)):
                self.pool.word_free(handle)
            return
        counter_sub(&self.n.compr_data_size, size)
        if size == BLOCK_SIZE:
            counter_sub(&self.n.huge_pages, 1)
        self.pool.obj_free(handle)

    cdef uint64_t _get(self, uint64_t block) noexcept nogil:
        if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
            return 0
        return load_acquire(&self.slots[block])

    cdef uint64_t _set(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Publish a block's new slot; the old one, which is the caller's to drop. The stripe is held."""
        cdef uint64_t old = self._get(block), size = slot & SLOT_SIZE_MASK
        if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
            if slot == 0:
                return 0
            if touch(&self.touched[block // SLOTS_PER_PAGE]):
                counter_add(&self.touched_pages, 1)
        store_release(&self.slots[block], slot)
        zr_crash_point("slot-stored")
        if slot:
            counter_add(&self.n.pages_stored, 1)
            if slot & SLOT_SAME:
                counter_add(&self.n.same_pages, 1)
            else:
                counter_add(&self.n.compr_data_size, size)
                if size == BLOCK_SIZE:
                    counter_add(&self.n.huge_pages, 1)
                    counter_add(&self.n.huge_pages_since, 1)
        return old

    cdef void _prefetch(self, uint64_t block) noexcept nogil:
        """Ask the cache for the object of a block."""
        cdef uint64_t slot = self._get(block)
        if slot and not slot & SLOT_SAME:
            self.pool.obj_prefetch(slot_handle(slot), slot & SLOT_SIZE_MASK)

    cdef int _slot_is_ready(self, uint64_t block) noexcept nogil:
        """Before a slot is written: 0, or -ENOSPC, the state's file system has no room for it."""
        if is_touched(&self.touched[block // SLOTS_PER_PAGE]) or self.slot_table.ready(&self.slots[block], 8) == 0:
            return 0
        return -ENOSPC

    cdef int _write_block(self, uint64_t block, const char *src, scratch *s) noexcept nogil:
        cdef uint64_t slot, old
        cdef int rc = self._slot_is_ready(block)
        if rc == 0:
            rc = self._store(block, src, s, &slot)
        if rc == 0:
            pthread_mutex_lock(&self.stripes[block % STRIPES])
            old = self._set(block, slot)
            pthread_mutex_unlock(&self.stripes[block % STRIPES])
            self._drop(block, old)
        return rc

    cdef int _merge_block(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s) noexcept nogil:
        """Write n bytes (zeros when src is NULL) at a place in a block: its other bytes stay."""
        cdef uint64_t slot, old = 0
        cdef int rc = self._slot_is_ready(block)
        if rc:
            return rc
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        rc = self._load(block, self._get(block), s.page)
        if rc == 0:
            if src != NULL:
                memcpy(s.page + at, src, n)
            else:
                memset(s.page + at, 0, n)
            rc = self._store(block, s.page, s, &slot)
            if rc == 0:
                old = self._set(block, slot)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._drop(block, old)
        return rc

    cdef int _read_block(self, uint64_t block, uint32_t at, char *dst, uint32_t n, scratch *s) noexcept nogil:
        cdef int rc
        if self._get(block) == 0:
            memset(dst, 0, n)
            return 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        rc = self._load(block, self._get(block), dst if n == BLOCK_SIZE else s.page)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        if n != BLOCK_SIZE and rc == 0:
            memcpy(dst, s.page + at, n)
        return rc

    cdef int _zero_block(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Make a block a hole (slot 0) or allocated zeros (SLOT_SAME)."""
        cdef uint64_t old
        if slot:
            if self._slot_is_ready(block):
                return -ENOSPC
            slot = self._same_slot(block, 0)
        if slot == 0 and self._get(block) == 0:
            return 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        old = self._set(block, slot)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._drop(block, old)
        return 0

    # --------------------------------------------------------------------------------------------------------
    # whole requests: 0 or -errno of the first block that failed; blocks before it are done

    cdef void _enter_gate(self) noexcept nogil:
        """At work until _leave_gate: check and reset wait for it, the compactor makes way."""
        pthread_rwlock_rdlock(&self.gate)
        counter_add(&self.n.inflight, 1)

    cdef void _leave_gate(self) noexcept nogil:
        counter_sub(&self.n.inflight, 1)
        pthread_rwlock_unlock(&self.gate)

    cdef uint64_t _begin(self) noexcept nogil:
        """Enter the gate for a request; when it came. Waiting at the gate is part of what the client waits for."""
        cdef uint64_t began = clock_now()
        self._enter_gate()
        return began

    cdef void _end(self, op kind, uint64_t began) noexcept nogil:
        """Count a request, failed or not, and leave the gate: reset is never between the two."""
        latency_add(&self.n.latencies[<int>kind], began)
        self._leave_gate()

    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint32_t at, n
        cdef int rc = 0
        cdef scratch *s = self._scratch_take()
        if s == NULL:
            rc = -ENOMEM
        while done < length and rc == 0:
            at = (offset + done) & (BLOCK_SIZE - 1)
            n = min(<uint64_t>(BLOCK_SIZE - at), length - done)
            if n == BLOCK_SIZE:
                rc = self._write_block((offset + done) >> BLOCK_SHIFT, src + done, s)
            else:
                rc = self._merge_block((offset + done) >> BLOCK_SHIFT, at, src + done, n, s)
            done += n
        if s != NULL:
            self._scratch_give(s)
        if rc:
            counter_add(&self.n.failed_writes, 1)
        else:
            counter_add(&self.n.written_bytes, length)
        return rc

    cdef int _read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint32_t at, n
        cdef int rc = 0
        cdef scratch *s = NULL
        if (offset | length) & (BLOCK_SIZE - 1):
            s = self._scratch_take()
            if s == NULL:
                rc = -ENOMEM
        while done < length and rc == 0:
            at = (offset + done) & (BLOCK_SIZE - 1)
            n = min(<uint64_t>(BLOCK_SIZE - at), length - done)
            # Objects of neighbouring blocks are anywhere, so the processor cannot guess which is next: 6 % on 128K reads.
            # (For what a write replaces it gained nothing.)
            if done + n < length:
                self._prefetch(((offset + done) >> BLOCK_SHIFT) + 1)
            rc = self._read_block((offset + done) >> BLOCK_SHIFT, at, dst + done, n, s)
            done += n
        if s != NULL:
            self._scratch_give(s)
        if rc:
            counter_add(&self.n.failed_reads, 1)
        else:
            counter_add(&self.n.read_bytes, length)
        return rc

    cdef int _zero(self, uint64_t offset, uint64_t length, uint64_t slot, bint exact) noexcept nogil:
        """Zero a range with slot 0 or SLOT_SAME. Parts of blocks at its ends: zeroed if exact, else left as they are."""
        cdef uint64_t done = 0, block, skip
        cdef uint32_t at, n
        cdef int rc = 0
        cdef scratch *s = NULL
        if exact and (offset | length) & (BLOCK_SIZE - 1):
            s = self._scratch_take()
            if s == NULL:
                return -ENOMEM
        while done < length and rc == 0:
            block = (offset + done) >> BLOCK_SHIFT
            at = (offset + done) & (BLOCK_SIZE - 1)
            n = min(<uint64_t>(BLOCK_SIZE - at), length - done)
            if n == BLOCK_SIZE and slot == 0 and not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
                # A client trims whole devices: go over what was never written a page of slots at a time.
                skip = min(SLOTS_PER_PAGE - block % SLOTS_PER_PAGE, (length - done) >> BLOCK_SHIFT)
                counter_add(&self.n.notify_free, skip)
                done += skip << BLOCK_SHIFT
                continue
            if n == BLOCK_SIZE:
                rc = self._zero_block(block, slot)
                counter_add(&self.n.notify_free, 1)
            elif exact and (self._get(block) or slot):
                rc = self._merge_block(block, at, NULL, n, s)
            done += n
        if s != NULL:
            self._scratch_give(s)
        return rc

    cdef uint64_t _extent(self, uint64_t offset, uint64_t end, int *kind) noexcept nogil:
        """Where the run of blocks of one kind that offset is in ends, at most end; kind: NBD's hole and zero flags."""
        cdef uint64_t block = offset >> BLOCK_SHIFT, last = (end + BLOCK_SIZE - 1) >> BLOCK_SHIFT, slot
        cdef int this
        kind[0] = -1
        while block < last:
            slot = self._get(block)
            this = STATE_HOLE | STATE_ZERO if slot == 0 else STATE_ZERO if slot & SLOT_SAME and slot_handle(slot) == 0 else 0
            if kind[0] < 0:
                kind[0] = this
            if this != kind[0]:
                break
            if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
                block = (block // SLOTS_PER_PAGE + 1) * SLOTS_PER_PAGE
            else:
                block += 1
        return min(block << BLOCK_SHIFT, end)

    cdef const char *_find_fault(self, uint64_t *where) noexcept nogil:
        """The gate is held alone: no request is at work. Slots are unique when their handles are as many as the cells."""
        cdef uint64_t block, slot, handle, obj_size, touched = 0
        cdef uint64_t stored = 0, lost = 0, same = 0, words = 0, huge = 0, compr = 0
        cdef char *payload
        for block in range(self.blocks // SLOTS_PER_PAGE + 1):
            touched += self.touched[block]
        if touched != self.touched_pages:
            return "the count of touched slot pages is wrong"
        block = 0
        while block < self.blocks:
            if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
                block += SLOTS_PER_PAGE - block % SLOTS_PER_PAGE
                continue
            where[0] = block
            slot = self.slots[block]
            handle = slot_handle(slot)
            obj_size = slot & SLOT_SIZE_MASK
            block += 1
            if slot == 0:
                continue
            stored += 1
            if slot == SLOT_LOST:
                lost += 1
                continue
            if slot & SLOT_SAME:
                same += 1
                words += handle != 0
                if not self._word_is_sound(block - 1, slot, self.pool.word_read(handle) if handle else 0):
                    return "a slot's checksum differs from its word"
                continue
            if self.pool.obj_begin(handle, &payload):
                return "a slot's handle is not live"
            if obj_size == 0 or obj_size > self.pool.obj_capacity(handle):
                self.pool.obj_end(handle)
                return "a slot's size does not fit its object"
            if not self._object_is_sound(block - 1, slot, payload):
                self.pool.obj_end(handle)
                return "a slot's checksum differs from its object"
            self.pool.obj_end(handle)
            compr += obj_size
            huge += obj_size == BLOCK_SIZE
        where[0] = 0
        if (stored != self.n.pages_stored or same != self.n.same_pages or compr != self.n.compr_data_size
                or huge != self.n.huge_pages):
            return "the counters differ from the slots"
        if stored - lost - same + words != self.pool.cells_used:
            return "the slots' handles are not as many as the cells in use"
        return self.pool.find_fault(where, words)

    # --------------------------------------------------------------------------------------------------------
    # what clients ask for: 0 or -errno, -EINVAL beyond the end of the device

    cdef bint _fits(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Whether a range is on the device; one that is not is counted."""
        if offset > self.disksize or length > self.disksize - offset:
            counter_add(&self.n.invalid_io, 1)
            return False
        return True

    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._read(dst, offset, length)
        self._end(OP_READ, began)
        return rc

    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._write(src, offset, length)
        self._end(OP_WRITE, began)
        return rc

    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        self._zero(offset, length, 0, False)
        self._end(OP_TRIM, began)
        return 0

    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil:
        cdef int rc
        cdef uint64_t began
        if not self._fits(offset, length):
            return -EINVAL
        began = self._begin()
        rc = self._zero(offset, length, 0 if may_trim else SLOT_SAME, True)
        if rc:
            counter_add(&self.n.failed_writes, 1)
        self._end(OP_ZERO, began)
        return rc

    # --------------------------------------------------------------------------------------------------------
    # for Python
    cdef str culprit(self, int rc, uint64_t offset, uint64_t length):
        """Which block of a range that was read does not match its checksum, as the end of a sentence."""
        cdef uint64_t block = load_relaxed(&self.n.corrupt_block) - 1
        if rc != -EIO or not offset >> BLOCK_SHIFT <= block <= (offset + length) >> BLOCK_SHIFT:
            return ""
        return f", block {block}"

    @property
    def corrupt_block(self):
        """The last block that could not be read because its object was changed in memory; -1: there was none."""
        return <int64_t>load_relaxed(&self.n.corrupt_block) - 1

    def read(self, buf, uint64_t offset):
        """Fill a writable buffer from offset. Raises CorruptObjectError; ValueError beyond the device's end."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
        with nogil:
            rc = self.serve_read(<char *>view.buf, offset, view.len)
        PyBuffer_Release(&view)
        if rc:
            raise error_from(rc, f"read of {view.len} bytes at {offset}{self.culprit(rc, offset, view.len)}")

    def write(self, buf, uint64_t offset):
        """Write a buffer to offset. Raises PoolFullError when mem_limit leaves no room even after compaction (then
        each block has its old content or its new); ValueError beyond the device's end."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
        with nogil:
            rc = self.serve_write(<const char *>view.buf, offset, view.len)
        PyBuffer_Release(&view)
        if rc:
            raise error_from(rc, f"write of {view.len} bytes at {offset}{self.culprit(rc, offset, view.len)}")

    def trim(self, uint64_t offset, uint64_t length):
        """Free the whole blocks of a range: they are holes and read as zeros. Parts of blocks stay as they are."""
        cdef int rc
        with nogil:
            rc = self.serve_trim(offset, length)
        if rc:
            raise error_from(rc, f"trim of {length} bytes at {offset}")

    def zero(self, uint64_t offset, uint64_t length, bint may_trim=True):
        """Zero a range, to the byte. may_trim: whole blocks become holes, else allocated zeros; neither takes memory.

        Raises PoolFullError when a part of a block has to be merged and mem_limit leaves no room.
        """
        cdef int rc
        with nogil:
            rc = self.serve_zero(offset, length, may_trim)
        if rc:
            raise error_from(rc, f"zeroing of {length} bytes at {offset}")

    def extents(self, uint64_t offset, uint64_t length, bint one=False):
        """What is stored in a range: tuples (offset, length, kind), kind 0 data, 2 allocated zeros, 3 a hole (NBD's flags).

        They follow each other from offset on, neighbours differ in kind; at most 4096 of them, one: only the first.
        """
        cdef uint64_t end = offset + length, stop
        cdef int kind
        if not self._fits(offset, length):
            raise error_from(-EINVAL, f"extents of {length} bytes at {offset}")
        extents = []
        while offset < end and len(extents) < (1 if one else EXTENTS_MAX):
            with nogil:
                self._enter_gate()
                stop = self._extent(offset, end, &kind)
                self._leave_gate()
            extents.append((offset, stop - offset, kind))
            offset = stop
        return extents

    def compact(self, uint64_t budget=0):
        """Move about budget bytes of objects, 0: until nothing is freeable; returns the number of pages freed."""
        return self.pool.compact(budget)

    def trim_stock(self):
        """Give the empty pages that are kept for the next write back to the operating system; returns how many."""
        cdef uint64_t n
        with nogil:
            n = self.pool.trim()
        return n

    def reserve_start(self, uint64_t size):
        """Make every table resident and keep size bytes of pages ready, so that requests need no memory any more.

        Then a thread must be in reserve_keep. Raises MemoryError when the system does not give as much.
        """
        cdef int rc
        with nogil:
            rc = self._populate()
            if rc == 0:
                rc = self.pool.arena.reserve_start((size + PAGE_SIZE - 1) >> PAGE_SHIFT)
        if rc:
            raise MemoryError(f"the system refuses memory for the tables or for a reserve of {size} bytes")

    def reserve_keep(self):
        """Keep the reserve full, and no fuller, until reserve_stop: the work of one thread, which needs no GIL for it."""
        with nogil:
            self.pool.arena.reserve_keep()

    def reserve_stop(self):
        """Make the thread in reserve_keep return."""
        with nogil:
            self.pool.arena.reserve_stop()

    cdef int _populate(self) noexcept nogil:
        """Make the slots and the cells resident; 0 or -ENOMEM."""
        cdef uint64_t pages = self.blocks // SLOTS_PER_PAGE + 1
        cdef int rc = self.pool.populate()
        if rc or region_populate(self.slots, self.blocks * sizeof(uint64_t)):
            return -ENOMEM
        memset(self.touched, 1, pages)
        store_relaxed(&self.touched_pages, pages)
        return 0

    def pressure(self):
        """What the compactor looks at: (freeable pages, pages used, mem_limit in pages or 0, requests done, in flight)."""
        return (
            self.pool.freeable_pages(),
            load_relaxed(&self.pool.arena.pages),
            load_relaxed(&self.pool.arena.limit),
            self._requests(OP_READ) + self._requests(OP_WRITE) + self._requests(OP_TRIM) + self._requests(OP_ZERO),
            load_relaxed(&self.n.inflight),
        )

    @property
    def mem_limit(self):
        """Most bytes of pages the pool may use, 0: no limit; what is stored already stays when it is lowered."""
        return self.pool.mem_limit

    @mem_limit.setter
    def mem_limit(self, uint64_t limit):
        self.pool.mem_limit = limit
        self.kept.limit = limit

    def counters(self):
        """Every number that is kept, by the names of the statistics, as a dict of ints. Nothing is waited for."""
        stats = self.pool.stats()
        stats |= {
            "disksize": self.disksize,
            "orig_data_size": load_relaxed(&self.n.pages_stored) << BLOCK_SHIFT,
            "compr_data_size": load_relaxed(&self.n.compr_data_size),
            "pages_stored": load_relaxed(&self.n.pages_stored),
            "same_pages": load_relaxed(&self.n.same_pages),
            "huge_pages": load_relaxed(&self.n.huge_pages),
            "huge_pages_since": load_relaxed(&self.n.huge_pages_since),
            "failed_reads": load_relaxed(&self.n.failed_reads),
            "failed_writes": load_relaxed(&self.n.failed_writes),
            "invalid_io": load_relaxed(&self.n.invalid_io),
            "notify_free": load_relaxed(&self.n.notify_free),
            "reads": self._requests(OP_READ),
            "writes": self._requests(OP_WRITE),
            "trims": self._requests(OP_TRIM),
            "zeroes": self._requests(OP_ZERO),
            "read_bytes": load_relaxed(&self.n.read_bytes),
            "written_bytes": load_relaxed(&self.n.written_bytes),
            "limit_compactions": load_relaxed(&self.n.limit_compactions),
            "recovery_ms": self.recovery_ms,
            "recovered_blocks": self.recovered_blocks,
            "leaked_objects": self.leaked_objects,
            "lost_blocks": self.lost_blocks,
            "checksum_errors": load_relaxed(&self.n.checksum_errors),
            "requests_inflight": load_relaxed(&self.n.inflight),
            "metadata_bytes": (
                (load_relaxed(&self.touched_pages) << PAGE_SHIFT)
                + (self.blocks // SLOTS_PER_PAGE + PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE
                + load_relaxed(&self.scratch_count) * self.scratch_size
                + sizeof(self.stripes)
                + self.pool.metadata_bytes()
            ),
        }
        return stats

    cdef uint64_t _requests(self, op kind) noexcept nogil:
        return latency_count(&self.n.latencies[<int>kind])

    @property
    def latency_bounds(self):
        """Upper bounds of the buckets of latencies, in nanoseconds; the last bucket has none."""
        return tuple([FIRST_BOUND << i for i in range(BUCKETS - 1)])

    def latencies(self):
        """How long requests took, failed ones too: by operation (their nanoseconds together, requests in each bucket)."""
        cdef int kind, i
        found = {}
        for kind, name in enumerate(("read", "write", "trim", "zero")):
            counts = tuple([load_relaxed(&self.n.latencies[kind].buckets[i]) for i in range(BUCKETS)])
            found[name] = (load_relaxed(&self.n.latencies[kind].sum), counts)
        return found

    def classes(self):
        """zsmalloc's table, see Zsmalloc.table."""
        return self.pool.table()

    def block(self, uint64_t number):
        """What stands for a block, as a dict. `kind` is hole, same (one repeated word), lz4, raw, or lost.

        same: word, handle (0: the word is 0 and needs none). lz4 and raw: handle, payload_bytes, obj (bytes into the
        arena), zspage, chunk (of the zspage), class_index, class_size (bytes of a chunk), zspage_inuse and zspage_objs
        (chunks used and in all). An object may move at any time. Raises ValueError beyond the device's end; CorruptionError.
        """
        cdef uint64_t slot, handle, obj = 0, word = 0
        cdef char *payload
        cdef uint32_t span = 0, inuse = 0
        cdef size_class *c = NULL
        cdef int rc = 0
        if number >= self.blocks:
            raise ValueError(f"block {number} is not on the device, which has blocks 0 to {self.blocks - 1}")
        with nogil:
            self._enter_gate()
            pthread_mutex_lock(&self.stripes[number % STRIPES])
            slot = self._get(number)
            handle = slot_handle(slot)
            if slot & SLOT_SAME:
                word = self.pool.word_read(handle) if handle else 0
            elif slot and slot != SLOT_LOST:
                rc = self.pool.obj_begin(handle, &payload)
                if rc == 0:
                    obj = cell_obj(load_relaxed(&self.pool.cells[handle]))
                    span = obj >> SPAN_SHIFT
                    c = &self.pool.classes[self.pool.zspages[span].class_index]
                    pthread_mutex_lock(&c.lock)
                    inuse = self.pool.zspages[span].inuse
                    pthread_mutex_unlock(&c.lock)
                    self.pool.obj_end(handle)
            pthread_mutex_unlock(&self.stripes[number % STRIPES])
            self._leave_gate()
        if rc:
            raise CorruptionError(f"a slot's handle is not live (at {number})")
        if slot == 0:
            return {"block": number, "kind": "hole"}
        if slot == SLOT_LOST:
            return {"block": number, "kind": "lost"}
        if slot & SLOT_SAME:
            return {"block": number, "kind": "same", "word": word, "handle": handle}
        return {
            "block": number,
            "kind": "raw" if slot & SLOT_SIZE_MASK == BLOCK_SIZE else "lz4",
            "handle": handle,
            "payload_bytes": slot & SLOT_SIZE_MASK,
            "obj": obj,
            "zspage": span,
            "chunk": (obj & (SPAN_SIZE - 1)) // c.size,
            "class_index": <uint64_t>(c - &self.pool.classes[0]),
            "class_size": c.size,
            "zspage_inuse": inuse,
            "zspage_objs": c.objs,
        }

    def reset_mem_used_max(self):
        """Forget the peak: mem_used_max starts again from what is used now."""
        self.pool.arena.reset_peak()

    def reset(self):
        """Drop all data and set all counters to 0; mem_limit stays. Waits for the requests at work."""
        cdef size_t i
        self._name_data()  # first: what is left after a crash is not what was there before
        with nogil:
            pthread_rwlock_wrlock(&self.gate)
            pthread_mutex_lock(&self.pool.compact_lock)
            owned_add(&self.epoch, 1)
            self.slot_table.release_all()
            zr_crash_point("slots-cleared")
            self.touches.release_all()
            store_relaxed(&self.touched_pages, 0)
            for i in range(sizeof(counters) // sizeof(uint64_t)):
                store_relaxed(<uint64_t *>self.n + i, 0)
            self.pool.clear()
            if load_relaxed(&self.pool.arena.reserve):
                self._populate()
            pthread_mutex_unlock(&self.pool.compact_lock)
            pthread_rwlock_unlock(&self.gate)

    def check(self):
        """Walk every structure, while requests wait. Raises CorruptionError when one contradicts another."""
        cdef uint64_t where = 0
        cdef const char *wrong
        with nogil:
            pthread_rwlock_wrlock(&self.gate)
            pthread_mutex_lock(&self.pool.compact_lock)
            wrong = self._find_fault(&where)
            pthread_mutex_unlock(&self.pool.compact_lock)
            pthread_rwlock_unlock(&self.gate)
        if wrong != NULL:
            raise CorruptionError(f"{wrong.decode()} (at {where})")
