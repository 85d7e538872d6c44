cimport cython
from libc.stdint cimport uint32_t, uint64_t

from zramd.core.system.locks cimport (
    compare_swap,
    counter_sub,
    load_relaxed,
    ordered_load,
    pthread_mutex_t,
    store_relaxed,
    this_thread,
)
from zramd.core.memory.budget cimport Budget
from zramd.core.memory.region cimport Memory


@cython.final
cdef class Limits:
    # Looked at for each page. Where there is no limit, these stand high above all that there can be.
    cdef uint64_t pages             # atomic: resident pages, the stock among them, the reserve not
    cdef uint64_t *pages_max        # atomic: the most there ever were; kept
    cdef uint64_t limit             # atomic: most pages right now, by mem_limit and what is granted, for requests
    cdef uint64_t most              # atomic: the same with the shrinker's last pages
    cdef uint64_t wall              # atomic: most pages that there can be right now, for requests
    cdef uint64_t wall_most         # atomic: the same with the shrinker's last pages
    cdef uint64_t shrinker          # atomic: who makes a payload smaller right now, 0: nobody
    cdef Budget budget              # that grants pages within mem_limit, or None
    cdef uint32_t unit              # pages that the kernel gives and takes back together
    cdef uint64_t mem_limit         # atomic: most pages there may be, 0: no limit
    cdef pthread_mutex_t lock       # guards those below, what is granted, and each change of a limit above
    cdef bint shrinks               # the last pages are the shrinker's
    cdef bint refused               # the budget had no room the last time
    cdef bint left                  # no page may be taken any more

    cdef void set_mem_limit(self, uint64_t pages, bint shrinks) noexcept nogil
    cdef void join(self, Budget budget)
    cdef uint64_t leave(self) noexcept nogil
    cdef bint tidy_budget(self) noexcept nogil
    cdef uint64_t _last(self, uint64_t pages) noexcept nogil
    cdef uint64_t _with_last(self, uint64_t pages) noexcept nogil
    cdef void _bound(self) noexcept nogil
    cdef bint _claim(self, uint64_t pages) noexcept nogil
    cdef bint _may_pass(self, uint64_t pages) noexcept nogil
    cdef bint is_full(self) noexcept nogil
    cdef void recount(self, uint64_t pages) noexcept nogil
    cdef void reset_peak(self) noexcept nogil

    cdef inline bint charge(self, uint64_t n) noexcept nogil:
        """Count n more pages as resident, unless that would pass the limit."""
        cdef uint64_t pages, peak
        while True:
            pages = load_relaxed(&self.pages)
            if pages + n > load_relaxed(&self.limit) and not self._may_pass(pages + n):
                if self.budget is None or not self._claim(pages + n):
                    return False
                continue
            if not compare_swap(&self.pages, pages, pages + n):
                continue
            if self.budget is None or pages + n <= ordered_load(&self.limit) or self._may_pass(pages + n):
                break
            self.uncharge(n)    # what was granted is being given back
        while True:
            peak = load_relaxed(self.pages_max)
            if peak >= pages + n or compare_swap(self.pages_max, peak, pages + n):
                return True

    cdef inline void uncharge(self, uint64_t n) noexcept nogil:
        """Count n pages less."""
        counter_sub(&self.pages, n)

    cdef inline bint leaves(self, uint64_t n) noexcept nogil:
        """Whether requests may have n more pages, as far as that can be known."""
        return load_relaxed(&self.pages) + n <= load_relaxed(&self.wall)

    cdef inline bint leaves_shrinker(self, uint64_t n) noexcept nogil:
        """Whether the shrinker may have n more pages."""
        return load_relaxed(&self.pages) + n <= load_relaxed(&self.wall_most)

    cdef inline bint owes(self) noexcept nogil:
        """Whether more pages are resident than requests may have: what is freed is not kept for the next of them."""
        return not self.leaves(0)

    cdef inline void shrink_begin(self) noexcept nogil:
        """The last pages are this thread's: one at a time, until shrink_end."""
        store_relaxed(&self.shrinker, this_thread())

    cdef inline void shrink_end(self) noexcept nogil:
        store_relaxed(&self.shrinker, 0)
