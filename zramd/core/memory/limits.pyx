"""How many pages are resident, and how many there may be: mem_limit, what a budget grants, and the last pages.

    pages                            limit        most                                         wall        wall_most
    |################################|............|............................................|...........|
     resident                        |the shrinker's  not granted yet: who comes here, claims  |           mem_limit
                                     `- this much right now                                    `- whatever is claimed

A page is counted before it is touched (charge), in one comparison with `limit`, whatever bounds it. Only who comes to that
looks closer: at the last pages, which are for who makes payloads smaller (`shrinks`), and at the budget, which may grant
more. The walls say what claiming cannot get beyond: mem_limit, or what is granted where the budget has no room. What is
full, and whether freed pages are kept, goes by them.

What always holds:
- pages <= limit, or <= most if the shrinker has counted the last of them. Only after a limit was lowered there are more:
  what is stored stays, no page is counted, and who frees pages gives them back (owes).
- With a budget, most <= budget.granted, and pages <= budget.granted too. What is granted is taken back only when nobody
  can have counted on it: `limit` is lowered first, and who has counted a page looks at it once more. Of both, one sees the
  other (charge, tidy_budget).
- All of `limit`, `most` and the walls follow from mem_limit, budget.granted, shrinks, refused and left: _bound.

`lock` is taken last of all locks, and none is needed to count a page.
"""

cimport cython
from libc.stdint cimport uint64_t

from zramd.core.system.checks cimport zr_assert_held
from zramd.core.system.locks cimport (
    load_relaxed,
    ordered_load,
    ordered_store,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    store_relaxed,
    this_thread,
)
from zramd.core.memory.budget cimport Budget, sums
from zramd.core.memory.region cimport KEPT_ARENA, Memory, page_unit

cdef enum:
    LAST_SHARE = 64         # a page in so many of mem_limit is for who makes payloads smaller,
    LAST_UNITS = 16         # and of the kernel's so many at most
    CLAIM_PAGES = 1024      # that the budget is asked for at once while there is plenty: 4 MiB
    SPARE_SHARE = 16        # a page in so many of those in use may be granted beyond them,
    SPARE_PART = 1024       # of the budget's a page in so many at most
    LITTLE_PAGES = 16       # the same where the budget is nearly used up
    LITTLE_SHARE = 8        # as it is when less than a part in so many is left

cdef uint64_t NO_LIMIT = <uint64_t>1 << 63


