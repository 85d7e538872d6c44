"""Compaction: objects of part-filled zspages are moved together, so that zspages, and the last pages of others, get empty.

    src  |7 ##|    |9 ##|    |    dst  |1 ##|3 ##|    |4 ##|        cells[7]: obj in src -> obj in dst
            └───────── a move ────────────────^

The emptiest zspage of a class is emptied into the fullest, as zs_compact of Linux' mm/zsmalloc.c does it. Zspages that stay
part-filled are tightened then: their objects are moved to their first pages. lending.pyx goes on over the bounds of classes.
Nothing here is seen from above: a handle stays, only its cell is changed. For locks, pins and crashes see pool.pyx.
"""

from libc.errno cimport EBUSY, EDQUOT, ENOSPC
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.pool.chunks cimport (
    chunk_at,
    chunk_give,
    chunk_take,
    header_at,
    last_used,
    mapped_room,
    next_used,
    set_header,
    spare_drop,
    unused_pages,
)
from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport STUCK, is_mapped, lock_class, pages_below, size_class
from zramd.core.pool.zspages cimport (
    SIFT_TRIES,
    find_room,
    freeable,
    pages_wanted,
    zspage_gone,
    zspage_link,
    zspage_regroup,
    zspage_unlink,
)
from zramd.core.system cimport points
from zramd.core.system.bits cimport bits_set, lowest_bit_64
from zramd.core.system.checks cimport zr_assert, zr_assert_held, zr_poison
from zramd.core.system.latency cimport system_now
from zramd.core.system.locks cimport (
    compare_swap,
    counter_add,
    give_way,
    let_in,
    load_relaxed,
    load_relaxed_32,
    nap,
    owned_add,
    owned_sub,
    pthread_mutex_unlock,
    store_relaxed,
    store_release,
)
from zramd.core.system.points cimport zr_point
from zramd.core.types cimport (
    CELL_LENT,
    CELL_LIVE,
    CELL_PIN,
    GROUP_EMPTY,
    GROUP_FULL,
    HEADER_SIZE,
    ISOLATED,
    NIL,
    NO_CHUNK,
    PAGE_SHIFT,
    cell_obj,
    free_header,
    header_handle,
    header_is_live,
    header_next,
    zspage,
)

cdef enum:
    ROOM_TURNS = 10000      # naps of a thread that waits for room, while others are in the way
    EMPTIEST_TRIES = 32     # zspages of a fullness group that are compared

cdef enum outcome:
    SOURCE_EMPTY
    TARGET_FULL             # or its places have no pages, and get none
    SOURCE_HELD             # other threads have the pins of what is left
    WANTED                  # by others; or the budget is used up

cdef struct class_run:
    # The compaction of one class.
    uint64_t *budget        # bytes that may still be moved
    uint64_t enough         # pages
    bint whole
    bint resident           # only chunks whose pages are there can be moved into: with a reserve, and at the limit
    uint32_t src            # off their lists; NIL: there is none yet
    uint32_t dst
    uint32_t chunk          # of src: what is to be moved next
    uint32_t retries
    uint64_t freed          # pages
    uint64_t grown          # pages that became resident


cdef uint64_t freeable_pages(Pool pool) noexcept nogil:
    """Pages that moving objects within their classes would free: what is worth starting for, and going on."""
    cdef uint64_t n = 0
    cdef uint32_t i
    for i in range(pool.huge):
        n += freeable(pool, &pool.classes[i])
    return n


cdef uint64_t compact_run(Pool pool, uint64_t budget, uint64_t enough) noexcept nogil:
    """Compact until about budget bytes were moved, enough pages freed, or nothing is freeable; the pages freed.

    First whole zspages, as zsmalloc does, largest class first: the fewest copies for each page freed. Then the last
    pages of those that stay part-filled, which cost more: after aging 4 times as much (docs/benchmarks.md).
    """
    cdef uint64_t freed = 0, start
    cdef uint32_t i
    cdef bint whole
    compact_begin(pool)
    # A thread that needs a page now is let in at once, but lets no other in until it has the page.
    pool.gives_way = enough == <uint64_t>-1
    start = system_now()
    for whole in range(1, -1, -1):
        i = pool.huge
        while i and budget and freed < enough:
            freed += compact_class(pool, i - 1, &budget, enough - freed, whole)
            if is_wanted(pool):
                give_way(&pool.compact_lock, &pool.compact_waiters)
                pool.gives_way = enough == <uint64_t>-1
            else:
                i -= 1
    counter_add(&pool.counters.compact_ns, system_now() - start)
    if freed:
        counter_add(&pool.counters.pages_compacted, freed)
        counter_add(&pool.counters.num_compactions, 1)
    compact_end(pool)
    return freed


