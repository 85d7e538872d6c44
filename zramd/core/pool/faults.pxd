"""Where a pool contradicts itself: functions over a Pool."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.pool.pool cimport Pool

cdef const char *find_pool_fault(Pool pool, uint64_t *where, uint64_t words) noexcept nogil
cdef const char *find_zspage_fault(Pool pool, uint32_t *span, uint32_t chunks, uint64_t *where) noexcept nogil
