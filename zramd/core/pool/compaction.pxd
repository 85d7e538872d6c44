"""Compaction: functions over a Pool."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.pool.pool cimport Pool
from zramd.core.pool.size_classes cimport size_class
from zramd.core.system.locks cimport lock_counted, pthread_mutex_unlock

cdef inline void compact_begin(Pool pool) noexcept nogil:
    """Be the only thread that compacts, or that may look at zspages off their lists, until compact_end."""
    lock_counted(&pool.compact_lock, &pool.compact_waiters)

cdef inline void compact_end(Pool pool) noexcept nogil:
    pthread_mutex_unlock(&pool.compact_lock)

cdef uint64_t freeable_pages(Pool pool) noexcept nogil
cdef uint64_t compact_run(Pool pool, uint64_t budget, uint64_t enough) noexcept nogil
cdef uint64_t release_stock(Pool pool) noexcept nogil
cdef uint64_t release_stock_alone(Pool pool) noexcept nogil
cdef bint make_room(Pool pool, int rc, bint *in_vain) noexcept nogil

# what lending needs of it; the class's lock is held
cdef uint32_t isolate_emptiest(Pool pool, size_class *c) noexcept nogil
cdef uint32_t putback(Pool pool, size_class *c, uint32_t span) noexcept nogil
cdef uint64_t tighten(Pool pool, size_class *c, uint32_t span, uint64_t *budget, bint always) noexcept nogil
cdef int move_object(Pool pool, size_class *c, uint32_t src, uint32_t chunk, size_class *d, uint32_t dst,
                     bint resident) noexcept nogil
