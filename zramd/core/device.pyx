"""The device: a table of slots, one a block, over a codec and a pool. Whole requests run without the GIL.

    write:  encode -> pool.obj_alloc -> copy -> obj_end -> slot -> free the old object
    read:   slot -> pool.obj_begin -> decode into the client's buffer -> obj_end
    trim:   slot = 0 -> free

A block is read or written whole, under the lock of its stripe; blocks of one request one after the other. A new object
is complete before its slot changes, so a write that fails leaves the old content (and a crash leaves either).
Nothing here knows where an object is, and compaction knows nothing of slots.

Lock order: gate, one stripe, then the pool's. No lock but the stripe of a part-written block is held while compressing.
"""

cimport cython
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from zramd.core.arena cimport region_map, region_populate, region_release, region_unmap
from zramd.core.codec cimport decode, encode, fill, same_filled, state_size
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
from zramd.core.types cimport (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    CELL_TAGS,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOT_HANDLE_SHIFT,
    SLOT_SAME,
    SLOT_SIZE_MASK,
    SPAN_SHIFT,
    SPAN_SIZE,
)
from zramd.core.zsmalloc cimport Zsmalloc, size_class

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
    SLOTS_PER_PAGE = 512
    EXTENTS_MAX = 4096      # in one answer: the client asks again for the rest
    # NBD's block status flags
    STATE_HOLE = 1
    STATE_ZERO = 2


