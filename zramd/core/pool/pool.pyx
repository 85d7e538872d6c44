"""zsmalloc: an allocator for objects of 1 to 4096 bytes that can compact itself.

The design is that of Linux' mm/zsmalloc.c with Minchan Kim's compaction series of 2015 and the fullness groups of 2023.

    handle ──> cells[handle] = obj ──> chunk in a zspage:  |handle<<1|1|payload ...........|   allocated
                     ^                        |            |next<<1    |...................|   free
                     └────── header ──────────┘

A handle is not a location: moving an object rewrites its cell, and the header leads a mover from the object to the cell.
Chunks of one zspage are all of one size class; its pages are virtually contiguous, so no object straddles a copy.
Zspages of at most MAPPED_CHUNKS chunks (all those of 1 KiB or more) have a bitmap of the chunks in use instead of the list
of free ones. So a page on which nothing is left can be given back by itself, before any compaction; the kernel gives back
whole zspages. See docs/density.md.
Objects above max_payload are huge: a page each, without a header, so there is nothing to compact.

Lock order: compact_lock, then a class lock, then cells_lock or arena.lock, then limits.lock. Pins are outside of
that order: a holder of a class lock may only try for a pin, the holder of a pin may wait for a class lock.
A thread that holds a lock for longer than one object takes looks whether others wait for it, and gives way. No walk over
zspages is longer than SIFT_TRIES between two such looks.

A pin (CELL_PIN) is the exclusive right to an object: to its bytes, to move it and to free it. A reader holds it for one
decompression, a mover for one copy. A mover that cannot have it goes on and comes back later.
A mover also holds the lock of the object's class, so a thread that waits for a pin waits for that lock first: it waits for
a mover that does not get the processor as long as it takes, and passes its priority on to it where locks do that.

Crash rule: what a scan of the slots, cells and payloads finds is whole at any instant, because each is written after
what it points to: alloc: class of the span, header, payload, cell, (slot); move: copy, cell, header of the source; free:
(slot), chunk, cell. The cell of an object being written is pinned, and no slot holds its handle yet; the scan takes its
chunk back. A span changes its class only when no slot leads there. (A kill keeps what one processor has stored, in its
order; the compiler keeps the order because each step ends with store_release, which has a fence for it.)
zr_point marks each step; tests/property/test_crash_points.py dies at each.

What a word of the file says is not trusted with memory beyond the file's own: a handle, an obj or a link that a flipped
bit has made wrong is refused, or leads to an object whose checksum differs.
"""

cimport cython
from libc.errno cimport EINVAL, ENOENT, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from zramd.core.memory.arena cimport Arena, pages_load
from zramd.core.memory.region cimport KEPT_ARENA, KEPT_PAGES, KEPT_POOL, Memory, Region, page_unit, whole_pages
from zramd.core.pool.chunks cimport chunk_at, chunk_give, chunk_holds, chunk_take, spare_add
from zramd.core.pool.size_classes cimport is_huge, is_mapped, lock_class, size_class
from zramd.core.pool.zspages cimport (
    SIFT_TRIES,
    find_room,
    give_pages,
    zspage_gone,
    zspage_link,
    zspage_regroup,
    zspage_unlink,
)
from zramd.core.system cimport points
from zramd.core.system.bits cimport bits_set, prefetch
from zramd.core.system.checks cimport zr_assert, zr_assert_held, zr_static_assert
from zramd.core.system.locks cimport (
    clear_words,
    compare_swap,
    counter_add,
    cpu_relax,
    give_way,
    let_in,
    load_acquire,
    load_relaxed,
    load_relaxed_16,
    load_relaxed_32,
    mutex_inherit,
    nap,
    owned_add,
    owned_sub,
    owned_sub_32,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
    store_relaxed_16,
    store_release,
)
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport (
    CELLS_SLACK,
    CELL_LIVE,
    CELL_PIN,
    CELL_SUM_SHIFT,
    CELL_TAGS,
    CLASS_DELTA,
    GROUPS,
    GROUP_EMPTY,
    GROUP_FULL,
    HEADER_SIZE,
    ISOLATED,
    MAX_CLASSES,
    NIL,
    NO_CHUNK,
    PAGE_SHIFT,
    PAGE_SIZE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
    cell_obj,
    free_cell,
    next_cell,
    pages_of,
    zspage,
)

