"""Size classes: the record of one, and where the chunks of its zspages lie."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.system.locks cimport lock_counted, pthread_mutex_t
from zramd.core.types cimport GROUPS, GROUP_EMPTY, GROUP_FULL, MAPPED_CHUNKS, PAGE_SHIFT, PAGE_SIZE, zspage

cdef struct size_class:
    pthread_mutex_t lock            # guards all of this and the zspages of the class
    uint32_t waiters                # atomic: threads that want the lock; the compactor looks and gives way
    uint32_t size                   # bytes of a chunk, header and rounding included
    uint32_t pages                  # per zspage
    uint32_t objs                   # chunks per zspage
    uint32_t unit                   # pages that the kernel gives and takes back together
    uint32_t heads[GROUPS]          # first zspage of each fullness group, NIL: none; last in first out
    uint32_t tails[GROUPS]          # last of each: those without room on resident pages, as far as is known
    uint64_t group_count[GROUPS]    # zspages listed in each
    uint64_t zspages                # isolated ones included
    uint64_t inuse                  # objects
    uint64_t committed              # resident pages; of huge: those in use and the spare ones
    uint64_t stuck                  # atomic: what was tried without avail since an object of the class was freed

cdef enum:
    STUCK = 1                       # to compact it
    LENT_OUT = 2                    # to move more of its last objects to larger classes

cdef inline bint is_mapped(size_class *c) noexcept nogil:
    """Whether zspages of the class have a bitmap of the chunks in use, not a list of the free ones."""
    return c.objs <= MAPPED_CHUNKS

cdef inline bint is_huge(size_class *c) noexcept nogil:
    """Whether it is the class of raw blocks: a page each, without a header."""
    return c.size == PAGE_SIZE

cdef inline uint32_t pages_below(size_class *c, uint32_t chunks) noexcept nogil:
    """Pages that the first chunks of a zspage need."""
    return (((chunks * c.size + PAGE_SIZE - 1) >> PAGE_SHIFT) + c.unit - 1) & ~(c.unit - 1)

cdef inline uint32_t pages_of_chunk(size_class *c, uint32_t chunk) noexcept nogil:
    """Bitmap of the pages of its zspage that a chunk touches."""
    cdef uint32_t start = chunk * c.size
    cdef uint32_t first = start >> PAGE_SHIFT, last = (start + c.size - 1) >> PAGE_SHIFT
    return (<uint32_t>2 << last) - (<uint32_t>1 << first)

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
