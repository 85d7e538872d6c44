"""Compaction over the bounds of size classes: objects of a last page are lent chunks of somewhat larger classes.

Each class has a part-filled zspage, whose last page is half empty on average. After all classes were compacted, objects on
such pages fill what is free on those of larger classes. An object lent to another class is marked (CELL_LENT): it is not
lent a second time.

The kernel's zsmalloc has nothing like it; docs/density.md has what it gains.
"""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.pool.chunks cimport last_used, mapped_room
from zramd.core.pool.compaction cimport (
    compact_begin,
    compact_end,
    compact_run,
    freeable_pages,
    isolate_emptiest,
    move_object,
    putback,
    release_stock,
    tighten,
)
from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport LENT_OUT, is_mapped, lock_class, pages_below, size_class
from zramd.core.pool.zspages cimport zspage_regroup
from zramd.core.system.bits cimport bits_set, bits_set_64
from zramd.core.system.checks cimport zr_assert_held
from zramd.core.system.locks cimport (
    counter_add,
    give_way,
    load_relaxed,
    load_relaxed_32,
    pthread_mutex_unlock,
    store_relaxed,
)
from zramd.core.types cimport GROUP_EMPTY, GROUP_FULL, MAX_CLASSES, NIL, PAGE_SHIFT

cdef enum:
    BORROW_SHIFT = 4        # a borrowed chunk is at most 1/16 larger than the object's own


cdef uint64_t whole_freeable_pages(Pool pool) noexcept nogil:
    """Pages that compact_whole would free now: those, what can be lent then, and what is kept for the next write."""
    return (freeable_pages(pool) + borrowable(pool) + load_relaxed(&pool.arena.stock)
            + load_relaxed_32(&pool.spares))


cdef uint64_t borrowable(Pool pool) noexcept nogil:
    """Pages that _borrow would free after compact_run: its steps, with the numbers of objects alone."""
    cdef uint32_t last[MAX_CLASSES]     # objects in each class's part-filled zspage
    cdef uint32_t i, index, wanted
    cdef uint64_t n = 0
    cdef size_class *c
    if load_relaxed(&pool.arena.reserve):
        return 0
    for i in range(pool.huge):
        last[i] = <uint32_t>(load_relaxed(&pool.classes[i].inuse) % pool.classes[i].objs)
    for i in range(pool.huge):
        index = pool.huge - 1 - i
        c = &pool.classes[index]
        while last[index] and not load_relaxed(&c.stuck) & LENT_OUT:
            wanted = last_page_chunks(c, last[index])
            if not fill_larger(pool, index, wanted, last):
                break
            n += pages_below(c, last[index]) - pages_below(c, last[index] - wanted)
            last[index] -= wanted
    return n