cdef bint is_wanted(Pool pool) noexcept nogil:
    """Whether the compactor is to let waiting threads in."""
    return pool.gives_way and load_relaxed_32(&pool.compact_waiters)


cdef bint is_worth_moving(Pool pool, size_class *c, bint whole) noexcept nogil:
    """Whether compacting the class frees a page; with whole, a whole zspage (zsmalloc's zs_can_compact)."""
    return freeable(pool, c) and (
        not whole or load_relaxed(&c.zspages) * c.objs - load_relaxed(&c.inuse) >= c.objs)


cdef uint64_t compact_class(Pool pool, uint32_t index, uint64_t *budget, uint64_t enough, bint whole) noexcept nogil:
    """Move objects from the emptiest zspage into the fullest while that frees pages; the pages freed.

    With whole, only while it frees whole zspages. Else what stays part-filled is tightened. Both are off their lists
    meanwhile, so that the lock can be dropped whenever a thread waits for it: no thread allocates from them, and one that
    frees an object in them leaves them alone otherwise.
    """
    cdef size_class *c = &pool.classes[index]
    cdef uint64_t undone = load_relaxed(&pool.undone)
    cdef class_run run
    cdef outcome why
    zr_assert_held(&pool.compact_lock)
    if not is_worth_moving(pool, c, whole):
        return 0
    run.budget = budget
    run.enough = enough
    run.whole = whole
    run.resident = load_relaxed(&pool.arena.reserve) != 0
    run.src = run.dst = NIL
    run.retries = 2
    run.freed = run.grown = 0
    lock_class(c)
    while run.freed < enough and budget[0] and not is_wanted(pool) and open_pair(pool, c, &run):
        why = drain(pool, c, &run)
        if why == SOURCE_EMPTY:
            give_source(pool, c, &run)
            continue
        if why == SOURCE_HELD:
            break       # come back later
        if why == TARGET_FULL:
            put_target_back(pool, c, &run)
        if load_relaxed_32(&c.waiters):
            give_way(&c.lock, &c.waiters)
    run.freed += putback(pool, c, run.src) + putback(pool, c, run.dst)
    if not whole:
        tighten_all(pool, c, &run)
        if gain(&run) == 0 and budget[0] and load_relaxed(&pool.undone) == undone and not is_wanted(pool):
            store_relaxed(&c.stuck, c.stuck | STUCK)
    pthread_mutex_unlock(&c.lock)
    let_in(&c.waiters)
    return gain(&run)


cdef inline uint64_t gain(class_run *run) noexcept nogil:
    """The pages freed, less those that had to be made resident for it."""
    return run.freed - min(run.freed, run.grown)


cdef bint open_pair(Pool pool, size_class *c, class_run *run) noexcept nogil:
    """Have a zspage to move from and one to move into, the emptiest and the fullest; False: that would free nothing."""
    if run.dst == NIL and is_worth_moving(pool, c, run.whole):
        run.dst = isolate_fullest(pool, c, run.resident)
        if run.dst == NIL and run.src != NIL and run.resident and run.retries:
            # The source itself may be the only one with room: let it be the next destination.
            run.retries -= 1
            run.freed += putback(pool, c, run.src)
            run.src = NIL
            if run.freed < run.enough and is_worth_moving(pool, c, run.whole):
                run.dst = isolate_fullest(pool, c, run.resident)
    if run.src == NIL and run.dst != NIL and is_worth_moving(pool, c, run.whole):
        run.src = isolate_emptiest(pool, c)
        run.chunk = 0
    return run.src != NIL and run.dst != NIL


