"""Recovery, once every slot was looked at: records of zspages, and lists, from what slots lead to. See recovery.pyx.

    2  every span, in parallel: its record, its free chunks, its pages; pages that no object is on are given back
    3  lists: zspages by fullness, free spans, free cells. Objects that no slot holds are gone by this: they are only counted
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy

from zramd.core.device.recovery cimport Recovery
from zramd.core.device.slots cimport SLOT_LOST
from zramd.core.pool.size_classes cimport is_mapped, pages_below, pages_of_chunk, size_class
from zramd.core.pool.zspages cimport zspage_link
from zramd.core.system.bits cimport bits_set
from zramd.core.system.checks cimport FILL_FREED, zr_fill, zr_unpoison
from zramd.core.system.locks cimport pthread_mutex_lock, pthread_mutex_unlock, store_relaxed
from zramd.core.memory.region cimport whole_pages
from zramd.core.types cimport (
    CELL_LIVE,
    CELL_PIN,
    CHUNK_ALIGN,
    HEADER_SIZE,
    NO_CHUNK,
    NO_ZSPAGE,
    PAGE_SHIFT,
    SPAN_SHIFT,
    cell_obj,
    free_cell,
    free_header,
    header_of,
    zspage,
)

cdef extern from *:
    """
    #define bit_is_set(bits, n) ((__atomic_load_n(&(bits)[(n) / 64], __ATOMIC_RELAXED) >> (n) % 64) & 1)
    """
    bint bit_is_set(uint64_t *bits, uint64_t n) noexcept nogil


cdef void rebuild_span(Recovery r, uint32_t span) noexcept nogil:
    """Make a span's record, its list of free chunks and its bitmap of pages from the bits of its live chunks."""
    cdef zspage *z = &r.pool.zspages[span]
    cdef char *base = r.arena.base + (<uint64_t>span << SPAN_SHIFT)
    cdef char *start
    cdef size_class *c = NULL
    cdef uint32_t index = r.pool.span_class[span], chunk, header, needed = 0, excess
    z.group = NO_ZSPAGE
    # (Spans of a reserve have pages, and no class.)
    if index and index <= r.pool.class_count:
        z.class_index = <uint16_t>(index - 1)
        z.first_free = NO_CHUNK
        c = &r.pool.classes[index - 1]
        for chunk in range(c.objs):
            if bit_is_set(r._live_bits(span, c), chunk):
                z.inuse += 1
                z.fresh = <uint16_t>(chunk + 1)
                needed |= pages_of_chunk(c, chunk)
        if z.inuse:
            z.group = 0
            if is_mapped(c):
                z.fresh = <uint16_t>c.objs
            else:
                needed = (1 << pages_below(c, z.fresh)) - 1
        needed = r.arena.whole(needed)
    if r.keeps and not z.inuse:
        needed = r.arena.committed[span]
    if not r._has_pages(span, needed):
        return
    excess = r.arena.committed[span] & ~needed
    if excess:
        r.arena._release(span, excess)
    r.arena.committed[span] = <uint16_t>needed
    if z.group == NO_ZSPAGE:
        return
    for chunk in range(c.objs):
        start = base + (c.objs - 1 - chunk) * c.size
        if bit_is_set(r._live_bits(span, c), c.objs - 1 - chunk):
            zr_unpoison(start, c.size)
        elif not is_mapped(c) and c.objs - 1 - chunk < z.fresh:
            zr_unpoison(start, CHUNK_ALIGN)
            header = free_header(z.first_free)
            memcpy(start, &header, HEADER_SIZE)
            zr_fill(start + HEADER_SIZE, FILL_FREED, CHUNK_ALIGN - HEADER_SIZE)
            z.first_free = <uint16_t>(c.objs - 1 - chunk)


