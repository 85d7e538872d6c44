"""The arena: reserved address space in spans of SPAN_PAGES pages, and the count of the pages that are resident.

    span 0          span 1          span 2                 top                          span_count
    |PPPPPP..|......|PPP.....|......|........|  …           |  address space without pages  |
     resident pages: bitmap committed[0] = 0b111111          (not even writable above `writable`)

A page costs memory only once it is committed, one by one, so a span of a part-filled zspage costs the pages that were
touched. A free span keeps its pages for a while (the stock): a first touch takes 1.8 us and giving back 16 KiB 2.1 us,
more than a block's decompression, and steady overwriting empties and starts zspages all the time.
"""

cimport cython
from libc.errno cimport ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    madvise,
    mmap,
    mprotect,
    munmap,
)

from zramd.core.checks cimport zr_assert, zr_poison, zr_unpoison
from zramd.core.locks cimport (
    compare_swap,
    counter_add,
    counter_sub,
    load_relaxed,
    load_relaxed_32,
    owned_add_32,
    owned_sub_32,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
)
from zramd.core.types cimport NIL, PAGE_SHIFT, PAGE_SIZE, SPAN_PAGES, SPAN_SHIFT, SPAN_SIZE

cdef extern from *:
    """
    #include <sys/mman.h>
    #define zr_popcount(x) __builtin_popcount(x)
    """
    int MADV_NOHUGEPAGE
    int zr_popcount(unsigned int x) noexcept nogil

cdef enum:
    STOCK_PAGES = 64        # 256 KiB: covers what 16 workers empty and start between two looks of the compactor
    GROW_SPANS = 512        # address space becomes writable 16 MiB at a time: strict overcommit charges what is writable