@cython.final
cdef class Limits:
    """No page yet, and no limit. The most pages there ever were are kept in `memory`."""

    def __cinit__(self, Memory memory not None):
        pthread_mutex_init(&self.lock, NULL)
        self.limit = self.most = self.wall = self.wall_most = NO_LIMIT
        self.unit = page_unit()
        self.pages_max = memory.kept(KEPT_ARENA)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef void set_mem_limit(self, uint64_t pages, bint shrinks) noexcept nogil:
        """Let there be so many pages, 0: any number. shrinks: requests leave a few of them to who makes payloads smaller.

        In a full pool that could not begin otherwise: each page is taken by whoever asks first, again and again.
        """
        pthread_mutex_lock(&self.lock)
        store_relaxed(&self.mem_limit, pages)
        self.shrinks = shrinks
        self._bound()
        pthread_mutex_unlock(&self.lock)

    cdef void join(self, Budget budget):
        """Take no more than the budget grants from now on; what there is is granted. No other thread may be there."""
        cdef uint64_t pages = load_relaxed(&self.pages)
        pthread_mutex_lock(&self.lock)
        if pages > budget.granted:
            budget.set_granted(pages)
        self.budget = budget
        self._bound()
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t leave(self) noexcept nogil:
        """Take no more pages, as if the budget had none; how many there are."""
        cdef uint64_t pages
        pthread_mutex_lock(&self.lock)
        self.left = True
        self._bound()
        pages = ordered_load(&self.pages)
        pthread_mutex_unlock(&self.lock)
        return pages

    cdef bint tidy_budget(self) noexcept nogil:
        """Let others have what is granted and not needed; whether pages may be had again that were refused before."""
        cdef uint64_t pages, spare, wanted
        cdef bint again = False, little
        cdef sums now
        pthread_mutex_lock(&self.lock)
        if self.budget is not None and not self.left:
            now = self.budget.add_up(self.budget.granted)
            little = now.taken + self.budget.limit() // LITTLE_SHARE > self.budget.limit()
            pages = load_relaxed(&self.pages)
            spare = 0 if little else min(max(pages // SPARE_SHARE, <uint64_t>CLAIM_PAGES),
                                         self.budget.limit() // SPARE_PART)
            spare = max(spare, <uint64_t>LITTLE_PAGES)
            wanted = self._with_last(pages + spare)
            if self.budget.granted > wanted + spare:
                # Who has seen the old limit has counted its pages before we look at them, or sees the new one after.
                ordered_store(&self.most, min(ordered_load(&self.most), wanted))
                ordered_store(&self.limit, min(ordered_load(&self.limit), wanted - self._last(wanted)))
                if ordered_load(&self.pages) <= wanted - self._last(wanted):
                    self.budget.set_granted(wanted)
            else:
                self.budget.set_granted(self.budget.granted)    # whatever stands there
            if self.refused and self.budget.fits(self._with_last(max(pages, self.budget.granted) + 2 * self.unit)):
                self.refused = False
                again = True
            self._bound()
        pthread_mutex_unlock(&self.lock)
        return again

    cdef uint64_t _last(self, uint64_t pages) noexcept nogil:
        """How many of so many pages are for the shrinker alone."""
        return min(pages // LAST_SHARE, LAST_UNITS * self.unit) if self.shrinks else 0

    cdef uint64_t _with_last(self, uint64_t pages) noexcept nogil:
        """How many there must be so that requests may have so many."""
        return pages + (min(pages // (LAST_SHARE - 1) + 1, LAST_UNITS * self.unit) if self.shrinks else 0)

    cdef void _bound(self) noexcept nogil:
        """Compute all that follows from mem_limit and what is granted. The lock is held."""
        cdef uint64_t own = load_relaxed(&self.mem_limit), most
        zr_assert_held(&self.lock)
        own = most = own if own else NO_LIMIT
        if self.budget is not None:
            most = min(own, self.budget.granted)
        if self.left:
            own = most = 0
        ordered_store(&self.most, most)
        ordered_store(&self.limit, most - self._last(most))
        if not self.refused:
            most = own
        store_relaxed(&self.wall_most, most)
        store_relaxed(&self.wall, most - self._last(most))

    cdef bint _claim(self, uint64_t pages) noexcept nogil:
        """Have the budget grant as many pages as the caller needs to have so many; False: not so many, or mem_limit."""
        cdef bint last = load_relaxed(&self.shrinker) == this_thread()
        cdef bint done = False
        cdef uint64_t own
        pthread_mutex_lock(&self.lock)
        own = load_relaxed(&self.mem_limit)
        own = own if own else NO_LIMIT
        if not self.left and pages <= (own if last else own - self._last(own)):
            done = self.budget.raise_to(min(own, pages if last else self._with_last(pages)), CLAIM_PAGES)
            self.refused = not done
            self._bound()
        pthread_mutex_unlock(&self.lock)
        return done

    cdef bint _may_pass(self, uint64_t pages) noexcept nogil:
        """Whether the caller may have so many pages, which are above what requests may have."""
        return load_relaxed(&self.shrinker) == this_thread() and pages <= ordered_load(&self.most)

    cdef bint is_full(self) noexcept nogil:
        """Whether the limits leave the caller not one page of the kernel's."""
        return not self.leaves(self.unit) and not self._may_pass(load_relaxed(&self.pages) + self.unit)

    # --------------------------------------------------------------------------------------------------------

    cdef void recount(self, uint64_t pages) noexcept nogil:
        """So many pages are resident: they were found in a state. No other thread may be there."""
        store_relaxed(&self.pages, pages)
        store_relaxed(self.pages_max, max(load_relaxed(self.pages_max), pages))

    cdef void reset_peak(self) noexcept nogil:
        """What is resident now is the most there ever was."""
        store_relaxed(self.pages_max, load_relaxed(&self.pages))