cdef void mend(Recovery r) noexcept nogil:
    """Clear the pins that threads held when the server died, write headers that were wrong, mark lost blocks."""
    cdef uint64_t i, handle, cell
    cdef uint32_t header
    for i in range(r.lost_now):
        store_relaxed(&r.slots[r.lost_blocks[i]], SLOT_LOST)
    for i in range(r.mend_count):
        handle = r.mends[i]
        if handle == 0:
            continue        # it was lost since
        cell = r.pool.cells[handle] & ~<uint64_t>CELL_PIN
        store_relaxed(&r.pool.cells[handle], cell)
        if r.pool.zspages[cell_obj(cell) >> SPAN_SHIFT].class_index != r.pool.huge:
            header = header_of(handle)
            memcpy(r.arena.base + cell_obj(cell), &header, HEADER_SIZE)


cdef void list_zspages(Recovery r) noexcept nogil:
    """Count the zspages and list them by fullness; list the spans that are free."""
    cdef size_class *c
    cdef uint32_t span, i
    cdef uint64_t pages = 0
    for i in range(r.top):
        span = r.top - 1 - i
        if r.pool.zspages[span].group == NO_ZSPAGE:
            if r.arena.committed[span]:
                if r.arena.top == 0:
                    r.arena.top = span + 1
                pthread_mutex_lock(&r.arena.lock)
                r.arena._ready_push(span)
                pthread_mutex_unlock(&r.arena.lock)
            elif r.arena.top:
                r.arena.links[span] = r.arena.cold
                r.arena.cold = span
            continue
        if r.arena.top == 0:
            r.arena.top = span + 1
        c = &r.pool.classes[r.pool.zspages[span].class_index]
        c.zspages += 1
        c.inuse += r.pool.zspages[span].inuse
        c.committed += bits_set(r.arena.committed[span])
        pages += bits_set(r.arena.committed[span])
        zspage_link(r.pool, c, span)
    # What is beyond was ready, but never in use.
    r.arena.spans.release(r.arena.base + (<uint64_t>r.arena.top << SPAN_SHIFT),
                          <uint64_t>(r.arena.span_count - r.arena.top) << SPAN_SHIFT)
    r.arena.limits.recount(pages)


cdef void list_cells(Recovery r) noexcept nogil:
    """List the cells that no slot holds as free."""
    cdef uint64_t start = 0, end = r.pool.cell_table.size, handle, top = 1, last = 0, used_end
    while r.pool.cell_table.next_extent(&start, &end):
        for handle in range(start // sizeof(uint64_t), min(end // sizeof(uint64_t), r.cells_end)):
            if bit_is_set(<uint64_t *>r.used.base, handle):
                top = handle + 1
            else:
                r.leaked += (r.pool.cells[handle] & CELL_LIVE) != 0
        last = end
        start = end
        end = r.pool.cell_table.size
    for handle in range(1, top):
        if not bit_is_set(<uint64_t *>r.used.base, top - handle):
            store_relaxed(&r.pool.cells[top - handle], free_cell(r.pool.cells_free))
            r.pool.cells_free = top - handle
    r.pool.cells_top = top
    r.pool.cells_used = r.handles
    # Cells beyond are as new.
    used_end = last if r.keeps else min(whole_pages(top * sizeof(uint64_t)), last)
    r.pool.cells_populated = used_end // sizeof(uint64_t)
    for handle in range(top, used_end // sizeof(uint64_t)):
        store_relaxed(&r.pool.cells[handle], 0)
    if last > used_end:
        r.pool.cell_table.release(<char *>r.pool.cells + used_end, last - used_end)


cdef void give_back_slots(Recovery r) noexcept nogil:
    """Give the pages back on which no slot is in use, unless they are kept."""
    cdef uint64_t start = 0, end = r.slot_table.size, page, unit = r.arena.unit, i
    cdef bint touched
    while not r.keeps and r.slot_table.next_extent(&start, &end):
        page = start >> PAGE_SHIFT
        while page < end >> PAGE_SHIFT:
            touched = False
            for i in range(unit):
                touched = touched or (<uint8_t *>r.touches.base)[page + i]
            if not touched:
                r.slot_table.release(r.slot_table.base + (page << PAGE_SHIFT), unit << PAGE_SHIFT)
            page += unit
        start = end
        end = r.slot_table.size