cdef outcome drain(Pool pool, size_class *c, class_run *run) noexcept nogil:
    """Move objects from the source into the target until there is a reason to stop, which is returned."""
    cdef uint64_t before
    cdef int rc
    run.chunk = next_used(pool, c, run.src, run.chunk)
    while run.chunk < pool.zspages[run.src].fresh:
        before = c.committed
        rc = move_object(pool, c, run.src, run.chunk, c, run.dst, run.resident)
        run.grown += c.committed - before
        if rc and rc != -EBUSY:
            return TARGET_FULL
        if rc == 0:
            run.budget[0] -= min(c.size, run.budget[0])
        run.chunk = next_used(pool, c, run.src, run.chunk + 1)
        if run.budget[0] == 0 or load_relaxed_32(&c.waiters) or is_wanted(pool):
            break
    if pool.zspages[run.src].inuse == 0:
        return SOURCE_EMPTY
    return SOURCE_HELD if run.chunk == pool.zspages[run.src].fresh else WANTED


cdef void give_source(Pool pool, size_class *c, class_run *run) noexcept nogil:
    """Give the span of the source, which is empty, back. The lock is dropped meanwhile."""
    cdef uint32_t span = run.src
    run.freed += zspage_gone(pool, c, span)
    run.src = NIL
    pthread_mutex_unlock(&c.lock)
    pool.arena.give(span, False)
    lock_class(c)


cdef void put_target_back(Pool pool, size_class *c, class_run *run) noexcept nogil:
    """List the target again. If it has a place, that place has no page, and the limit or the file refuses one."""
    run.resident = run.resident or pool.zspages[run.dst].inuse < c.objs
    run.freed += putback(pool, c, run.dst)
    run.dst = NIL


cdef void tighten_all(Pool pool, size_class *c, class_run *run) noexcept nogil:
    """Tighten the part-filled zspages, the emptiest first, while that frees pages and no thread waits."""
    cdef uint32_t group, span, next
    for group in range(GROUP_EMPTY + 1, GROUP_FULL):
        span = c.heads[group]
        while span != NIL and gain(run) < run.enough and run.budget[0] and freeable(pool, c):
            if load_relaxed_32(&c.waiters) or is_wanted(pool):
                counter_add(&pool.undone, 1)
                break
            next = pool.zspages[span].next
            run.freed += tighten(pool, c, span, run.budget, False)
            span = next


cdef uint32_t isolate_fullest(Pool pool, size_class *c, bint resident) noexcept nogil:
    """Unlist the fullest zspage that has room, with resident room without another page; NIL when there is none.

    With resident the lock may be dropped meanwhile.
    """
    cdef uint32_t group = GROUP_FULL - 1, span, tries = SIFT_TRIES
    while group > GROUP_EMPTY:
        span = find_room(pool, c, group, &tries) if resident else c.heads[group]
        if span != NIL:
            zspage_unlink(pool, c, span)
            return span
        if tries:
            group -= 1
        else:
            give_way(&c.lock, &c.waiters)
            group = GROUP_FULL - 1
            tries = SIFT_TRIES
    return NIL


cdef uint32_t isolate_emptiest(Pool pool, size_class *c) noexcept nogil:
    """Unlist the emptiest zspage, of those at the head of the lowest group that has one: fewer objects to move."""
    cdef uint32_t group, span, best, tries = EMPTIEST_TRIES
    for group in range(GROUP_EMPTY + 1, GROUP_FULL):
        best = span = c.heads[group]
        while span != NIL and tries:
            if pool.zspages[span].inuse < pool.zspages[best].inuse:
                best = span
            span = pool.zspages[span].next
            tries -= 1
        if best != NIL:
            zspage_unlink(pool, c, best)
            return best
    return NIL


