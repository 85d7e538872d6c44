"""Recovery: a pool and the counters of a device, rebuilt from slots, cells and the classes of spans.

    0  which pages the pool has, in parallel. Those of the tables that the file lacks are made ready: a page that was all
       zeros may be missing in a copy, and touching it must not be the end on a full file system
    1  every slot, in parallel: slot, cell and class must agree. Nothing is written yet: a state that contradicts itself
       is refused as it was found. With verify, where each block answers for itself, the block is lost and the others
       are not: of two that lead to one place the checksum tells whose it is. Headers are looked at then, too: nothing
       relies on them but moving and freeing, so they are mended
    2  every span, in parallel, and
    3  lists: rebuilding.pyx

It takes a bit for each cell, and 256 bytes for each zspage of small objects, some hundred of which are in one: a server that
runs with little address space can be taken over with little more.

Payloads are not read, nor are holes of the file: the file system knows which pages the file has. A kill in the middle
leaves the state as it was: nothing that a slot leads to is changed, except the pins of threads that held an object when the
server died.

What may be found here follows from the crash rule of pool.pyx.
"""

cimport cython
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks
from zramd.core.device.rebuilding cimport give_back_slots, list_cells, list_zspages, mend, rebuild_span
from zramd.core.device.slots cimport COLD, HOLE, LOST, OUT, RAW, SAME
from zramd.core.device.slots cimport block_kind, has_object, is_known, is_out, slot_bytes, slot_handle, slot_kind
from zramd.core.system.bits cimport prefetch
from zramd.core.system.checks cimport zr_poison, zr_unpoison
from zramd.core.system.locks cimport counter_add, load_relaxed
from zramd.core.system cimport points
from zramd.core.system.points cimport zr_point
from zramd.core.memory.region cimport Region, whole_pages
from zramd.core.pool.size_classes cimport is_huge, is_mapped, pages_of_chunk, size_class
from zramd.core.types cimport (
    CELL_LIVE,
    CELL_PIN,
    HEADER_SIZE,
    MAX_CHUNKS,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOTS_PER_PAGE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
    cell_obj,
    header_of,
)

import os
import time
from contextlib import suppress

from zramd.errors import BackingError, CorruptionError, error_from
from zramd.core.system.threads import start_thread

cdef extern from *:
    """
    /* The first look at memory that is still poisoned for the address sanitizer. */
    __attribute__((no_sanitize("address"), noinline)) static uint32_t peek(const void *p)
    {
        return *(const uint32_t *)p;
    }
    #define bit_set(bits, n) \\
        ((__atomic_fetch_or(&(bits)[(n) / 64], (uint64_t)1 << (n) % 64, __ATOMIC_RELAXED) >> (n) % 64) & 1)
    #define bit_clear(bits, n) \
        ((void)__atomic_fetch_and(&(bits)[(n) / 64], ~((uint64_t)1 << (n) % 64), __ATOMIC_RELAXED))
    #define fetch_add(p, n) __atomic_fetch_add((p), (n), __ATOMIC_RELAXED)
    """
    uint32_t peek(const void *p) noexcept nogil
    bint bit_set(uint64_t *bits, uint64_t n) noexcept nogil     # whether it was set already
    void bit_clear(uint64_t *bits, uint64_t n) noexcept nogil
    uint64_t fetch_add(uint64_t *p, uint64_t n) noexcept nogil

cdef enum:
    PIECE_PAGES = 64                # pages of slots in a piece of work: 32768 blocks
    PIECE_SPANS = 1024
    BATCH = 64                      # slots whose cells and headers are on their way to the cache at once
    SPAN_CHUNKS = MAX_CHUNKS
    THREADS_MAX = 8
    BLOCKS_PER_THREAD = 1 << 16     # a thread is worth it from here on


