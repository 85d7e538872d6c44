"""Compaction over the bounds of size classes: functions over a Pool."""

from libc.stdint cimport uint64_t

from zramd.core.pool.pool cimport Pool

cdef uint64_t whole_freeable_pages(Pool pool) noexcept nogil
cdef uint64_t compact_whole(Pool pool) noexcept nogil
