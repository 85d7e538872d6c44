"""The arena: reserved address space in spans of SPAN_PAGES pages, and the count of the pages that are resident.

    span 0          span 1          span 2                 top                          span_count
    |PPPPPP..|......|PPP.....|......|........|  …           |  address space without pages  |
     resident pages: bitmap committed[0] = 0b111111          (not even writable above `writable`)

A page costs memory only once it is committed, one by one, so a span of a part-filled zspage costs the pages that were
touched. (Where the kernel's page is larger, `unit` of them are committed and given back together, and all are counted.) A
free span keeps its pages for a while (the stock): a first touch takes 1.8 us and giving back 16 KiB 2.1 us,
more than a block's decompression, and steady overwriting empties and starts zspages all the time.

A server that its own kernel swaps to must never need memory while it takes a page in: there may be none until it has. So
it can have a reserve: free spans of each length, resident ahead of need. A thread of its own (the refiller) fills it and
gives back what is too much; no lock is held while it does, so when it has to wait for memory no request waits for it.
Requests take spans from the reserve and return them there, without a system call.

How many pages there may be is the business of the arena's Limits, which count each page that becomes resident for use.
"""

cimport cython
from libc.errno cimport ENOBUFS, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport PROT_READ, PROT_WRITE, mprotect

from zramd.core.system cimport points
from zramd.core.system.bits cimport bits_set, lowest_bit, lowest_run
from zramd.core.system.checks cimport zr_assert, zr_assert_held, zr_forget, zr_poison
from zramd.core.system.locks cimport (
    counter_add,
    counter_sub,
    load_relaxed,
    load_relaxed_32,
    nap,
    owned_add_32,
    owned_sub_32,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
)
from zramd.core.system.points cimport zr_point
from zramd.core.memory.limits cimport Limits
from zramd.core.memory.region cimport Memory, Region, page_unit, region_map, region_populate, whole_pages
from zramd.core.types cimport NIL, PAGE_SHIFT, SPAN_LENGTHS, SPAN_PAGES, SPAN_SHIFT

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef enum:
    STOCK_PAGES = 64        # 256 KiB: covers what 16 workers empty and start between two looks of the compactor
    GROW_SPANS = 512        # address space becomes writable 16 MiB at a time: strict overcommit charges what is writable
    RECORD_SPANS = 1024     # spans whose records the refiller makes resident at once
    RETRY_US = 10000        # until the refiller asks again when the system refused memory


