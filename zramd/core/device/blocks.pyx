"""One block at a time: the table of slots over a codec and a pool.

    write:  encode -> pool.obj_alloc -> copy -> obj_publish -> slot -> free the old object
    read:   slot -> pool.obj_begin -> decode into the caller's buffer -> obj_end
    trim:   slot = 0 -> free

A block is read or written whole, under the lock of its stripe. A new object is complete before its slot changes, so a
write that fails leaves the old content (and a crash leaves either). Nothing here knows where an object is, and compaction
knows nothing of slots.

With verify, half of an object's checksum is in the slot and half in the cell; it is seeded with the block's number, so
that a slot that leads to another block's object is found out too. For a same-filled block all of it is in the slot.

Lock order: the cold codec's encoder_lock, one stripe, then a decoder's or the pool's. While compressing no lock is held
but the stripe of a part-written block, or encoder_lock.
"""

cimport cython
from libc.errno cimport EIO, ENOMEM, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zramd.core.system.bits cimport prefetch
from zramd.core.system.checks cimport zr_assert_held, zr_static_assert
from zramd.core.system cimport points
from zramd.core.system.points cimport zr_point
from zramd.core.device.backing cimport AWAY, ROOM, Backing
from zramd.core.device.checksum cimport checksum
from zramd.core.device.cold cimport Cold
from zramd.core.device.codec cimport (
    USE_LZ4,
    USE_LZ4HC,
    USE_ZSTD,
    codec_of,
    decode,
    encode,
    fill,
    same_filled,
    state_prepare,
    state_size,
)
from zramd.core.device.slots cimport (
    COLD,
    HOLE,
    LOST,
    OUT,
    RAW,
    SAME,
    SLOT_SIZE_MASK,
    SLOT_ZSTD,
    block_kind,
    has_object,
    is_cold,
    is_out,
    object_slot,
    same_slot,
    slot_bytes,
    slot_handle,
    slot_kind,
    slot_sum,
    sum_high,
    sum_low,
)
from zramd.core.system.locks cimport (
    clear_words,
    counter_add,
    load_acquire,
    load_relaxed,
    load_relaxed_8,
    mutex_inherit,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
    store_relaxed_8,
    store_release,
)
from zramd.core.memory.region cimport (
    KEPT_DEVICE,
    KEPT_PAGES,
    KEPT_STATE,
    Memory,
    Region,
    secret_alloc,
    secret_free,
    whole_pages,
)
from zramd.core.pool.compaction cimport make_room
from zramd.core.pool.pool cimport Pool
from zramd.core.types cimport (
    BLOCK_SIZE,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOTS_PER_PAGE,
    pages_of,
)

cdef extern from *:
    """
    #define touch(p) (__atomic_exchange_n((p), 1, __ATOMIC_RELAXED) == 0)
    """
    bint touch(uint8_t *p) noexcept nogil   # whether it was not before