@cython.final
cdef class Recovery:
    """Rebuilds the pool of blocks that were just made over a state's memory. Nobody else may use them meanwhile.

    keeps: pages that free spans and tables have stay, for a reserve: where memory is short, they might not be had again.
    """

    def __cinit__(self, Blocks table not None, bint had_backing, bint has_it, bint keeps):
        self.table = table
        self.pool = table.pool
        self.arena = table.pool.arena
        self.slot_table = table.slot_table
        self.slots = table.slots
        self.touches = table.touches
        self.blocks = table.count
        self.verify = table.verify
        self.had_backing = had_backing
        self.keeps = keeps
        self.backing = table.backing if has_it else None

    def run(self, progress):
        """Do it. Calls progress(pieces done, pieces) about every second, unless it is None.

        Raises BackingError when blocks are out and the backing is not the one they are on, CorruptionError when the state
        contradicts itself, MemoryError or PoolFullError when the system or the file system has no room for what it takes;
        then nothing was changed in it.
        """
        cdef uint64_t slot_pieces = (self.blocks + PIECE_PAGES * SLOTS_PER_PAGE - 1) // (PIECE_PAGES * SLOTS_PER_PAGE)
        cdef uint64_t span_pieces
        started = time.monotonic()
        with nogil:
            self._find_top()
            self.cells_end = self._fill_holes(self.pool.cell_table, self.pool.cell_table.size) // sizeof(uint64_t)
            self.cells_end = min(self.cells_end, <uint64_t>self.arena.span_count + 1)
            if self.top > self.arena.writable and self.arena.grow(self.top):
                self.failed = -ENOMEM
            else:
                zr_poison(self.arena.base, <uint64_t>self.top << SPAN_SHIFT)
        self._look_failed()
        self.used = Region(self.cells_end // 8 + sizeof(uint64_t))
        self.live = Region(max(<uint64_t>self.lists * SPAN_CHUNKS // 8, sizeof(uint64_t)))
        span_pieces = (self.top + PIECE_SPANS - 1) // PIECE_SPANS
        total = slot_pieces + 2 * span_pieces
        self._in_parallel(FIND_PAGES, span_pieces, progress, 0, total)
        self._in_parallel(SCAN_SLOTS, slot_pieces, progress, span_pieces, total)
        self._look_failed()
        if self.lacks_backing:
            raise BackingError("blocks of the state are out, on another backing than this one")
        if self.wrong == NULL and self.dispute_count:
            self._settle_disputes()
        if self.wrong == NULL and self.mend_count > MENDS:
            self.wrong = "too many headers are wrong"
        if self.wrong != NULL:
            raise CorruptionError(f"block {self.wrong_block}: {self.wrong.decode()}")
        self._in_parallel(REBUILD_SPANS, span_pieces, progress, span_pieces + slot_pieces, total)
        self._look_failed()
        with nogil:
            zr_point(points.spans_rebuilt)
            mend(self)
            list_zspages(self)
            list_cells(self)
            give_back_slots(self)
            zr_point(points.recovered)
        self.table.counters.pages_stored = self.stored
        self.table.counters.compr_data_size = self.compr
        self.table.counters.same_pages = self.same
        self.table.counters.huge_pages = self.huge
        self.table.counters.out_pages = self.out
        self.table.counters.out_data_size = self.out_bytes
        if self.table.backing is not None:
            self.table.backing.count_used()
        self.table.counters.cold_pages = self.cold
        self.table.counters.cold_data_size = self.cold_bytes
        self.table.touched_pages = self.slot_pages
        self.milliseconds = <uint64_t>((time.monotonic() - started) * 1000)

    cdef recovery_numbers numbers(self):
        return recovery_numbers(self.milliseconds, self.stored, self.leaked, self.lost)

    def _look_failed(self):
        if self.failed:
            raise error_from(self.failed, "taking over the state")

    def _in_parallel(self, step now, uint64_t pieces, progress, uint64_t before, uint64_t total):
        self.now = now
        self.cursor = 0
        self.pieces = pieces
        count = min(os.cpu_count() or 1, THREADS_MAX, self.blocks // BLOCKS_PER_THREAD + 1)
        threads = []
        # It takes no more threads than the system gives: this one can do it all.
        with suppress(RuntimeError, MemoryError):
            while len(threads) < count - (progress is None):
                threads.append(start_thread("zramd-recovery", self._thread, patience=0))
        if progress is None:
            self._thread()
        for thread in threads:
            thread.join(1.0)
            while thread.is_alive():
                progress and progress(before + min(load_relaxed(&self.cursor), pieces), total)
                thread.join(1.0)
        self._thread()  # what they have left: all, if there is none of them

    def _thread(self):
        with nogil:
            self._work()

    cdef void _work(self) noexcept nogil:
        cdef uint64_t piece
        cdef uint32_t first, last, span
        while self.wrong == NULL and self.failed == 0 and not self.lacks_backing:
            piece = fetch_add(&self.cursor, 1)
            if piece >= self.pieces:
                break
            first = <uint32_t>(piece * PIECE_SPANS)
            last = <uint32_t>min((piece + 1) * PIECE_SPANS, <uint64_t>self.top)
            if self.now == FIND_PAGES:
                self._find_pages(first, last)
            elif self.now == SCAN_SLOTS:
                self._scan_slots(piece * PIECE_PAGES, (piece + 1) * PIECE_PAGES)
            else:
                for span in range(first, last):
                    rebuild_span(self, span)

    # --------------------------------------------------------------------------------------------------------
    # 0: pages

    cdef void _find_top(self) noexcept nogil:
        """Find the end of the spans that ever had a class, and give each that needs it a place in live.

        Of a reserve that is kept the end of those that have pages.
        """
        cdef uint64_t start = 0, end = self.pool.span_classes.size, span
        cdef uint32_t index
        while self.pool.span_classes.next_extent(&start, &end):
            for span in range(start, min(end, <uint64_t>self.arena.span_count)):
                index = self.pool.span_class[span]
                if index:
                    self.top = <uint32_t>span + 1
                if index and index <= self.pool.class_count and not is_mapped(&self.pool.classes[index - 1]):
                    self.pool.zspages[span].next = self.lists
                    self.lists += 1
            start = end
            end = self.pool.span_classes.size
        start = <uint64_t>self.top << SPAN_SHIFT
        end = self.arena.spans.size
        while self.keeps and start < end and self.arena.spans.next_extent(&start, &end):
            self.top = <uint32_t>((end - 1 >> SPAN_SHIFT) + 1)
            start = end
            end = self.arena.spans.size
        self._fill_holes(self.pool.span_classes, self.top)
        self.pool.classes_populated = whole_pages(self.top)

    cdef uint64_t _fill_holes(self, Region table, uint64_t end) noexcept nogil:
        """Make ready what lies between the parts of a table, up to end, that the file has; where the last of them ends."""
        cdef uint64_t start = 0, stop = end, last = 0
        cdef int rc = 0
        while rc == 0 and table.next_extent(&start, &stop):
            if start > last:
                rc = table.take_room(table.base + last, start - last)
            last = start = stop
            stop = end
        if rc:
            self.failed = rc
        return last

    cdef void _find_pages(self, uint32_t first, uint32_t last) noexcept nogil:
        """Find out which pages of some spans the file has."""
        cdef uint64_t start = <uint64_t>first << SPAN_SHIFT, end = <uint64_t>last << SPAN_SHIFT, page
        cdef uint32_t span
        while start < end and self.arena.spans.next_extent(&start, &end):
            for page in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
                span = <uint32_t>(page // SPAN_PAGES)
                self.arena.committed[span] = <uint16_t>(self.arena.committed[span] | 1 << page % SPAN_PAGES)
            start = end
            end = <uint64_t>last << SPAN_SHIFT

    cdef bint _has_pages(self, uint32_t span, uint32_t pages) noexcept nogil:
        """Make sure that some pages of a span may be touched."""
        cdef uint32_t missing = pages & ~<uint32_t>self.arena.committed[span]
        cdef int rc = self.arena.take_room(span, missing, False) if missing else 0
        if rc:
            self.failed = rc
        return rc == 0

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
        cdef uint64_t stored = 0, same = 0, huge = 0, compr = 0, handles = 0, cold = 0, cold_bytes = 0
        cdef uint64_t out = 0, out_bytes = 0
        cdef block_kind what
        cdef const char *wrong
        while block < end:
            batch_end = min(block + BATCH, end)
            for b in range(block, batch_end):
                handle = slot_handle(self.slots[b])
                if handle < self.cells_end:     # (Those of blocks that are out are none; it does no harm.)
                    prefetch(&self.pool.cells[handle])
            for b in range(block, batch_end if self.verify else block):
                slot = self.slots[b]
                handle = slot_handle(slot)
                if handle < self.cells_end and has_object(slot):
                    obj = cell_obj(self.pool.cells[handle])
                    if obj >> SPAN_SHIFT < self.top:
                        prefetch(self.arena.base + obj)
            for block in range(block, batch_end):
                slot = self.slots[block]
                what = slot_kind(slot)
                if what == HOLE:
                    continue
                wrong = NULL if what == LOST else self._scan_slot(block, slot)
                if self.lacks_backing:
                    return True
                if wrong != NULL:
                    n = fetch_add(&self.lost_now, 1) if self.verify else LOST
                    if n >= LOST:
                        # Any of those found by several threads will do.
                        self.wrong_block = block
                        self.wrong = wrong
                        return True
                    self.lost_blocks[n] = block
                    what = LOST
                stored += 1
                if what == LOST:
                    counter_add(&self.lost, 1)
                    continue
                if what == OUT:
                    self.backing.add(slot)
                    out += 1
                    out_bytes += slot_bytes(slot)
                    continue
                handles += slot_handle(slot) != 0
                same += what == SAME
                huge += what == RAW
                if what != SAME:
                    compr += slot_bytes(slot)
                if what == COLD:
                    cold += 1
                    cold_bytes += slot_bytes(slot)
            block = batch_end
        counter_add(&self.stored, stored)
        counter_add(&self.same, same)
        counter_add(&self.huge, huge)
        counter_add(&self.compr, compr)
        counter_add(&self.out, out)
        counter_add(&self.out_bytes, out_bytes)
        counter_add(&self.cold, cold)
        counter_add(&self.cold_bytes, cold_bytes)
        counter_add(&self.handles, handles)
        return stored != 0

    cdef const char *_scan_slot(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Follow a slot to its chunk and mark it as live; NULL, or what is wrong."""
        cdef uint64_t handle = slot_handle(slot), cell, obj, n
        cdef uint32_t size = slot_bytes(slot), index, offset, span
        cdef bint is_word = slot_kind(slot) == SAME
        cdef size_class *c
        if not is_known(slot):
            return "its slot is of no kind that this zramd knows"
        if is_out(slot):
            if self.backing is None and self.had_backing:
                self.lacks_backing = True
                return NULL
            if self.backing is None:
                return "its slot is of no kind that this zramd knows"
            if self.backing.has_place(slot):
                return NULL
            return "its slot leads beyond the backing"
        if handle == 0 and is_word:
            return NULL
        if handle == 0 or handle >= self.cells_end:
            return "its slot holds no handle"
        if is_word:
            if bit_set(<uint64_t *>self.used.base, handle) and not self._is_rightful(block, slot):
                return "its slot holds the handle of another block"
            return NULL
        cell = self.pool.cells[handle]
        obj = cell_obj(cell)
        if not cell & CELL_LIVE or obj >> SPAN_SHIFT >= self.top:
            return "its cell leads to no object"
        span = <uint32_t>(obj >> SPAN_SHIFT)
        index = self.pool.span_class[span]
        if index == 0 or index > self.pool.class_count:
            return "its object is in a span without a size class"
        c = &self.pool.classes[index - 1]
        offset = obj & (SPAN_SIZE - 1)
        if offset % c.size or offset // c.size >= c.objs:
            return "its object is not where one of its size class can be"
        if size == 0 or size > (PAGE_SIZE if is_huge(c) else c.size - HEADER_SIZE):
            return "its object is larger than its size class"
        if not self._has_pages(span, pages_of_chunk(c, offset // c.size)):
            return NULL
        if bit_set(<uint64_t *>self.used.base, handle):
            if not self._is_rightful(block, slot):
                return "its slot holds the handle of another block"
            bit_set(self._live_bits(span, c), offset // c.size)     # (The other one's may be a word.)
        elif bit_set(self._live_bits(span, c), offset // c.size) and not self._is_rightful(block, slot):
            bit_clear(<uint64_t *>self.used.base, handle)
            return "its object is that of another block"
        # Reading the headers takes as long as all else: each page of the pool is mapped for it.
        if not cell & CELL_PIN and (not self.verify or is_huge(c)
                                    or peek(self.arena.base + obj) == header_of(handle)):
            return NULL
        n = fetch_add(&self.mend_count, 1)
        if n < MENDS:
            self.mends[n] = handle
        return NULL

    cdef uint64_t *_live_bits(self, uint32_t span, size_class *c) noexcept nogil:
        """Where it is noted which chunks of a zspage slots lead to: a bit for each."""
        if is_mapped(c):
            return &self.pool.zspages[span].used_map
        return <uint64_t *>self.live.base + <uint64_t>self.pool.zspages[span].next * (SPAN_CHUNKS // 64)

    # --------------------------------------------------------------------------------------------------------
    # with verify: two blocks, one place

    cdef bint _is_rightful(self, uint64_t block, uint64_t slot) noexcept nogil:
        """Whether a handle or chunk that another block's slot leads to is this block's: then the other one is to lose it.

        Its pages may be touched.
        """
        cdef uint64_t handle = slot_handle(slot), cell = self.pool.cells[handle], n
        cdef uint32_t size = slot_bytes(slot)
        cdef char *payload
        if not self.verify:
            return False
        if slot_kind(slot) == SAME:
            if not self.table.word_is_sound(block, slot, cell):
                return False
        else:
            payload = self.arena.base + cell_obj(cell)
            if self.pool.span_class[cell_obj(cell) >> SPAN_SHIFT] != self.pool.huge + 1:
                payload += HEADER_SIZE
            zr_unpoison(payload, size)
            if not self.table.checksum_agrees(block, slot, payload):
                return False
        n = fetch_add(&self.dispute_count, 1)
        if n < LOST:
            self.disputed[n] = block
        return n < LOST

    cdef void _settle_disputes(self) noexcept nogil:
        """Lose the blocks that took what is others'."""
        cdef uint64_t block, count = min(self.dispute_count, <uint64_t>LOST), i
        for block in range(self.blocks):
            if not (<uint8_t *>self.touches.base)[block // SLOTS_PER_PAGE]:
                continue
            if slot_handle(self.slots[block]) == 0 or slot_handle(self.slots[block]) >= self.cells_end:
                continue
            if is_out(self.slots[block]):
                continue
            for i in range(count):
                # (Of two that are both in the right, whose words are alike, the first one keeps it.)
                if self.disputed[i] == block:
                    break
                if (self._same_handle(block, self.disputed[i]) or self._same_chunk(block, self.disputed[i])) and (
                        not self._is_lost(block)):
                    self._lose(block)
                    break

    cdef void _lose(self, uint64_t block) noexcept nogil:
        """Undo what _scan_slot and _scan_page did for a block, but for what is now another's."""
        cdef uint64_t slot = self.slots[block], handle = slot_handle(slot), obj = cell_obj(self.pool.cells[handle]), i
        cdef uint32_t span = <uint32_t>(obj >> SPAN_SHIFT)
        cdef bint handle_stays = False, object_stays = False, chunk_stays = not has_object(slot)
        cdef size_class *c
        if self.lost_now >= LOST:
            self.wrong_block = block
            self.wrong = "its slot holds the handle of another block"
            return
        self.lost_blocks[self.lost_now] = block
        self.lost_now += 1
        self.lost += 1
        self.handles -= 1
        self.same -= slot_kind(slot) == SAME
        self.huge -= slot_kind(slot) == RAW
        if has_object(slot):
            self.compr -= slot_bytes(slot)
        if slot_kind(slot) == COLD:
            self.cold -= 1
            self.cold_bytes -= slot_bytes(slot)
        for i in range(min(self.dispute_count, <uint64_t>LOST)):
            if self._same_handle(block, self.disputed[i]):
                handle_stays = True
                object_stays = object_stays or has_object(self.slots[self.disputed[i]])
            chunk_stays = chunk_stays or self._same_chunk(block, self.disputed[i])
        if not chunk_stays:
            c = &self.pool.classes[self.pool.span_class[span] - 1]
            bit_clear(self._live_bits(span, c), (obj & (SPAN_SIZE - 1)) // c.size)
        if not handle_stays:
            bit_clear(<uint64_t *>self.used.base, handle)
        for i in range(min(self.mend_count, <uint64_t>MENDS)):
            if self.mends[i] == handle and not object_stays:
                self.mends[i] = 0

    cdef bint _is_lost(self, uint64_t block) noexcept nogil:
        cdef uint64_t i
        for i in range(self.lost_now):
            if self.lost_blocks[i] == block:
                return True
        return False

    cdef bint _same_handle(self, uint64_t block, uint64_t other) noexcept nogil:
        return slot_handle(self.slots[block]) == slot_handle(self.slots[other])

    cdef bint _same_chunk(self, uint64_t block, uint64_t other) noexcept nogil:
        cdef uint64_t slot = self.slots[block], rival = self.slots[other]
        return has_object(slot) and has_object(rival) and (
            cell_obj(self.pool.cells[slot_handle(slot)]) == cell_obj(self.pool.cells[slot_handle(rival)]))
