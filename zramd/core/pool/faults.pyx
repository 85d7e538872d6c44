"""Where a pool contradicts itself: every list walked, every count counted again."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.pool.chunks cimport header_at, is_resident, next_used
from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport all_chunks, fullness, is_huge, is_mapped, size_class
from zramd.core.pool.zspages cimport has_resident_room
from zramd.core.system.bits cimport bits_set
from zramd.core.system.checks cimport zr_assert_held
from zramd.core.system.locks cimport load_relaxed, load_relaxed_32
from zramd.core.types cimport (
    CELL_LIVE,
    CELL_TAGS,
    GROUPS,
    GROUP_EMPTY,
    HEADER_SIZE,
    NIL,
    NO_CHUNK,
    NO_ZSPAGE,
    SPAN_SHIFT,
    cell_obj,
    header_handle,
    header_is_live,
    header_next,
    next_cell,
    zspage,
)


cdef const char *find_pool_fault(Pool pool, uint64_t *where, uint64_t words) noexcept nogil:
    """Look whether all lists and counts agree; NULL, or what is wrong, with a handle or span in where[0].

    What is in a zspage, find_zspage_fault looks at. words: handles that stand for a word. Nobody else may use the pool
    meanwhile.
    """
    cdef const char *wrong = NULL
    cdef uint64_t objects = 0, zspages = 0, listed = 0, handle
    cdef uint32_t i, spans_used
    zr_assert_held(&pool.compact_lock)
    for i in range(pool.class_count):
        wrong = find_class_fault(pool, i, where)
        if wrong != NULL:
            return wrong
        objects += pool.classes[i].inuse
        zspages += pool.classes[i].zspages
    where[0] = 0
    spans_used = 0
    for i in range(load_relaxed_32(&pool.arena.top)):
        # Group 0 is the zero of a record that was never used: an empty zspage is found in its class.
        if pool.zspages[i].group != NO_ZSPAGE and pool.zspages[i].group != GROUP_EMPTY:
            spans_used += 1
    if spans_used != zspages:
        return "a zspage is on no list"
    if objects + words != pool.cells_used:
        return "objects and words do not add up to the cells in use"
    handle = pool.cells_free
    while handle:
        where[0] = handle
        listed += 1
        if handle >= pool.cells_top or listed > pool.cells_top or pool.cells[handle] & CELL_TAGS:
            return "the list of free cells is broken"
        handle = next_cell(pool.cells[handle])
    where[0] = 0
    if listed + pool.cells_used + 1 != pool.cells_top:
        return "cells in use and free cells do not add up"
    return pool.arena.check(spans_used, where)


cdef const char *find_zspage_fault(Pool pool, uint32_t *span, uint32_t chunks, uint64_t *where) noexcept nogil:
    """Look into the zspages of spans from span[0] on, until about so many chunks were seen; span[0] is the next one.

    NULL, or what is wrong, with the span in where[0]. Nobody else may use the pool meanwhile.
    """
    cdef uint32_t top = load_relaxed_32(&pool.arena.top), seen = 0
    cdef const char *wrong = NULL
    cdef zspage *z
    while span[0] < top and seen < chunks and wrong == NULL:
        z = &pool.zspages[span[0]]
        seen += 1
        # (For group 0 see find_pool_fault.)
        if z.group != NO_ZSPAGE and z.group != GROUP_EMPTY:
            where[0] = span[0]
            wrong = "a zspage has no size class"
            if z.class_index < pool.class_count:
                seen += pool.classes[z.class_index].objs
                wrong = find_one_zspage_fault(pool, z.class_index, span[0])
        span[0] += 1
    return wrong


cdef const char *find_class_fault(Pool pool, uint32_t index, uint64_t *where) noexcept nogil:
    cdef size_class *c = &pool.classes[index]
    cdef uint64_t count, inuse = 0, committed = 0, zspages = 0
    cdef uint32_t group, span, prev, unused, i
    cdef uint32_t top = load_relaxed_32(&pool.arena.top)    # the refiller may be taking spans meanwhile
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
            z = &pool.zspages[span]
            if z.prev != prev or z.group != group or z.class_index != index or fullness(c, z) != group:
                return "a zspage is on the wrong list"
            if z.dry and has_resident_room(pool, c, span):
                return "a zspage that has room is marked as one that has none"
            if not z.dry and prev != NIL and pool.zspages[prev].dry:
                return "a zspage that may have room is behind one that has none"
            inuse += z.inuse
            committed += bits_set(pool.arena.committed[span])
            if is_huge(c):
                unused = bits_set(pool.arena.committed[span] & ~pool.arena.whole(<uint32_t>z.used_map))
                for i in range(pool.spares):
                    unused -= pool.spare[i] == span
                if unused and (c.unit == 1 or not load_relaxed(&pool.arena.reserve)):
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


cdef const char *find_one_zspage_fault(Pool pool, uint32_t index, uint32_t span) noexcept nogil:
    cdef size_class *c = &pool.classes[index]
    cdef zspage *z = &pool.zspages[span]
    cdef uint64_t obj = <uint64_t>span << SPAN_SHIFT
    cdef uint32_t chunk, header, live = 0, unused = 0
    cdef const char *wrong
    if z.fresh > c.objs or z.inuse > z.fresh or (is_mapped(c) and (z.fresh != c.objs or z.used_map & ~all_chunks(c))):
        return "a zspage has more chunks than fit"
    chunk = next_used(pool, c, span, 0)
    while chunk < z.fresh:
        live += 1
        if not is_resident(pool, c, span, chunk):
            return "a chunk in use is on a page that is not resident"
        if not is_huge(c):
            wrong = find_chunk_fault(pool, c, obj + chunk * c.size)
            if wrong != NULL:
                return wrong
        chunk = next_used(pool, c, span, chunk + 1)
    if live != z.inuse:
        return "the count of a zspage differs from its headers"
    if is_mapped(c):
        if z.first_free != NO_CHUNK:
            return "a zspage with a bitmap has a free list"
        return NULL
    chunk = z.first_free
    while chunk != NO_CHUNK:
        unused += 1
        if chunk >= z.fresh or unused > z.fresh:
            return "the free list of a zspage is broken"
        if not is_resident(pool, c, span, chunk):
            return "a chunk on the free list is on a page that is not resident"
        header = header_at(pool, c, span, chunk)
        if header_is_live(header):
            return "an allocated chunk is on the free list"
        chunk = header_next(header)
    if unused + z.inuse != z.fresh:
        return "a free chunk is not on the free list"
    return NULL


cdef const char *find_chunk_fault(Pool pool, size_class *c, uint64_t obj) noexcept nogil:
    cdef uint32_t header
    cdef uint64_t cell
    memcpy(&header, pool.arena.base + obj, HEADER_SIZE)
    if not header_is_live(header):
        return "a chunk in use has the header of a free one"
    if header_handle(header) == 0 or header_handle(header) >= pool.cells_top:
        return "a header names no cell"
    cell = pool.cells[header_handle(header)]
    if cell_obj(cell) != obj or not cell & CELL_LIVE:
        return "a header's cell does not point back"
    return NULL
