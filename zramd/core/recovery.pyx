"""Recovery: a pool and the counters of a device, rebuilt from slots, cells and the classes of spans.

    1  every slot, in parallel: slot, cell and class must agree. Nothing is written yet: a state that contradicts itself
       is refused as it was found. With verify, where each block answers for itself, the block is lost and the others
       are not; and headers are looked at, too: nothing relies on them but moving and freeing, so they are mended
    2  every span, in parallel: its record, its free chunks, its pages; pages that no object is on are given back
    3  lists: zspages by fullness, free spans, free cells. Objects that no slot holds are gone by this: they are only counted

Payloads are not read, and holes of the file neither: what there is of it, the file system knows. A kill in the middle
leaves what there was: nothing that a slot leads to is changed but the pins of who held an object when the server died.
"""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.checks cimport FILL_FREED, zr_crash_point, zr_fill, zr_unpoison
from zramd.core.locks cimport counter_add, load_relaxed, store_relaxed
from zramd.core.region cimport Region
from zramd.core.types cimport (
    BLOCK_SIZE,
    CELL_LIVE,
    CELL_PIN,
    CHUNK_ALIGN,
    HEADER_SIZE,
    MIN_CHUNK,
    NO_CHUNK,
    NO_ZSPAGE,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOT_LOST,
    SLOT_SAME,
    SLOT_SIZE_MASK,
    SLOTS_PER_PAGE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
    cell_obj,
    slot_handle,
    zspage,
)
from zramd.core.zsmalloc cimport Zsmalloc, is_mapped, pages_below, pages_of_chunk, size_class

import os
import threading
import time

from zramd.errors import CorruptionError

cdef extern from *:
    """
    /* The first look at memory that the address sanitizer has been told nobody may look at. */
    __attribute__((no_sanitize("address"), noinline)) static uint32_t peek(const void *p)
    {
        return *(const uint32_t *)p;
    }
    #define bit_is_set(bits, n) ((__atomic_load_n(&(bits)[(n) / 64], __ATOMIC_RELAXED) >> (n) % 64) & 1)
    #define bit_set(bits, n) \\
        ((__atomic_fetch_or(&(bits)[(n) / 64], (uint64_t)1 << (n) % 64, __ATOMIC_RELAXED) >> (n) % 64) & 1)
    #define bit_clear(bits, n) \
        ((void)__atomic_fetch_and(&(bits)[(n) / 64], ~((uint64_t)1 << (n) % 64), __ATOMIC_RELAXED))
    #define fetch_add(p, n) __atomic_fetch_add((p), (n), __ATOMIC_RELAXED)
    #define bits_set(x) ((uint32_t)__builtin_popcount(x))
    #define prefetch(p) __builtin_prefetch(p)
    """
    uint32_t peek(const void *p) noexcept nogil
    bint bit_is_set(uint64_t *bits, uint64_t n) noexcept nogil
    bint bit_set(uint64_t *bits, uint64_t n) noexcept nogil     # whether it was set already
    void bit_clear(uint64_t *bits, uint64_t n) noexcept nogil
    uint64_t fetch_add(uint64_t *p, uint64_t n) noexcept nogil
    uint32_t bits_set(uint32_t x) noexcept nogil
    void prefetch(const void *p) noexcept nogil

cdef enum:
    PIECE_PAGES = 64                # pages of slots in a piece of work: 32768 blocks
    PIECE_SPANS = 1024
    BATCH = 64                      # slots whose cells and headers are on their way to the cache at once
    SPAN_BITS = SPAN_SIZE // MIN_CHUNK
    THREADS_MAX = 8
    BLOCKS_PER_THREAD = 1 << 16     # a thread is worth it from here on


