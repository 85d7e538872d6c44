"""Chunks: taken, given back and found in one zspage, whose class is locked.

Here are functions over a Pool, not its methods, for the pool and for what compacts and checks it; in a header, so that
each of these has them inline.
"""

from libc.errno cimport ENOSPC
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zramd.core.pool.pool cimport SPARES, Pool
from zramd.core.pool.size_classes cimport (
    LENT_OUT,
    all_chunks,
    chunks_of_page,
    is_huge,
    is_mapped,
    pages_of_chunk,
    size_class,
)
from zramd.core.system.bits cimport highest_bit_64, lowest_bit, lowest_bit_64
from zramd.core.system.checks cimport FILL_FREED, FILL_FRESH, zr_assert, zr_assert_held, zr_fill, zr_poison, zr_unpoison
from zramd.core.system.locks cimport load_relaxed, owned_add, owned_add_32, owned_sub, owned_sub_32, store_relaxed
from zramd.core.types cimport (
    CHUNK_ALIGN,
    HEADER_SIZE,
    NIL,
    NO_CHUNK,
    NO_ZSPAGE,
    PAGE_SHIFT,
    SPAN_SHIFT,
    free_header,
    header_is_live,
    header_next,
    header_of,
    zspage,
)

cdef inline char *chunk_at(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    return pool.arena.base + (<uint64_t>span << SPAN_SHIFT) + chunk * c.size

cdef inline uint32_t header_at(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    cdef uint32_t header
    memcpy(&header, chunk_at(pool, c, span, chunk), HEADER_SIZE)
    return header

cdef inline void set_header(char *start, uint32_t header) noexcept nogil:
    memcpy(start, &header, HEADER_SIZE)

cdef inline bint is_resident(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    """Whether all pages that a chunk touches are."""
    return not pages_of_chunk(c, chunk) & ~<uint32_t>pool.arena.committed[span]

cdef inline int list_take(Pool pool, size_class *c, uint32_t span, bint resident) noexcept nogil:
    """Take the first chunk off the free list, its pages are there already; else one that was never used."""
    cdef zspage *z = &pool.zspages[span]
    cdef uint32_t chunk, header, next
    cdef int rc
    if z.first_free != NO_CHUNK:
        chunk = z.first_free
        header = header_at(pool, c, span, chunk)
        next = header_next(header)
        if header_is_live(header) or (next != NO_CHUNK and next >= z.fresh):
            # The link was overwritten in memory. What follows it is lost until the next start.
            z.first_free = NO_CHUNK
            return -ENOSPC
        z.first_free = <uint16_t>next
        return <int>chunk
    chunk = z.fresh
    if chunk == c.objs or (resident and not is_resident(pool, c, span, chunk)):
        return -ENOSPC
    rc = chunk_commit(pool, c, span, chunk)
    if rc:
        return rc
    z.fresh += 1
    return <int>chunk

cdef inline int mapped_take(Pool pool, size_class *c, uint32_t span, bint resident) noexcept nogil:
    """Mark a chunk in the bitmap: the lowest free one whose pages are resident, else the lowest."""
    cdef zspage *z = &pool.zspages[span]
    cdef uint64_t free_map = ~z.used_map & all_chunks(c), bits = free_map & chunks_below(pool, c, span)
    cdef uint32_t chunk, i
    cdef int rc
    while bits and not is_resident(pool, c, span, lowest_bit_64(bits)):
        bits &= bits - 1
    if bits:
        chunk = lowest_bit_64(bits)
        for i in range(pool.spares if is_huge(c) else 0):
            if pool.spare[i] == span:
                spare_drop(pool, i)
                break
    elif free_map and not resident:
        chunk = lowest_bit_64(free_map)
        rc = chunk_commit(pool, c, span, chunk)
        if rc:
            return rc
    else:
        return -ENOSPC
    z.used_map |= <uint64_t>1 << chunk
    return <int>chunk

cdef inline int chunk_take(Pool pool, size_class *c, uint32_t span, uint64_t handle, bint resident) noexcept nogil:
    """Allocate a chunk of a zspage and write its header; its number, or -ENOSPC, or what Arena.commit says.

    A free chunk whose pages are resident first. With resident, no other one.
    """
    cdef zspage *z = &pool.zspages[span]
    cdef char *start
    cdef int chunk = mapped_take(pool, c, span, resident) if is_mapped(c) else list_take(pool, c, span, resident)
    zr_assert_held(&c.lock)
    if chunk < 0:
        return chunk
    zr_assert(<uint32_t>chunk < c.objs and is_resident(pool, c, span, chunk))
    start = chunk_at(pool, c, span, chunk)
    zr_unpoison(start, c.size)
    if not is_huge(c):
        set_header(start, header_of(handle))
        zr_fill(start + HEADER_SIZE, FILL_FRESH, c.size - HEADER_SIZE)
    z.inuse += 1
    owned_add(&c.inuse, 1)
    return chunk

cdef inline int chunk_commit(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    """Count the pages of a chunk as resident; 0, or what Arena.commit says."""
    cdef char *last = chunk_at(pool, c, span, chunk + 1) - 1
    cdef int n = pool.arena.commit(span, pages_of_chunk(c, chunk))
    if n < 0:
        return n
    owned_add(&c.committed, n)
    if n:
        store_relaxed(&c.stuck, c.stuck & ~<uint64_t>LENT_OUT)
        # The object may end before the page that its chunk ends on, which is counted as resident.
        zr_unpoison(last, 1)
        last[0] = 0
    return 0

cdef inline uint64_t chunks_below(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """Bitmap of the chunks that end on the last resident page or before it."""
    cdef uint32_t committed = pool.arena.committed[span], chunks
    if committed == 0:
        return 0
    chunks = min(((highest_bit_64(committed) + 1) << PAGE_SHIFT) // c.size, c.objs)
    return ~<uint64_t>0 >> (64 - chunks) if chunks else 0

cdef inline uint64_t mapped_room(Pool pool, size_class *c, uint32_t span) noexcept nogil:
    """Bitmap of the free chunks whose pages are resident."""
    cdef uint64_t bits = ~pool.zspages[span].used_map & chunks_below(pool, c, span), room = 0
    while bits:
        if is_resident(pool, c, span, lowest_bit_64(bits)):
            room |= bits & -bits
        bits &= bits - 1
    return room

cdef inline bint chunk_holds(Pool pool, size_class *c, uint32_t span, uint32_t chunk, uint64_t handle) noexcept nogil:
    """Whether a chunk holds the object of handle, as far as its header shows."""
    cdef zspage *z = &pool.zspages[span]
    if z.group == NO_ZSPAGE or &pool.classes[z.class_index] != c or chunk >= z.fresh:
        return False
    if is_mapped(c) and not z.used_map >> chunk & 1:
        return False
    if is_huge(c):
        return True
    return header_at(pool, c, span, chunk) == header_of(handle)

cdef inline void spare_add(Pool pool, uint32_t span) noexcept nogil:
    pool.spare[pool.spares] = span
    owned_add_32(&pool.spares, 1)

cdef inline void spare_drop(Pool pool, uint32_t i) noexcept nogil:
    """Take an entry off the list of spare pages: the last one takes its place."""
    owned_sub_32(&pool.spares, 1)
    pool.spare[i] = pool.spare[pool.spares]

cdef inline uint32_t unused_pages(Pool pool, size_class *c, uint32_t span, uint32_t pages) noexcept nogil:
    """Those of some pages of a zspage with a bitmap that are resident, and that no object touches."""
    cdef uint32_t unused = 0
    pages &= pool.arena.committed[span]
    while pages:
        if not pool.zspages[span].used_map & chunks_of_page(c, lowest_bit(pages)):
            unused |= pages & -pages
        pages &= pages - 1
    return unused

cdef inline void spare_page(Pool pool, size_class *c, uint32_t span, uint32_t page) noexcept nogil:
    """A huge object was freed: its page is a spare while spares are few, else it is given back at once.

    Of larger pages of the kernel only a reserve keeps some, which are on no list.
    """
    if c.unit == 1 and pool.spares < SPARES and not pool.arena.limits.owes():
        spare_add(pool, span)
    elif c.unit == 1 or not load_relaxed(&pool.arena.reserve) or c.committed - c.inuse > SPARES:
        owned_sub(&c.committed, pool.arena.decommit(span, unused_pages(pool, c, span, pool.arena.whole(1 << page))))

cdef inline void chunk_give(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    cdef zspage *z = &pool.zspages[span]
    cdef char *start = chunk_at(pool, c, span, chunk)
    zr_assert_held(&c.lock)
    zr_assert(z.inuse and chunk < z.fresh and chunk < c.objs)
    z.inuse -= 1
    owned_sub(&c.inuse, 1)
    store_relaxed(&c.stuck, 0)
    zr_fill(start, FILL_FREED, c.size)
    if is_mapped(c):
        z.used_map &= ~(<uint64_t>1 << chunk)
        zr_poison(start, c.size)
        if is_huge(c):
            spare_page(pool, c, span, chunk)
        return
    set_header(start, free_header(z.first_free))
    # The first 8 bytes hold the link, which is ours to read.
    zr_poison(start + CHUNK_ALIGN, c.size - CHUNK_ALIGN)
    z.first_free = <uint16_t>chunk

cdef inline uint32_t next_used(Pool pool, size_class *c, uint32_t span, uint32_t chunk) noexcept nogil:
    """The first chunk from `chunk` on that holds an object, or fresh."""
    cdef zspage *z = &pool.zspages[span]
    if z.inuse == 0 or chunk >= z.fresh:
        return z.fresh
    if is_mapped(c):
        return lowest_bit_64(z.used_map >> chunk << chunk) if z.used_map >> chunk else z.fresh
    while chunk < z.fresh and not header_is_live(header_at(pool, c, span, chunk)):
        chunk += 1
    return chunk

cdef inline uint32_t last_used(Pool pool, size_class *c, uint32_t span, uint32_t end) noexcept nogil:
    """The last chunk below `end` that holds an object, or NIL."""
    cdef uint64_t bits
    if is_mapped(c):
        bits = pool.zspages[span].used_map & (all_chunks(c) if end == c.objs else (<uint64_t>1 << end) - 1)
        return highest_bit_64(bits) if bits else <uint32_t>NIL
    while end:
        end -= 1
        if header_is_live(header_at(pool, c, span, end)):
            return end
    return NIL
