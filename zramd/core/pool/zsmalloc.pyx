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

Lock order: compact_lock, then a class lock, then cells_lock or arena.lock. Pins are outside of that order: whoever holds
a class lock may only try for a pin, whoever holds a pin may wait for a class lock.
Who holds a lock for longer than one object takes looks whether others wait for it, and gives way. No walk over zspages
is longer than SIFT_TRIES between two such looks.

A pin (CELL_PIN) is the exclusive right to an object: to its bytes, to move it and to free it. A reader holds it for one
decompression, a mover for one copy. A mover that cannot have it goes on and comes back later.
A mover also holds the lock of the object's class. So who waits for a pin waits for that lock first: a mover that does not
get the processor is waited for as long as it takes, and gets the waiter's priority where locks hand it on.

Crash rule: what a scan of the slots, cells and payloads finds is whole at any instant, because each is written after
what it points to: alloc: class of the span, header, payload, cell, (slot); move: copy, cell, header of the source; free:
(slot), chunk, cell. The cell of an object being written is pinned, and no slot holds its handle yet; the scan takes its
chunk back. A span changes its class only when no slot leads there. (A kill keeps what one processor has stored, in its
order; the compiler keeps the order because each step ends with store_release, which has a fence for it.)
zr_crash_point marks each step; tests/property/test_crash_points.py dies at each.