@cython.final
cdef class Arena:
    """span_count spans of address space in `memory`. Raises MemoryError when that cannot be had."""

    def __cinit__(self, uint32_t span_count, Memory memory not None):
        cdef uint32_t n
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work, NULL)
        self.span_count = span_count
        self.unit = page_unit()
        self.warm = self.cold = NIL
        for n in range(SPAN_LENGTHS):
            self.ready[n] = NIL
        self.memory = memory
        self.limits = Limits(memory)
        self.spans = memory.region(<uint64_t>span_count << SPAN_SHIFT, False)
        self.base = self.spans.base
        self.bitmaps = Region(span_count * sizeof(uint16_t))
        self.committed = <uint16_t *>self.bitmaps.base
        self.neighbours = Region(span_count * sizeof(uint32_t))
        self.links = <uint32_t *>self.neighbours.base

    def __dealloc__(self):
        if self.base != NULL:
            zr_forget(self.base, <uint64_t>self.writable << SPAN_SHIFT)
        pthread_cond_destroy(&self.work)
        pthread_mutex_destroy(&self.lock)

    cdef int64_t take(self, uint32_t npages, bint modest) noexcept nogil:
        """A free span for a zspage of npages, from the stock first; -ENOMEM when none is left, -ENOSPC
        of a reserve when the limits leave no page.

        Its resident pages are those below npages at most: what a longer zspage left there is given back.
        modest: of a reserve only from its upper half, and no page that is not resident; else -ENOBUFS, or -ENOSPC where
        the limit would refuse them anyway. Others find that out when they take a page.
        """
        cdef int64_t span = -ENOMEM
        cdef uint32_t excess
        pthread_mutex_lock(&self.lock)
        if load_relaxed(&self.reserve):
            span = self._ready_take(npages, modest)
            if span < 0 and not modest and self.limits.is_full():
                span = -ENOSPC
        else:
            modest = False
        if span < 0 and modest:
            span = -ENOBUFS if self.limits.leaves_shrinker(npages) else -ENOSPC
        elif span == -ENOMEM:
            if self.warm != NIL:
                span = self.warm
                self.warm = self.links[span]
                counter_sub(&self.stock, bits_set(self.committed[span]))
            else:
                span = self._cold_take()
        pthread_mutex_unlock(&self.lock)
        if span >= 0:
            excess = self.committed[span] >> npages << npages
            if excess:
                self.decommit(<uint32_t>span, excess)
        return span

    cdef int64_t _cold_take(self) noexcept nogil:
        """A free span without resident pages, or -ENOMEM. The lock is held."""
        cdef int64_t span = -ENOMEM
        zr_assert_held(&self.lock)
        if self.cold != NIL:
            span = self.cold
            self.cold = self.links[span]
        elif self.top < self.span_count:
            if self.top == self.writable:
                self.grow(min(self.writable + <uint32_t>GROW_SPANS, self.span_count))
            if self.top < self.writable:
                span = self.top
                # Not in grow: of a reserve that is all of the arena, and its shadow 1 GB.
                zr_poison(self.base + (<uint64_t>span << SPAN_SHIFT), 1 << SPAN_SHIFT)
                owned_add_32(&self.top, 1)
        return span

    cdef void _cold_give(self, uint32_t span) noexcept nogil:
        """List a free span without resident pages. The lock is held."""
        zr_assert_held(&self.lock)
        self.links[span] = self.cold
        self.cold = span

    cdef int grow(self, uint32_t writable) noexcept nogil:
        """Make the spans below writable so; 0, or -1. The lock is held."""
        cdef char *start = self.base + (<uint64_t>self.writable << SPAN_SHIFT)
        cdef uint64_t size = <uint64_t>(writable - self.writable) << SPAN_SHIFT
        if mprotect(start, size, PROT_READ | PROT_WRITE):
            return -1
        self.writable = writable
        return 0

    cdef void give(self, uint32_t span, bint keep) noexcept nogil:
        """Take a span back. With keep, its pages stay resident while the stock has room for them."""
        cdef int resident = bits_set(self.committed[span])
        if load_relaxed(&self.reserve):
            self._ready_give(span)
            return
        if resident and not (keep and load_relaxed(&self.stock) + resident <= STOCK_PAGES and not self.limits.owes()):
            self.decommit(span, self.committed[span])
            resident = 0
        pthread_mutex_lock(&self.lock)
        if resident:
            self.links[span] = self.warm
            self.warm = span
            counter_add(&self.stock, resident)
        else:
            self._cold_give(span)
        pthread_mutex_unlock(&self.lock)

    cdef int commit(self, uint32_t span, uint32_t mask) noexcept nogil:
        """Count the pages of mask, and what the kernel gives with them, as resident.

        The number of pages that were not before; -ENOSPC at the limit, -EDQUOT or -ENOMEM from the file.
        Of anonymous memory nothing is touched here: the owner's first write makes the page resident.
        """
        cdef uint32_t fresh
        cdef int n, rc
        zr_assert(mask >> SPAN_PAGES == 0 and span < load_relaxed_32(&self.top))
        if not mask & ~<uint32_t>self.committed[span]:
            return 0
        fresh = self.whole(mask) & ~<uint32_t>self.committed[span]
        n = bits_set(fresh)
        if not self.limits.charge(n):
            return -ENOSPC
        rc = self.take_room(span, fresh, True)
        if rc:
            self._release(span, fresh)
            self.limits.uncharge(n)
            return rc
        if load_relaxed(&self.reserve):
            counter_add(&self.misses, n)
        pages_store(&self.committed[span], <uint16_t>(self.committed[span] | fresh))
        return n

    cdef uint32_t whole(self, uint32_t mask) noexcept nogil:
        """The pages of a span that the kernel gives along with those of mask."""
        cdef uint32_t found = 0, one = (1 << self.unit) - 1
        if self.unit == 1:
            return mask
        while one >> SPAN_PAGES == 0:
            if mask & one:
                found |= one
            one <<= self.unit
        return found

    cdef int take_room(self, uint32_t span, uint32_t mask, bint unused) noexcept nogil:
        """Before pages are touched for the first time: see Region.take_room. There may be gaps between them.

        unused: whatever is on them is not needed.
        """
        cdef char *start
        cdef uint64_t size
        cdef uint32_t run
        cdef int rc = 0
        while mask and rc == 0 and self.spans.fd >= 0:
            run = lowest_run(mask)
            start = self.base + (<uint64_t>span << SPAN_SHIFT) + (lowest_bit(run) << PAGE_SHIFT)
            size = <uint64_t>bits_set(run) << PAGE_SHIFT
            rc = self.spans.touch(start, size) if unused else self.spans.take_room(start, size)
            mask ^= run
        return rc

    cdef int decommit(self, uint32_t span, uint32_t mask) noexcept nogil:
        """Give the resident pages of mask back to the operating system, but for what it takes back only together with
        others; how many there were."""
        cdef uint32_t gone = mask & self.committed[span]
        cdef int n
        if self.unit > 1:
            gone &= ~self.whole(self.committed[span] & ~gone)
        n = bits_set(gone)
        self._release(span, gone)
        if gone:
            zr_point(points.page_given_back)
        pages_store(&self.committed[span], <uint16_t>(self.committed[span] & ~gone))
        self.limits.uncharge(n)
        return n

    cdef void _release(self, uint32_t span, uint32_t mask) noexcept nogil:
        cdef char *base = self.base + (<uint64_t>span << SPAN_SHIFT)
        cdef uint32_t run
        while mask:
            run = lowest_run(mask)
            self.spans.release(base + (lowest_bit(run) << PAGE_SHIFT), <uint64_t>bits_set(run) << PAGE_SHIFT)
            mask ^= run

    cdef uint64_t release_stock(self) noexcept nogil:
        """Give the pages of all free spans back; how many there were."""
        cdef uint64_t n = 0
        cdef uint32_t span
        pthread_mutex_lock(&self.lock)
        while self.warm != NIL:
            span = self.warm
            self.warm = self.links[span]
            counter_sub(&self.stock, bits_set(self.committed[span]))
            # Not with the lock held: STOCK_PAGES take 20 microseconds, those of a state 60.
            pthread_mutex_unlock(&self.lock)
            n += self.decommit(span, self.committed[span])
            pthread_mutex_lock(&self.lock)
            self.links[span] = self.cold
            self.cold = span
        pthread_mutex_unlock(&self.lock)
        return n

    # --------------------------------------------------------------------------------------------------------
    # the reserve

    cdef int reserve_start(self, uint64_t pages) noexcept nogil:
        """Keep pages ready from now on: fill the reserve; 0, -ENOMEM or -EDQUOT. Then one thread must be in reserve_keep."""
        cdef uint32_t n
        cdef int rc = 1
        pthread_mutex_lock(&self.lock)
        self.demand_sum = 0
        for n in range(1, SPAN_LENGTHS):
            self.demand[n] = SPAN_PAGES if n % self.unit == 0 else 0
            self.demand_sum += self.demand[n]
        # All of it at once: to make more writable later takes a lock of the whole process, in the middle of a request.
        if self.grow(self.span_count):
            rc = -ENOMEM
        else:
            store_relaxed(&self.reserve, pages)
            rc = self._populate_used()
            while rc > 0:
                rc = self._keep_one()
        pthread_mutex_unlock(&self.lock)
        return rc

    cdef void reserve_keep(self) noexcept nogil:
        """The refiller: keep the reserve full and no fuller until reserve_stop."""
        cdef int rc
        pthread_mutex_lock(&self.lock)
        while not self.refiller_ends:
            rc = self._keep_one()
            if rc == 0:
                self.refiller_sleeps = True
                pthread_cond_wait(&self.work, &self.lock)
                self.refiller_sleeps = False
            elif rc < 0:
                pthread_mutex_unlock(&self.lock)
                usleep(RETRY_US)
                pthread_mutex_lock(&self.lock)
        self.refiller_ends = False
        pthread_mutex_unlock(&self.lock)

    cdef void reserve_stop(self) noexcept nogil:
        """Make the refiller return; what is ready stays so."""
        pthread_mutex_lock(&self.lock)
        self.refiller_ends = True
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef uint32_t _ready_wanted(self, uint32_t npages) noexcept nogil:
        """Spans of a length to keep ready: half of the reserve is for all lengths alike, half goes by what is taken."""
        cdef uint64_t half = load_relaxed(&self.reserve) // 2, lengths = SPAN_PAGES // self.unit
        if npages == 0 or npages % self.unit:
            return 0
        # (What is asked for fades, in a small reserve until nothing is left.)
        return <uint32_t>((half // lengths + half * self.demand[npages] // max(self.demand_sum, 1)) // npages) + 1

    cdef void _note_demand(self, uint32_t npages) noexcept nogil:
        """Count a span that was asked for; what was long ago counts less and less."""
        cdef uint32_t n
        self.demand[npages] += npages
        self.demand_sum += npages
        if self.demand_sum > 4 * load_relaxed(&self.reserve):
            self.demand_sum = 0
            for n in range(SPAN_LENGTHS):
                self.demand[n] //= 2
                self.demand_sum += self.demand[n]

    cdef int _keep_one(self) noexcept nogil:
        """Make one span ready, or give one back; 1; 0 when nothing is to be done; -ENOMEM, -EDQUOT when none can be had.

        Where none can be had, spans that are too many still go back. The lock is held, and dropped for the parts that
        may wait.
        """
        cdef uint32_t n = self._scarcest()
        cdef int64_t span = self._cold_take() if n else -1
        cdef int rc = self._make_one(<uint32_t>span, n) if span >= 0 else 0
        if rc > 0:
            return rc
        n = self._too_many()
        if n < SPAN_LENGTHS:
            self._return_one(n)
            return 1
        return rc

    cdef uint32_t _scarcest(self) noexcept nogil:
        """The length of spans of which the smallest part of what is wanted is ready; 0 when enough of all are."""
        cdef uint32_t n, least = 0
        for n in range(1, SPAN_LENGTHS):
            if self.ready_count[n] < self._ready_wanted(n) and (
                    least == 0 or self.ready_count[n] * self._ready_wanted(least)
                    < self.ready_count[least] * self._ready_wanted(n)):
                least = n
        return least

    cdef uint32_t _too_many(self) noexcept nogil:
        """A length of spans of which too many are ready; SPAN_LENGTHS when none is.

        Twice of what is wanted before any is given back: overwriting empties as many zspages as it starts.
        """
        cdef uint32_t n
        for n in range(SPAN_LENGTHS):
            if self.ready_count[n] > 2 * self._ready_wanted(n):
                return n
        return SPAN_LENGTHS

    cdef int _make_one(self, uint32_t span, uint32_t npages) noexcept nogil:
        """Make the first pages of a span that is on no list resident; what _populate says. Then it is ready, or cold."""
        cdef int rc
        self._work_begin()
        rc = self._populate(span, npages)
        self._work_end()
        if rc > 0:
            self.committed[span] = <uint16_t>((1 << npages) - 1)
            self._ready_push(span)
        else:
            self._cold_give(span)
        return rc

    cdef void _return_one(self, uint32_t npages) noexcept nogil:
        """Give the pages of a ready span of a length back."""
        cdef uint32_t span = self._ready_pop(npages), mask = self.committed[span]
        self.committed[span] = 0
        self._work_begin()
        self._release(span, mask)
        self._work_end()
        self._cold_give(span)

    cdef void _work_begin(self) noexcept nogil:
        """Drop the lock for what may wait, while this thread has a span that is on no list."""
        self.refiller_works = True
        pthread_mutex_unlock(&self.lock)

    cdef void _work_end(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.refiller_works = False

    cdef int _populate_used(self) noexcept nogil:
        """Map the pages in use, so that a lock on all memory holds them: those of a state are somewhere else yet.

        A call for each run of pages, across spans, not for each page: who takes over is waited for meanwhile. 1, -ENOMEM or
        -EDQUOT.
        """
        cdef uint32_t span, mask, run
        cdef char *start = self.base
        cdef char *at
        cdef uint64_t size = 0
        for span in range(self.top):
            mask = self.committed[span]
            while mask:
                run = lowest_run(mask)
                at = self.base + (<uint64_t>span << SPAN_SHIFT) + (lowest_bit(run) << PAGE_SHIFT)
                if at != start + size:
                    if size and region_map(start, size):
                        return self.spans.refusal()
                    start = at
                    size = 0
                size += <uint64_t>bits_set(run) << PAGE_SHIFT
                mask ^= run
        if size and region_map(start, size):
            return self.spans.refusal()
        return 1

    cdef int _populate(self, uint32_t span, uint32_t npages) noexcept nogil:
        """Make a span's first pages and its records resident; 1, -ENOMEM or -EDQUOT."""
        cdef uint32_t first, count
        cdef int rc
        if span >= self.records_populated:
            first = span // RECORD_SPANS * RECORD_SPANS
            count = min(<uint32_t>RECORD_SPANS, self.span_count - first)
            if (region_populate(self.committed + first, count * sizeof(uint16_t))
                    or region_populate(self.links + first, count * sizeof(uint32_t))
                    or region_populate(self.records + <uint64_t>first * self.record_size,
                                       <uint64_t>count * self.record_size)):
                return -ENOMEM
            owned_add_32(&self.records_populated, first + count - self.records_populated)
        if region_populate(self.base + (<uint64_t>span << SPAN_SHIFT), npages << PAGE_SHIFT):
            rc = self.spans.refusal()
            self._release(span, (1 << npages) - 1)
            return rc
        return 1

    cdef int64_t _ready_take(self, uint32_t npages, bint modest) noexcept nogil:
        """A ready span of npages or, failing that, a longer one, then a shorter one, whose other pages are not
        resident; its pages count as used. -ENOMEM: none.

        So are the last pages below the limit had, which are seldom just as many as a zspage has: a shorter one fits.
        modest: not a shorter one, and none that leaves less than half of the reserve. The lock is held.
        """
        cdef uint32_t i, n
        self._note_demand(npages)
        if self.refiller_sleeps and self.ready_count[npages] <= self._ready_wanted(npages) // 2:
            pthread_cond_signal(&self.work)
        for i in range(1, SPAN_LENGTHS):
            n = npages + i - 1 if npages + i <= SPAN_LENGTHS else SPAN_LENGTHS - i
            if modest and (n < npages or load_relaxed(&self.ready_pages) < load_relaxed(&self.reserve) // 2 + n):
                break
            if self.ready[n] != NIL and self.limits.charge(n):
                return self._ready_pop(n)
        return -ENOMEM

    cdef void _ready_give(self, uint32_t span) noexcept nogil:
        """Take a span back into the reserve; what is too much there the refiller gives back."""
        pthread_mutex_lock(&self.lock)
        self.limits.uncharge(bits_set(self.committed[span]))
        self._ready_push(span)
        pthread_mutex_unlock(&self.lock)

    cdef uint32_t _ready_pop(self, uint32_t npages) noexcept nogil:
        cdef uint32_t span = self.ready[npages]
        zr_assert_held(&self.lock)
        self.ready[npages] = self.links[span]
        owned_sub_32(&self.ready_count[npages], 1)
        counter_sub(&self.ready_pages, bits_set(self.committed[span]))
        return span

    cdef void _ready_push(self, uint32_t span) noexcept nogil:
        """List a free span by its length; one with gaps, which huge zspages have, is only to be given back."""
        cdef uint32_t mask = self.committed[span], n = 0
        zr_assert_held(&self.lock)
        if mask & (mask + 1) == 0:
            n = bits_set(mask)
        self.links[span] = self.ready[n]
        self.ready[n] = span
        owned_add_32(&self.ready_count[n], 1)
        counter_add(&self.ready_pages, bits_set(mask))
        if self.refiller_sleeps and self.ready_count[n] > 2 * self._ready_wanted(n):
            pthread_cond_signal(&self.work)

    # --------------------------------------------------------------------------------------------------------

    cdef void reset(self) noexcept nogil:
        """Forget every span and give all pages back. Nobody else may hold one; the records are gone already."""
        cdef uint32_t n
        pthread_mutex_lock(&self.lock)
        while self.refiller_works:
            pthread_mutex_unlock(&self.lock)
            nap()
            pthread_mutex_lock(&self.lock)
        for n in range(SPAN_LENGTHS):
            self.ready[n] = NIL
            owned_sub_32(&self.ready_count[n], self.ready_count[n])
        store_relaxed(&self.ready_pages, 0)
        store_relaxed(&self.misses, 0)
        owned_sub_32(&self.records_populated, self.records_populated)
        if self.writable:
            self.spans.release(self.base, <uint64_t>self.writable << SPAN_SHIFT)
        zr_poison(self.base, <uint64_t>self.top << SPAN_SHIFT)
        memset(self.committed, 0, self.top * sizeof(uint16_t))
        owned_sub_32(&self.top, self.top)
        self.warm = self.cold = NIL
        store_relaxed(&self.stock, 0)
        store_relaxed(&self.limits.pages, 0)
        self.limits.reset_peak()
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t metadata_bytes(self) noexcept nogil:
        """Resident bytes of the two tables, counted in whole pages."""
        cdef uint64_t top = max(load_relaxed_32(&self.top), load_relaxed_32(&self.records_populated))
        return whole_pages(top * sizeof(uint16_t)) + whole_pages(top * sizeof(uint32_t))

    cdef const char *check(self, uint64_t used, uint64_t *where) noexcept nogil:
        """Walk all free lists and count the pages; NULL, or what is wrong, with the span in where[0]. used: spans in use."""
        cdef const char *wrong
        pthread_mutex_lock(&self.lock)
        wrong = self._walk(used, where)
        pthread_mutex_unlock(&self.lock)
        return wrong

    cdef const char *_walk(self, uint64_t used, uint64_t *where) noexcept nogil:
        cdef uint64_t pages = 0, stock = 0, listed = 0, ready = 0
        cdef uint32_t span, n, count
        zr_assert(self.top <= self.writable and self.writable <= self.span_count)
        for span in range(self.top):
            where[0] = span
            if self.committed[span] != self.whole(self.committed[span]):
                return "a span has a part of a page"
            pages += bits_set(self.committed[span])
        span = self.warm
        while span != NIL:
            where[0] = span
            listed += 1
            if span >= self.top or listed > self.top:
                return "the list of warm spans is broken"
            if self.committed[span] == 0:
                return "a warm span has no resident page"
            stock += bits_set(self.committed[span])
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
        for n in range(SPAN_LENGTHS):
            count = 0
            span = self.ready[n]
            while span != NIL:
                where[0] = span
                count += 1
                if span >= self.top or count > self.ready_count[n]:
                    return "a list of the reserve is broken"
                if n and self.committed[span] != (1 << n) - 1:
                    return "a ready span has not the pages of its length"
                ready += bits_set(self.committed[span])
                span = self.links[span]
            if count != self.ready_count[n]:
                return "the count of a list of the reserve differs from the list"
            listed += count
        where[0] = 0
        if used + listed + self.refiller_works != self.top:
            return "a span is neither free nor in use"
        if ready != load_relaxed(&self.ready_pages):
            return "the count of the reserve differs from its spans' bitmaps"
        pages -= ready
        if pages != load_relaxed(&self.limits.pages):
            return "the count of resident pages differs from the spans' bitmaps"
        if stock != load_relaxed(&self.stock):
            return "the count of the stock differs from the warm spans' bitmaps"
        return NULL