@cython.final
cdef class Device:
    """A block device of disksize bytes (rounded up to 4096) that reads as zeros until it is written.

    mem_limit: most bytes of pages the pool may use, 0: no limit. acceleration: lz4's, 1 compresses best.
    Raises ValueError for a size out of range, MemoryError when the address space cannot be had.
    Every method may be called from any number of threads.
    """

    def __cinit__(self, uint64_t disksize, *, uint64_t mem_limit=0, int acceleration=1):
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
        self.slots = <uint64_t *>region_map(self.blocks * sizeof(uint64_t), True)
        self.touched = <uint8_t *>region_map(self.blocks // SLOTS_PER_PAGE + 1, True)
        if self.slots == NULL or self.touched == NULL:
            raise MemoryError(f"no address space for {self.blocks} slots")
        self.pool = Zsmalloc(self.blocks, mem_limit=mem_limit)

    def __dealloc__(self):
        cdef scratch *s
        cdef uint32_t i
        while self.scratches != NULL:
            s = self.scratches
            self.scratches = s.next
            free(s)
        region_unmap(self.slots, self.blocks * sizeof(uint64_t))
        region_unmap(self.touched, self.blocks // SLOTS_PER_PAGE + 1)
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

    cdef int _store(self, const char *block, scratch *s, uint64_t *slot) noexcept nogil:
        """Store a block's content; the slot that stands for it. -ENOSPC: mem_limit, even after compaction."""
        cdef uint64_t word, handle = 0
        cdef uint32_t size
        cdef char *payload
        cdef int rc
        if same_filled(block, &word):
            slot[0] = SLOT_SAME
            if word:
                handle = self.pool.word_alloc(word)
                if handle == 0:
                    return -ENOMEM
                slot[0] |= handle << SLOT_HANDLE_SHIFT
            return 0
        size = encode(block, s.out, self.pool.max_payload, s.state, self.acceleration)
        if size == 0:
            size = BLOCK_SIZE
        rc = self.pool.obj_alloc(size, &handle, &payload)
        if rc == -ENOSPC:
            counter_add(&self.n.limit_compactions, 1)
            while rc == -ENOSPC and self.pool.make_room():
                rc = self.pool.obj_alloc(size, &handle, &payload)
        if rc:
            return rc
        memcpy(payload, block if size == BLOCK_SIZE else <const char *>s.out, size)
        self.pool.obj_end(handle)
        slot[0] = handle << SLOT_HANDLE_SHIFT | size
        return 0

    cdef int _load(self, uint64_t slot, char *block) noexcept nogil:
        """The content that a slot stands for; 0 or -EIO."""
        cdef uint64_t handle = slot >> SLOT_HANDLE_SHIFT
        cdef char *payload
        cdef int rc
        if slot == 0:
            memset(block, 0, BLOCK_SIZE)
            return 0
        if slot & SLOT_SAME:
            fill(block, self.pool.word_read(handle) if handle else 0)
            return 0
        if self.pool.obj_begin(handle, &payload):
            return -EIO
        rc = decode(payload, slot & SLOT_SIZE_MASK, block)
        self.pool.obj_end(handle)
        return rc

    cdef void _drop(self, uint64_t slot) noexcept nogil:
        """Free what a slot stood for, once no block holds the slot."""
        cdef uint64_t handle = slot >> SLOT_HANDLE_SHIFT, size = slot & SLOT_SIZE_MASK
        if slot == 0:
            return
        counter_sub(&self.n.pages_stored, 1)
        if slot & SLOT_SAME:
            counter_sub(&self.n.same_pages, 1)
            if handle:
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
            self.pool.obj_prefetch(slot >> SLOT_HANDLE_SHIFT, slot & SLOT_SIZE_MASK)

    cdef int _write_block(self, uint64_t block, const char *src, scratch *s) noexcept nogil:
        cdef uint64_t slot, old
        cdef int rc = self._store(src, s, &slot)
        if rc == 0:
            pthread_mutex_lock(&self.stripes[block % STRIPES])
            old = self._set(block, slot)
            pthread_mutex_unlock(&self.stripes[block % STRIPES])
            self._drop(old)
        return rc

    cdef int _merge_block(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s) noexcept nogil:
        """Write n bytes (zeros when src is NULL) at a place in a block: its other bytes stay."""
        cdef uint64_t slot, old = 0
        cdef int rc
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        rc = self._load(self._get(block), s.page)
        if rc == 0:
            if src != NULL:
                memcpy(s.page + at, src, n)
            else:
                memset(s.page + at, 0, n)
            rc = self._store(s.page, s, &slot)
            if rc == 0:
                old = self._set(block, slot)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._drop(old)
        return rc

    cdef int _read_block(self, uint64_t block, uint32_t at, char *dst, uint32_t n, scratch *s) noexcept nogil:
        cdef int rc
        if self._get(block) == 0:
            memset(dst, 0, n)
            return 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        rc = self._load(self._get(block), dst if n == BLOCK_SIZE else s.page)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        if n != BLOCK_SIZE and rc == 0:
            memcpy(dst, s.page + at, n)
        return rc

    cdef int _zero_block(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Make a block a hole (slot 0) or allocated zeros (SLOT_SAME)."""
        cdef uint64_t old
        if slot == 0 and self._get(block) == 0:
            return 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        old = self._set(block, slot)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._drop(old)
        return 0

    # --------------------------------------------------------------------------------------------------------
    # whole requests: 0 or -errno of the first block that failed; blocks before it are done

    cdef int _write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint32_t at, n
        cdef int rc = 0
        cdef scratch *s = self._scratch_take()
        if s == NULL:
            return -ENOMEM
        while done < length and rc == 0:
            at = (offset + done) & (BLOCK_SIZE - 1)
            n = min(<uint64_t>(BLOCK_SIZE - at), length - done)
            if n == BLOCK_SIZE:
                rc = self._write_block((offset + done) >> BLOCK_SHIFT, src + done, s)
            else:
                rc = self._merge_block((offset + done) >> BLOCK_SHIFT, at, src + done, n, s)
            done += n
        self._scratch_give(s)
        counter_add(&self.n.writes, 1)
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
                return -ENOMEM
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
        counter_add(&self.n.reads, 1)
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
            this = STATE_HOLE | STATE_ZERO if slot == 0 else STATE_ZERO if slot == SLOT_SAME else 0
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
        cdef uint64_t stored = 0, same = 0, words = 0, huge = 0, compr = 0
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
            handle = slot >> SLOT_HANDLE_SHIFT
            obj_size = slot & SLOT_SIZE_MASK
            block += 1
            if slot == 0:
                continue
            stored += 1
            if slot & SLOT_SAME:
                same += 1
                words += handle != 0
                continue
            if self.pool.obj_begin(handle, &payload):
                return "a slot's handle is not live"
            if obj_size == 0 or obj_size > self.pool.obj_capacity(handle):
                self.pool.obj_end(handle)
                return "a slot's size does not fit its object"
            self.pool.obj_end(handle)
            compr += obj_size
            huge += obj_size == BLOCK_SIZE
        where[0] = 0
        if (stored != self.n.pages_stored or same != self.n.same_pages or compr != self.n.compr_data_size
                or huge != self.n.huge_pages):
            return "the counters differ from the slots"
        if stored - same + words != self.pool.cells_used:
            return "the slots' handles are not as many as the cells in use"
        return self.pool.find_fault(where, words)

    # --------------------------------------------------------------------------------------------------------
    # what clients ask for: 0 or -errno, -EINVAL beyond the end of the device

    cdef bint _begin(self, uint64_t offset, uint64_t length) noexcept nogil:
        """A request is at work until _end: check and reset wait for it, the compactor makes way. False: out of range."""
        if offset > self.disksize or length > self.disksize - offset:
            counter_add(&self.n.invalid_io, 1)
            return False
        pthread_rwlock_rdlock(&self.gate)
        counter_add(&self.n.inflight, 1)
        return True

    cdef void _end(self) noexcept nogil:
        counter_sub(&self.n.inflight, 1)
        pthread_rwlock_unlock(&self.gate)

    cdef int serve_read(self, char *dst, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        if not self._begin(offset, length):
            return -EINVAL
        rc = self._read(dst, offset, length)
        self._end()
        return rc

    cdef int serve_write(self, const char *src, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int rc
        if not self._begin(offset, length):
            return -EINVAL
        rc = self._write(src, offset, length)
        self._end()
        return rc

    cdef int serve_trim(self, uint64_t offset, uint64_t length) noexcept nogil:
        if not self._begin(offset, length):
            return -EINVAL
        self._zero(offset, length, 0, False)
        counter_add(&self.n.trims, 1)
        self._end()
        return 0

    cdef int serve_zero(self, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil:
        cdef int rc
        if not self._begin(offset, length):
            return -EINVAL
        rc = self._zero(offset, length, 0 if may_trim else SLOT_SAME, True)
        counter_add(&self.n.zeroes, 1)
        if rc:
            counter_add(&self.n.failed_writes, 1)
        self._end()
        return rc

    # --------------------------------------------------------------------------------------------------------
    # for Python

    def read(self, buf, uint64_t offset):
        """Fill a writable buffer from offset. Raises CorruptObjectError; ValueError beyond the device's end."""
        cdef Py_buffer view
        cdef int rc
        PyObject_GetBuffer(buf, &view, PyBUF_WRITABLE)
        with nogil:
            rc = self.serve_read(<char *>view.buf, offset, view.len)
        PyBuffer_Release(&view)
        if rc:
            raise error_from(rc, f"read of {view.len} bytes at {offset}")

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
            raise error_from(rc, f"write of {view.len} bytes at {offset}")

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
        cdef bint there
        extents = []
        while offset < end and len(extents) < (1 if one else EXTENTS_MAX):
            with nogil:
                there = self._begin(offset, length)
                if there:
                    stop = self._extent(offset, end, &kind)
                    self._end()
            if not there:
                raise error_from(-EINVAL, f"extents of {length} bytes at {offset}")
            extents.append((offset, stop - offset, kind))
            length -= stop - offset
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
            load_relaxed(&self.n.reads) + load_relaxed(&self.n.writes)
            + load_relaxed(&self.n.trims) + load_relaxed(&self.n.zeroes),
            load_relaxed(&self.n.inflight),
        )

    @property
    def mem_limit(self):
        """Most bytes of pages the pool may use, 0: no limit; what is stored already stays when it is lowered."""
        return self.pool.mem_limit

    @mem_limit.setter
    def mem_limit(self, uint64_t limit):
        self.pool.mem_limit = limit

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
            "reads": load_relaxed(&self.n.reads),
            "writes": load_relaxed(&self.n.writes),
            "trims": load_relaxed(&self.n.trims),
            "zeroes": load_relaxed(&self.n.zeroes),
            "read_bytes": load_relaxed(&self.n.read_bytes),
            "written_bytes": load_relaxed(&self.n.written_bytes),
            "limit_compactions": load_relaxed(&self.n.limit_compactions),
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

    def classes(self):
        """zsmalloc's table, see Zsmalloc.table."""
        return self.pool.table()

    def block(self, uint64_t number):
        """What stands for a block, as a dict. `kind` is hole, same (one repeated word), lz4, or raw.

        same: word, handle (0: the word is 0 and needs none). lz4 and raw: handle, payload_bytes, obj (bytes into the
        arena), zspage, chunk (of the zspage), class_index, class_size (bytes of a chunk), zspage_inuse and zspage_objs (chunks
        used and in all). An object may move at any time. Raises ValueError beyond the device's end; CorruptionError.
        """
        cdef uint64_t slot, handle, obj = 0, word = 0
        cdef char *payload
        cdef uint32_t span = 0, inuse = 0
        cdef size_class *c = NULL
        cdef int rc = 0
        if number >= self.blocks:
            raise ValueError(f"block {number} is not on the device, which has blocks 0 to {self.blocks - 1}")
        with nogil:
            self._begin(0, 0)
            pthread_mutex_lock(&self.stripes[number % STRIPES])
            slot = self._get(number)
            handle = slot >> SLOT_HANDLE_SHIFT
            if slot & SLOT_SAME:
                word = self.pool.word_read(handle) if handle else 0
            elif slot:
                rc = self.pool.obj_begin(handle, &payload)
                if rc == 0:
                    obj = load_relaxed(&self.pool.cells[handle]) & ~<uint64_t>CELL_TAGS
                    span = obj >> SPAN_SHIFT
                    c = &self.pool.classes[self.pool.zspages[span].class_index]
                    pthread_mutex_lock(&c.lock)
                    inuse = self.pool.zspages[span].inuse
                    pthread_mutex_unlock(&c.lock)
                    self.pool.obj_end(handle)
            pthread_mutex_unlock(&self.stripes[number % STRIPES])
            self._end()
        if rc:
            raise CorruptionError(f"a slot's handle is not live (at {number})")
        if slot == 0:
            return {"block": number, "kind": "hole"}
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
        with nogil:
            pthread_rwlock_wrlock(&self.gate)
            pthread_mutex_lock(&self.pool.compact_lock)
            region_release(self.slots, self.blocks * sizeof(uint64_t))
            region_release(self.touched, self.blocks // SLOTS_PER_PAGE + 1)
            store_relaxed(&self.touched_pages, 0)
            for i in range(sizeof(counters) // sizeof(uint64_t)):
                store_relaxed(<uint64_t *>&self.n + i, 0)
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