cdef uint32_t putback(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """List an isolated zspage again, or let it go if its last object was freed meanwhile; the pages freed."""
    cdef uint32_t freed = 0
    if span != NIL:
        if pool.zspages[span].inuse:
            zspage_link(pool, c, span)
        else:
            freed = zspage_gone(pool, c, span)
            pool.arena.give(span, False)
    return freed


cdef uint64_t tighten(Pool pool, size_class *c, uint32_t span, uint64_t *budget, bint always) noexcept nogil:
    """Give back the last pages of a zspage, after moving what is on them to its first; the pages freed.

    always: also where that frees none. At most half a zspage is copied, with the class lock held.
    """
    cdef uint64_t before = c.committed
    cdef uint32_t wanted = pages_wanted(pool, c, pool.zspages[span].inuse), unused
    # (A span of the reserve has resident pages beyond those that were used.)
    if bits_set(pool.arena.committed[span]) <= wanted and not always:
        return 0
    if pool.zspages[span].dry:
        zspage_regroup(pool, c, span)      # it may get room
    pack(pool, c, span, budget)
    if is_mapped(c):
        unused = unused_pages(pool, c, span, ~<uint32_t>0)
        if load_relaxed(&pool.arena.reserve):
            unused &= ~<uint32_t>0 << wanted
    else:
        unused = ~<uint32_t>0 << pages_wanted(pool, c, pool.zspages[span].fresh)
    owned_sub(&c.committed, pool.arena.decommit(span, unused))
    return before - min(before, c.committed)


cdef void pack(Pool pool, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
    """Move the objects of a zspage to its first pages."""
    if is_mapped(c):
        pack_mapped(pool, c, span, budget)
    else:
        pack_list(pool, c, span, budget)


cdef void pack_list(Pool pool, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
    """Move the objects of a zspage to its first pages."""
    cdef zspage *z = &pool.zspages[span]
    cdef uint32_t enough = (pages_below(c, z.inuse) << PAGE_SHIFT) // c.size    # chunks on the pages that stay
    cdef uint32_t chunk
    list_chunks(pool, c, span)
    chunk = last_used(pool, c, span, z.fresh)
    while chunk != NIL and chunk >= enough and budget[0]:
        if z.first_free >= enough or move_object(pool, c, span, chunk, c, span, True):
            break
        budget[0] -= min(c.size, budget[0])
        # The lowest free chunk is to be the first of the list, not this one.
        z.first_free = <uint16_t>header_next(header_at(pool, c, span, chunk))
        chunk = last_used(pool, c, span, chunk)
    list_chunks(pool, c, span)


cdef void pack_mapped(Pool pool, size_class *c, uint32_t span, uint64_t *budget) noexcept nogil:
    """Move the objects of a zspage to its first pages, some of which may have to be resident again first."""
    cdef zspage *z = &pool.zspages[span]
    cdef uint64_t room
    cdef uint32_t chunk = last_used(pool, c, span, c.objs)
    cdef uint32_t missing = ((1 << pages_below(c, z.inuse)) - 1) & ~<uint32_t>pool.arena.committed[span]
    cdef int n
    if missing and load_relaxed(&pool.arena.reserve) == 0:
        # Each of them is written below: the first chunks are all in use then.
        n = pool.arena.commit(span, missing)
        owned_add(&c.committed, max(n, 0))
    while chunk != NIL and budget[0]:
        room = mapped_room(pool, c, span)
        if room == 0 or lowest_bit_64(room) > chunk or move_object(pool, c, span, chunk, c, span, True):
            break
        budget[0] -= min(c.size, budget[0])
        chunk = last_used(pool, c, span, chunk)


cdef void list_chunks(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """List the free chunks of a zspage again, lowest first; those above the last object are as never used."""
    cdef zspage *z = &pool.zspages[span]
    cdef char *start
    cdef uint32_t chunk, i, last = z.fresh
    z.first_free = NO_CHUNK
    z.fresh = 0
    for i in range(last):
        chunk = last - 1 - i
        start = chunk_at(pool, c, span, chunk)
        if header_is_live(header_at(pool, c, span, chunk)):
            z.fresh = <uint16_t>max(<uint32_t>z.fresh, chunk + 1)
        elif z.fresh:
            set_header(start, free_header(z.first_free))
            z.first_free = <uint16_t>chunk
        else:
            zr_poison(start, c.size)


cdef int move_object(Pool pool, size_class *c, uint32_t src, uint32_t chunk, size_class *d, uint32_t dst,
                     bint resident) noexcept nogil:
    """Move an object of class c to a zspage of class d, which is c or a larger one; both are locked.

    -EBUSY: its pin is held, or it was lent to c already, so that no object creeps up class by class; or what
    chunk_take says.
    """
    cdef char *old = chunk_at(pool, c, src, chunk)
    cdef char *new
    cdef uint64_t obj = old - pool.arena.base, handle = header_handle(header_at(pool, c, src, chunk)), cell
    cdef int room
    zr_assert_held(&c.lock)
    zr_assert_held(&d.lock)
    zr_assert(src == dst or pool.zspages[src].group == ISOLATED)
    if handle >= load_relaxed(&pool.cells_top):
        return -EBUSY
    cell = load_relaxed(&pool.cells[handle])
    if cell_obj(cell) != obj or not cell & CELL_LIVE or (d != c and cell & CELL_LENT):
        return -EBUSY
    zr_point(points.move_seen)
    if cell & CELL_PIN or not compare_swap(&pool.cells[handle], cell, cell | CELL_PIN):
        counter_add(&pool.undone, 1)
        return -EBUSY
    zr_point(points.move_pinned)
    room = chunk_take(pool, d, dst, handle, resident)
    if room < 0:
        store_release(&pool.cells[handle], cell)
        return room
    zr_point(points.move_chunk_taken)
    new = chunk_at(pool, d, dst, room)
    memcpy(new + HEADER_SIZE, old + HEADER_SIZE, c.size - HEADER_SIZE)
    zr_point(points.move_copied)
    cell = cell ^ obj ^ <uint64_t>(new - pool.arena.base)
    store_release(&pool.cells[handle], cell if d == c else cell | CELL_LENT)
    zr_point(points.move_cell_stored)
    chunk_give(pool, c, src, chunk)
    zr_point(points.move_source_freed)
    counter_add(&pool.counters.objects_migrated, 1)
    counter_add(&pool.counters.bytes_migrated, c.size)
    return 0


cdef uint64_t release_stock(Pool pool) noexcept nogil:
    """Give resident pages that hold nothing (the stock, and the spare pages of huge) back; how many there were."""
    cdef size_class *c = &pool.classes[pool.huge]
    cdef uint64_t n = pool.arena.release_stock()
    cdef uint32_t span, gone
    lock_class(c)
    while pool.spares:
        span = pool.spare[pool.spares - 1]
        spare_drop(pool, pool.spares - 1)
        # Entries of the same span come to 0 the second time.
        gone = pool.arena.decommit(span, ~<uint32_t>pool.zspages[span].used_map)
        owned_sub(&c.committed, gone)
        n += gone
    pthread_mutex_unlock(&c.lock)
    return n


cdef uint64_t release_stock_alone(Pool pool) noexcept nogil:
    """release_stock, while no other thread compacts or checks."""
    cdef uint64_t n
    compact_begin(pool)
    n = release_stock(pool)
    compact_end(pool)
    return n


cdef bint make_room(Pool pool, int rc, bint *in_vain) noexcept nogil:
    """Whether to try again what failed with rc: after -ENOSPC or -EDQUOT, as long as there are pages to free.

    And once more when there are none, which is noted in in_vain[0], False to begin with: others may have freed some
    after the try. The caller holds no pin and no lock of the pool.
    """
    if rc != -ENOSPC and rc != -EDQUOT or in_vain[0]:
        return False
    in_vain[0] = not free_some(pool, rc)
    return True


cdef bint free_some(Pool pool, int rc) noexcept nogil:
    """Free pages by every means; False when nothing can be freed."""
    cdef uint64_t undone
    if release_stock(pool):
        return True
    for _ in range(ROOM_TURNS):
        undone = load_relaxed(&pool.undone)
        if compact_run(pool, <uint64_t>-1, 1):
            return True
        # Another thread made room while this one waited for compact_lock. A chunk touches 2 pages at most.
        # (What took the room of the state's file system is not known.)
        if rc == -ENOSPC and pool.arena.limits.leaves(2 * pool.arena.unit):
            return True
        if load_relaxed(&pool.undone) == undone:
            return False
        nap()       # another thread was in the way of what could be freed
    return False