@cython.final
cdef class Recovery:
    """Rebuilds a pool that was just made over a state's memory. Nobody else may use it meanwhile."""

    def __cinit__(self, Zsmalloc pool not None, Region slot_table not None, Region touches not None, uint64_t blocks,
                  bint verify):
        self.pool = pool
        self.arena = pool.arena
        self.slot_table = slot_table
        self.slots = <uint64_t *>slot_table.base
        self.touches = touches
        self.blocks = blocks
        self.verify = verify
        self.used = Region(pool.cell_table.size // sizeof(uint64_t) // 8)
        self.live = Region(<uint64_t>pool.arena.span_count * SPAN_BITS // 8)

    def run(self, progress):
        """Do it. Calls progress(pieces done, pieces) about every second, unless it is None.

        Raises CorruptionError when the state contradicts itself; then nothing was changed in it.
        """
        cdef uint64_t slot_pieces = (self.blocks + PIECE_PAGES * SLOTS_PER_PAGE - 1) // (PIECE_PAGES * SLOTS_PER_PAGE)
        cdef uint64_t span_pieces
        started = time.monotonic()
        self.top = self._find_top()
        if self.top > self.arena.writable and self.arena.grow(self.top):
            raise MemoryError("the system refuses to map the state")
        span_pieces = (self.top + PIECE_SPANS - 1) // PIECE_SPANS
        self._in_parallel(slot_pieces, progress, 0, slot_pieces + span_pieces)
        if self.wrong == NULL and self.mend_count > MENDS:
            self.wrong = "too many headers are wrong"
        if self.wrong != NULL:
            raise CorruptionError(f"block {self.wrong_block}: {self.wrong.decode()}")
        self.spans_now = True
        self._in_parallel(span_pieces, progress, slot_pieces, slot_pieces + span_pieces)
        with nogil:
            zr_crash_point("spans-rebuilt")
            self._mend()
            self._list_zspages()
            self._list_cells()
            self._give_back_slots()
            zr_crash_point("recovered")
        self.milliseconds = <uint64_t>((time.monotonic() - started) * 1000)

    def _in_parallel(self, uint64_t pieces, progress, uint64_t before, uint64_t total):
        self.cursor = 0
        self.pieces = pieces
        count = min(os.cpu_count() or 1, THREADS_MAX, self.blocks // BLOCKS_PER_THREAD + 1)
        threads = [threading.Thread(target=self._thread) for _ in range(count - 1)]
        if progress is not None:
            threads.append(threading.Thread(target=self._thread))
        for thread in threads:
            thread.start()
        if progress is None:
            self._thread()
        for thread in threads:
            thread.join(1.0)
            while thread.is_alive():
                progress and progress(before + min(load_relaxed(&self.cursor), pieces), total)
                thread.join(1.0)

    def _thread(self):
        with nogil:
            self._work()

    cdef void _work(self) noexcept nogil:
        cdef uint64_t piece
        while self.wrong == NULL:
            piece = fetch_add(&self.cursor, 1)
            if piece >= self.pieces:
                break
            if self.spans_now:
                self._rebuild_spans(<uint32_t>(piece * PIECE_SPANS), <uint32_t>min((piece + 1) * PIECE_SPANS, self.top))
            else:
                self._scan_slots(piece * PIECE_PAGES, (piece + 1) * PIECE_PAGES)

    cdef uint32_t _find_top(self) noexcept nogil:
        """The end of the spans that ever had a class."""
        cdef uint64_t start = 0, end = self.pool.span_classes.size, span
        cdef uint32_t top = 0
        while self.pool.span_classes.next_extent(&start, &end):
            for span in range(start, min(end, <uint64_t>self.arena.span_count)):
                if self.pool.span_class[span]:
                    top = <uint32_t>span + 1
            start = end
            end = self.pool.span_classes.size
        return top

    # --------------------------------------------------------------------------------------------------------
    # 1: slots

    cdef void _scan_slots(self, uint64_t first, uint64_t last) noexcept nogil:
        """Go over some pages of slots."""
        cdef uint64_t start = first << PAGE_SHIFT, end = min(last << PAGE_SHIFT, self.slot_table.size), page
        while start < end and self.slot_table.next_extent(&start, &end):
            for page in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
                if self._scan_page(page * SLOTS_PER_PAGE, min((page + 1) * SLOTS_PER_PAGE, self.blocks)):
                    (<uint8_t *>self.touches.base)[page] = 1
                    counter_add(&self.slot_pages, 1)
            start = end
            end = min(last << PAGE_SHIFT, self.slot_table.size)

    cdef bint _scan_page(self, uint64_t block, uint64_t end) noexcept nogil:
        """Go over a page of slots; whether there was one in use."""
        cdef uint64_t batch_end, slot, handle, obj, b, n
        cdef uint64_t stored = 0, same = 0, huge = 0, compr = 0, handles = 0
        cdef const char *wrong
        while block < end:
            batch_end = min(block + BATCH, end)
            for b in range(block, batch_end):
                handle = slot_handle(self.slots[b])
                if handle and handle <= self.arena.span_count:
                    prefetch(&self.pool.cells[handle])
            for b in range(block, batch_end if self.verify else block):
                slot = self.slots[b]
                handle = slot_handle(slot)
                if handle and handle <= self.arena.span_count and not slot & SLOT_SAME:
                    obj = cell_obj(self.pool.cells[handle])
                    if obj >> SPAN_SHIFT < self.top:
                        prefetch(self.arena.base + obj)
            for block in range(block, batch_end):
                slot = self.slots[block]
                if slot == 0:
                    continue
                wrong = NULL if slot == SLOT_LOST else self._scan_slot(slot)
                if wrong != NULL:
                    n = fetch_add(&self.lost_now, 1) if self.verify else LOST
                    if n >= LOST:
                        # Any of those found by several threads will do.
                        self.wrong_block = block
                        self.wrong = wrong
                        return True
                    self.lost_blocks[n] = block
                    slot = SLOT_LOST
                stored += 1
                if slot == SLOT_LOST:
                    counter_add(&self.lost, 1)
                    continue
                handles += slot_handle(slot) != 0
                if slot & SLOT_SAME:
                    same += 1
                else:
                    compr += slot & SLOT_SIZE_MASK
                    huge += slot & SLOT_SIZE_MASK == BLOCK_SIZE
            block = batch_end
        counter_add(&self.stored, stored)
        counter_add(&self.same, same)
        counter_add(&self.huge, huge)
        counter_add(&self.compr, compr)
        counter_add(&self.handles, handles)
        return stored != 0

    cdef const char *_scan_slot(self, uint64_t slot) noexcept nogil:
        """Follow a slot to its chunk and mark it as live; NULL, or what is wrong."""
        cdef uint64_t handle = slot_handle(slot), cell, obj, n
        cdef uint32_t size = slot & SLOT_SIZE_MASK, index, offset
        cdef size_class *c
        if handle == 0 and slot & SLOT_SAME:
            return NULL
        if handle == 0 or handle > self.arena.span_count:
            return "its slot holds no handle"
        if slot & SLOT_SAME:
            if bit_set(<uint64_t *>self.used.base, handle):
                return "its slot holds the handle of another block"
            return NULL
        cell = self.pool.cells[handle]
        obj = cell_obj(cell)
        if not cell & CELL_LIVE or obj >> SPAN_SHIFT >= self.top:
            return "its cell leads to no object"
        index = self.pool.span_class[obj >> SPAN_SHIFT]
        if index == 0 or index > self.pool.class_count:
            return "its object is in a span without a size class"
        c = &self.pool.classes[index - 1]
        offset = obj & (SPAN_SIZE - 1)
        if offset % c.size or offset // c.size >= c.objs:
            return "its object is not where one of its size class can be"
        if size == 0 or size > (PAGE_SIZE if c.size == PAGE_SIZE else c.size - HEADER_SIZE):
            return "its object is larger than its size class"
        if bit_set(<uint64_t *>self.used.base, handle):
            return "its slot holds the handle of another block"
        if bit_set(<uint64_t *>self.live.base, obj // MIN_CHUNK):
            bit_clear(<uint64_t *>self.used.base, handle)
            return "its object is that of another block"
        # Reading the headers takes as long as all else: each page of the pool is mapped for it.
        if not cell & CELL_PIN and (not self.verify or c.size == PAGE_SIZE
                                    or peek(self.arena.base + obj) == (<uint32_t>handle << 1 | 1)):
            return NULL
        n = fetch_add(&self.mend_count, 1)
        if n < MENDS:
            self.mends[n] = handle
        return NULL

    # --------------------------------------------------------------------------------------------------------
    # 2: spans

    cdef void _rebuild_spans(self, uint32_t first, uint32_t last) noexcept nogil:
        cdef uint64_t start = <uint64_t>first << SPAN_SHIFT, end = <uint64_t>last << SPAN_SHIFT, page
        cdef uint32_t span, mask
        while start < end and self.arena.spans.next_extent(&start, &end):
            for page in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
                span = <uint32_t>(page // SPAN_PAGES)
                mask = self.arena.committed[span] | <uint32_t>1 << page % SPAN_PAGES
                self.arena.committed[span] = <uint16_t>mask
            start = end
            end = <uint64_t>last << SPAN_SHIFT
        for span in range(first, last):
            self._rebuild_span(span)

    cdef void _rebuild_span(self, uint32_t span) noexcept nogil:
        """Make a span's record, its list of free chunks and its bitmap of pages from the bits of its live chunks."""
        cdef zspage *z = &self.pool.zspages[span]
        cdef uint64_t *live = <uint64_t *>self.live.base + <uint64_t>span * (SPAN_BITS // 64)
        cdef char *base = self.arena.base + (<uint64_t>span << SPAN_SHIFT)
        cdef char *start
        cdef size_class *c
        cdef uint32_t chunk, header, needed = 0, excess
        z.group = NO_ZSPAGE
        if self.arena.committed[span]:
            z.class_index = <uint16_t>(self.pool.span_class[span] - 1)
            if z.class_index < self.pool.class_count:
                c = &self.pool.classes[z.class_index]
                z.used = 0
                z.inuse = z.fresh = 0
                z.free = NO_CHUNK
                for chunk in range(c.objs):
                    if bit_is_set(live, chunk * c.size // MIN_CHUNK):
                        z.inuse += 1
                        z.fresh = <uint16_t>(chunk + 1)
                        if is_mapped(c):
                            z.used |= <uint64_t>1 << chunk
                            needed |= pages_of_chunk(c, chunk)
                if z.inuse:
                    z.group = 0
                    if is_mapped(c):
                        z.fresh = <uint16_t>c.objs
                    else:
                        needed = (1 << pages_below(c, z.fresh)) - 1
            excess = self.arena.committed[span] & ~needed
            if excess:
                self.arena._release(span, excess)
            self.arena.committed[span] = <uint16_t>needed
        if z.group == NO_ZSPAGE:
            return
        for chunk in range(c.objs):
            start = base + (c.objs - 1 - chunk) * c.size
            if bit_is_set(live, <uint64_t>(start - base) // MIN_CHUNK):
                zr_unpoison(start, c.size)
            elif not is_mapped(c) and c.objs - 1 - chunk < z.fresh:
                zr_unpoison(start, CHUNK_ALIGN)
                header = <uint32_t>z.free << 1
                memcpy(start, &header, HEADER_SIZE)
                zr_fill(start + HEADER_SIZE, FILL_FREED, CHUNK_ALIGN - HEADER_SIZE)
                z.free = <uint16_t>(c.objs - 1 - chunk)

    # --------------------------------------------------------------------------------------------------------
    # 3: lists

    cdef void _mend(self) noexcept nogil:
        """Take off the pins of who held an object when the server died, write headers that were wrong, mark lost blocks."""
        cdef uint64_t i, handle, cell
        cdef uint32_t header
        for i in range(self.lost_now):
            store_relaxed(&self.slots[self.lost_blocks[i]], SLOT_LOST)
        for i in range(self.mend_count):
            handle = self.mends[i]
            cell = self.pool.cells[handle] & ~<uint64_t>CELL_PIN
            store_relaxed(&self.pool.cells[handle], cell)
            if self.pool.zspages[cell_obj(cell) >> SPAN_SHIFT].class_index != self.pool.huge:
                header = <uint32_t>handle << 1 | 1
                memcpy(self.arena.base + cell_obj(cell), &header, HEADER_SIZE)

    cdef void _list_zspages(self) noexcept nogil:
        """Count the zspages and list them by fullness; list the spans that are free."""
        cdef size_class *c
        cdef uint32_t span, i
        cdef uint64_t pages = 0
        for i in range(self.top):
            span = self.top - 1 - i
            if self.pool.zspages[span].group == NO_ZSPAGE:
                if self.arena.top:
                    self.arena.links[span] = self.arena.cold
                    self.arena.cold = span
                continue
            if self.arena.top == 0:
                self.arena.top = span + 1
            c = &self.pool.classes[self.pool.zspages[span].class_index]
            c.zspages += 1
            c.inuse += self.pool.zspages[span].inuse
            c.committed += bits_set(self.arena.committed[span])
            pages += bits_set(self.arena.committed[span])
            self.pool._link(c, span)
        # What is beyond was ready, but never in use.
        self.arena.spans.release(self.arena.base + (<uint64_t>self.arena.top << SPAN_SHIFT),
                                 <uint64_t>(self.arena.span_count - self.arena.top) << SPAN_SHIFT)
        store_relaxed(&self.arena.pages, pages)
        store_relaxed(self.arena.pages_max, max(load_relaxed(self.arena.pages_max), pages))

    cdef void _list_cells(self) noexcept nogil:
        """List the cells that no slot holds as free."""
        cdef uint64_t start = 0, end = self.pool.cell_table.size, handle, top = 1, last = 0, used_end
        while self.pool.cell_table.next_extent(&start, &end):
            for handle in range(start // sizeof(uint64_t), end // sizeof(uint64_t)):
                if bit_is_set(<uint64_t *>self.used.base, handle):
                    top = handle + 1
                else:
                    self.leaked += (self.pool.cells[handle] & CELL_LIVE) != 0
            last = end
            start = end
            end = self.pool.cell_table.size
        for handle in range(1, top):
            if not bit_is_set(<uint64_t *>self.used.base, top - handle):
                store_relaxed(&self.pool.cells[top - handle], self.pool.cells_free << 3)
                self.pool.cells_free = top - handle
        self.pool.cells_top = top
        self.pool.cells_used = self.handles
        # Cells beyond are as new.
        used_end = (top * sizeof(uint64_t) + PAGE_SIZE - 1) >> PAGE_SHIFT << PAGE_SHIFT
        for handle in range(top, min(used_end, last) // sizeof(uint64_t)):
            store_relaxed(&self.pool.cells[handle], 0)
        if last > used_end:
            self.pool.cell_table.release(<char *>self.pool.cells + used_end, last - used_end)

    cdef void _give_back_slots(self) noexcept nogil:
        """Give the pages back on which no slot is in use."""
        cdef uint64_t start = 0, end = self.slot_table.size, page
        while self.slot_table.next_extent(&start, &end):
            for page in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
                if not (<uint8_t *>self.touches.base)[page]:
                    self.slot_table.release(self.slot_table.base + (page << PAGE_SHIFT), PAGE_SIZE)
            start = end
            end = self.slot_table.size
