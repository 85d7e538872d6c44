"""Zspages: listed by how full they are, and what a class of them could free. The class is locked.

The groups are the fullness groups of Linux' mm/zsmalloc.c; in each, zspages without resident room come last.

In a header for the same reason as chunks.pxd.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramd.core.pool.chunks cimport is_resident, mapped_room, spare_drop, unused_pages
from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport STUCK, fullness, is_huge, is_mapped, pages_below, pages_of_chunk, size_class
from zramd.core.system.bits cimport bits_set
from zramd.core.system.checks cimport zr_assert, zr_assert_held
from zramd.core.system.locks cimport load_relaxed, owned_add, owned_sub
from zramd.core.types cimport GROUPS, GROUP_EMPTY, GROUP_FULL, ISOLATED, NIL, NO_CHUNK, NO_ZSPAGE, zspage

cdef enum:
    SIFT_TRIES = 64         # zspages that are looked at for room on resident pages before others get the class lock: 10 us
    TAIL_PAGES = 2          # unused pages that the last zspage of a class keeps if the pool has a reserve
    SLACK_SHIFT = 3         # a page goes back by itself once 1/8 of its class is freeable, or overwriting would thrash

cdef inline bint is_unlisted(zspage *z) noexcept nogil:
    """Whether a zspage is on no list. (One that was never used has the zeros of a fresh record.)"""
    return z.group == ISOLATED or z.group == NO_ZSPAGE or z.group == GROUP_EMPTY

cdef inline void link_between(Pool pool, size_class *c, uint32_t span, uint32_t group,
                              uint32_t prev, uint32_t next) noexcept nogil:
    """List a zspage in a group between two neighbours; NIL: it is the first, or the last."""
    cdef zspage *z = &pool.zspages[span]
    zr_assert(is_unlisted(z))
    z.group = <uint8_t>group
    z.prev = prev
    z.next = next
    if prev != NIL:
        pool.zspages[prev].next = span
    else:
        c.heads[group] = span
    if next != NIL:
        pool.zspages[next].prev = span
    else:
        c.tails[group] = span
    owned_add(&c.group_count[group], 1)

cdef inline void zspage_link(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """List a zspage in its fullness group."""
    cdef uint32_t group = fullness(c, &pool.zspages[span])
    link_between(pool, c, span, group, NIL, c.heads[group])
    pool.zspages[span].dry = False

cdef inline void zspage_link_dry(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """List a zspage behind those of its fullness group that may have room on resident pages: it has none."""
    cdef uint32_t group = fullness(c, &pool.zspages[span])
    zr_assert_held(&c.lock)
    link_between(pool, c, span, group, c.tails[group], NIL)
    pool.zspages[span].dry = True

cdef inline void zspage_unlink(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    cdef zspage *z = &pool.zspages[span]
    zr_assert_held(&c.lock)
    zr_assert(z.group < GROUPS)
    if z.prev != NIL:
        pool.zspages[z.prev].next = z.next
    else:
        c.heads[z.group] = z.next
    if z.next != NIL:
        pool.zspages[z.next].prev = z.prev
    else:
        c.tails[z.group] = z.prev
    owned_sub(&c.group_count[z.group], 1)
    z.group = ISOLATED
    z.dry = False

cdef inline void zspage_regroup(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """List a zspage anew after a chunk or a page of it came or went."""
    if fullness(c, &pool.zspages[span]) != pool.zspages[span].group or pool.zspages[span].dry:
        zspage_unlink(pool, c, span)
        zspage_link(pool, c, span)

cdef inline uint32_t zspage_gone(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """Take an empty, unlisted zspage out of its class; how many resident pages it had. Then arena.give the span."""
    cdef uint32_t pages = bits_set(pool.arena.committed[span]), i = 0
    zr_assert_held(&c.lock)
    zr_assert(pool.zspages[span].inuse == 0 and pool.zspages[span].group == ISOLATED)
    while is_huge(c) and i < pool.spares:
        if pool.spare[i] == span:
            spare_drop(pool, i)
        else:
            i += 1
    pool.zspages[span].group = NO_ZSPAGE
    owned_sub(&c.zspages, 1)
    owned_sub(&c.committed, pages)
    return pages

cdef inline bint has_resident_room(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """Whether a part-filled zspage has a free chunk whose pages are resident."""
    cdef zspage *z = &pool.zspages[span]
    if is_mapped(c):
        return mapped_room(pool, c, span) != 0
    return z.first_free != NO_CHUNK or is_resident(pool, c, span, z.fresh)

cdef inline uint32_t find_room(Pool pool, size_class *c, uint32_t group, uint32_t *tries) noexcept nogil:
    """The first zspage of a fullness group with room on resident pages; NIL: none, or tries[0] are used up.

    Those without go behind all others, so that they are not looked at again before they get a chunk or a page.
    """
    cdef uint32_t span = c.heads[group]
    while span != NIL and not pool.zspages[span].dry and tries[0]:
        if has_resident_room(pool, c, span):
            return span
        tries[0] -= 1
        zspage_unlink(pool, c, span)
        zspage_link_dry(pool, c, span)
        span = c.heads[group]
    return NIL

cdef inline uint32_t pages_wanted(Pool pool, size_class *c, uint32_t chunks) noexcept nogil:
    """Pages that a part-filled zspage keeps when it is tightened to so many chunks."""
    return min(c.pages, pages_below(c, chunks) + (max(c.unit, TAIL_PAGES) if load_relaxed(&pool.arena.reserve) else 0))

cdef inline uint64_t freeable(Pool pool, size_class *c) noexcept nogil:
    """Pages that compacting the class frees: the one predicate for starting, for going on and for the statistics.

    At best all zspages are full but one, which has its objects on its first pages. Where mem_limit leaves no room
    to move between zspages, each part-filled one can still be tightened, which costs each a part of a page.
    Where only resident chunks can be moved into (there, and with a reserve) that may be more than can be had: what
    has been tried in vain counts as nothing, until an object of the class is freed.
    With a reserve that one keeps TAIL_PAGES: they are ready for what comes. (All of its pages would be 5 MiB.)
    May be read without the lock, then it can be off by what is happening meanwhile.
    """
    cdef uint64_t inuse = load_relaxed(&c.inuse), best, part
    cdef bint full = not pool.arena.limits.leaves(2 * c.unit)
    if is_huge(c) or inuse == 0 or (
            load_relaxed(&c.stuck) & STUCK and (full or load_relaxed(&pool.arena.reserve))):
        return 0
    best = inuse // c.objs * c.pages
    if inuse % c.objs:
        best += pages_wanted(pool, c, inuse % c.objs)
    if full:
        part = load_relaxed(&c.zspages) - load_relaxed(&c.group_count[GROUP_FULL])
        best += part - 1 if part else 0
    return load_relaxed(&c.committed) - best if load_relaxed(&c.committed) > best else 0

cdef inline void give_pages(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    """Give the pages back that nothing but a freed chunk was on, where much of the class is free.

    The refiller of a reserve wants them: there they wait for compaction.
    """
    cdef uint64_t used = pool.zspages[span].used_map
    cdef uint32_t unused
    if (used << 1 & used >> 1) >> chunk & 1:
        return      # both neighbours are in use, and each page has a part of one of them
    unused = unused_pages(pool, c, span, pool.arena.whole(pages_of_chunk(c, chunk)))
    if unused and load_relaxed(&pool.arena.reserve) == 0 and (
            freeable(pool, c) << SLACK_SHIFT > load_relaxed(&c.committed)):
        owned_sub(&c.committed, pool.arena.decommit(span, unused))