from zramd.core.pool.size_classes import CLASSES as _CLASSES

cdef enum:
    PIN_SPINS = 200         # about a decompression; then let the holder of the pin run
    PIN_TURNS = 100000      # naps of a thread that waits for a pin that no mover holds: about 10 s of its own
    ROOM_TRIES = 8          # zspages that are looked at for room where another one, or a new one, may do as well


@cython.final
cdef class Pool:
    """A pool of objects of 1 to 4096 bytes in `memory`.

    max_objects: most objects it may ever hold (costs address space, no memory). Raises ValueError when that is out of range,
    MemoryError when the address space cannot be had.
    """

    def __cinit__(self, max_objects, Memory memory not None):
        cdef uint32_t i
        zr_static_assert(sizeof(pool_counters) <= KEPT_ARENA - KEPT_POOL)
        for i in range(MAX_CLASSES):
            pthread_mutex_init(&self.classes[i].lock, NULL)
        pthread_mutex_init(&self.cells_lock, NULL)
        pthread_mutex_init(&self.compact_lock, NULL)
        if not 1 <= max_objects <= NIL - CELLS_SLACK - 1:
            raise ValueError(f"max_objects {max_objects} is out of range: 1 to {NIL - CELLS_SLACK - 1}")
        self.max_objects = max_objects
        self._make_classes()
        self.memory = memory
        self.counters = <pool_counters *>memory.kept(KEPT_POOL)
        # Each zspage holds one object at least, so there are never more zspages than objects.
        self.span_classes = memory.region(self.max_objects + CELLS_SLACK, True)
        self.span_class = <uint8_t *>self.span_classes.base
        self.cell_table = memory.region((self.max_objects + CELLS_SLACK + 1) * sizeof(uint64_t), True)
        self.cells = <uint64_t *>self.cell_table.base
        self.arena = Arena(<uint32_t>(self.max_objects + CELLS_SLACK), memory)
        self.records = Region(self.arena.span_count * sizeof(zspage))
        self.zspages = <zspage *>self.records.base
        self.arena.records = <char *>self.zspages
        self.arena.record_size = sizeof(zspage)
        self.cells_top = 1

    def __dealloc__(self):
        cdef uint32_t i
        pthread_mutex_destroy(&self.compact_lock)
        pthread_mutex_destroy(&self.cells_lock)
        for i in range(MAX_CLASSES):
            pthread_mutex_destroy(&self.classes[i].lock)

    cdef void _make_classes(self):
        """Fill classes and class_of."""
        cdef uint32_t size, i, g
        self.class_count = len(_CLASSES)
        self.huge = self.class_count - 1
        self.max_payload = <uint32_t>_CLASSES[self.huge - 1][0] - HEADER_SIZE
        for i in range(self.class_count):
            self.classes[i].size, self.classes[i].pages, self.classes[i].objs = _CLASSES[i]
            self.classes[i].unit = page_unit()
            for g in range(GROUPS):
                self.classes[i].heads[g] = self.classes[i].tails[g] = NIL
        i = 0
        for size in range(0, PAGE_SIZE + 1, CLASS_DELTA):
            while self.classes[i].size < size:
                i += 1
            self.class_of[size // CLASS_DELTA] = <uint8_t>i

    # --------------------------------------------------------------------------------------------------------
    # cells

    cdef int _cell_take(self, uint64_t *taken) noexcept nogil:
        """A free cell, which stays without CELL_LIVE until its owner stores an obj. -ENOMEM when none is left; -EDQUOT."""
        cdef uint64_t handle, next
        cdef int rc = 0
        pthread_mutex_lock(&self.cells_lock)
        handle = self.cells_free
        if handle:
            next = load_relaxed(&self.cells[handle])
            if next & CELL_TAGS:
                handle = 0      # overwritten in memory: what follows it is lost until the next start
            zr_point(points.cell_free_seen)
            self.cells_free = next_cell(next) if handle and next_cell(next) < self.cells_top else 0
        if handle == 0:
            if self.cells_top > self.max_objects + CELLS_SLACK:
                rc = -ENOMEM
            elif self.cells_top >= self.cells_populated:
                rc = self.cell_table.take_room(&self.cells[self.cells_top], sizeof(uint64_t))
                if rc == 0:
                    next = whole_pages((self.cells_top + 1) * sizeof(uint64_t)) // sizeof(uint64_t)
                    store_relaxed(&self.cells_populated, next)
            if rc == 0:
                handle = self.cells_top
                owned_add(&self.cells_top, 1)
        if rc == 0:
            owned_add(&self.cells_used, 1)
        pthread_mutex_unlock(&self.cells_lock)
        taken[0] = handle
        return rc

    cdef void _cell_give(self, uint64_t handle) noexcept nogil:
        zr_assert(handle and handle < load_relaxed(&self.cells_top))
        pthread_mutex_lock(&self.cells_lock)
        store_release(&self.cells[handle], free_cell(self.cells_free))
        self.cells_free = handle
        owned_sub(&self.cells_used, 1)
        pthread_mutex_unlock(&self.cells_lock)

    cdef int _pin(self, uint64_t handle, uint64_t *obj) noexcept nogil:
        """Wait for the pin of an object; its location, or -ENOENT when the handle is not live."""
        cdef uint64_t cell
        cdef uint32_t spins = 0, turns = 0
        if handle == 0 or handle >= load_relaxed(&self.cells_populated):
            return -ENOENT
        while True:
            cell = load_acquire(&self.cells[handle])
            if not cell & CELL_LIVE:
                return -ENOENT
            zr_point(points.cell_seen)
            if not cell & CELL_PIN and compare_swap(&self.cells[handle], cell, cell | CELL_PIN):
                obj[0] = cell_obj(cell)
                if obj[0] >> SPAN_SHIFT < load_relaxed_32(&self.arena.top):
                    return 0
                store_release(&self.cells[handle], cell)
                return -ENOENT
            spins += 1
            if spins < PIN_SPINS:
                cpu_relax()
                continue
            self._await_mover(cell)
            if load_acquire(&self.cells[handle]) != cell:
                continue
            # Nobody moves it. Only our own turns count: a thread may stand still for longer than any time.
            turns += 1
            if turns > PIN_TURNS:
                return -ENOENT      # no thread holds it: the bit was set by an error of the memory
            nap()

    cdef void _await_mover(self, uint64_t cell) noexcept nogil:
        """Wait until an object is not being moved, if that is why it is pinned. What the cell says may be wrong by now."""
        cdef uint64_t span = cell_obj(cell) >> SPAN_SHIFT
        cdef uint32_t index
        if span < load_relaxed_32(&self.arena.top):
            index = load_relaxed_16(&self.zspages[span].class_index)
            if index < self.class_count:
                lock_class(&self.classes[index])
                pthread_mutex_unlock(&self.classes[index].lock)

    # --------------------------------------------------------------------------------------------------------
    # objects

    cdef int obj_alloc(self, uint32_t size, uint64_t *handle, char **payload, bint modest=False) noexcept nogil:
        """Make an object of size bytes; pinned, until obj_end publishes what was written to payload.

        -EINVAL: size is not 1 to 4096; -ENOSPC: mem_limit; -EDQUOT: the file system of the state; -ENOMEM.
        modest: -ENOBUFS where a reserve is needed for requests, see Arena.take; but mem_limit's last pages are for
        this, see Limits.set_mem_limit. One thread at a time.
        """
        cdef uint32_t index
        cdef int rc
        if size == 0 or size > PAGE_SIZE:
            return -EINVAL
        index = self._class_for(size)
        rc = self._cell_take(handle)
        if rc:
            return rc
        zr_point(points.cell_taken)
        if modest:
            self.arena.limits.shrink_begin()
        rc = self._obj_alloc(index, handle[0], payload, modest)
        if modest:
            self.arena.limits.shrink_end()
        if rc:
            self._cell_give(handle[0])
        return rc

    cdef inline uint32_t _class_for(self, uint32_t size) noexcept nogil:
        """The size class of a payload of 1 to 4096 bytes."""
        if size > self.max_payload:
            return self.huge
        return self.class_of[(size + HEADER_SIZE + CLASS_DELTA - 1) // CLASS_DELTA]

    cdef uint32_t payload_below(self, uint32_t size) noexcept nogil:
        """The longest payload that takes a smaller chunk than one of size bytes (1 to 4096); 0: there is none."""
        cdef uint32_t index = self._class_for(size)
        return min(self.max_payload, self.classes[index - 1].size - HEADER_SIZE) if index else 0

    cdef int _obj_alloc(self, uint32_t index, uint64_t handle, char **payload, bint modest) noexcept nogil:
        cdef size_class *c = &self.classes[index]
        cdef uint32_t span = NIL
        cdef int chunk
        cdef char *start
        lock_class(c)
        chunk = self._spare_take(c, handle, &span)
        if chunk < 0:
            chunk = self._part_filled_take(c, handle, &span)
        if chunk < 0:
            chunk = self._new_take(c, index, handle, &span, modest)
        if chunk >= 0:
            zspage_regroup(self, c, span)
            start = chunk_at(self, c, span, chunk)
            zr_point(points.chunk_taken)
            store_release(&self.cells[handle], <uint64_t>(start - self.arena.base) | CELL_LIVE | CELL_PIN)
            payload[0] = start if is_huge(c) else start + HEADER_SIZE
            zr_point(points.cell_stored)
        pthread_mutex_unlock(&c.lock)
        if chunk >= 0:
            return 0
        let_in(&c.waiters)      # a caller that is refused tries again at once
        return chunk

    cdef int _spare_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil:
        """A spare page, for a huge object; or -ENOSPC."""
        if not is_huge(c) or self.spares == 0:
            return -ENOSPC
        span[0] = self.spare[self.spares - 1]
        return chunk_take(self, c, span[0], handle, False)

    cdef int _new_take(self, size_class *c, uint32_t index, uint64_t handle, uint32_t *span, bint modest) noexcept nogil:
        """The first chunk of a new zspage; or what _zspage_new and chunk_take say."""
        cdef int64_t fresh = self._zspage_new(c, index, modest)
        cdef int chunk
        if fresh < 0:
            return <int>fresh
        span[0] = <uint32_t>fresh
        chunk = chunk_take(self, c, span[0], handle, False)
        if chunk < 0:
            zspage_unlink(self, c, span[0])
            zspage_gone(self, c, span[0])
            self.arena.give(span[0], False)
        return chunk

    cdef int _part_filled_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil:
        """A chunk of a part-filled zspage, the fullest first, so that the emptiest get empty by themselves; or -ENOSPC."""
        cdef uint32_t group, candidate, tries = ROOM_TRIES
        cdef int chunk = -ENOSPC
        # All pages of huge zspages are alike, and those that are resident are in use, or spare. But of larger pages of the
        # kernel a part may be in use.
        cdef bint may_have_room = not is_huge(c) or c.unit > 1
        # With a reserve, a new zspage from there is better than the pages that a part-filled one has not.
        if load_relaxed(&self.arena.reserve):
            return self._resident_take(c, handle, span) if may_have_room else chunk
        for group in range(GROUP_FULL - 1, GROUP_EMPTY, -1):
            candidate = c.heads[group]
            while candidate != NIL and tries:
                span[0] = candidate
                chunk = chunk_take(self, c, candidate, handle, False)
                if chunk >= 0:
                    return chunk
                # The limit refuses the pages of its unused chunks. The next one may want fewer.
                tries -= 1
                candidate = self.zspages[candidate].next
        return self._resident_take(c, handle, span) if tries < ROOM_TRIES and may_have_room else chunk

    cdef int _resident_take(self, size_class *c, uint64_t handle, uint32_t *span) noexcept nogil:
        """A chunk on resident pages of the fullest zspage that has one; or -ENOSPC. The lock may be dropped meanwhile."""
        cdef uint32_t group = GROUP_FULL - 1, candidate, tries
        cdef bint reserve = load_relaxed(&self.arena.reserve) != 0
        cdef int chunk = -ENOSPC
        tries = ROOM_TRIES if reserve else SIFT_TRIES
        while chunk < 0 and group > GROUP_EMPTY:
            candidate = find_room(self, c, group, &tries)
            if candidate != NIL:
                span[0] = candidate
                chunk = chunk_take(self, c, candidate, handle, True)
            elif tries or reserve:
                group -= 1
                tries = ROOM_TRIES if reserve else SIFT_TRIES
            else:
                give_way(&c.lock, &c.waiters)
                group = GROUP_FULL - 1
                tries = SIFT_TRIES
        return chunk

    cdef int64_t _zspage_new(self, size_class *c, uint32_t index, bint modest) noexcept nogil:
        """An empty zspage, listed; its span, or -ENOMEM, -EDQUOT, -ENOBUFS."""
        cdef int64_t span = self.arena.take(c.pages, modest)
        cdef zspage *z
        cdef uint32_t page
        cdef int rc
        if span < 0:
            return span
        rc = self._class_take_room(<uint32_t>span)
        if rc:
            self.arena.give(<uint32_t>span, False)
            return rc
        z = &self.zspages[span]
        z.inuse = 0
        z.used_map = 0
        z.fresh = <uint16_t>c.objs if is_mapped(c) else 0
        z.first_free = NO_CHUNK
        store_relaxed_16(&z.class_index, <uint16_t>index)    # _await_mover looks at it without a lock
        self.span_class[span] = <uint8_t>(index + 1)
        zr_point(points.class_stored)
        if is_huge(c) and c.unit > 1:
            if not load_relaxed(&self.arena.reserve):
                self.arena.decommit(<uint32_t>span, ~<uint32_t>0)
        elif is_huge(c):
            for page in range(SPAN_PAGES):
                if self.arena.committed[span] >> page & 1:
                    if self.spares < SPARES:
                        spare_add(self, <uint32_t>span)
                    else:
                        self.arena.decommit(<uint32_t>span, <uint32_t>1 << page)
        owned_add(&c.zspages, 1)
        owned_add(&c.committed, bits_set(self.arena.committed[span]))
        zspage_link(self, c, <uint32_t>span)
        return span

    cdef int _class_take_room(self, uint32_t span) noexcept nogil:
        """Before a span's class is stored: see Region.take_room. Spans are handed out lowest first."""
        cdef uint64_t first = load_relaxed(&self.classes_populated), end = whole_pages(<uint64_t>span + 1)
        cdef int rc = 0
        if span >= first:
            rc = self.span_classes.take_room(&self.span_class[first], end - first)
            if rc == 0:
                store_relaxed(&self.classes_populated, end)     # several threads: the lower one of theirs is true as well
        return rc

    cdef int obj_begin(self, uint64_t handle, char **payload) noexcept nogil:
        """Pin an object: until obj_end it is the caller's alone and stays where payload points. -ENOENT: not live."""
        cdef uint64_t obj
        cdef int rc = self._pin(handle, &obj)
        if rc == 0:
            zr_point(points.object_pinned)
            payload[0] = self.arena.base + obj
            if self.zspages[obj >> SPAN_SHIFT].class_index != self.huge:
                payload[0] += HEADER_SIZE
        return rc

    cdef void obj_end(self, uint64_t handle) noexcept nogil:
        cdef uint64_t cell = load_relaxed(&self.cells[handle])
        zr_assert((cell & CELL_PIN) != 0)
        store_release(&self.cells[handle], cell & ~<uint64_t>CELL_PIN)

    cdef void obj_publish(self, uint64_t handle, uint64_t sum) noexcept nogil:
        """obj_end of an object that was written just now; sum: 16 bits to keep for it."""
        cdef uint64_t cell = load_relaxed(&self.cells[handle])
        zr_assert((cell & CELL_PIN) != 0)
        store_release(&self.cells[handle], cell_obj(cell) | CELL_LIVE | sum << CELL_SUM_SHIFT)

    cdef uint64_t obj_sum(self, uint64_t handle) noexcept nogil:
        """What obj_publish was given for a pinned object."""
        return load_relaxed(&self.cells[handle]) >> CELL_SUM_SHIFT

    cdef bint obj_fits(self, const char *payload, uint32_t size) noexcept nogil:
        """Whether size bytes are there to be read, wherever payload leads."""
        return <uint64_t>(payload - self.arena.base) + size <= <uint64_t>load_relaxed_32(&self.arena.top) << SPAN_SHIFT

    cdef bint obj_is_there(self, const char *payload, uint32_t size) noexcept nogil:
        """Whether the pages of size bytes that obj_fits are resident: those of an object are, and touching others may end
        the process."""
        cdef uint64_t start = payload - self.arena.base, last = start + size - 1
        cdef uint32_t first_page = (start & (SPAN_SIZE - 1)) >> PAGE_SHIFT
        cdef uint32_t last_page = (last & (SPAN_SIZE - 1)) >> PAGE_SHIFT
        return size and start >> SPAN_SHIFT == last >> SPAN_SHIFT and not (
            (<uint32_t>2 << last_page) - (<uint32_t>1 << first_page)
            & ~<uint32_t>pages_load(&self.arena.committed[start >> SPAN_SHIFT]))

    cdef int obj_free(self, uint64_t handle) noexcept nogil:
        """Free an object, once the holder of its pin is done. -ENOENT: the handle is not live."""
        cdef uint64_t obj
        cdef uint32_t span, index, chunk
        cdef size_class *c
        cdef bint empty = False
        cdef int rc = self._pin(handle, &obj)
        if rc:
            return rc
        zr_point(points.free_pinned)
        span = obj >> SPAN_SHIFT
        index = self.zspages[span].class_index
        c = &self.classes[index]
        chunk = (<uint32_t>obj & (SPAN_SIZE - 1)) // c.size
        lock_class(c)
        if not chunk_holds(self, c, span, chunk, handle):
            pthread_mutex_unlock(&c.lock)
            self.obj_end(handle)
            return -ENOENT
        chunk_give(self, c, span, chunk)
        zr_point(points.chunk_freed)
        if self.zspages[span].group != ISOLATED:
            if self.zspages[span].inuse:
                zspage_regroup(self, c, span)
                if is_mapped(c) and not is_huge(c):
                    give_pages(self, c, span, chunk)
            else:
                zspage_unlink(self, c, span)
                zspage_gone(self, c, span)
                empty = True
        pthread_mutex_unlock(&c.lock)
        if empty:
            self.arena.give(span, True)
        zr_point(points.span_freed)
        self._cell_give(handle)
        zr_point(points.cell_freed)
        return 0

    cdef uint32_t obj_capacity(self, uint64_t handle) noexcept nogil:
        """Bytes that fit in a pinned object."""
        cdef uint64_t obj = cell_obj(load_relaxed(&self.cells[handle]))
        cdef uint32_t index = self.zspages[obj >> SPAN_SHIFT].class_index
        return PAGE_SIZE if index == self.huge else self.classes[index].size - HEADER_SIZE

    cdef void obj_prefetch(self, uint64_t handle, uint32_t size) noexcept nogil:
        """Ask the cache for the first size bytes of an object, and what is known of its zspage. Only a hint: nothing is
        pinned or even looked at but the cell."""
        cdef uint64_t obj = 0
        cdef uint32_t at
        if handle < load_relaxed(&self.cells_populated):
            obj = cell_obj(load_relaxed(&self.cells[handle]))
        if obj >> SPAN_SHIFT < self.arena.span_count:
            prefetch(&self.zspages[obj >> SPAN_SHIFT])
            for at in range(0, size, 64):
                prefetch(self.arena.base + obj + at)

    cdef int word_alloc(self, uint64_t word, uint64_t *handle) noexcept nogil:
        """A handle whose cell holds a word: same-filled blocks use no pool memory. 0, -ENOMEM or -EDQUOT as obj_alloc."""
        cdef int rc = self._cell_take(handle)
        if rc == 0:
            store_release(&self.cells[handle[0]], word)
            zr_point(points.word_stored)
        return rc

    cdef uint64_t word_read(self, uint64_t handle) noexcept nogil:
        return load_acquire(&self.cells[handle]) if handle < load_relaxed(&self.cells_populated) else 0

    cdef void word_free(self, uint64_t handle) noexcept nogil:
        if handle < load_relaxed(&self.cells_top):
            self._cell_give(handle)
        zr_point(points.word_freed)

    # --------------------------------------------------------------------------------------------------------
    # the pool as a whole

    cdef int inherit_priority(self) noexcept nogil:
        """Make every lock hand on priority; 0 or an errno. Nobody else may use the pool yet."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.cells_lock) or mutex_inherit(&self.compact_lock)
        rc = rc or mutex_inherit(&self.arena.lock) or mutex_inherit(&self.arena.limits.lock)
        for i in range(self.class_count):
            rc = rc or mutex_inherit(&self.classes[i].lock)
        return rc

    cdef uint64_t mem_limit(self) noexcept nogil:
        """Most bytes of pages the pool may use, 0: no limit."""
        return load_relaxed(&self.arena.limits.mem_limit) << PAGE_SHIFT

    cdef void set_mem_limit(self, uint64_t limit, bint shrinks) noexcept nogil:
        """Rounded up to pages. Raising and lowering it takes effect at once. shrinks: see Limits.

        One thread at a time.
        """
        self.arena.limits.set_mem_limit(pages_of(limit), shrinks)
        self._limits_changed()

    cdef void tidy_budget(self) noexcept nogil:
        """Let others have what the budget has granted and is not needed. One thread at a time."""
        if self.arena.limits.tidy_budget():
            self._limits_changed()

    cdef void _limits_changed(self) noexcept nogil:
        """Have all be tried again that was in vain."""
        cdef uint32_t i
        counter_add(&self.undone, 1)    # who compacts now had the old limit
        for i in range(self.class_count):
            lock_class(&self.classes[i])
            store_relaxed(&self.classes[i].stuck, 0)
            pthread_mutex_unlock(&self.classes[i].lock)

    cdef int populate(self) noexcept nogil:
        """Make the cells of max_objects objects and the classes of spans resident; 0, -EDQUOT or -ENOMEM."""
        # One more for each object that is written while its block still holds the old one.
        cdef uint64_t cells = min(self.max_objects + PAGE_SIZE, self.max_objects + CELLS_SLACK + 1)
        cdef int rc = self.cell_table.populate(cells * sizeof(uint64_t))
        if rc == 0:
            store_relaxed(&self.cells_populated, max(cells, self.cells_populated))
            rc = self.span_classes.populate(self.arena.span_count)
        if rc == 0:
            store_relaxed(&self.classes_populated, self.arena.span_count)
        return rc

    cdef void clear(self) noexcept nogil:
        """Forget every object and give all memory back. Nobody else may have an object; compact_lock is held."""
        cdef uint32_t i, g
        cdef size_class *c
        zr_assert_held(&self.compact_lock)
        for i in range(self.class_count):
            c = &self.classes[i]
            lock_class(c)
            store_relaxed(&c.zspages, 0)
            store_relaxed(&c.inuse, 0)
            store_relaxed(&c.committed, 0)
            store_relaxed(&c.stuck, 0)
            for g in range(GROUPS):
                c.heads[g] = c.tails[g] = NIL
                store_relaxed(&c.group_count[g], 0)
            if i == self.huge:
                owned_sub_32(&self.spares, self.spares)
            pthread_mutex_unlock(&c.lock)
        self.records.clear()
        self.arena.reset()
        zr_point(points.pool_cleared)
        pthread_mutex_lock(&self.cells_lock)
        self.span_classes.clear()
        store_relaxed(&self.classes_populated, 0)
        self.cell_table.clear()
        store_relaxed(&self.cells_populated, 0)
        store_relaxed(&self.cells_top, 1)
        store_relaxed(&self.cells_used, 0)
        self.cells_free = 0
        pthread_mutex_unlock(&self.cells_lock)
        clear_words(<uint64_t *>self.counters, sizeof(pool_counters))

    cdef uint64_t metadata_bytes(self) noexcept nogil:
        """Resident bytes beside the arena's pages: cells, zspages, tables, counters, this object."""
        cdef uint64_t zspages = max(load_relaxed_32(&self.arena.top), load_relaxed_32(&self.arena.records_populated))
        return (whole_pages(load_relaxed(&self.cells_populated) * sizeof(uint64_t)) + whole_pages(zspages * sizeof(zspage))
                + whole_pages(zspages) + whole_pages(KEPT_PAGES << PAGE_SHIFT)
                + self.arena.metadata_bytes() + sizeof(self.classes) + sizeof(self.class_of))
