"""What Python sees of a pool."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.pool.pool cimport Pool

cdef struct place:
    # Where an object is, and how full its zspage.
    uint64_t obj
    uint32_t span
    uint32_t chunk
    uint32_t class_index
    uint32_t class_size
    uint32_t inuse          # chunks in use,
    uint32_t objs           # of so many
    uint32_t pages          # resident ones

cdef int object_place(Pool pool, uint64_t handle, place *found) noexcept nogil
cdef dict pool_stats(Pool pool)
cdef list pool_table(Pool pool)

cdef class Zsmalloc:
    cdef readonly uint64_t max_objects
    cdef readonly uint32_t class_count
    cdef readonly uint32_t max_payload  # largest object that is not huge
    cdef Pool pool