What a word of the file says is not trusted with memory beyond the file's own: a handle, an obj or a link that a flipped
bit has made wrong is refused, or leads to an object whose checksum differs.
"""

cimport cython
from libc.errno cimport EBUSY, EDQUOT, EINVAL, ENOENT, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from zramd.core.memory.arena cimport Arena, pages_load
from zramd.core.system.checks cimport (
    FILL_FREED,
    FILL_FRESH,
    ZRAMD_CHECK,
    zr_assert,
    zr_crash_point,
    zr_fill,
    zr_poison,
    zr_unpoison,
)
from zramd.core.system.locks cimport (
    compare_swap,
    counter_add,
    cpu_relax,
    give_way,
    let_in,
    load_acquire,
    load_relaxed,
    load_relaxed_16,
    load_relaxed_32,
    lock_counted,
    mutex_inherit,
    nap,
    owned_add,
    owned_add_32,
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
from zramd.core.memory.region cimport HEAD_SIZE, KEPT_PAGES, KEPT_POOL, Memory, Region, page_unit, whole_pages
from zramd.core.types cimport (
    CELL_CHECK_SHIFT,
    CELL_LENT,
    CELL_LIVE,
    CELL_PIN,
    CELL_TAGS,
    CHUNK_ALIGN,
    CLASS_DELTA,
    FINE_CHUNK,
    GROUP_EMPTY,
    GROUP_FULL,
    GROUPS,
    HEADER_SIZE,
    ISOLATED,
    MAX_CLASSES,
    MIN_CHUNK,
    NIL,
    NO_CHUNK,
    NO_ZSPAGE,
    PAGE_SHIFT,
    PAGE_SIZE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
    cell_obj,
    zspage,
)

import zlib

from zramd.errors import CorruptionError, error_from

CHECK_LEVEL = ZRAMD_CHECK    # see checks.pxd

cdef extern from *:
    """
    #include <time.h>
    static inline uint64_t monotonic_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    #define lowest_bit(x) ((uint32_t)__builtin_ctz(x))
    #define highest_bit_64(x) (63 - (uint32_t)__builtin_clzll(x))
    #define lowest_bit_64(x) ((uint32_t)__builtin_ctzll(x))
    #define bits_set(x) ((uint32_t)__builtin_popcount(x))
    #define bits_set_64(x) ((uint32_t)__builtin_popcountll(x))
    #define prefetch(p) __builtin_prefetch(p)
    """
    void prefetch(const void *p) noexcept nogil
    uint64_t monotonic_ns() noexcept nogil
    uint32_t lowest_bit(uint32_t x) noexcept nogil
    uint32_t bits_set(uint32_t x) noexcept nogil
    uint32_t highest_bit_64(uint64_t x) noexcept nogil
    uint32_t lowest_bit_64(uint64_t x) noexcept nogil
    uint32_t bits_set_64(uint64_t x) noexcept nogil

cdef enum:
    SPARES = 32             # pages of huge objects kept for the next one: overwriting raw blocks would else fault each time
    CELLS_SLACK = 1 << 17   # handles beyond max_objects: objects that are written but not yet published by their owner
    PIN_SPINS = 200         # about a decompression; then let the holder of the pin run
    PIN_TURNS = 100000      # naps of one who waits for a pin that no mover holds: about 10 s of its own
    ROOM_TURNS = 10000      # the same of one who waits for room that others are in the way of
    EMPTIEST_TRIES = 32     # zspages of a fullness group that are compared
    ROOM_TRIES = 8          # zspages that are looked at for room where another one, or a new one, may do as well
    SIFT_TRIES = 64         # zspages that are looked at for room on resident pages before others get the class lock: 10 us
    TAIL_PAGES = 2          # unused pages that the last zspage of a class keeps where there is a reserve
    BORROW_SHIFT = 4        # a borrowed chunk is at most 1/16 larger than the object's own
    SLACK_SHIFT = 3         # a page goes back by itself once 1/8 of its class is freeable, or overwriting would thrash


# ------------------------------------------------------------------------------------------------------------
# small words


cdef inline void lock_class(size_class *c) noexcept nogil:
    lock_counted(&c.lock, &c.waiters)


cdef inline uint32_t fullness(size_class *c, zspage *z) noexcept nogil:
    """The fullness group: 1 of 127 used is in the 10 % group, all but one of 2 in the 50 % group, as zsmalloc rounds."""
    if z.inuse == 0:
        return GROUP_EMPTY
    if z.inuse == c.objs:
        return GROUP_FULL
    return 10 * <uint32_t>z.inuse // c.objs + 1


cdef inline uint64_t all_chunks(size_class *c) noexcept nogil:
    """Bitmap of the chunks of a zspage."""
    return ~<uint64_t>0 >> (64 - c.objs)


cdef inline uint64_t chunks_of_page(size_class *c, uint32_t page) noexcept nogil:
    """Bitmap of the chunks of a zspage that touch a page."""
    cdef uint32_t first = (page << PAGE_SHIFT) // c.size, last = (((page + 1) << PAGE_SHIFT) - 1) // c.size
    return ((<uint64_t>2 << min(last, c.objs - 1)) - (<uint64_t>1 << first)) if first < c.objs else 0


cdef void geometry(uint32_t size, uint32_t unit, uint32_t *pages, uint32_t *objs) noexcept nogil:
    """The zspage of a chunk size: the fewest pages with the least waste a page. unit: pages of 4096 bytes in the kernel's.

    zsmalloc takes the least waste of a zspage; a page's share of it is what memory is lost.
    """
    cdef uint32_t n, waste, best = 0
    pages[0] = 0
    for n in range(1, SPAN_PAGES + 1):
        if n % unit or n * PAGE_SIZE < size:
            continue
        waste = n * PAGE_SIZE % size
        if pages[0] == 0 or waste * pages[0] < best * n:
            best = waste
            pages[0] = n
    objs[0] = pages[0] * PAGE_SIZE // size


def size_classes(uint32_t unit):
    """The size classes, smallest first, the huge class last: tuples (bytes of a chunk, pages and chunks of a zspage).

    unit: how many pages of 4096 bytes the kernel gives and takes back together: each zspage is of whole ones. As in
    zsmalloc, sizes whose zspages have as many pages and hold as many objects are merged into the largest.
    """
    cdef uint32_t size, pages, objs
    merged = [(PAGE_SIZE, SPAN_PAGES, SPAN_PAGES)]
    last = None
    # The largest class that still puts more than one object in a page's worth of memory; above it, a raw block is
    # as small.
    size = PAGE_SIZE - CLASS_DELTA
    while size >= MIN_CHUNK:
        geometry(size, unit, &pages, &objs)
        if objs > pages and (pages, objs) != last:
            last = (pages, objs)
            merged.append((size, pages, objs))
        size -= CLASS_DELTA if size <= FINE_CHUNK else 2 * CLASS_DELTA
    assert len(merged) <= MAX_CLASSES
    merged.reverse()
    return merged


CLASSES = size_classes(min(page_unit(), SPAN_PAGES))     # (With larger pages there is no pool.)


def layout_sum(uint32_t unit):
    """Names the size classes, and the size of a page with them, in a state."""
    return zlib.crc32(repr(size_classes(unit)).encode() + (b"" if unit == 1 else b"%d" % unit))


def pool_layout(uint64_t max_objects):
    """See state_layout in device.pyx."""
    cdef uint64_t spans = max_objects + CELLS_SLACK
    return {
        "cells": spans + 1,
        "spans": spans,
        "span_size": SPAN_SIZE,
        "size_classes": layout_sum(min(page_unit(), SPAN_PAGES)),
        "bytes": (HEAD_SIZE + whole_pages(max_objects * sizeof(uint64_t)) + whole_pages(spans)
                  + whole_pages((spans + 1) * sizeof(uint64_t)) + (spans << SPAN_SHIFT)),
    }


cdef uint64_t natural(value, str what) except? 0:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{what} {value} is out of range")
    return value


cdef uint64_t handle_number(handle) except? 0:
    """A handle as the pool has it: one that cannot be is 0, which is never live."""
    return handle if 0 <= handle < 1 << 32 else 0


# ------------------------------------------------------------------------------------------------------------


@cython.final
cdef class Zsmalloc:
    """A pool of objects of 1 to 4096 bytes.

    max_objects: most objects it may ever hold (costs address space, no memory); mem_limit: most bytes of pages it may
    use, rounded up to pages, 0 for no limit. Raises ValueError for either out of range, MemoryError when the address space
    cannot be had.
    """

    def __cinit__(self, max_objects=1 << 24, *, mem_limit=0, Memory memory=None):
        cdef uint32_t i
        for i in range(MAX_CLASSES):
            pthread_mutex_init(&self.classes[i].lock, NULL)
        pthread_mutex_init(&self.cells_lock, NULL)
        pthread_mutex_init(&self.compact_lock, NULL)
        if not 1 <= max_objects <= NIL - CELLS_SLACK - 1:
            raise ValueError(f"max_objects {max_objects} is out of range: 1 to {NIL - CELLS_SLACK - 1}")
        self.max_objects = max_objects
        self._make_classes()
        if memory is None:
            memory = Memory()
        self.memory = memory
        self.n = <pool_counters *>memory.kept(KEPT_POOL)
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
        self.mem_limit = mem_limit

    def __dealloc__(self):
        cdef uint32_t i
        pthread_mutex_destroy(&self.compact_lock)
        pthread_mutex_destroy(&self.cells_lock)
        for i in range(MAX_CLASSES):
            pthread_mutex_destroy(&self.classes[i].lock)

    cdef int inherit_priority(self) noexcept nogil:
        """Make every lock hand on priority; 0 or an errno. Nobody else may use the pool yet."""
        cdef uint32_t i
        cdef int rc = mutex_inherit(&self.cells_lock) or mutex_inherit(&self.compact_lock) or mutex_inherit(&self.arena.lock)
        for i in range(self.class_count):
            rc = rc or mutex_inherit(&self.classes[i].lock)
        return rc

    def _make_classes(self):
        """Fill classes and class_of."""
        cdef uint32_t size, i, g
        self.class_count = len(CLASSES)
        self.huge = self.class_count - 1
        self.max_payload = <uint32_t>CLASSES[self.huge - 1][0] - HEADER_SIZE
        for i in range(self.class_count):
            self.classes[i].size, self.classes[i].pages, self.classes[i].objs = CLASSES[i]
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
        """A free cell, which stays without CELL_LIVE until its owner stores an obj. -ENOMEM: there is none; -EDQUOT."""
        cdef uint64_t handle, next
        cdef int rc = 0
        pthread_mutex_lock(&self.cells_lock)
        handle = self.cells_free
        if handle:
            next = load_relaxed(&self.cells[handle])
            if next & CELL_TAGS:
                handle = 0      # overwritten in memory: what follows it is lost until the next start
            self.cells_free = next >> 3 if handle and next >> 3 < self.cells_top else 0
        if handle == 0:
            if self.cells_top > self.max_objects + CELLS_SLACK:
                rc = -ENOMEM
            elif self.cells_top >= self.cells_ready:
                rc = self.cell_table.ready(&self.cells[self.cells_top], sizeof(uint64_t))
                if rc == 0:
                    next = whole_pages((self.cells_top + 1) * sizeof(uint64_t)) // sizeof(uint64_t)
                    store_relaxed(&self.cells_ready, next)
            if rc == 0:
                handle = self.cells_top
                owned_add(&self.cells_top, 1)
        if rc == 0:
            owned_add(&self.cells_used, 1)
        pthread_mutex_unlock(&self.cells_lock)
        taken[0] = handle
        return rc

    cdef void _cell_give(self, uint64_t handle) noexcept nogil:
        pthread_mutex_lock(&self.cells_lock)
        store_release(&self.cells[handle], self.cells_free << 3)
        self.cells_free = handle
        owned_sub(&self.cells_used, 1)
        pthread_mutex_unlock(&self.cells_lock)

    cdef int _pin(self, uint64_t handle, uint64_t *obj) noexcept nogil:
        """Wait for the pin of an object; its location, or -ENOENT when the handle is not live."""
        cdef uint64_t cell
        cdef uint32_t spins = 0, turns = 0
        if handle == 0 or handle >= load_relaxed(&self.cells_ready):
            return -ENOENT
        while True:
            cell = load_acquire(&self.cells[handle])
            if not cell & CELL_LIVE:
                return -ENOENT
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
                return -ENOENT      # nobody holds it: the bit was set by an error of the memory
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

    cdef int obj_alloc(self, uint32_t size, uint64_t *handle, char **payload) noexcept nogil:
        """Make an object of size bytes; pinned, until obj_end publishes what was written to payload.

        -EINVAL: size is not 1 to 4096; -ENOSPC: mem_limit; -EDQUOT: the file system of the state; -ENOMEM.
        """
        cdef uint32_t index
        cdef int rc
        if size == 0 or size > PAGE_SIZE:
            return -EINVAL
        if size > self.max_payload:
            index = self.huge
        else:
            index = self.class_of[(size + HEADER_SIZE + CLASS_DELTA - 1) // CLASS_DELTA]
        rc = self._cell_take(handle)
        if rc:
            return rc
        zr_crash_point("cell-taken")
        rc = self._obj_alloc(index, handle[0], payload)
        if rc:
            self._cell_give(handle[0])
        return rc

    cdef int _obj_alloc(self, uint32_t index, uint64_t handle, char **payload) noexcept nogil:
        cdef size_class *c = &self.classes[index]
        cdef int64_t span = -ENOSPC
        cdef int chunk = -ENOSPC
        cdef char *start
        lock_class(c)
        if index == self.huge and self.spares:
            span = self.spare[self.spares - 1]
            chunk = self._chunk_take(c, <uint32_t>span, handle, False)
        if chunk < 0:
            chunk = self._part_filled_take(c, handle, &span)
        if chunk < 0:
            span = self._zspage_new(c, index)
            if span < 0:
                chunk = <int>span
            else:
                chunk = self._chunk_take(c, <uint32_t>span, handle, False)
                if chunk < 0:
                    self._unlink(c, <uint32_t>span)
                    self._zspage_gone(c, <uint32_t>span)
                    self.arena.give(<uint32_t>span, False)
        if chunk >= 0:
            self._regroup(c, <uint32_t>span)
            start = self.arena.base + (span << SPAN_SHIFT) + chunk * c.size
            zr_crash_point("chunk-taken")
            store_release(&self.cells[handle], <uint64_t>(start - self.arena.base) | CELL_LIVE | CELL_PIN)
            payload[0] = start if index == self.huge else start + HEADER_SIZE
            zr_crash_point("cell-stored")
        pthread_mutex_unlock(&c.lock)
        if chunk >= 0:
            return 0
        let_in(&c.waiters)      # who is refused tries again at once
        return chunk

    cdef int _part_filled_take(self, size_class *c, uint64_t handle, int64_t *span) noexcept nogil:
        """A chunk of a part-filled zspage, the fullest first, so that the emptiest get empty by themselves; or -ENOSPC."""
        cdef uint32_t group, candidate, tries = ROOM_TRIES
        cdef int chunk = -ENOSPC
        # All pages of huge zspages are alike, and those that are resident are in use, or spare. But of larger pages of the
        # kernel a part may be in use.
        cdef bint may_have_room = c.size != PAGE_SIZE or c.unit > 1
        # With a reserve, a new zspage from there is better than the pages that a part-filled one has not.
        if load_relaxed(&self.arena.reserve):
            return self._resident_take(c, handle, span) if may_have_room else chunk
        for group in range(GROUP_FULL - 1, GROUP_EMPTY, -1):
            candidate = c.heads[group]
            while candidate != NIL and tries:
                span[0] = candidate
                chunk = self._chunk_take(c, candidate, handle, False)
                if chunk >= 0:
                    return chunk
                # The limit refuses the pages of its unused chunks. The next one may want fewer.
                tries -= 1
                candidate = self.zspages[candidate].next
        return self._resident_take(c, handle, span) if tries < ROOM_TRIES and may_have_room else chunk

    cdef int _resident_take(self, size_class *c, uint64_t handle, int64_t *span) noexcept nogil:
        """A chunk on resident pages of the fullest zspage that has one; or -ENOSPC. The lock may be dropped meanwhile."""
        cdef uint32_t group = GROUP_FULL - 1, candidate, tries
        cdef bint reserve = load_relaxed(&self.arena.reserve) != 0
        cdef int chunk = -ENOSPC
        tries = ROOM_TRIES if reserve else SIFT_TRIES
        while chunk < 0 and group > GROUP_EMPTY:
            candidate = self._find_room(c, group, &tries)
            if candidate != NIL:
                span[0] = candidate
                chunk = self._chunk_take(c, candidate, handle, True)
            elif tries or reserve:
                group -= 1
                tries = ROOM_TRIES if reserve else SIFT_TRIES
            else:
                give_way(&c.lock, &c.waiters)
                group = GROUP_FULL - 1
                tries = SIFT_TRIES
        return chunk

    cdef int obj_begin(self, uint64_t handle, char **payload) noexcept nogil:
        """Pin an object: until obj_end it is the caller's alone and stays where payload points. -ENOENT: not live."""
        cdef uint64_t obj
        cdef int rc = self._pin(handle, &obj)
        if rc == 0:
            payload[0] = self.arena.base + obj
            if self.zspages[obj >> SPAN_SHIFT].class_index != self.huge:
                payload[0] += HEADER_SIZE
        return rc

    cdef void obj_end(self, uint64_t handle) noexcept nogil:
        cdef uint64_t cell = load_relaxed(&self.cells[handle])
        zr_assert((cell & CELL_PIN) != 0)
        store_release(&self.cells[handle], cell & ~<uint64_t>CELL_PIN)

    cdef void obj_publish(self, uint64_t handle, uint64_t check) noexcept nogil:
        """obj_end of an object that was written just now; check: 16 bits to keep for it."""
        cdef uint64_t cell = load_relaxed(&self.cells[handle])
        zr_assert((cell & CELL_PIN) != 0)
        store_release(&self.cells[handle], cell_obj(cell) | CELL_LIVE | check << CELL_CHECK_SHIFT)

    cdef uint64_t obj_check(self, uint64_t handle) noexcept nogil:
        """What obj_publish was given for a pinned object."""
        return load_relaxed(&self.cells[handle]) >> CELL_CHECK_SHIFT

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
        """Free an object, once whoever holds its pin is done. -ENOENT: the handle is not live."""
        cdef uint64_t obj
        cdef uint32_t span, index, chunk
        cdef size_class *c
        cdef bint empty = False
        cdef int rc = self._pin(handle, &obj)
        if rc:
            return rc
        zr_crash_point("free-pinned")
        span = obj >> SPAN_SHIFT
        index = self.zspages[span].class_index
        c = &self.classes[index]
        chunk = (<uint32_t>obj & (SPAN_SIZE - 1)) // c.size
        lock_class(c)
        if not self._chunk_holds(c, span, chunk, handle):
            pthread_mutex_unlock(&c.lock)
            self.obj_end(handle)
            return -ENOENT
        self._chunk_give(c, span, chunk)
        zr_crash_point("chunk-freed")
        if self.zspages[span].group != ISOLATED:
            if self.zspages[span].inuse:
                self._regroup(c, span)
                if is_mapped(c) and index != self.huge:
                    self._give_pages(c, span, chunk)
            else:
                self._unlink(c, span)
                self._zspage_gone(c, span)
                empty = True
        pthread_mutex_unlock(&c.lock)
        if empty:
            self.arena.give(span, True)
        zr_crash_point("span-freed")
        self._cell_give(handle)
        zr_crash_point("cell-freed")
        return 0

    cdef uint32_t obj_capacity(self, uint64_t handle) noexcept nogil:
        """Bytes that fit in a pinned object."""
        cdef uint64_t obj = cell_obj(load_relaxed(&self.cells[handle]))
        cdef uint32_t index = self.zspages[obj >> SPAN_SHIFT].class_index
        return PAGE_SIZE if index == self.huge else self.classes[index].size - HEADER_SIZE

    cdef void obj_prefetch(self, uint64_t handle, uint32_t size) noexcept nogil:
        """Ask the cache for the first size bytes of an object. Only a hint: nothing is pinned or even looked at."""
        cdef uint64_t obj = 0
        cdef uint32_t at
        if handle < load_relaxed(&self.cells_ready):
            obj = cell_obj(load_relaxed(&self.cells[handle]))
        if obj >> SPAN_SHIFT < self.arena.span_count:
            for at in range(0, size, 64):
                prefetch(self.arena.base + obj + at)

    cdef int word_alloc(self, uint64_t word, uint64_t *handle) noexcept nogil:
        """A handle whose cell holds a word: same-filled blocks use no pool memory. 0, -ENOMEM or -EDQUOT as obj_alloc."""
        cdef int rc = self._cell_take(handle)
        if rc == 0:
            store_release(&self.cells[handle[0]], word)
            zr_crash_point("word-stored")
        return rc

    cdef uint64_t word_read(self, uint64_t handle) noexcept nogil:
        return load_acquire(&self.cells[handle]) if handle < load_relaxed(&self.cells_ready) else 0

    cdef void word_free(self, uint64_t handle) noexcept nogil:
        if handle < load_relaxed(&self.cells_top):
            self._cell_give(handle)
        zr_crash_point("word-freed")

    # --------------------------------------------------------------------------------------------------------
    # chunks; the class lock is held

    cdef int _chunk_take(self, size_class *c, uint32_t span, uint64_t handle, bint resident) noexcept nogil:
        """Allocate a chunk of a zspage and write its header; its number, or -ENOSPC, or what Arena.commit says.

        A free chunk whose pages are resident first. With resident, no other one.
        """
        cdef zspage *z = &self.zspages[span]
        cdef char *start
        cdef uint32_t header
        cdef int chunk = self._mapped_take(c, span, resident) if is_mapped(c) else self._list_take(c, span, resident)
        if chunk < 0:
            return chunk
        start = self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size
        zr_unpoison(start, c.size)
        if c.size != PAGE_SIZE:
            header = <uint32_t>handle << 1 | 1
            memcpy(start, &header, HEADER_SIZE)
            zr_fill(start + HEADER_SIZE, FILL_FRESH, c.size - HEADER_SIZE)
        z.inuse += 1
        owned_add(&c.inuse, 1)
        return chunk

    cdef int _list_take(self, size_class *c, uint32_t span, bint resident) noexcept nogil:
        """Take the first chunk off the free list, its pages are there already; else one that was never used."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t chunk, header, next
        cdef int rc
        if z.free != NO_CHUNK:
            chunk = z.free
            memcpy(&header, self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size, HEADER_SIZE)
            next = header >> 1
            if header & 1 or (next != NO_CHUNK and next >= z.fresh):
                # The link was overwritten in memory. What follows it is lost until the next start.
                z.free = NO_CHUNK
                return -ENOSPC
            z.free = <uint16_t>next
            return <int>chunk
        chunk = z.fresh
        if chunk == c.objs or (resident and pages_of_chunk(c, chunk) & ~<uint32_t>self.arena.committed[span]):
            return -ENOSPC
        rc = self._commit(c, span, chunk)
        if rc:
            return rc
        z.fresh += 1
        return <int>chunk

    cdef int _mapped_take(self, size_class *c, uint32_t span, bint resident) noexcept nogil:
        """Mark a chunk in the bitmap: the lowest free one whose pages are resident, else the lowest."""
        cdef zspage *z = &self.zspages[span]
        cdef uint64_t free = ~z.used & all_chunks(c), bits = free & self._chunks_below(c, span)
        cdef uint32_t chunk, i
        cdef int rc
        while bits and pages_of_chunk(c, lowest_bit_64(bits)) & ~<uint32_t>self.arena.committed[span]:
            bits &= bits - 1
        if bits:
            chunk = lowest_bit_64(bits)
            for i in range(self.spares if c.size == PAGE_SIZE else 0):
                if self.spare[i] == span:
                    self._spare_drop(i)
                    break
        elif free and not resident:
            chunk = lowest_bit_64(free)
            rc = self._commit(c, span, chunk)
            if rc:
                return rc
        else:
            return -ENOSPC
        z.used |= <uint64_t>1 << chunk
        return <int>chunk

    cdef int _commit(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
        """Count the pages of a chunk as resident; 0, or what Arena.commit says."""
        cdef char *last = self.arena.base + (<uint64_t>span << SPAN_SHIFT) + (chunk + 1) * c.size - 1
        cdef int n = self.arena.commit(span, pages_of_chunk(c, chunk))
        if n < 0:
            return n
        owned_add(&c.committed, n)
        if n:
            store_relaxed(&c.stuck, c.stuck & ~<uint64_t>LENT_OUT)
            # The object may end before the page that its chunk ends on, which is counted as resident.
            zr_unpoison(last, 1)
            last[0] = 0
        return 0

    cdef uint64_t _chunks_below(self, size_class *c, uint32_t span) noexcept nogil:
        """Bitmap of the chunks that end on the last resident page or before it."""
        cdef uint32_t committed = self.arena.committed[span], chunks
        if committed == 0:
            return 0
        chunks = min(((highest_bit_64(committed) + 1) << PAGE_SHIFT) // c.size, c.objs)
        return ~<uint64_t>0 >> (64 - chunks) if chunks else 0

    cdef uint64_t _mapped_room(self, size_class *c, uint32_t span) noexcept nogil:
        """Bitmap of the free chunks whose pages are resident."""
        cdef uint64_t bits = ~self.zspages[span].used & self._chunks_below(c, span), room = 0
        while bits:
            if not pages_of_chunk(c, lowest_bit_64(bits)) & ~<uint32_t>self.arena.committed[span]:
                room |= bits & -bits
            bits &= bits - 1
        return room

    cdef bint _chunk_holds(self, size_class *c, uint32_t span, uint32_t chunk, uint64_t handle) noexcept nogil:
        """Whether a chunk holds the object of handle, as far as it tells."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t header
        if z.group == NO_ZSPAGE or &self.classes[z.class_index] != c or chunk >= z.fresh:
            return False
        if is_mapped(c) and not z.used >> chunk & 1:
            return False
        if c.size == PAGE_SIZE:
            return True
        memcpy(&header, self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size, HEADER_SIZE)
        return header == (<uint32_t>handle << 1 | 1)

    cdef void _chunk_give(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
        cdef zspage *z = &self.zspages[span]
        cdef char *start = self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size
        cdef uint32_t header = <uint32_t>z.free << 1
        z.inuse -= 1
        owned_sub(&c.inuse, 1)
        store_relaxed(&c.stuck, 0)
        zr_fill(start, FILL_FREED, c.size)
        if is_mapped(c):
            z.used &= ~(<uint64_t>1 << chunk)
            zr_poison(start, c.size)
            if c.size == PAGE_SIZE:
                self._spare_page(c, span, chunk)
            return
        memcpy(start, &header, HEADER_SIZE)
        # The first 8 bytes hold the link, which is ours to read.
        zr_poison(start + CHUNK_ALIGN, c.size - CHUNK_ALIGN)
        z.free = <uint16_t>chunk

    cdef void _spare_page(self, size_class *c, uint32_t span, uint32_t page) noexcept nogil:
        """A huge object was freed: its page is a spare while there are few, else it is given back at once.

        Of larger pages of the kernel only a reserve keeps some, which are on no list.
        """
        if c.unit == 1 and self.spares < SPARES:
            self._spare_add(span)
        elif c.unit == 1 or not load_relaxed(&self.arena.reserve) or c.committed - c.inuse > SPARES:
            owned_sub(&c.committed, self.arena.decommit(span, self._unused_pages(c, span, self.arena.whole(1 << page))))

    cdef void _spare_add(self, uint32_t span) noexcept nogil:
        self.spare[self.spares] = span
        owned_add_32(&self.spares, 1)

    cdef void _spare_drop(self, uint32_t i) noexcept nogil:
        """Take an entry off the list of spare pages: the last one takes its place."""
        owned_sub_32(&self.spares, 1)
        self.spare[i] = self.spare[self.spares]

    cdef uint32_t _unused_pages(self, size_class *c, uint32_t span, uint32_t pages) noexcept nogil:
        """Those of some pages of a zspage with a bitmap that are resident, and that no object touches."""
        cdef uint32_t unused = 0
        pages &= self.arena.committed[span]
        while pages:
            if not self.zspages[span].used & chunks_of_page(c, lowest_bit(pages)):
                unused |= pages & -pages
            pages &= pages - 1
        return unused

    cdef void _give_pages(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
        """Give the pages back that nothing but a freed chunk was on, where much of the class is free.

        The keeper of a reserve wants them: there they wait for compaction.
        """
        cdef uint64_t used = self.zspages[span].used
        cdef uint32_t unused
        if (used << 1 & used >> 1) >> chunk & 1:
            return      # both neighbours are in use, and each page has a part of one of them
        unused = self._unused_pages(c, span, self.arena.whole(pages_of_chunk(c, chunk)))
        if unused and load_relaxed(&self.arena.reserve) == 0 and (
                self.freeable(c) << SLACK_SHIFT > load_relaxed(&c.committed)):
            owned_sub(&c.committed, self.arena.decommit(span, unused))

    cdef uint32_t _next_used(self, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
        """The first chunk from `chunk` on that holds an object, or fresh."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t header = 0
        if z.inuse == 0 or chunk >= z.fresh:
            return z.fresh
        if is_mapped(c):
            return lowest_bit_64(z.used >> chunk << chunk) if z.used >> chunk else z.fresh
        while chunk < z.fresh:
            memcpy(&header, self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size, HEADER_SIZE)
            if header & 1:
                break
            chunk += 1
        return chunk

    cdef uint32_t _last_used(self, size_class *c, uint32_t span, uint32_t end) noexcept nogil:
        """The last chunk below `end` that holds an object, or NIL."""
        cdef uint64_t bits
        cdef uint32_t header = 0
        if is_mapped(c):
            bits = self.zspages[span].used & (all_chunks(c) if end == c.objs else (<uint64_t>1 << end) - 1)
            return highest_bit_64(bits) if bits else <uint32_t>NIL
        while end:
            end -= 1
            memcpy(&header, self.arena.base + (<uint64_t>span << SPAN_SHIFT) + end * c.size, HEADER_SIZE)
            if header & 1:
                return end
        return NIL

    # --------------------------------------------------------------------------------------------------------
    # zspages; the class lock is held

    cdef void _link(self, size_class *c, uint32_t span) noexcept nogil:
        """List a zspage in its fullness group."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t group = fullness(c, z)
        z.group = <uint8_t>group
        z.dry = False
        z.prev = NIL
        z.next = c.heads[group]
        if z.next != NIL:
            self.zspages[z.next].prev = span
        else:
            c.tails[group] = span
        c.heads[group] = span
        owned_add(&c.group_count[group], 1)

    cdef void _link_dry(self, size_class *c, uint32_t span) noexcept nogil:
        """List a zspage behind those of its fullness group that may have room on resident pages: it has none."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t group = fullness(c, z)
        z.group = <uint8_t>group
        z.dry = True
        z.next = NIL
        z.prev = c.tails[group]
        if z.prev != NIL:
            self.zspages[z.prev].next = span
        else:
            c.heads[group] = span
        c.tails[group] = span
        owned_add(&c.group_count[group], 1)

    cdef void _unlink(self, size_class *c, uint32_t span) noexcept nogil:
        cdef zspage *z = &self.zspages[span]
        if z.prev != NIL:
            self.zspages[z.prev].next = z.next
        else:
            c.heads[z.group] = z.next
        if z.next != NIL:
            self.zspages[z.next].prev = z.prev
        else:
            c.tails[z.group] = z.prev
        owned_sub(&c.group_count[z.group], 1)
        z.group = ISOLATED
        z.dry = False

    cdef void _regroup(self, size_class *c, uint32_t span) noexcept nogil:
        """List a zspage anew after a chunk or a page of it came or went."""
        if fullness(c, &self.zspages[span]) != self.zspages[span].group or self.zspages[span].dry:
            self._unlink(c, span)
            self._link(c, span)

    cdef int64_t _zspage_new(self, size_class *c, uint32_t index) noexcept nogil:
        """An empty zspage, listed; its span, or -ENOMEM, -EDQUOT."""
        cdef int64_t span = self.arena.take(c.pages)
        cdef zspage *z
        cdef uint32_t page
        cdef int rc
        if span < 0:
            return span
        rc = self._class_is_ready(<uint32_t>span)
        if rc:
            self.arena.give(<uint32_t>span, False)
            return rc
        z = &self.zspages[span]
        z.inuse = 0
        z.used = 0
        z.fresh = <uint16_t>c.objs if is_mapped(c) else 0
        z.free = NO_CHUNK
        store_relaxed_16(&z.class_index, <uint16_t>index)    # _await_mover looks at it without a lock
        self.span_class[span] = <uint8_t>(index + 1)
        zr_crash_point("class-stored")
        if index == self.huge and c.unit > 1:
            if not load_relaxed(&self.arena.reserve):
                self.arena.decommit(<uint32_t>span, ~<uint32_t>0)
        elif index == self.huge:
            for page in range(SPAN_PAGES):
                if self.arena.committed[span] >> page & 1:
                    if self.spares < SPARES:
                        self._spare_add(<uint32_t>span)
                    else:
                        self.arena.decommit(<uint32_t>span, <uint32_t>1 << page)
        owned_add(&c.zspages, 1)
        owned_add(&c.committed, bits_set(self.arena.committed[span]))
        self._link(c, <uint32_t>span)
        return span

    cdef int _class_is_ready(self, uint32_t span) noexcept nogil:
        """Before a span's class is stored: see Region.ready. Spans are handed out lowest first."""
        cdef uint64_t first = load_relaxed(&self.classes_ready), end = whole_pages(<uint64_t>span + 1)
        cdef int rc = 0
        if span >= first:
            rc = self.span_classes.ready(&self.span_class[first], end - first)
            if rc == 0:
                store_relaxed(&self.classes_ready, end)     # several threads: the lower one of theirs is true as well
        return rc

    cdef uint32_t _zspage_gone(self, size_class *c, uint32_t span) noexcept nogil:
        """Take an empty, unlisted zspage out of its class; how many resident pages it had. Then arena.give the span."""
        cdef uint32_t pages = bits_set(self.arena.committed[span]), i = 0
        zr_assert(self.zspages[span].inuse == 0)
        while c.size == PAGE_SIZE and i < self.spares:
            if self.spare[i] == span:
                self._spare_drop(i)
            else:
                i += 1
        self.zspages[span].group = NO_ZSPAGE
        owned_sub(&c.zspages, 1)
        owned_sub(&c.committed, pages)
        return pages

    # --------------------------------------------------------------------------------------------------------
    # compaction

    cdef uint64_t freeable(self, size_class *c) noexcept nogil:
        """Pages that compacting the class frees: the one predicate for starting, for going on and for the statistics.

        At best all zspages are full but one, which has its objects on its first pages. Where mem_limit leaves no room
        to move between zspages, each part-filled one can still be tightened, which costs each a part of a page.
        Where only resident chunks can be moved into (there, and with a reserve) that may be more than can be had: what
        has been tried in vain counts as nothing, until an object of the class is freed.
        With a reserve that one keeps TAIL_PAGES: they are ready for what comes. (All of its pages would be 5 MiB.)
        May be read without the lock, then it can be off by what is happening meanwhile.
        """
        cdef uint64_t inuse = load_relaxed(&c.inuse), limit = load_relaxed(&self.arena.limit), best, part
        cdef bint full = limit and load_relaxed(&self.arena.pages) + 2 * c.unit > limit
        if c.size == PAGE_SIZE or inuse == 0 or (
                load_relaxed(&c.stuck) & STUCK and (full or load_relaxed(&self.arena.reserve))):
            return 0
        best = inuse // c.objs * c.pages
        if inuse % c.objs:
            best += self._pages_wanted(c, inuse % c.objs)
        if full:
            part = load_relaxed(&c.zspages) - load_relaxed(&c.group_count[GROUP_FULL])
            best += part - 1 if part else 0
        return load_relaxed(&c.committed) - best if load_relaxed(&c.committed) > best else 0

    cdef uint32_t _pages_wanted(self, size_class *c, uint32_t chunks) noexcept nogil:
        """Pages that a part-filled zspage keeps when it is tightened to so many chunks."""
        return min(c.pages, pages_below(c, chunks) + (max(c.unit, TAIL_PAGES) if load_relaxed(&self.arena.reserve) else 0))

    cdef uint64_t freeable_pages(self) noexcept nogil:
        """Pages that moving objects within their classes would free: what is worth starting for, and going on."""
        cdef uint64_t n = 0
        cdef uint32_t i
        for i in range(self.huge):
            n += self.freeable(&self.classes[i])
        return n

    cdef uint64_t whole_freeable_pages(self) noexcept nogil:
        """Pages that compact_whole would free now: those, what can be lent then, and what is kept for the next write."""
        return (self.freeable_pages() + self._borrowable() + load_relaxed(&self.arena.stock)
                + load_relaxed_32(&self.spares))

    cdef uint64_t _borrowable(self) noexcept nogil:
        """Pages that _borrow would free after compact_run: its steps, with the numbers of objects alone."""
        cdef uint32_t last[MAX_CLASSES]     # objects in each class's part-filled zspage
        cdef uint32_t i, index, wanted
        cdef uint64_t n = 0
        cdef size_class *c
        if load_relaxed(&self.arena.reserve):
            return 0
        for i in range(self.huge):
            last[i] = <uint32_t>(load_relaxed(&self.classes[i].inuse) % self.classes[i].objs)
        for i in range(self.huge):
            index = self.huge - 1 - i
            c = &self.classes[index]
            while last[index] and not load_relaxed(&c.stuck) & LENT_OUT:
                wanted = self._last_page_chunks(c, last[index])
                if not self._fill_larger(index, wanted, last):
                    break
                n += pages_below(c, last[index]) - pages_below(c, last[index] - wanted)
                last[index] -= wanted
        return n

    cdef bint _fill_larger(self, uint32_t index, uint32_t wanted, uint32_t *last) noexcept nogil:
        """Count `wanted` objects of a class into what larger ones have to spare; False, and nothing is done: too little."""
        cdef size_class *c = &self.classes[index]
        cdef size_class *d
        cdef uint32_t room[MAX_CLASSES]
        cdef uint32_t i = index
        while wanted:
            i += 1
            d = &self.classes[i]
            if i == self.huge or d.size - c.size > c.size >> BORROW_SHIFT:
                return False
            room[i] = 0
            if last[i]:
                room[i] = min(min((pages_below(d, last[i]) << PAGE_SHIFT) // d.size, d.objs) - last[i], wanted)
            wanted -= room[i]
        while i > index:
            last[i] = (last[i] + room[i]) % self.classes[i].objs
            i -= 1
        return True

    cdef uint64_t compact_run(self, uint64_t budget, uint64_t enough) noexcept nogil:
        """Compact until about budget bytes were moved, enough pages freed, or nothing is freeable; the pages freed.

        First whole zspages, as zsmalloc does, largest class first: the fewest copies for each page freed. Then the last
        pages of those that stay part-filled, which cost more: after aging 4 times as much (docs/benchmarks.md).
        """
        cdef uint64_t freed = 0, start
        cdef uint32_t i
        cdef bint whole
        self.compact_begin()
        # Who needs a page now is let in at once, but lets nobody in itself until it has it.
        self.gives_way = enough == <uint64_t>-1
        start = monotonic_ns()
        for whole in range(1, -1, -1):
            i = self.huge
            while i and budget and freed < enough:
                freed += self._compact_class(i - 1, &budget, enough - freed, whole)
                if self._is_wanted():
                    give_way(&self.compact_lock, &self.compact_waiters)
                    self.gives_way = enough == <uint64_t>-1
                else:
                    i -= 1
        counter_add(&self.n.compact_ns, monotonic_ns() - start)
        if freed:
            counter_add(&self.n.pages_compacted, freed)
            counter_add(&self.n.num_compactions, 1)
        self.compact_end()
        return freed

    cdef void compact_begin(self) noexcept nogil:
        """Be the only one who compacts, or who may look at zspages that are off their lists, until compact_end."""
        lock_counted(&self.compact_lock, &self.compact_waiters)

    cdef void compact_end(self) noexcept nogil:
        pthread_mutex_unlock(&self.compact_lock)

    cdef bint _is_wanted(self) noexcept nogil:
        """Whether who compacts is to let others in who want to."""
        return self.gives_way and load_relaxed_32(&self.compact_waiters)

    cdef uint64_t compact_whole(self) noexcept nogil:
        """Compact until nothing is freeable, borrow, and give back what is kept for the next write.

        The pages freed by all of it: by as many mem_used_total falls, and as many were whole_freeable_pages before.
        """
        cdef uint64_t freed = self.compact_run(<uint64_t>-1, <uint64_t>-1), borrowed = 0
        cdef uint32_t i
        self.compact_begin()
        if load_relaxed(&self.arena.reserve) == 0:
            for i in range(self.huge, 0, -1):
                borrowed += self._borrow(i - 1)
                if load_relaxed_32(&self.compact_waiters):
                    give_way(&self.compact_lock, &self.compact_waiters)
        borrowed += self.give_back()
        counter_add(&self.n.pages_compacted, borrowed)
        self.compact_end()
        return freed + borrowed

    cdef bint _is_worth_moving(self, size_class *c, bint whole) noexcept nogil:
        """Whether compacting the class frees a page; with whole, a whole zspage (zsmalloc's zs_can_compact)."""
        return self.freeable(c) and (
            not whole or load_relaxed(&c.zspages) * c.objs - load_relaxed(&c.inuse) >= c.objs)

    cdef uint64_t _compact_class(self, uint32_t index, uint64_t *budget, uint64_t enough, bint whole) noexcept nogil:
        """Move objects from the emptiest zspage into the fullest while that frees pages; the pages freed.

        With whole, only while it frees whole zspages. Else what stays part-filled is tightened. Both are off their lists
        meanwhile, so that the lock can be dropped whenever someone waits for it: nobody allocates from them, and who
        frees an object in them leaves them alone otherwise.
        """
        cdef size_class *c = &self.classes[index]
        cdef uint32_t src = NIL, dst = NIL, chunk = 0, group, next, retries = 2
        cdef uint64_t freed = 0, grown = 0, before, undone = load_relaxed(&self.undone)
        # Only chunks whose pages are there can be moved into: with a reserve, and once the limit is reached.
        cdef bint resident = load_relaxed(&self.arena.reserve) != 0
        cdef int rc
        if not self._is_worth_moving(c, whole):
            return 0
        lock_class(c)
        while freed < enough and budget[0] and not self._is_wanted():
            if dst == NIL and self._is_worth_moving(c, whole):
                dst = self._isolate_fullest(c, resident)
                if dst == NIL and src != NIL and resident and retries:
                    # The source itself may be the only one with room: let it be the next destination.
                    retries -= 1
                    freed += self._putback(c, src)
                    src = NIL
                    continue
            if src == NIL and dst != NIL and self._is_worth_moving(c, whole):
                src = self._isolate_emptiest(c)
                chunk = 0
            if src == NIL or dst == NIL:
                break
            chunk = self._next_used(c, src, chunk)
            while chunk < self.zspages[src].fresh:
                before = c.committed
                rc = self._move(c, src, chunk, c, dst, resident)
                grown += c.committed - before
                if rc and rc != -EBUSY:
                    resident = resident or self.zspages[dst].inuse < c.objs
                    freed += self._putback(c, dst)
                    dst = NIL
                    break
                if rc == 0:
                    budget[0] -= min(c.size, budget[0])
                chunk = self._next_used(c, src, chunk + 1)
                if budget[0] == 0 or load_relaxed_32(&c.waiters) or self._is_wanted():
                    break
            if self.zspages[src].inuse == 0:
                freed += self._zspage_gone(c, src)
                pthread_mutex_unlock(&c.lock)
                self.arena.give(src, False)
                src = NIL
                lock_class(c)
            elif chunk == self.zspages[src].fresh:
                break       # somebody holds a pin in there: come back later
            elif load_relaxed_32(&c.waiters):
                give_way(&c.lock, &c.waiters)
        freed += self._putback(c, src) + self._putback(c, dst)
        for group in range(GROUP_FULL if whole else GROUP_EMPTY + 1, GROUP_FULL):
            src = c.heads[group]
            while src != NIL and freed - min(freed, grown) < enough and budget[0] and self.freeable(c):
                if load_relaxed_32(&c.waiters) or self._is_wanted():
                    counter_add(&self.undone, 1)
                    src = NIL
                    break
                next = self.zspages[src].next
                freed += self._tighten(c, src, budget, False)
                src = next
        freed -= min(freed, grown)
        if freed == 0 and not whole and budget[0] and load_relaxed(&self.undone) == undone and not self._is_wanted():
            store_relaxed(&c.stuck, c.stuck | STUCK)
        pthread_mutex_unlock(&c.lock)
        let_in(&c.waiters)
        return freed

    cdef uint32_t _isolate_fullest(self, size_class *c, bint resident) noexcept nogil:
        """Unlist the fullest zspage that has room, with resident room without another page; NIL when there is none.

        With resident the lock may be dropped meanwhile.
        """
        cdef uint32_t group = GROUP_FULL - 1, span, tries = SIFT_TRIES
        while group > GROUP_EMPTY:
            span = self._find_room(c, group, &tries) if resident else c.heads[group]
            if span != NIL:
                self._unlink(c, span)
                return span
            if tries:
                group -= 1
            else:
                give_way(&c.lock, &c.waiters)
                group = GROUP_FULL - 1
                tries = SIFT_TRIES
        return NIL

    cdef uint32_t _find_room(self, size_class *c, uint32_t group, uint32_t *tries) noexcept nogil:
        """The first zspage of a fullness group with room on resident pages; NIL: none, or tries[0] are used up.

        Those without go behind all others, so that nobody looks at them again before a chunk or a page of theirs comes.
        """
        cdef uint32_t span = c.heads[group]
        while span != NIL and not self.zspages[span].dry and tries[0]:
            if self._has_resident_room(c, span):
                return span
            tries[0] -= 1
            self._unlink(c, span)
            self._link_dry(c, span)
            span = c.heads[group]
        return NIL

    cdef bint _has_resident_room(self, size_class *c, uint32_t span) noexcept nogil:
        """Whether a part-filled zspage has a free chunk whose pages are resident."""
        cdef zspage *z = &self.zspages[span]
        if is_mapped(c):
            return self._mapped_room(c, span) != 0
        return z.free != NO_CHUNK or not pages_of_chunk(c, z.fresh) & ~<uint32_t>self.arena.committed[span]

    cdef uint32_t _isolate_emptiest(self, size_class *c) noexcept nogil:
        """Unlist the emptiest zspage, of those at the head of the lowest group that has one: fewer objects to move."""
        cdef uint32_t group, span, best, tries = EMPTIEST_TRIES
        for group in range(GROUP_EMPTY + 1, GROUP_FULL):
            best = span = c.heads[group]
            while span != NIL and tries:
                if self.zspages[span].inuse < self.zspages[best].inuse:
                    best = span
                span = self.zspages[span].next
                tries -= 1
            if best != NIL:
                self._unlink(c, best)
                return best
        return NIL

    cdef uint32_t _putback(self, size_class *c, uint32_t span) noexcept nogil:
        """List an isolated zspage again, or let it go if its last object was freed meanwhile; the pages freed."""
        cdef uint32_t freed = 0
        if span != NIL:
            if self.zspages[span].inuse:
                self._link(c, span)
            else:
                freed = self._zspage_gone(c, span)
                self.arena.give(span, False)
        return freed

    cdef uint64_t _tighten(self, size_class *c, uint32_t span, uint64_t *budget, bint always) noexcept nogil:
        """Give back the last pages of a zspage, after moving what is on them to its first; the pages freed.

        always: also where that frees none. At most half a zspage is copied, with the class lock held.
        """
        cdef uint64_t before = c.committed
        cdef uint32_t wanted = self._pages_wanted(c, self.zspages[span].inuse), unused
        # (A span of the reserve has resident pages beyond those that were used.)
        if bits_set(self.arena.committed[span]) <= wanted and not always:
            return 0
        if self.zspages[span].dry:
            self._regroup(c, span)      # it may get room
        self._pack(c, span, budget)
        if is_mapped(c):
            unused = self._unused_pages(c, span, ~<uint32_t>0)
            if load_relaxed(&self.arena.reserve):
                unused &= ~<uint32_t>0 << wanted
        else:
            unused = ~<uint32_t>0 << self._pages_wanted(c, self.zspages[span].fresh)
        owned_sub(&c.committed, self.arena.decommit(span, unused))
        return before - min(before, c.committed)

    cdef void _pack(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
        """Move the objects of a zspage to its first pages."""
        if is_mapped(c):
            self._pack_mapped(c, span, budget)
        else:
            self._pack_list(c, span, budget)

    cdef void _pack_list(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
        """Move the objects of a zspage to its first pages."""
        cdef zspage *z = &self.zspages[span]
        cdef uint32_t enough = (pages_below(c, z.inuse) << PAGE_SHIFT) // c.size    # chunks on the pages that stay
        cdef uint32_t chunk, header
        self._list_chunks(c, span)
        chunk = self._last_used(c, span, z.fresh)
        while chunk != NIL and chunk >= enough and budget[0]:
            if z.free >= enough or self._move(c, span, chunk, c, span, True):
                break
            budget[0] -= min(c.size, budget[0])
            # The lowest free chunk is to be the first of the list, not this one.
            memcpy(&header, self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size, HEADER_SIZE)
            z.free = <uint16_t>(header >> 1)
            chunk = self._last_used(c, span, chunk)
        self._list_chunks(c, span)

    cdef void _pack_mapped(self, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
        """Move the objects of a zspage to its first pages, some of which may have to be resident again first."""
        cdef zspage *z = &self.zspages[span]
        cdef uint64_t room
        cdef uint32_t chunk = self._last_used(c, span, c.objs)
        cdef uint32_t missing = ((1 << pages_below(c, z.inuse)) - 1) & ~<uint32_t>self.arena.committed[span]
        cdef int n
        if missing and load_relaxed(&self.arena.reserve) == 0:
            # Each of them is written below: the first chunks are all in use then.
            n = self.arena.commit(span, missing)
            owned_add(&c.committed, max(n, 0))
        while chunk != NIL and budget[0]:
            room = self._mapped_room(c, span)
            if room == 0 or lowest_bit_64(room) > chunk or self._move(c, span, chunk, c, span, True):
                break
            budget[0] -= min(c.size, budget[0])
            chunk = self._last_used(c, span, chunk)

    cdef uint64_t _borrow(self, uint32_t index) noexcept nogil:
        """Empty the last pages of a class's part-filled zspage into chunks of somewhat larger classes; the pages freed.

        Those chunks are free and on resident pages, so that they cost nothing now. A class's last page is half empty
        on average, and so is each of the larger ones': 0.6 % of a pool of 36 MB (docs/density.md). Larger classes were
        seen to before, so their pages stay. The class lock is held for a few copies.
        """
        cdef size_class *c = &self.classes[index]
        cdef uint32_t span, wanted
        cdef uint64_t freed = 0, budget = <uint64_t>-1
        lock_class(c)
        span = self._isolate_emptiest(c)
        if span != NIL and self.zspages[span].inuse:
            freed = self._tighten(c, span, &budget, True)
        while span != NIL and self.zspages[span].inuse:
            wanted = self._last_page_chunks(c, self.zspages[span].inuse)
            # Nothing is moved unless it frees the page.
            if self._lend(index, span, wanted, False) < wanted or self._lend(index, span, wanted, True) < wanted:
                break
            if self.zspages[span].inuse:
                freed += self._tighten(c, span, &budget, False)
        freed += self._putback(c, span)
        store_relaxed(&c.stuck, c.stuck | LENT_OUT)
        pthread_mutex_unlock(&c.lock)
        return freed

    cdef uint32_t _last_page_chunks(self, size_class *c, uint32_t chunks) noexcept nogil:
        """Of the first so many chunks of a zspage those that are not whole on the pages before their last."""
        return chunks - ((pages_below(c, chunks) - c.unit) << PAGE_SHIFT) // c.size

    cdef uint32_t _lend(self, uint32_t index, uint32_t span, uint32_t wanted, bint move) noexcept nogil:
        """Find chunks of larger classes for the last `wanted` objects of a zspage, and move them there if told; how many."""
        cdef size_class *c = &self.classes[index]
        cdef size_class *d
        cdef uint32_t found = 0, i, dst, group, room, chunk = self.zspages[span].fresh
        for i in range(index + 1, self.huge):
            d = &self.classes[i]
            if found == wanted or d.size - c.size > c.size >> BORROW_SHIFT:
                break
            lock_class(d)
            dst = NIL
            for group in range(GROUP_FULL - 1, GROUP_EMPTY, -1):
                if d.heads[group] != NIL:
                    dst = d.heads[group]
                    break
            if dst != NIL:
                if is_mapped(d):
                    room = bits_set_64(self._mapped_room(d, dst))
                else:
                    room = (bits_set(self.arena.committed[dst]) << PAGE_SHIFT) // d.size
                    room = min(room, d.objs) - min(<uint32_t>self.zspages[dst].inuse, room)
                while room and found < wanted:
                    if move:
                        chunk = self._last_used(c, span, chunk)
                        if chunk == NIL or self._move(c, span, chunk, d, dst, True):
                            wanted = found      # the page stays: do not move more
                            break
                    room -= 1
                    found += 1
                self._regroup(d, dst)
            pthread_mutex_unlock(&d.lock)
        return found

    cdef void _list_chunks(self, size_class *c, uint32_t span) noexcept nogil:
        """List the free chunks of a zspage again, lowest first; those above the last object are as never used."""
        cdef zspage *z = &self.zspages[span]
        cdef char *start
        cdef uint32_t chunk, header, i, last = z.fresh
        z.free = NO_CHUNK
        z.fresh = 0
        for i in range(last):
            chunk = last - 1 - i
            start = self.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size
            memcpy(&header, start, HEADER_SIZE)
            if header & 1:
                z.fresh = <uint16_t>max(<uint32_t>z.fresh, chunk + 1)
            elif z.fresh:
                header = <uint32_t>z.free << 1
                memcpy(start, &header, HEADER_SIZE)
                z.free = <uint16_t>chunk
            else:
                zr_poison(start, c.size)

    cdef int _move(self, size_class *c, uint32_t src, uint32_t chunk, size_class *d, uint32_t dst,
                   bint resident) noexcept nogil:
        """Move an object of class c to a zspage of class d, which is c or a larger one; both are locked.

        -EBUSY: its pin is held, or it was lent to c already, so that no object creeps up class by class; or what
        _chunk_take says.
        """
        cdef uint64_t obj = (<uint64_t>src << SPAN_SHIFT) + chunk * c.size, handle, cell
        cdef char *old = self.arena.base + obj
        cdef char *new
        cdef uint32_t header
        cdef int room
        memcpy(&header, old, HEADER_SIZE)
        handle = header >> 1
        if handle >= load_relaxed(&self.cells_top):
            return -EBUSY
        cell = load_relaxed(&self.cells[handle])
        if cell_obj(cell) != obj or not cell & CELL_LIVE or (d != c and cell & CELL_LENT):
            return -EBUSY
        if cell & CELL_PIN or not compare_swap(&self.cells[handle], cell, cell | CELL_PIN):
            counter_add(&self.undone, 1)
            return -EBUSY
        zr_crash_point("move-pinned")
        room = self._chunk_take(d, dst, handle, resident)
        if room < 0:
            store_release(&self.cells[handle], cell)
            return room
        zr_crash_point("move-chunk-taken")
        new = self.arena.base + (<uint64_t>dst << SPAN_SHIFT) + room * d.size
        memcpy(new + HEADER_SIZE, old + HEADER_SIZE, c.size - HEADER_SIZE)
        zr_crash_point("move-copied")
        cell = cell ^ obj ^ <uint64_t>(new - self.arena.base)
        store_release(&self.cells[handle], cell if d == c else cell | CELL_LENT)
        zr_crash_point("move-cell-stored")
        self._chunk_give(c, src, chunk)
        zr_crash_point("move-source-freed")
        counter_add(&self.n.objects_migrated, 1)
        counter_add(&self.n.bytes_migrated, c.size)
        return 0

    cdef uint64_t give_back(self) noexcept nogil:
        """Give resident pages that hold nothing (the stock, and the spare pages of huge) back; how many there were."""
        cdef size_class *c = &self.classes[self.huge]
        cdef uint64_t n = self.arena.trim_stock()
        cdef uint32_t span, gone
        lock_class(c)
        while self.spares:
            span = self.spare[self.spares - 1]
            self._spare_drop(self.spares - 1)
            # Entries of the same span come to 0 the second time.
            gone = self.arena.decommit(span, ~<uint32_t>self.zspages[span].used)
            owned_sub(&c.committed, gone)
            n += gone
        pthread_mutex_unlock(&c.lock)
        return n

    cdef uint64_t trim(self) noexcept nogil:
        """give_back, while nobody compacts or checks."""
        cdef uint64_t n
        self.compact_begin()
        n = self.give_back()
        self.compact_end()
        return n

    cdef bint make_room(self, int rc, bint *in_vain) noexcept nogil:
        """Whether to try again what failed with rc: after -ENOSPC or -EDQUOT, as long as there are pages to free.

        And once more when there are none, which is noted in in_vain[0], False to begin with: others may have freed some
        after the try. The caller holds no pin and no lock of the pool.
        """
        if rc != -ENOSPC and rc != -EDQUOT or in_vain[0]:
            return False
        in_vain[0] = not self._free_some(rc)
        return True

    cdef bint _free_some(self, int rc) noexcept nogil:
        """Free pages by whatever means there are; False when there is nothing to free."""
        cdef uint64_t limit, undone
        if self.give_back():
            return True
        for _ in range(ROOM_TURNS):
            undone = load_relaxed(&self.undone)
            if self.compact_run(<uint64_t>-1, 1):
                return True
            # Somebody else made room while this thread waited for compact_lock. A chunk touches 2 pages at most.
            # (Of the state's file system nobody knows who took it.)
            limit = load_relaxed(&self.arena.limit)
            if rc == -ENOSPC and (limit == 0 or load_relaxed(&self.arena.pages) + 2 * self.arena.unit <= limit):
                return True
            if load_relaxed(&self.undone) == undone:
                return False
            nap()       # somebody was in the way where there was something to free
        return False

    # --------------------------------------------------------------------------------------------------------
    # the pool as a whole

    cdef int populate(self) noexcept nogil:
        """Make the cells of max_objects objects and the classes of spans resident; 0, -EDQUOT or -ENOMEM."""
        # One more for each object that is written while its block still holds the old one.
        cdef uint64_t cells = min(self.max_objects + PAGE_SIZE, self.max_objects + CELLS_SLACK + 1)
        cdef int rc = self.cell_table.populate(cells * sizeof(uint64_t))
        if rc == 0:
            store_relaxed(&self.cells_ready, max(cells, self.cells_ready))
            rc = self.span_classes.populate(self.arena.span_count)
        if rc == 0:
            store_relaxed(&self.classes_ready, self.arena.span_count)
        return rc

    cdef void clear(self) noexcept nogil:
        """Forget every object and give all memory back. Nobody else may have an object; compact_lock is held."""
        cdef uint32_t i, g
        cdef size_class *c
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
        zr_crash_point("pool-cleared")
        pthread_mutex_lock(&self.cells_lock)
        self.span_classes.clear()
        store_relaxed(&self.classes_ready, 0)
        self.cell_table.clear()
        store_relaxed(&self.cells_ready, 0)
        store_relaxed(&self.cells_top, 1)
        store_relaxed(&self.cells_used, 0)
        self.cells_free = 0
        pthread_mutex_unlock(&self.cells_lock)
        store_relaxed(&self.n.pages_compacted, 0)
        store_relaxed(&self.n.objects_migrated, 0)
        store_relaxed(&self.n.num_compactions, 0)
        store_relaxed(&self.n.compact_ns, 0)
        store_relaxed(&self.n.bytes_migrated, 0)

    cdef uint64_t metadata_bytes(self) noexcept nogil:
        """Resident bytes beside the arena's pages: cells, zspages, tables, counters, this object."""
        cdef uint64_t zspages = max(load_relaxed_32(&self.arena.top), load_relaxed_32(&self.arena.records_ready))
        return (whole_pages(load_relaxed(&self.cells_ready) * sizeof(uint64_t)) + whole_pages(zspages * sizeof(zspage))
                + whole_pages(zspages) + whole_pages(KEPT_PAGES << PAGE_SHIFT)
                + self.arena.metadata_bytes() + sizeof(self.classes) + sizeof(self.class_of))

    cdef const char *find_fault(self, uint64_t *where, uint64_t words) noexcept nogil:
        """Look whether all lists and counts agree; NULL, or what is wrong, with a handle or span in where[0].

        What is in a zspage, find_zspage_fault looks at. words: handles that stand for a word. Nobody else may use the pool
        meanwhile.
        """
        cdef const char *wrong = NULL
        cdef uint64_t objects = 0, zspages = 0, listed = 0, handle
        cdef uint32_t i, spans_used
        for i in range(self.class_count):
            wrong = self._find_class_fault(i, where)
            if wrong != NULL:
                return wrong
            objects += self.classes[i].inuse
            zspages += self.classes[i].zspages
        where[0] = 0
        spans_used = 0
        for i in range(load_relaxed_32(&self.arena.top)):
            # Group 0 is the zero of a record that was never used: an empty zspage is found in its class.
            if self.zspages[i].group != NO_ZSPAGE and self.zspages[i].group != GROUP_EMPTY:
                spans_used += 1
        if spans_used != zspages:
            return "a zspage is on no list"
        if objects + words != self.cells_used:
            return "objects and words do not add up to the cells in use"
        handle = self.cells_free
        while handle:
            where[0] = handle
            listed += 1
            if handle >= self.cells_top or listed > self.cells_top or self.cells[handle] & CELL_TAGS:
                return "the list of free cells is broken"
            handle = self.cells[handle] >> 3
        where[0] = 0
        if listed + self.cells_used + 1 != self.cells_top:
            return "cells in use and free cells do not add up"
        return self.arena.check(spans_used, where)

    cdef const char *find_zspage_fault(self, uint32_t *span, uint32_t chunks, uint64_t *where) noexcept nogil:
        """Look into the zspages of spans from span[0] on, until about so many chunks were seen; span[0] is the next one.

        NULL, or what is wrong, with the span in where[0]. Nobody else may use the pool meanwhile.
        """
        cdef uint32_t top = load_relaxed_32(&self.arena.top), seen = 0
        cdef const char *wrong = NULL
        cdef zspage *z
        while span[0] < top and seen < chunks and wrong == NULL:
            z = &self.zspages[span[0]]
            seen += 1
            # (For group 0 see find_fault.)
            if z.group != NO_ZSPAGE and z.group != GROUP_EMPTY:
                where[0] = span[0]
                wrong = "a zspage has no size class"
                if z.class_index < self.class_count:
                    seen += self.classes[z.class_index].objs
                    wrong = self._find_zspage_fault(z.class_index, span[0])
            span[0] += 1
        return wrong

    cdef const char *_find_class_fault(self, uint32_t index, uint64_t *where) noexcept nogil:
        cdef size_class *c = &self.classes[index]
        cdef uint64_t count, inuse = 0, committed = 0, zspages = 0
        cdef uint32_t group, span, prev, unused, i
        cdef uint32_t top = load_relaxed_32(&self.arena.top)    # the keeper may be taking spans meanwhile
        cdef zspage *z
        for group in range(GROUPS):
            count = 0
            prev = NIL
            span = c.heads[group]
            while span != NIL:
                where[0] = span
                count += 1
                if span >= top or count > top:
                    return "the list of a fullness group is broken"
                z = &self.zspages[span]
                if z.prev != prev or z.group != group or z.class_index != index or fullness(c, z) != group:
                    return "a zspage is on the wrong list"
                if z.dry and self._has_resident_room(c, span):
                    return "a zspage that has room is marked as one that has none"
                if not z.dry and prev != NIL and self.zspages[prev].dry:
                    return "a zspage that may have room is behind one that has none"
                inuse += z.inuse
                committed += bits_set(self.arena.committed[span])
                if index == self.huge:
                    unused = bits_set(self.arena.committed[span] & ~self.arena.whole(<uint32_t>z.used))
                    for i in range(self.spares):
                        unused -= self.spare[i] == span
                    if unused and (c.unit == 1 or not load_relaxed(&self.arena.reserve)):
                        return "the spare pages of a huge zspage are not those listed"
                prev = span
                span = z.next
            if c.tails[group] != prev:
                return "the end of a fullness group's list is not its last zspage"
            if count != c.group_count[group]:
                return "the count of a fullness group differs from its list"
            zspages += count
        where[0] = index
        if c.group_count[GROUP_EMPTY]:
            return "an empty zspage was kept"
        if zspages != c.zspages or inuse != c.inuse or committed != c.committed:
            return "the counts of a size class differ from its zspages"
        return NULL

    cdef const char *_find_zspage_fault(self, uint32_t index, uint32_t span) noexcept nogil:
        cdef size_class *c = &self.classes[index]
        cdef zspage *z = &self.zspages[span]
        cdef uint64_t obj = <uint64_t>span << SPAN_SHIFT
        cdef uint32_t chunk, header, live = 0, unused = 0
        cdef const char *wrong
        if z.fresh > c.objs or z.inuse > z.fresh or (is_mapped(c) and (z.fresh != c.objs or z.used & ~all_chunks(c))):
            return "a zspage has more chunks than fit"
        chunk = self._next_used(c, span, 0)
        while chunk < z.fresh:
            live += 1
            if pages_of_chunk(c, chunk) & ~<uint32_t>self.arena.committed[span]:
                return "a chunk in use is on a page that is not resident"
            if index != self.huge:
                wrong = self._find_chunk_fault(c, obj + chunk * c.size)
                if wrong != NULL:
                    return wrong
            chunk = self._next_used(c, span, chunk + 1)
        if live != z.inuse:
            return "the count of a zspage differs from its headers"
        if is_mapped(c):
            if z.free != NO_CHUNK:
                return "a zspage with a bitmap has a free list"
            return NULL
        chunk = z.free
        while chunk != NO_CHUNK:
            unused += 1
            if chunk >= z.fresh or unused > z.fresh:
                return "the free list of a zspage is broken"
            if pages_of_chunk(c, chunk) & ~<uint32_t>self.arena.committed[span]:
                return "a chunk on the free list is on a page that is not resident"
            memcpy(&header, self.arena.base + obj + chunk * c.size, HEADER_SIZE)
            if header & 1:
                return "an allocated chunk is on the free list"
            chunk = header >> 1
        if unused + z.inuse != z.fresh:
            return "a free chunk is not on the free list"
        return NULL

    cdef const char *_find_chunk_fault(self, size_class *c, uint64_t obj) noexcept nogil:
        cdef uint32_t header
        cdef uint64_t cell
        memcpy(&header, self.arena.base + obj, HEADER_SIZE)
        if not header & 1:
            return "a chunk in use has the header of a free one"
        if header >> 1 == 0 or header >> 1 >= self.cells_top:
            return "a header names no cell"
        cell = self.cells[header >> 1]
        if cell_obj(cell) != obj or not cell & CELL_LIVE:
            return "a header's cell does not point back"
        return NULL

    # --------------------------------------------------------------------------------------------------------
    # for Python

    @property
    def mem_limit(self):
        """Most bytes of pages the pool may use, 0: no limit. Raising and lowering it takes effect at once."""
        return load_relaxed(&self.arena.limit) << PAGE_SHIFT

    @mem_limit.setter
    def mem_limit(self, value):
        cdef uint64_t limit = natural(value, "mem_limit")
        cdef uint32_t i
        with nogil:
            store_relaxed(&self.arena.limit, (limit >> PAGE_SHIFT) + (1 if limit & (PAGE_SIZE - 1) else 0))
            # Who compacts now had the old one: what it tries in vain may be worth a try.
            counter_add(&self.undone, 1)
            for i in range(self.class_count):
                lock_class(&self.classes[i])
                store_relaxed(&self.classes[i].stuck, 0)
                pthread_mutex_unlock(&self.classes[i].lock)

    def malloc(self, size):
        """A handle to a new object of size bytes, 1 to 4096, all zero.

        Raises ValueError for another size, PoolFullError when mem_limit leaves no room even after compaction,
        MemoryError at max_objects.
        """
        cdef uint64_t handle = 0
        cdef char *payload = NULL
        cdef uint32_t n
        cdef int rc
        cdef bint in_vain = False
        if not 1 <= size <= PAGE_SIZE:
            raise error_from(-EINVAL, f"malloc of {size} bytes")
        if load_relaxed(&self.cells_used) >= self.max_objects:
            raise MemoryError(f"malloc of {size} bytes: the pool holds {self.max_objects} objects, as many as it may")
        n = size
        with nogil:
            rc = self.obj_alloc(n, &handle, &payload)
            while rc and self.make_room(rc, &in_vain):
                rc = self.obj_alloc(n, &handle, &payload)
            if rc == 0:
                memset(payload, 0, self.obj_capacity(handle))
                self.obj_publish(handle, n)     # its size is what is kept for it
        if rc:
            raise error_from(rc, f"malloc of {size} bytes")
        return handle

    def free(self, handle):
        """Free an object. Raises HandleError when the handle is not live."""
        cdef uint64_t number = handle_number(handle)
        cdef int rc
        with nogil:
            rc = self.obj_free(number)
        if rc:
            raise error_from(rc, f"free of handle {handle}")

    def read(self, handle, size=0):
        """The first size bytes of an object, 0: all of it. Raises HandleError, ValueError."""
        cdef uint64_t number = handle_number(handle)
        cdef char *payload
        cdef uint64_t all
        cdef int rc
        with nogil:
            rc = self.obj_begin(number, &payload)
        if rc:
            raise error_from(rc, f"read of handle {handle}")
        try:
            all = self.obj_check(number)
            if not 0 <= size <= all:
                raise ValueError(f"read of {size} bytes from handle {handle}, which has {all}")
            return PyBytes_FromStringAndSize(payload, size or all)
        finally:
            self.obj_end(number)

    def write(self, handle, data):
        """Put data (a buffer) at the start of an object. Raises HandleError, ValueError when it does not fit."""
        cdef uint64_t number = handle_number(handle)
        cdef char *payload
        cdef uint64_t all
        cdef int rc
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                rc = self.obj_begin(number, &payload)
            if rc:
                raise error_from(rc, f"write to handle {handle}")
            all = self.obj_check(number)
            if <uint64_t>view.len <= all:
                memcpy(payload, view.buf, view.len)
            self.obj_end(number)
            if <uint64_t>view.len > all:
                raise ValueError(f"write of {view.len} bytes to handle {handle}, which has {all}")
        finally:
            PyBuffer_Release(&view)

    def compact(self, budget=0):
        """Move about budget bytes of objects, 0: all that frees a page; returns the number of pages freed.

        0 also gives back the pages that are kept for the next writes: it frees the freeable_pages of stats(). A budget
        may end between taking a page for what is moved and freeing those that it came from.
        """
        cdef uint64_t freed, bytes = natural(budget, "budget")
        with nogil:
            freed = self.compact_run(bytes, <uint64_t>-1) if bytes else self.compact_whole()
        return freed

    def stats(self):
        """The pool's numbers by the names of the statistics, as a dict of ints.

        stock_pages: pages of free spans that stay resident for the next writes: part of mem_used_total, and freeable.
        """
        cdef uint64_t allocated = 0, used = 0, zspages = 0
        cdef uint32_t i
        for i in range(self.class_count):
            zspages += load_relaxed(&self.classes[i].zspages)
            # Places on pages that are resident: others cost nothing, and nothing is gained by filling them.
            allocated += max(load_relaxed(&self.classes[i].inuse),
                             load_relaxed(&self.classes[i].committed) * self.classes[i].objs // self.classes[i].pages)
            used += load_relaxed(&self.classes[i].inuse)
        return {
            "mem_used_total": load_relaxed(&self.arena.pages) << PAGE_SHIFT,
            "mem_limit": self.mem_limit,
            "mem_used_max": load_relaxed(self.arena.pages_max) << PAGE_SHIFT,
            "stock_pages": load_relaxed(&self.arena.stock),
            "reserve_bytes": load_relaxed(&self.arena.ready_pages) << PAGE_SHIFT,
            "reserve_misses": load_relaxed(&self.arena.misses),
            "pages_compacted": load_relaxed(&self.n.pages_compacted),
            "objects_migrated": load_relaxed(&self.n.objects_migrated),
            "bytes_migrated": load_relaxed(&self.n.bytes_migrated),
            "num_compactions": load_relaxed(&self.n.num_compactions),
            "compact_ns": load_relaxed(&self.n.compact_ns),
            "zspages": zspages,
            "objs_allocated": allocated,
            "objs_used": used,
            "freeable_pages": self.whole_freeable_pages(),
        }

    def table(self):
        """zsmalloc's table: for each size class a tuple (class, size, zspages up to 10, 20, … 90, 99 and 100 % full,
        obj_allocated, obj_used, pages_used, pages_per_zspage, freeable)."""
        cdef size_class *c
        cdef uint32_t i, g
        rows = []
        for i in range(self.class_count):
            c = &self.classes[i]
            rows.append((
                i,
                c.size,
                *[load_relaxed(&c.group_count[g]) for g in range(1, GROUPS)],
                load_relaxed(&c.zspages) * c.objs,
                load_relaxed(&c.inuse),
                load_relaxed(&c.committed),
                c.pages,
                self.freeable(c),
            ))
        return rows

    def check(self):
        """Walk every structure. Raises CorruptionError when one contradicts another. Nobody else may use the pool."""
        cdef uint64_t where = 0
        cdef uint32_t span = 0
        cdef const char *wrong
        with nogil:
            self.compact_begin()
            wrong = self.find_zspage_fault(&span, <uint32_t>-1, &where)
            if wrong == NULL:
                wrong = self.find_fault(&where, 0)
            self.compact_end()
        if wrong != NULL:
            raise CorruptionError(f"{wrong.decode()} (at {where})")