@cython.final
cdef class Blocks:
    """The blocks 0 to count - 1, with their slots and counters in memory; each reads as zeros until it is written.

    verify: store a checksum with each, and check it on each read. name, level: the codec of what is written. Raises
    ValueError, MemoryError.
    """

    def __cinit__(self, uint64_t count, Memory memory not None, str name, int level, bint verify, int cold_level=0,
                  Backing backing=None):
        cdef uint32_t i
        zr_static_assert(sizeof(counters) <= KEPT_STATE + KEPT_PAGES * <int>PAGE_SIZE - KEPT_DEVICE)
        zr_static_assert(BLOCK_SIZE == PAGE_SIZE)
        zr_static_assert(<int>SLOT_SIZE_MASK >= <int>BLOCK_SIZE)
        for i in range(STRIPES):
            pthread_mutex_init(&self.stripes[i], NULL)
        pthread_mutex_init(&self.scratch_lock, NULL)
        self.count = count
        self.hot = codec_of(name, level)
        self.hot_marks = SLOT_ZSTD if self.hot.name == USE_ZSTD else 0
        self.promotes = self.hot.name == USE_LZ4 or self.hot.name == USE_LZ4HC
        self.verify = verify
        self.backing = backing
        self.scratch_size = <uint32_t>whole_pages(sizeof(scratch) + state_size(&self.hot))
        if backing is not None:
            self.scratch_size += ROOM
        self.counters = <counters *>memory.kept(KEPT_DEVICE)
        self.slot_table = memory.region(count * sizeof(uint64_t), True)
        self.slots = <uint64_t *>self.slot_table.base
        self.touches = Region(self.slot_table.size // PAGE_SIZE + 1)
        self.touched = <uint8_t *>self.touches.base
        self.ages_table = Region(count)
        self.ages = <uint8_t *>self.ages_table.base
        self.reads_table = Region(count // 8 + sizeof(uint64_t))
        self.reads = <uint64_t *>self.reads_table.base
        self.cold = Cold(cold_level, self.hot.name == USE_ZSTD)
        self.pool = Pool(count, memory)
        # The first request is not to be the one that finds no memory for it.
        self.scratches = self._scratch_make()
        if self.scratches == NULL:
            raise MemoryError(f"no memory to compress by {name}: {self.scratch_size} bytes")

    def __dealloc__(self):
        cdef scratch *s
        cdef uint32_t i
        while self.scratches != NULL:
            s = self.scratches
            self.scratches = s.next
            secret_free(s, self.scratch_size)
        pthread_mutex_destroy(&self.scratch_lock)
        for i in range(STRIPES):
            pthread_mutex_destroy(&self.stripes[i])

    cdef int inherit_priority(self) noexcept nogil:
        """Make every lock hand on priority; 0 or an errno. Nobody else may be here yet."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.scratch_lock) or self.pool.inherit_priority() or self.cold.inherit_priority()
        for i in range(STRIPES):
            rc = rc or mutex_inherit(&self.stripes[i])
        return rc

    # --------------------------------------------------------------------------------------------------------
    # scratch: as many as there ever were requests at work at once; the last one used is still in the cache

    cdef scratch *_scratch_make(self) noexcept nogil:
        """One more; NULL when memory is short."""
        cdef scratch *s = <scratch *>secret_alloc(self.scratch_size)
        if s == NULL:
            return NULL
        s.next = NULL
        s.room = NULL if self.backing is None else <char *>s + self.scratch_size - ROOM
        if not state_prepare(&self.hot, s.state):
            secret_free(s, self.scratch_size)
            return NULL
        counter_add(&self.scratch_count, 1)
        return s

    cdef scratch *scratch_take(self) noexcept nogil:
        cdef scratch *s
        pthread_mutex_lock(&self.scratch_lock)
        s = self.scratches
        if s != NULL:
            self.scratches = s.next
        pthread_mutex_unlock(&self.scratch_lock)
        if s == NULL:
            s = self._scratch_make()    # without the lock: it may take long
        return s

    cdef void scratch_give(self, scratch *s) noexcept nogil:
        pthread_mutex_lock(&self.scratch_lock)
        s.next = self.scratches
        self.scratches = s
        pthread_mutex_unlock(&self.scratch_lock)

    # --------------------------------------------------------------------------------------------------------
    # one block

    cdef int _store(self, uint64_t block, const char *content, scratch *s, uint64_t *slot, bint waits) noexcept nogil:
        """Store a block's content; the slot that stands for it. -ENOSPC: mem_limit leaves no room, -EDQUOT: the state's
        file system does not; with `waits`, not even after compaction. -ENOMEM: the system refuses memory."""
        cdef uint64_t word, marks = 0
        cdef uint32_t size
        cdef int rc
        if same_filled(content, &word):
            return self.store_word(block, word, slot) if waits else self._store_word(block, word, slot)
        # What the block has now is freed afterwards: while compressing, there is time to fetch what that touches.
        self.prefetch_cell(block)
        size = encode(&self.hot, content, s.out, self.pool.max_payload, s.state)
        self.prefetch_object(block, 1)
        if size == 0:
            size = BLOCK_SIZE
        else:
            content = s.out
            marks = self.hot_marks
        if waits:
            rc = self.store_payload(block, content, size, slot)
        else:
            rc = self._store_payload(block, content, size, slot)
        if rc == 0:
            slot[0] |= marks
        return rc

    cdef int store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil:
        """Store a block that is one word repeated; the slot that stands for it. Errors as _store that waits."""
        cdef bint in_vain = False
        cdef int rc = self._store_word(block, word, slot)
        while rc and make_room(self.pool, rc, &in_vain):
            rc = self._store_word(block, word, slot)
        return rc

    cdef int _store_word(self, uint64_t block, uint64_t word, uint64_t *slot) noexcept nogil:
        """store_word, if there is room now."""
        cdef uint64_t handle = 0
        cdef int rc = 0
        if word:
            rc = self.pool.word_alloc(word, &handle)
        slot[0] = self._same_slot(block, word, handle)
        return rc

    cdef int store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil:
        """Store what a block is compressed to, or all of it; the slot that stands for it. Errors as _store that waits.

        The caller holds no lock.
        """
        cdef bint in_vain = False
        cdef int rc = self._store_payload(block, payload, size, slot)
        if rc == -ENOSPC:
            counter_add(&self.counters.limit_compactions, 1)
        while rc and make_room(self.pool, rc, &in_vain):
            rc = self._store_payload(block, payload, size, slot)
        return rc

    cdef int _store_payload(self, uint64_t block, const char *payload, uint32_t size, uint64_t *slot) noexcept nogil:
        """store_payload, if there is room now."""
        cdef uint64_t handle = 0
        cdef uint32_t sum = 0
        cdef char *place
        cdef int rc = self.pool.obj_alloc(size, &handle, &place)
        if rc:
            return rc
        if self.verify:
            sum = checksum(payload, size, block)
        memcpy(place, payload, size)
        zr_point(points.payload_written)
        self.pool.obj_publish(handle, sum_high(sum))
        zr_point(points.object_published)
        slot[0] = object_slot(handle, size, sum)
        return 0

    cdef uint64_t _same_slot(self, uint64_t block, uint64_t word, uint64_t handle) noexcept nogil:
        """The slot of a block that is one word repeated."""
        return same_slot(handle, checksum(<const char *>&word, sizeof(word), block) if self.verify else 0)

    cdef int _load(self, uint64_t block, uint64_t slot, char *content) noexcept nogil:
        """The content that a block's slot stands for; 0, -EIO, or AWAY: it is out."""
        cdef uint64_t handle = slot_handle(slot), word
        cdef char *payload
        cdef int rc = -EIO
        cdef block_kind what = slot_kind(slot)
        zr_assert_held(&self.stripes[block % STRIPES])
        zr_point(points.slot_seen)
        if what == HOLE:
            memset(content, 0, BLOCK_SIZE)
            return 0
        if what == OUT:
            if self.is_away(slot):
                return AWAY
        elif what == SAME:
            word = self.word_of(slot)
            if self.word_is_sound(block, slot, word):
                fill(content, word)
                rc = 0
        elif what != LOST and self.pool.obj_begin(handle, &payload) == 0:
            if self.object_is_sound(block, slot, payload):
                if is_cold(slot):
                    rc = self.cold.decode(payload, slot_bytes(slot), content)
                else:
                    rc = decode(payload, slot_bytes(slot), content)
            self.pool.obj_end(handle)
        if rc:
            counter_add(&self.counters.checksum_errors, 1)
            store_relaxed(&self.counters.corrupt_block, block + 1)
        return rc

    cdef inline uint64_t word_of(self, uint64_t slot) noexcept nogil:
        """The word that a slot of one stands for."""
        cdef uint64_t handle = slot_handle(slot)
        return self.pool.word_read(handle) if handle else 0

    cdef inline bint word_is_sound(self, uint64_t block, uint64_t slot, uint64_t word) noexcept nogil:
        return not self.verify or slot == self._same_slot(block, word, slot_handle(slot))

    cdef inline bint object_is_sound(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil:
        cdef uint32_t size = slot_bytes(slot)
        if size > BLOCK_SIZE or not self.pool.obj_fits(payload, size):
            return False
        if not self.verify:
            return True
        return self.pool.obj_is_there(payload, size) and self.checksum_agrees(block, slot, payload)

    cdef inline bint checksum_agrees(self, uint64_t block, uint64_t slot, const char *payload) noexcept nogil:
        """Whether a payload on resident pages has the checksum that its slot and its cell have."""
        cdef uint32_t sum = checksum(payload, slot_bytes(slot), block)
        return sum_low(sum) == slot_sum(slot) and sum_high(sum) == self.pool.obj_sum(slot_handle(slot))

    cdef void _free(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Free what a block's slot stood for, once no block holds the slot."""
        cdef uint64_t handle = slot_handle(slot)
        if has_object(slot):
            self.pool.obj_free(handle)
        elif is_out(slot):
            if self.is_away(slot):
                self.backing.drop(slot)
        # A wrong slot must not free another block's word.
        elif slot_kind(slot) == SAME and handle and self.word_is_sound(block, slot, self.pool.word_read(handle)):
            self.pool.word_free(handle)

    cdef uint64_t get(self, uint64_t block) noexcept nogil:
        if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
            return 0
        return load_acquire(&self.slots[block])

    cdef int put(self, uint64_t block, uint64_t slot, bint held) noexcept nogil:
        """Give a block a new slot, and free what the old one stood for: no block is changed in any other way.

        0, or -EDQUOT, -ENOMEM when no room is left for the slot, not even after compaction unless the caller has the stripe
        (held): then the block is as it was, and what the new slot stands for is freed. The stripe is let go before
        anything is freed.
        """
        cdef uint64_t gone = slot
        cdef int rc = 0
        if slot:
            rc = self._slot_take_room(block) if held else self._slot_make_room(block)
        if not held:
            pthread_mutex_lock(&self.stripes[block % STRIPES])
        zr_assert_held(&self.stripes[block % STRIPES])
        if rc == 0:
            gone = self.get(block)
            if slot or gone:
                self._used(block)
                store_release(&self.slots[block], slot)
                zr_point(points.slot_stored)
                self._count(slot, 1)
                self._count(gone, <uint64_t>-1)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        self._free(block, gone)
        return rc

    cdef int _slot_take_room(self, uint64_t block) noexcept nogil:
        """Before a slot that is not 0 is stored: see Region.take_room. Several threads may ask for the same page."""
        cdef int rc = 0
        if not is_touched(&self.touched[block // SLOTS_PER_PAGE]):
            rc = self.slot_table.take_room(&self.slots[block], sizeof(uint64_t))
            if rc == 0 and touch(&self.touched[block // SLOTS_PER_PAGE]):
                counter_add(&self.touched_pages, 1)
        return rc

    cdef int _slot_make_room(self, uint64_t block) noexcept nogil:
        """_slot_take_room, after compaction if need be. The caller holds no lock."""
        cdef bint in_vain = False
        cdef int rc = self._slot_take_room(block)
        while rc and make_room(self.pool, rc, &in_vain):
            rc = self._slot_take_room(block)
        return rc

    cdef inline void _used(self, uint64_t block) noexcept nogil:
        """Note that a request changes a block. The caller has its stripe."""
        if load_relaxed_8(&self.ages[block]):
            store_relaxed_8(&self.ages[block], 0)
            if is_read(self.reads, block):
                clear_read(self.reads, block)

    cdef void _read_again(self, uint64_t block, uint8_t age) noexcept nogil:
        """Note that a request reads a block of this age, which is not 0. The caller has its stripe."""
        cdef block_kind what = slot_kind(self.get(block))
        cdef bint again = age == AGE_WANTED or (
            age <= OUT_READ_AGAIN and is_read(self.reads, block) if what == OUT
            else age <= READ_AGAIN and what == COLD and self.promotes)
        if not is_read(self.reads, block):
            note_read(self.reads, block)
        if not again:
            store_relaxed_8(&self.ages[block], 0)
        elif age != AGE_WANTED:
            store_relaxed_8(&self.ages[block], AGE_WANTED)

    cdef void _count(self, uint64_t slot, uint64_t n) noexcept nogil:
        """Count a block's slot as stored (n: 1), or as stored no more (n: -1)."""
        cdef block_kind what = slot_kind(slot)
        if what == HOLE:
            return
        counter_add(&self.counters.pages_stored, n)
        if what == SAME:
            counter_add(&self.counters.same_pages, n)
        elif what == OUT:
            counter_add(&self.counters.out_pages, n)
            counter_add(&self.counters.out_data_size, n * slot_bytes(slot))
        elif what != LOST:
            counter_add(&self.counters.compr_data_size, n * slot_bytes(slot))
        if what == COLD:
            counter_add(&self.counters.cold_pages, n)
            counter_add(&self.counters.cold_data_size, n * slot_bytes(slot))
        if what == RAW:
            counter_add(&self.counters.huge_pages, n)
            if n == 1:
                counter_add(&self.counters.huge_pages_since, 1)

    cdef void prefetch_cell(self, uint64_t block) noexcept nogil:
        """Ask the cache for the age of a block and the cell of its object, for which the slot is waited for."""
        cdef uint64_t slot = self.get(block)
        if has_object(slot):
            prefetch(&self.ages[block])
            prefetch(&self.pool.cells[slot_handle(slot)])

    cdef void prefetch_object(self, uint64_t block, uint32_t most) noexcept nogil:
        """Ask the cache for the object of a block, or the first `most` bytes of it, for which slot and cell are waited for.
        """
        cdef uint64_t slot = self.get(block)
        if has_object(slot):
            self.pool.obj_prefetch(slot_handle(slot), min(slot_bytes(slot), most))

    cdef int write_block(self, uint64_t block, const char *src, scratch *s) noexcept nogil:
        cdef uint64_t slot
        cdef int rc = self._store(block, src, s, &slot, True)
        return self.put(block, slot, False) if rc == 0 else rc

    cdef int merge_block(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s) noexcept nogil:
        """Write n bytes (zeros when src is NULL) at a place in a block: its other bytes stay. AWAY: it is out."""
        return self.merge_loaded(block, at, src, n, s, 0)

    cdef int merge_loaded(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s,
                          uint64_t loaded) noexcept nogil:
        """merge_block, of one whose content is in s.page unless its slot is another than `loaded` by now."""
        # First: were there no room for it once the object has taken some, each try would free that, and take it again.
        cdef bint in_vain = False
        cdef int rc = self._slot_make_room(block)
        if rc:
            return rc
        rc = self._merge(block, at, src, n, s, loaded)
        if rc == -ENOSPC:
            counter_add(&self.counters.limit_compactions, 1)
        # Room is made without the stripe, on which readers of other blocks may wait: then the block may be another.
        while rc < 0 and make_room(self.pool, rc, &in_vain):
            rc = self._merge(block, at, src, n, s, loaded)
        return rc

    cdef int _merge(self, uint64_t block, uint32_t at, const char *src, uint32_t n, scratch *s,
                    uint64_t loaded) noexcept nogil:
        """merge_loaded, if there is room now."""
        cdef uint64_t slot
        cdef int rc = 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        if loaded == 0 or self.get(block) != loaded:
            rc = self._load(block, self.get(block), s.page)
        if rc == 0:
            if src != NULL:
                memcpy(s.page + at, src, n)
            else:
                memset(s.page + at, 0, n)
            rc = self._store(block, s.page, s, &slot, False)
            if rc == 0:
                return self.put(block, slot, True)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        return rc

    cdef inline bint is_away(self, uint64_t slot) noexcept nogil:
        """Whether a slot leads to a place on the backing; bits that changed in memory may only seem to say so."""
        return is_out(slot) and self.backing is not None and self.backing.has_place(slot)

    cdef int read_block(self, uint64_t block, uint32_t at, char *dst, uint32_t n, scratch *s) noexcept nogil:
        cdef uint8_t age
        cdef int rc
        if self.get(block) == 0:
            memset(dst, 0, n)
            return 0
        pthread_mutex_lock(&self.stripes[block % STRIPES])
        age = load_relaxed_8(&self.ages[block])
        if age:
            self._read_again(block, age)
        rc = self._load(block, self.get(block), dst if n == BLOCK_SIZE else s.page)
        pthread_mutex_unlock(&self.stripes[block % STRIPES])
        if n != BLOCK_SIZE and rc == 0:
            memcpy(dst, s.page + at, n)
        return rc

    cdef int zero_block(self, uint64_t block, bint hole) noexcept nogil:
        """Make a block a hole, or allocated zeros."""
        if hole and self.get(block) == 0:
            return 0
        return self.put(block, 0 if hole else self._same_slot(block, 0, 0), False)

    # --------------------------------------------------------------------------------------------------------
    # all of them

    cdef int populate(self) noexcept nogil:
        """Make the slots, the cells, some scratch, and what is needed for cold blocks resident; 0, -EDQUOT or -ENOMEM."""
        cdef uint64_t pages = self.count // SLOTS_PER_PAGE + 1, page
        cdef scratch *s
        cdef int rc = self.pool.populate()
        if rc == 0:
            rc = self.slot_table.populate(self.count * sizeof(uint64_t))
        if rc == 0:
            rc = self.ages_table.populate(self.count)
        if rc == 0:
            rc = self.reads_table.populate(self.reads_table.size)
        if rc == 0:
            rc = self.cold.populate()
        if rc == 0 and self.backing is not None:
            rc = self.backing.populate()
        while rc == 0 and load_relaxed(&self.scratch_count) < SCRATCHES_READY:
            s = self._scratch_make()
            if s == NULL:
                rc = -ENOMEM
            else:
                self.scratch_give(s)
        if rc:
            return rc
        for page in range(pages):
            store_relaxed_8(&self.touched[page], 1)     # a sweep may be under way
        store_relaxed(&self.touched_pages, pages)
        return 0

    cdef void clear(self) noexcept nogil:
        """Forget all content and all counts. Nobody else may be here; the pool's compact_lock is held."""
        self.slot_table.clear()
        zr_point(points.slots_cleared)
        self.touches.clear()
        self.ages_table.clear()
        self.reads_table.clear()
        if self.backing is not None:
            self.backing.forget_all()
        store_relaxed(&self.touched_pages, 0)
        clear_words(<uint64_t *>self.counters, sizeof(counters))
        self.pool.clear()

    cdef uint64_t metadata_bytes(self) noexcept nogil:
        """Resident bytes beside the pool's pages."""
        return (
            (load_relaxed(&self.touched_pages) << PAGE_SHIFT)
            + (pages_of(self.count // SLOTS_PER_PAGE + 1) << PAGE_SHIFT)
            + (pages_of(load_relaxed(&self.touched_pages) * SLOTS_PER_PAGE) << PAGE_SHIFT)
            + load_relaxed(&self.scratch_count) * self.scratch_size
            + (pages_of(load_relaxed(&self.touched_pages) * SLOTS_PER_PAGE // 8) << PAGE_SHIFT)
            + (0 if self.backing is None else self.backing.table.size)
            + sizeof(self.stripes)
            + self.cold.metadata_bytes()
            + self.pool.metadata_bytes()
        )