cdef void *region_map(uint64_t size, bint writable) noexcept nogil:
    """Reserve `size` bytes that read as zeros and cost nothing until touched; NULL when the system refuses."""
    cdef void *base = mmap(NULL, size, PROT_READ | PROT_WRITE if writable else PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if base == MAP_FAILED:
        return NULL
    # A huge page would make 2 MiB resident for one touched slot or object.
    madvise(base, size, MADV_NOHUGEPAGE)
    return base


cdef void region_unmap(void *base, uint64_t size) noexcept nogil:
    if base != NULL:
        munmap(base, size)


cdef int region_release(void *start, uint64_t size) noexcept nogil:
    """Give whole pages back to the operating system; they read as zeros afterwards."""
    return madvise(start, size, MADV_DONTNEED)


@cython.final
cdef class Arena:
    """span_count spans of address space. Raises MemoryError when it cannot be reserved."""

    def __cinit__(self, uint32_t span_count):
        pthread_mutex_init(&self.lock, NULL)
        self.span_count = span_count
        self.warm = self.cold = NIL
        self.base = <char *>region_map(<uint64_t>span_count << SPAN_SHIFT, False)
        self.committed = <uint16_t *>region_map(span_count * sizeof(uint16_t), True)
        self.links = <uint32_t *>region_map(span_count * sizeof(uint32_t), True)
        if self.base == NULL or self.committed == NULL or self.links == NULL:
            raise MemoryError(f"no address space for an arena of {span_count} spans of {SPAN_SIZE} bytes")

    def __dealloc__(self):
        if self.base != NULL:
            zr_unpoison(self.base, <uint64_t>self.writable << SPAN_SHIFT)
        region_unmap(self.base, <uint64_t>self.span_count << SPAN_SHIFT)
        region_unmap(self.committed, self.span_count * sizeof(uint16_t))
        region_unmap(self.links, self.span_count * sizeof(uint32_t))
        pthread_mutex_destroy(&self.lock)

    cdef int64_t take(self, uint32_t npages) noexcept nogil:
        """A free span for a zspage of npages, from the stock first; -ENOMEM when there is none.

        Its resident pages are those below npages at most: what a longer zspage left there is given back.
        """
        cdef int64_t span = -ENOMEM
        cdef uint32_t writable, excess
        pthread_mutex_lock(&self.lock)
        if self.warm != NIL:
            span = self.warm
            self.warm = self.links[span]
            counter_sub(&self.stock, zr_popcount(self.committed[span]))
        elif self.cold != NIL:
            span = self.cold
            self.cold = self.links[span]
        elif self.top < self.span_count:
            if self.top == self.writable:
                writable = min(self.writable + <uint32_t>GROW_SPANS, self.span_count)
                if mprotect(self.base + (<uint64_t>self.writable << SPAN_SHIFT),
                            <uint64_t>(writable - self.writable) << SPAN_SHIFT, PROT_READ | PROT_WRITE) == 0:
                    zr_poison(self.base + (<uint64_t>self.writable << SPAN_SHIFT),
                              <uint64_t>(writable - self.writable) << SPAN_SHIFT)
                    self.writable = writable
            if self.top < self.writable:
                span = self.top
                owned_add_32(&self.top, 1)
        pthread_mutex_unlock(&self.lock)
        if span >= 0:
            excess = self.committed[span] >> npages << npages
            if excess:
                self.decommit(<uint32_t>span, excess)
        return span

    cdef void give(self, uint32_t span, bint keep) noexcept nogil:
        """Take a span back. With keep, its pages stay resident while the stock has room for them."""
        cdef int resident = zr_popcount(self.committed[span])
        if resident and not (keep and load_relaxed(&self.stock) + resident <= STOCK_PAGES):
            self.decommit(span, self.committed[span])
            resident = 0
        pthread_mutex_lock(&self.lock)
        if resident:
            self.links[span] = self.warm
            self.warm = span
            counter_add(&self.stock, resident)
        else:
            self.links[span] = self.cold
            self.cold = span
        pthread_mutex_unlock(&self.lock)

    cdef int commit(self, uint32_t span, uint32_t mask) noexcept nogil:
        """Count the pages of mask as resident. The number of pages that were not before, or -ENOSPC at the limit.

        Nothing is touched here: the owner's first write makes the page resident.
        """
        cdef uint32_t fresh = mask & ~<uint32_t>self.committed[span]
        cdef uint64_t n, pages, limit, peak
        if fresh == 0:
            return 0
        n = zr_popcount(fresh)
        while True:
            pages = load_relaxed(&self.pages)
            limit = load_relaxed(&self.limit)
            if limit and pages + n > limit:
                return -ENOSPC
            if compare_swap(&self.pages, pages, pages + n):
                break
        self.committed[span] |= <uint16_t>fresh
        while True:
            peak = load_relaxed(&self.pages_max)
            if peak >= pages + n or compare_swap(&self.pages_max, peak, pages + n):
                return <int>n

    cdef int decommit(self, uint32_t span, uint32_t mask) noexcept nogil:
        """Give the resident pages of mask back to the operating system; how many there were."""
        cdef uint32_t gone = mask & self.committed[span], first, last
        cdef char *base = self.base + (<uint64_t>span << SPAN_SHIFT)
        cdef int n = zr_popcount(gone)
        first = 0
        while gone >> first:
            if gone >> first & 1:
                last = first
                while gone >> last & 1:
                    last += 1
                region_release(base + (first << PAGE_SHIFT), (last - first) << PAGE_SHIFT)
                first = last
            else:
                first += 1
        self.committed[span] &= <uint16_t>~gone
        counter_sub(&self.pages, n)
        return n

    cdef uint64_t trim_stock(self) noexcept nogil:
        """Give the pages of all free spans back; how many there were."""
        cdef uint64_t n = 0
        cdef uint32_t span
        pthread_mutex_lock(&self.lock)
        while self.warm != NIL:
            span = self.warm
            self.warm = self.links[span]
            n += self.decommit(span, self.committed[span])
            self.links[span] = self.cold
            self.cold = span
        store_relaxed(&self.stock, 0)
        pthread_mutex_unlock(&self.lock)
        return n

    cdef void reset(self) noexcept nogil:
        """Forget every span and give all pages back. Nobody else may hold one."""
        pthread_mutex_lock(&self.lock)
        region_release(self.base, <uint64_t>self.writable << SPAN_SHIFT)
        zr_poison(self.base, <uint64_t>self.writable << SPAN_SHIFT)
        memset(self.committed, 0, self.top * sizeof(uint16_t))
        owned_sub_32(&self.top, self.top)
        self.warm = self.cold = NIL
        store_relaxed(&self.stock, 0)
        store_relaxed(&self.pages, 0)
        store_relaxed(&self.pages_max, 0)
        pthread_mutex_unlock(&self.lock)

    cdef void reset_peak(self) noexcept nogil:
        store_relaxed(&self.pages_max, load_relaxed(&self.pages))

    cdef uint64_t metadata_bytes(self) noexcept nogil:
        """Resident bytes of the two tables, counted in whole pages."""
        cdef uint64_t top = load_relaxed_32(&self.top)
        return (((top * sizeof(uint16_t) + PAGE_SIZE - 1) >> PAGE_SHIFT)
                + ((top * sizeof(uint32_t) + PAGE_SIZE - 1) >> PAGE_SHIFT)) << PAGE_SHIFT

    cdef const char *check(self, uint64_t *where) noexcept nogil:
        """Walk both free lists and count the pages; NULL, or what is wrong, with the span in where[0]."""
        cdef const char *wrong
        pthread_mutex_lock(&self.lock)
        wrong = self._walk(where)
        pthread_mutex_unlock(&self.lock)
        return wrong

    cdef const char *_walk(self, uint64_t *where) noexcept nogil:
        cdef uint64_t pages = 0, stock = 0, listed = 0
        cdef uint32_t span
        zr_assert(self.top <= self.writable and self.writable <= self.span_count)
        for span in range(self.top):
            where[0] = span
            if self.committed[span] >> SPAN_PAGES:
                return "a span has pages beyond its end"
            pages += zr_popcount(self.committed[span])
        span = self.warm
        while span != NIL:
            where[0] = span
            listed += 1
            if span >= self.top or listed > self.top:
                return "the list of warm spans is broken"
            if self.committed[span] == 0:
                return "a warm span has no resident page"
            stock += zr_popcount(self.committed[span])
            span = self.links[span]
        span = self.cold
        while span != NIL:
            where[0] = span
            listed += 1
            if span >= self.top or listed > self.top:
                return "the list of cold spans is broken"
            if self.committed[span]:
                return "a cold span has resident pages"
            span = self.links[span]
        where[0] = 0
        if pages != load_relaxed(&self.pages):
            return "the count of resident pages differs from the spans' bitmaps"
        if stock != load_relaxed(&self.stock):
            return "the count of the stock differs from the warm spans' bitmaps"
        return NULL