cdef bint fill_larger(Pool pool, uint32_t index, uint32_t wanted, uint32_t *last) noexcept nogil:
    """Count `wanted` objects of a class into what larger ones have to spare; False, and nothing is done: too little."""
    cdef size_class *c = &pool.classes[index]
    cdef size_class *d
    cdef uint32_t room[MAX_CLASSES]
    cdef uint32_t i = index
    while wanted:
        i += 1
        d = &pool.classes[i]
        if i == pool.huge or not is_lender(c, d):
            return False
        room[i] = 0
        if last[i]:
            room[i] = min(min((pages_below(d, last[i]) << PAGE_SHIFT) // d.size, d.objs) - last[i], wanted)
        wanted -= room[i]
    while i > index:
        last[i] = (last[i] + room[i]) % pool.classes[i].objs
        i -= 1
    return True


cdef uint64_t compact_whole(Pool pool) noexcept nogil:
    """Compact until nothing is freeable, borrow, and give back what is kept for the next write.

    The pages freed by all of it: by as many mem_used_total falls, and as many were whole_freeable_pages before.
    """
    cdef uint64_t freed = compact_run(pool, <uint64_t>-1, <uint64_t>-1), borrowed = 0
    cdef uint32_t i
    compact_begin(pool)
    if load_relaxed(&pool.arena.reserve) == 0:
        for i in range(pool.huge, 0, -1):
            borrowed += borrow(pool, i - 1)
            if load_relaxed_32(&pool.compact_waiters):
                give_way(&pool.compact_lock, &pool.compact_waiters)
    borrowed += release_stock(pool)
    counter_add(&pool.counters.pages_compacted, borrowed)
    compact_end(pool)
    return freed + borrowed


cdef uint32_t last_page_chunks(size_class *c, uint32_t chunks) noexcept nogil:
    """Of the first so many chunks of a zspage those that are not whole on the pages before their last."""
    return chunks - ((pages_below(c, chunks) - c.unit) << PAGE_SHIFT) // c.size


cdef uint64_t borrow(Pool pool, uint32_t index) noexcept nogil:
    """Empty the last pages of a class's part-filled zspage into chunks of somewhat larger classes; the pages freed.

    Those chunks are free and on resident pages, so that they cost nothing now. A class's last page is half empty
    on average, and so is each of the larger ones': 0.6 % of a pool of 36 MB (docs/density.md). Larger classes were
    seen to before, so their pages stay. The class lock is held for a few copies.
    """
    cdef size_class *c = &pool.classes[index]
    cdef uint32_t span, wanted
    cdef uint64_t freed = 0, budget = <uint64_t>-1
    zr_assert_held(&pool.compact_lock)
    lock_class(c)
    span = isolate_emptiest(pool, c)
    if span != NIL and pool.zspages[span].inuse:
        freed = tighten(pool, c, span, &budget, True)
    while span != NIL and pool.zspages[span].inuse:
        wanted = last_page_chunks(c, pool.zspages[span].inuse)
        if count_room(pool, index, wanted) < wanted:
            break       # nothing is moved unless it frees the page
        if not lend(pool, index, span, wanted):
            break
        if pool.zspages[span].inuse:
            freed += tighten(pool, c, span, &budget, False)
    freed += putback(pool, c, span)
    store_relaxed(&c.stuck, c.stuck | LENT_OUT)
    pthread_mutex_unlock(&c.lock)
    return freed


cdef inline bint is_lender(size_class *c, size_class *d) noexcept nogil:
    """Whether chunks of a class are not too large for objects of a smaller one."""
    return d.size - c.size <= c.size >> BORROW_SHIFT


cdef uint32_t fullest_listed(size_class *d) noexcept nogil:
    """A zspage of the fullest group that has room; NIL when no group has."""
    cdef uint32_t group
    for group in range(GROUP_FULL - 1, GROUP_EMPTY, -1):
        if d.heads[group] != NIL:
            return d.heads[group]
    return NIL


cdef uint32_t free_places(Pool pool, size_class *d, uint32_t span) noexcept nogil:
    """Free chunks of a zspage on resident pages; of one with a list, on those in a row from its first."""
    cdef uint32_t places
    if is_mapped(d):
        return bits_set_64(mapped_room(pool, d, span))
    places = min((bits_set(pool.arena.committed[span]) << PAGE_SHIFT) // d.size, d.objs)
    return places - min(<uint32_t>pool.zspages[span].inuse, places)


cdef uint32_t count_room(Pool pool, uint32_t index, uint32_t wanted) noexcept nogil:
    """Places that larger classes could lend to a class: all of them, or as many as are wanted and maybe more."""
    cdef size_class *c = &pool.classes[index]
    cdef size_class *d
    cdef uint32_t i, span, found = 0
    for i in range(index + 1, pool.huge):
        d = &pool.classes[i]
        if found >= wanted or not is_lender(c, d):
            break
        lock_class(d)
        span = fullest_listed(d)
        if span != NIL:
            found += free_places(pool, d, span)
        pthread_mutex_unlock(&d.lock)
    return found


cdef bint lend(Pool pool, uint32_t index, uint32_t span, uint32_t count) noexcept nogil:
    """Move the last `count` objects of a zspage to larger classes; False: not all could be moved, and its page stays."""
    cdef size_class *c = &pool.classes[index]
    cdef size_class *d
    cdef uint32_t i, dst, places, chunk = pool.zspages[span].fresh
    cdef bint met = False       # an object that cannot be moved: no more are
    for i in range(index + 1, pool.huge):
        d = &pool.classes[i]
        if count == 0 or met or not is_lender(c, d):
            break
        lock_class(d)
        dst = fullest_listed(d)
        places = free_places(pool, d, dst) if dst != NIL else 0
        while count and places and not met:
            chunk = last_used(pool, c, span, chunk)
            met = chunk == NIL or move_object(pool, c, span, chunk, d, dst, True) != 0
            places -= 1
            count -= not met
        if dst != NIL:
            zspage_regroup(pool, d, dst)
        pthread_mutex_unlock(&d.lock)
    return count == 0
